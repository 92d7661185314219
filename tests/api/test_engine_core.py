"""The compiled core itself (`infer._core`): conversion, waiting, queues, ends. What users see of it is tested beside this."""

from __future__ import annotations

import gc
import itertools
import math
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from machine import patience

from infer._core import Engine, InferError, ReadyQueue, Request, SamplingParams, Tokenizer, Update, inspect, system_info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=None, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(bare_folder: Path) -> Iterator[Engine]:
    engine = Engine(bare_folder, threads=1)
    yield engine
    engine.close()


def drain(request: Request) -> list[Update]:
    updates: list[Update] = []
    while not request.finished:
        updates += request.wait(60)
    return updates


def token_ids(request: Request, index: int = 0) -> list[int]:
    return [token for update in drain(request) if update.index == index for token in update.token_ids]


def test_updates_join_to_the_whole(engine: Engine) -> None:
    params = GREEDY.replace(logprobs=3, prompt_logprobs=2)
    request = engine.submit([5, 6, 7], params)
    updates = drain(request)
    tokens = [token for update in updates for token in update.token_ids]
    rows = [row for update in updates for row in update.logprobs or []]
    assert (len(tokens), len(rows)) == (8, 8)
    assert [row[0][0] for row in rows] == tokens
    assert all(row[0][2] == 1 and len(row) == 3 for row in rows), "greedy takes the first of three"
    assert all(a[1] >= b[1] for row in rows for a, b in itertools.pairwise(row))
    assert [update.finish_reason for update in updates][-1] == "length"
    assert all(update.finish_reason is None and update.token_ids for update in updates[:-1])
    assert request.prompt_token_ids == [5, 6, 7]
    prompt_rows = request.prompt_logprobs
    assert prompt_rows is not None
    assert prompt_rows[0] is None
    assert [row[0][0] for row in prompt_rows[1:] if row] == [6, 7]


def test_logprobs_are_those_of_the_logits(engine: Engine) -> None:
    request = engine.submit([5, 6, 7], GREEDY.replace(logprobs=0))
    updates = drain(request)
    tokens = [token for update in updates for token in update.token_ids]
    reported = [row[0][1] for update in updates for row in update.logprobs or []]
    logits = engine.logits([5, 6, 7, *tokens]).astype(np.float64)
    assert logits.shape == (11, engine.info.vocabulary_size)
    expected = [logits[2 + n][token] - np.log(np.exp(logits[2 + n]).sum()) for n, token in enumerate(tokens)]
    assert reported == pytest.approx(expected, abs=1e-5)
    assert [int(row.argmax()) for row in logits[2:-1]] == tokens


def test_every_kind_of_integers_is_a_prompt(engine: Engine) -> None:
    expected = token_ids(engine.submit([5, 6, 7], GREEDY))
    prompts: list[Any] = [(5, 6, 7), range(5, 8), np.array([5, 6, 7]), np.array([5, 6, 7], dtype=np.uint8), [np.int64(5), 6, 7]]
    for prompt in prompts:
        assert token_ids(engine.submit(prompt, GREEDY)) == expected


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "no tokens"),
        ([1, -1], r"prompt\[1\] is -1"),
        ([2**40], r"prompt\[0\] is 1099511627776"),
        ([1, 1.5], r"prompt\[1\] is 1.5"),
        ([1, "x"], r"prompt\[1\] is 'x'"),
        ([10**6], "outside this model's vocabulary"),
        (7, "sequence of token ids"),
        ({1: 2}, "sequence of token ids"),
        ("text", "no tokenizer"),
        ([1] * 5000, "max_model_len"),
    ],
)
def test_prompts_that_are_none(engine: Engine, prompt: Any, words: str) -> None:
    with pytest.raises(InferError, match=words):
        engine.submit(prompt, GREEDY)
    if not isinstance(prompt, str):
        with pytest.raises(InferError):
            engine.logits(prompt)


def test_parameters_must_fit_the_model(engine: Engine) -> None:
    for params in (
        SamplingParams(stop_token_ids=[10**6]),
        SamplingParams(logit_bias={10**6: 1.0}),
        SamplingParams(allowed_token_ids=[10**6]),
        SamplingParams(logprobs=10**6),
        SamplingParams(stop="text"),
    ):
        with pytest.raises(InferError):
            engine.submit([1], params)


