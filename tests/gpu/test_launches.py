"""Steps whose graph is there, which the core begins and ends without Python (rust/bindings/src/launcher.rs).

On the numpy twin of a GPU, whose driver is ctypes callbacks; with a driver in C, which needs no lock of Python's; and on a GPU
where there is one.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from busy import busy_thread
from golden_table import GOLDEN
from samples import PROMPTS, kinds, same_choices

from infer import LLM, InferError, SamplingParams
from infer.gpu.device import FUNCTIONS
from infer.gpu.runner import Runner
from infer.gpu.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy_executor import HostDevice

LONG = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, detokenize=False)
SEEDED = SamplingParams(max_tokens=40, temperature=0.9, top_p=0.95, seed=5, repetition_penalty=1.05, n=2, detokenize=False)
ROUNDS = 3  # after which each size that comes has its graph
PROMPT = list(range(3, 15))


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step that Python runs."""
    rows: list[int] = []
    original = Runner.enqueue

    def enqueue(self: Runner, work: Any) -> Any:
        rows.append(work.rows)
        return original(self, work)

    monkeypatch.setattr(Runner, "enqueue", enqueue)
    return rows


@pytest.fixture
def llm(host: HostDevice) -> Iterator[LLM]:
    """On the twin; small, so that time is the engine's."""
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "enable_prefix_caching": False}
    with LLM(GOLDEN / "llama", device="cuda", dtype="float32", **sizes) as llm:
        yield llm


def written(llm: LLM, *params: SamplingParams) -> list[list[int]]:
    """Tokens of requests of each kind, one after the other and all at once."""
    outputs = [output for one in params for output in llm.generate([PROMPT], one)]
    outputs += llm.generate([PROMPT[:count] for count in range(4, 4 + len(params))], list(params))
    return [list(one.token_ids) for output in outputs for one in output.outputs]


def test_steps_with_a_graph_never_enter_python(llm: LLM, host: HostDevice, entered: list[int]) -> None:
    tokens = [llm.generate([PROMPT], LONG)[0].outputs[0].token_ids for _ in range(ROUNDS)]
    assert entered == [12, 1, 1, 12], "each size comes to Python twice"
    entered.clear()
    host.driver.calls.clear()
    tokens.append(llm.generate([PROMPT], LONG)[0].outputs[0].token_ids)
    assert not entered
    assert host.driver.calls.count("launch") == len(tokens[0]) == 40
    assert all(own == tokens[0] for own in tokens)


