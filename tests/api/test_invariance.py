"""Batch invariance, end to end: a request's tokens, text and log-probabilities are the same bits however it is served.

Every row of the matrix serves the same requests in another way, and shows by a counter that the way was really taken.
`.ci/run` runs this file once more against a core whose kernels treat several rows differently from one (the feature
`planted`); then it must fail.
"""

from __future__ import annotations

import random
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from infer import LLM, SamplingParams, model_info

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Seen = list[list[Any]]

STEM = "The king had three daughters, and the youngest was so beautiful that the sun himself wondered when he saw her face. "
# Nothing shared, a shared beginning of many pages, a prompt of one token and one of a few hundred.
PROMPTS: list[Any] = [
    [0],
    "Once upon a time",
    STEM * 3 + "One day she went out into the forest and",
    STEM * 3 + "One day she sat down by the well and",
    [random.Random(7).randrange(4, 8192) for _ in range(333)],
]
PARAMS = [
    SamplingParams(max_tokens=20, temperature=1.1, seed=1, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=24, temperature=0.0, logprobs=3, prompt_logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=16, temperature=0.8, seed=2, top_p=0.9, n=3, logprobs=1),
    SamplingParams(
        max_tokens=24, temperature=0.9, seed=3, repetition_penalty=1.2, presence_penalty=0.3, logprobs=0, ignore_eos=True
    ),
    SamplingParams(max_tokens=8, temperature=0.7, top_k=40, seed=4, logprobs=2, prompt_logprobs=0),
]
ALL = range(len(PROMPTS))


def seen(output: Any) -> list[Any]:
    """All that a request gives: equal floats are equal bits, but for zeros and NaN, and there are none."""
    completions = [(one.token_ids, one.text, one.logprobs, one.finish_reason) for one in output.outputs]
    return [output.prompt_logprobs, *completions]


def serve(llm: LLM, order: list[int] | range = ALL, **options: Any) -> Seen:
    """All requests in one call, in some order; answers in the order of `PROMPTS`."""
    outputs = llm.generate([PROMPTS[place] for place in order], [PARAMS[place] for place in order], **options)
    answers = {place: seen(output) for place, output in zip(order, outputs, strict=True)}
    return [answers[place] for place in ALL]


def one_by_one(llm: LLM) -> Seen:
    """Each request alone."""
    return [seen(llm.generate(PROMPTS[place], PARAMS[place])[0]) for place in ALL]