def test_seeds_hold_in_a_crowd(engine: Engine) -> None:
    params = SamplingParams(n=2, temperature=1.2, max_tokens=12, ignore_eos=True, top_p=0.95)
    prompts = [[3 + n % 5, 4, 5 + n] for n in range(24)]

    def run(n: int) -> list[list[int]]:
        request = engine.submit(prompts[n], params.replace(seed=n))
        updates = drain(request)
        return [[token for update in updates if update.index == index for token in update.token_ids] for index in range(2)]

    alone = [run(n) for n in range(24)]
    crowd: list[Any] = [None] * 24

    def store(n: int) -> None:
        crowd[n] = run(n)

    threads = [threading.Thread(target=store, args=(n,)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crowd == alone


def test_waiting_with_a_timeout(engine: Engine) -> None:
    queue = ReadyQueue()
    begun = time.monotonic()
    assert queue.wait(0.05) == []
    assert 0.05 <= time.monotonic() - begun < patience(1)
    for timeout in (-1.0, math.nan):
        with pytest.raises(InferError, match="timeout"):
            queue.wait(timeout)
    request = engine.submit([1], GREEDY)
    drain(request)
    assert request.wait(0) == []


def test_a_queue_reports_each_request_once_per_look(engine: Engine) -> None:
    queue = ReadyQueue()
    requests = {key: engine.submit([1, key], GREEDY, ready=queue, ready_key=key) for key in (11, 22, 33)}
    collected: dict[int, list[int]] = {key: [] for key in requests}
    while not all(request.finished for request in requests.values()):
        keys = queue.wait(60)
        assert len(keys) == len(set(keys))
        for key in keys:
            collected[key] += [token for update in requests[key].poll() for token in update.token_ids]
    assert {key: len(tokens) for key, tokens in collected.items()} == dict.fromkeys(requests, 8)


def test_a_queue_can_be_woken_from_another_thread() -> None:
    queue = ReadyQueue()
    threading.Timer(0.05, queue.wake).start()
    begun = time.monotonic()
    assert queue.wait(60) == []
    assert time.monotonic() - begun < patience(5)


def test_final_only_reports_ends_alone(engine: Engine) -> None:
    queue = ReadyQueue()
    request = engine.submit([1, 2], GREEDY.replace(n=3), final_only=True, ready=queue, ready_key=9)
    updates: list[Update] = []
    while not request.finished:
        assert queue.wait(60) == [9]
        updates += request.poll()
    assert sorted(update.index for update in updates) == [0, 1, 2]
    assert all(len(update.token_ids) == 8 and update.finish_reason == "length" for update in updates)


def test_cancelling_and_dropping(engine: Engine) -> None:
    request = engine.submit([1], ENDLESS.replace(n=200))
    updates = request.wait(60)
    request.cancel()
    updates += drain(request)
    request.cancel()
    assert sum(update.finish_reason == "abort" for update in updates) > 0
    assert len([update for update in updates if update.finish_reason]) == 200
    before = engine.metrics()["requests_aborted"]
    dropped = engine.submit([1], ENDLESS.replace(n=200))
    del dropped
    gc.collect()
    deadline = time.monotonic() + patience(10)
    while engine.metrics()["requests_aborted"] == before and time.monotonic() < deadline:
        time.sleep(0.01)
    metrics = engine.metrics()
    assert metrics["requests_aborted"] == before + 1
    assert metrics["pages_free"] + metrics["pages_evictable"] == metrics["pages_total"]


def test_metrics_of_a_request(engine: Engine) -> None:
    prompt = list(range(3, 43))
    drain(engine.submit(prompt, GREEDY))
    request = engine.submit(prompt, GREEDY)
    drain(request)
    metrics = request.metrics
    assert (metrics.prompt_tokens, metrics.cached_tokens, metrics.generated_tokens) == (40, 39, 8)
    assert metrics.queue_time is not None
    assert metrics.time_to_first_token is not None
    assert metrics.total_time is not None
    assert metrics.inter_token_latency is not None
    assert 0 <= metrics.queue_time <= metrics.time_to_first_token <= metrics.total_time


def test_logits_do_not_depend_on_chunks(bare_folder: Path) -> None:
    prompt = [1 + n % 60 for n in range(100)]
    found = []
    for rows in (8, 33, 512):
        engine = Engine(bare_folder, threads=1, max_num_seqs=4, max_num_batched_tokens=rows)
        found.append(engine.logits(prompt))
        engine.close()
    assert found[0].dtype == np.float32
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


CLOSED_CALLS: list[Callable[[Engine], Any]] = [
    lambda engine: engine.submit([1], GREEDY),
    lambda engine: engine.logits([1]),
    lambda engine: engine.metrics(),
]


def test_close_ends_requests_and_refuses_more(bare_folder: Path) -> None:
    engine = Engine(bare_folder, threads=1, max_num_batched_tokens=64)
    request = engine.submit([1], ENDLESS.replace(n=200))
    engine.close()
    reasons = {update.finish_reason for update in drain(request)}
    assert reasons <= {None, "length", "abort"}
    assert "abort" in reasons
    assert engine.closed
    engine.close()
    for call in CLOSED_CALLS:
        with pytest.raises(InferError, match="closed"):
            call(engine)
    assert request.finished
    assert request.wait() == []


@pytest.mark.parametrize("where", ["/nowhere/at/all", __file__, str(Path(__file__).parent)])
def test_paths_that_are_no_models(where: str) -> None:
    for call in (Engine, inspect, Tokenizer.from_path):
        with pytest.raises(InferError):
            call(where)


def test_a_folder_without_tokenizer(bare_folder: Path, engine: Engine) -> None:
    assert Tokenizer.from_path(bare_folder) is None
    assert engine.tokenizer is None
    assert not inspect(bare_folder).has_tokenizer


def test_every_container_of_a_model_is_one_model(bare_folder: Path) -> None:
    of_folder, of_file = inspect(bare_folder), inspect(bare_folder / "model.gguf")
    assert (of_folder.container, of_file.container) == ("safetensors", "gguf")
    for name in ("architecture", "parameters", "layers", "hidden_size", "heads", "kv_heads", "vocabulary_size"):
        assert getattr(of_folder, name) == getattr(of_file, name), name


def test_json_like_values_reach_the_template() -> None:
    from infer.hub import BUNDLED

    tokenizer = Tokenizer.from_path(BUNDLED)
    assert tokenizer is not None
    value: dict[str, Any] = {"a": [1, 2.5, None, True, "é"], "b": {"c": (1,)}}
    rendered = tokenizer.apply_chat_template([], chat_template="{{ value | tojson }}", template_kwargs={"value": value})
    assert rendered == '{"a": [1, 2.5, null, true, "é"], "b": {"c": [1]}}'
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for wrong in (deep, math.nan, 2**70, {1: 2}, object(), "\ud800"):
        with pytest.raises(InferError):
            tokenizer.apply_chat_template([], chat_template="x", template_kwargs={"value": wrong})
    with pytest.raises(InferError):
        tokenizer.encode("\ud800")
    with pytest.raises(InferError):
        tokenizer.apply_chat_template("text", chat_template="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1.5),
        ("n", "2"),
        ("temperature", "hot"),
        ("temperature", None),
        ("ignore_eos", "yes"),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 10**40),
        ("top_k", -(10**40)),
        ("stop", [1]),
        ("stop_token_ids", 3),
        ("logit_bias", {"a": 1}),
        ("logit_bias", [1]),
        ("allowed_token_ids", "abc"),
        ("logprobs", True + 0.5),
    ],
)
def test_wrong_types_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InferError, match=f"^{name}"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", ["threads", "max_model_len", "max_num_seqs", "seed", "mmap", "dtype", "kv_cache_dtype"])
def test_engine_arguments_of_a_wrong_type(name: str, bare_folder: Path) -> None:
    settings: dict[str, Any] = {name: object()}
    with pytest.raises(InferError, match=f"^{name}.*object at"):
        Engine(bare_folder, **settings)
    with pytest.raises(InferError, match="path must be"):
        Engine(3)  # type: ignore[arg-type]