def test_trees_of_drafts_are_steps_with_a_graph(host: HostDevice, entered: list[int]) -> None:
    """Their copies of pages, too; and the tokens are those without."""
    prompt = [5, 6, 7, 5, 6, 8, 5, 6, 9, 5, 6]
    with LLM(GOLDEN / "llama", dtype="float32", threads=2) as plain:
        expected = plain.generate([prompt], LONG)[0].outputs[0].token_ids
    tree = {"method": "ngram", "num_speculative_tokens": 3, "num_draft_tokens": 9, "prompt_lookup_min": 1}
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "enable_prefix_caching": False}
    with LLM(GOLDEN / "llama", device="cuda", dtype="float32", speculative_config=tree, **sizes) as llm:
        for _ in range(ROUNDS):
            assert llm.generate([prompt], LONG)[0].outputs[0].token_ids == expected
        entered.clear()
        before = llm.metrics()
        assert llm.generate([prompt], LONG)[0].outputs[0].token_ids == expected
        assert not entered
        after = llm.metrics()
        assert after["copied_pages"] - before["copied_pages"] > 5
        assert after["branch_tokens"] > 0


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_steps_that_python_begins_are_ended_without_it(
    enforce_eager: bool, host: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    finish = Worker._finish

    def counted(self: Worker, work: Any, step: Any, outcome: Any) -> None:
        ended.append(step.rows)
        finish(self, work, step, outcome)

    monkeypatch.setattr(Worker, "_finish", counted)
    with LLM(GOLDEN / "llama", device="cuda", dtype="float32", max_num_seqs=2, enforce_eager=enforce_eager) as llm:
        llm.generate([PROMPT], LONG)
        assert not ended
        calls = host.driver.calls
        assert calls.count("record") == calls.count("wait") == 40
        assert calls.count("launch") == (0 if enforce_eager else 37), "one step is a prompt, one is the first, one is captured"
        llm.generate([PROMPT], SamplingParams(max_tokens=3, logprobs=40, detokenize=False))
        assert len(ended) == 3, "log-probabilities that the host computes, from logits"


def test_steps_are_begun_before_their_tokens_are_known(llm: LLM, host: HostDevice) -> None:
    for _ in range(ROUNDS):
        host.driver.calls.clear()
        llm.generate([PROMPT], LONG)
    begun, depths = 0, []
    for call in host.driver.calls:
        if call == "launch":
            depths.append(begun)
        begun += (call == "record") - (call == "wait")
    assert set(depths) == {0, 1}
    assert sum(depths) > 35


@pytest.mark.parametrize("small_tables", [1 << 18, 0])
def test_tokens_are_those_of_the_cpu(small_tables: int, host: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page tables copied whole or by columns."""
    with LLM(GOLDEN / "llama", dtype="float32", threads=2) as llm:
        expected = written(llm, LONG, SEEDED)
    monkeypatch.setattr("infer.gpu.runner.SMALL_TABLES", small_tables)
    with LLM(GOLDEN / "llama", device="cuda", dtype="float32", max_num_seqs=8, max_num_batched_tokens=64) as llm:
        for _ in range(ROUNDS):
            assert written(llm, LONG, SEEDED) == expected
    assert host.driver.calls.count("launch") > 100
    assert ("columns" in host.driver.calls) == (small_tables == 0)


def test_all_kinds_of_draws(host: HostDevice) -> None:
    """Tokens and log-probabilities of all that a device draws, at once."""
    params = kinds()[:-1]

    def drawn(llm: LLM) -> list[tuple[list[int], Any]]:
        outputs = llm.generate([PROMPTS[1]] * len(params), params)
        return [(list(output.outputs[0].token_ids), output.outputs[0].logprobs) for output in outputs]

    with LLM(dtype="float32", threads=2) as llm:
        expected = drawn(llm)
    with LLM(device="cuda", dtype="float32", max_num_seqs=len(params), max_num_batched_tokens=256) as llm:
        for _ in range(ROUNDS):
            assert same_choices(drawn(llm), expected)
    assert host.driver.calls.count("launch") > 20


def test_a_failed_launch_fails_its_requests_alone(llm: LLM, host: HostDevice) -> None:
    expected = [llm.generate([PROMPT], LONG)[0].outputs[0].token_ids for _ in range(ROUNDS)]
    host.driver.fail_launches = 1
    with pytest.raises(InferError, match=r"launching a graph failed: a launch that failed \(700\)"):
        llm.generate([PROMPT], LONG)
    assert llm.generate([PROMPT], LONG)[0].outputs[0].token_ids == expected[0]


def test_a_failed_wait_ends_the_engine(llm: LLM, host: HostDevice) -> None:
    for _ in range(ROUNDS):
        llm.generate([PROMPT], LONG)
    host.fail_after = 5
    with pytest.raises(InferError, match=r"waiting for a step failed: an illegal memory access was encountered \(700\)"):
        llm.generate([PROMPT], LONG)
    with pytest.raises(InferError, match="the GPU failed and cannot go on: waiting for a step failed"):
        llm.generate([PROMPT], LONG)


DRIVER = """
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
static volatile long launches;
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) { memcpy((void *)to, from, size); return 0; }
int cuMemcpyDtoHAsync_v2(int32_t *to, uint64_t from, size_t size, void *stream) {
    for (size_t i = 0; i < size / 4; i++) to[i] = 300 + launches % 7;
    return 0;
}
int cuMemcpy2DAsync_v2(const void *copy, void *stream) { return 1; }
int cuGraphLaunch(void *graph, void *stream) { __sync_fetch_and_add(&launches, 1); return 0; }
int cuEventRecord(void *event, void *stream) { return 0; }
int cuEventSynchronize(void *event) { return 0; }
int cuGetErrorName(int status, const char **name) { *name = "an error"; return 0; }
long launched(void) { return launches; }
int wait_for_launches(long count, int seconds) {
    time_t end = time(NULL) + seconds;
    while (launches < count) if (time(NULL) > end) return 0;
    return 1;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_steps_go_on_while_nobody_can_have_pythons_lock(
    host: HostDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A call that keeps the lock for hundreds of steps; each of them "draws" what the driver in C says."""
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", tmp_path / "driver.so", tmp_path / "driver.c"], check=True)
    driver = ctypes.PyDLL(str(tmp_path / "driver.so"))  # calls keep the lock
    addresses = {name: ctypes.cast(getattr(driver, name), ctypes.c_void_p).value for name in FUNCTIONS}
    monkeypatch.setattr(host, "functions", lambda: addresses)
    found: list[int] = []
    with LLM(device="cuda", dtype="float32", max_num_seqs=2, max_num_batched_tokens=16, max_model_len=512) as llm:
        params = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
        thread = threading.Thread(target=lambda: found.extend(llm.generate([PROMPT], params)[0].outputs[0].token_ids))
        thread.start()
        while not driver.launched():
            time.sleep(0.001)
        assert driver.wait_for_launches(300, 20)
        thread.join()
    steps = [(after - before) % 7 for before, after in pairwise(found[50:])]
    assert set(steps) == {1}, "each step's own choice, a step after the other's"


def on_the_gpu(**options: Any) -> LLM:
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 256 << 20}
    return LLM(device="cuda", **{**sizes, **options})


@pytest.mark.usefixtures("gpu")
def test_tokens_beside_a_busy_thread_are_those_of_single_launches(entered: list[int]) -> None:
    with on_the_gpu(dtype="float32", enforce_eager=True) as llm:
        expected = written(llm, LONG, SEEDED)
    with on_the_gpu(dtype="float32", enable_prefix_caching=False) as llm, busy_thread():
        for _ in range(ROUNDS):
            entered.clear()
            assert written(llm, LONG, SEEDED) == expected
    assert len(entered) < 20, "most steps had their graph"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_graphs_launched_by_the_core_and_by_python(dtype: str, entered: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens and log-probabilities of all kinds of draws, bit for bit."""

    def drawn() -> list[tuple[list[int], Any]]:
        with on_the_gpu(dtype=dtype, enable_prefix_caching=False) as llm:
            for _ in range(ROUNDS):
                entered.clear()
                outputs = [llm.generate(PROMPTS[1], params)[0].outputs[0] for params in kinds()[:-1]]
        return [(list(output.token_ids), output.logprobs) for output in outputs]

    found = drawn()
    assert not entered
    monkeypatch.setattr(Runner, "_hand_over", lambda *_: None)
    assert found == drawn()
    assert len(entered) > 100