@contextmanager
def company(llm: LLM) -> Iterator[None]:
    """Other requests that come and go all the time."""
    over = threading.Event()

    def crowd(number: int) -> None:
        dice = random.Random(number)
        while not over.is_set():
            prompt = [dice.randrange(4, 8192) for _ in range(dice.randrange(1, 90))]
            llm.generate(prompt, SamplingParams(max_tokens=dice.randrange(1, 30), seed=number), use_tqdm=False)

    threads = [threading.Thread(target=crowd, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


# ---- ways to serve: each takes the options that all engines of a row of the matrix have in common, and a folder of its own


def together(_: Path, **options: Any) -> Seen:
    with LLM(**options) as llm:
        return serve(llm)


def in_reverse(_: Path, **options: Any) -> Seen:
    with LLM(**options) as llm:
        return serve(llm, [*reversed(ALL)])


def with_other_threads(_: Path, **options: Any) -> Seen:
    with LLM(**{**options, "threads": 3}) as llm:
        return serve(llm)


def in_small_chunks(_: Path, **options: Any) -> Seen:
    with LLM(**options, max_num_seqs=8, max_num_batched_tokens=9) as llm:
        found = serve(llm)
        assert llm.metrics()["steps"] > 60
    return found


def two_at_a_time(_: Path, **options: Any) -> Seen:
    with LLM(**options, max_num_seqs=2) as llm:
        return serve(llm)


def in_a_crowd(_: Path, **options: Any) -> Seen:
    with LLM(**options, max_num_batched_tokens=64) as llm, company(llm):
        return one_by_one(llm)


def from_the_prefix_cache(_: Path, **options: Any) -> Seen:
    with LLM(**options) as llm:
        serve(llm)
        before = llm.metrics()["cached_tokens"]
        found = serve(llm, [*reversed(ALL)])
        assert llm.metrics()["cached_tokens"] - before > 150
    return found


def without_a_prefix_cache(_: Path, **options: Any) -> Seen:
    with LLM(**options, enable_prefix_caching=False) as llm:
        found = serve(llm)
        assert llm.metrics()["cached_tokens"] == 0
    return found


def preempted(_: Path, **options: Any) -> Seen:
    kept = "float32" if options.get("dtype") == "float32" else options.get("kv_cache_dtype", "auto")
    page_bytes = 16 * model_info(kv_cache_dtype=kept).kv_bytes_per_token
    with LLM(**options, max_model_len=400, kv_cache_memory_bytes=26 * page_bytes) as llm, company(llm):
        found: Seen = [[] for _ in ALL]
        # The last in line are robbed first, and get more turns to be.
        for place, output in zip(ALL, llm.generate(PROMPTS, PARAMS, priority=3), strict=True):
            found[place] = seen(output)
        assert llm.metrics()["preemptions"] > 0
    return found


def restored_from_disk(folder: Path, **options: Any) -> Seen:
    with LLM(**options, kv_offload_dir=folder) as llm:
        serve(llm)
    with LLM(**options, kv_offload_dir=folder) as llm:
        found = serve(llm)
        assert llm.metrics()["restored_pages"] >= 6
    return found


def restored_from_a_session(folder: Path, **options: Any) -> Seen:
    with LLM(**options) as llm:
        serve(llm)
        llm.save_session(folder / "session", llm.tokenizer.encode(PROMPTS[2]))
    with LLM(**options) as llm:
        assert len(llm.load_session(folder / "session")) > 60
        found = serve(llm)
        assert llm.metrics()["cached_tokens"] > 60
    return found


def guessed_by_lookup(_: Path, **options: Any) -> Seen:
    with LLM(**options, speculative_config={"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}) as llm:
        found = serve(llm)
        assert llm.metrics()["drafted_tokens"] > 0
    return found


def guessed_by_a_draft_model(_: Path, **options: Any) -> Seen:
    with LLM(**options, speculative_config={"method": "draft_model"}) as llm:
        found = serve(llm)
        assert llm.metrics()["accepted_tokens"] > 0
    return found


def guessed_in_trees(_: Path, **options: Any) -> Seen:
    config = {"method": "draft_model", "num_speculative_tokens": 3, "num_draft_tokens": 9}
    with LLM(**options, speculative_config=config) as llm:
        found = serve(llm)
        assert llm.metrics()["branch_tokens"] > 0
    return found


def looked_up_in_trees(_: Path, **options: Any) -> Seen:
    config = {"method": "ngram", "prompt_lookup_min": 1, "num_draft_tokens": 12}
    with LLM(**options, speculative_config=config) as llm:
        found = serve(llm)
        assert llm.metrics()["copied_pages"] > 0
    return found


WAYS: list[Callable[..., Seen]] = [
    together,
    in_reverse,
    with_other_threads,
    in_small_chunks,
    two_at_a_time,
    in_a_crowd,
    from_the_prefix_cache,
    without_a_prefix_cache,
    preempted,
    restored_from_disk,
    restored_from_a_session,
    guessed_by_lookup,
    guessed_by_a_draft_model,
    guessed_in_trees,
    looked_up_in_trees,
]
KINDS: dict[str, dict[str, Any]] = {
    "auto": {},
    "float32": {"dtype": "float32"},
    "int8": {"kv_cache_dtype": "int8"},
    "bfloat16 and fp8": {"kv_cache_dtype": {"key": "bfloat16", "value": "fp8"}},
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Seen]:
    """How numbers are kept, and what each request gives alone, in an engine of its own, on one thread."""
    alone: Seen = []
    for place in ALL:
        with LLM(**request.param, threads=1, max_num_seqs=4) as llm:
            alone.append(seen(llm.generate(PROMPTS[place], PARAMS[place])[0]))
    return request.param, alone


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_not_a_bit_depends_on_how_a_request_is_served(
    kind: tuple[dict[str, Any], Seen], way: Callable[..., Seen], tmp_path: Path
) -> None:
    """A row of the matrix."""
    options, alone = kind
    found = way(tmp_path, **{"threads": 2, **options})
    for place in ALL:
        assert found[place] == alone[place], f"request {place} depends on its company"