def test_the_longest_sequence_is_what_memory_holds(bare_folder: Path) -> None:
    page = 16
    engine = Engine(bare_folder, threads=1, kv_cache_dtype="float32", max_num_seqs=2)
    assert (engine.max_model_len, engine.kv_cache_tokens) == (128, 2 * 128)
    engine.close()
    info = inspect(bare_folder)
    token_bytes = 2 * 4 * info.layers * info.kv_heads * info.head_dim
    settings: dict[str, Any] = {"threads": 1, "kv_cache_dtype": "float32", "kv_cache_memory_bytes": 5 * page * token_bytes}
    engine = Engine(bare_folder, **settings)
    assert (engine.max_model_len, engine.kv_cache_tokens) == (5 * page, 5 * page)
    assert len(token_ids(engine.submit([1], ENDLESS))) == 5 * page - 1
    engine.close()
    with pytest.raises(InferError, match=r"max_model_len = 100 does not fit.*80 tokens"):
        Engine(bare_folder, max_model_len=100, **settings)


def test_a_crowd_in_a_tiny_cache_gets_what_it_gets_alone(bare_folder: Path, engine: Engine) -> None:
    info = inspect(bare_folder)
    token_bytes = 2 * 2 * info.layers * info.kv_heads * info.head_dim
    tiny = Engine(bare_folder, threads=1, max_num_batched_tokens=64, max_num_seqs=12, kv_cache_memory_bytes=9 * 16 * token_bytes)
    params = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True)
    prompts = [[2 + n, *range(3, 10 + n)] for n in range(12)]
    requests = [tiny.submit(prompt, params.replace(seed=n)) for n, prompt in enumerate(prompts)]
    crowd = [token_ids(request) for request in requests]
    assert tiny.metrics()["preemptions"] > 0
    tiny.close()
    assert crowd == [token_ids(engine.submit(prompt, params.replace(seed=n))) for n, prompt in enumerate(prompts)]


def test_system_info() -> None:
    info = system_info()
    assert info["isa"] in info["available_isas"]
    assert info["threads"] >= 1
