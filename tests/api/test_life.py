"""From construction to `close()`: what an `LLM` holds, and that it gives it back."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from infer import LLM, InferError, SamplingParams, model_info

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

PARAMS = SamplingParams(temperature=0, max_tokens=8)


def test_everything_after_close_is_refused() -> None:
    llm = LLM(threads=1)
    llm.generate("a", PARAMS)
    llm.close()
    llm.close()
    calls: list[Callable[[], Any]] = [
        lambda: llm.generate("a", PARAMS),
        lambda: list(llm.stream("a", PARAMS)),
        lambda: llm.logits([1, 2]),
    ]
    for call in calls:
        with pytest.raises(InferError, match="closed"):
            call()
    assert "closed" in repr(llm)


CLOSING = """
import threading, time
from infer import LLM, InferError, SamplingParams
llm = LLM(threads=1)
said = []
def use(call):
    try:
        while True:
            call()
    except InferError as error:
        said.append(str(error))
calls = [llm.metrics, lambda: llm.generate("a", SamplingParams(max_tokens=1))]
threads = [threading.Thread(target=use, args=(call,)) for call in calls]
for thread in threads:
    thread.start()
time.sleep(0.1)
llm.close()
for thread in threads:
    thread.join()
print(set(said))
"""


def test_closing_while_other_threads_call(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_python(CLOSING, timeout=60)  # both sides once waited for each other, with Python's lock in hand
    assert (done.returncode, done.stdout, done.stderr) == (0, "{'this LLM is closed'}\n", "")


def test_every_close_returns_when_it_is_closed() -> None:
    llm = LLM(threads=1, max_num_batched_tokens=2048, step_time_target=None)
    request = llm._engine.submit([5] * 2000, PARAMS)  # one long step, which is not cut short
    time.sleep(0.1)
    first = threading.Thread(target=llm.close)
    first.start()
    time.sleep(0.05)
    llm.close()
    assert [update.finish_reason for update in request.poll()] == ["abort"]
    assert request.finished
    first.join()


def test_two_models_side_by_side(llm: LLM, bare_folder: Path) -> None:
    expected = llm.generate("Once upon a time", PARAMS)[0].outputs[0].token_ids
    with LLM(bare_folder, threads=1) as other:
        random_ids = other.generate([[1, 2, 3]], PARAMS)[0].outputs[0].token_ids
        assert llm.generate("Once upon a time", PARAMS)[0].outputs[0].token_ids == expected
        assert other.generate([[1, 2, 3]], PARAMS)[0].outputs[0].token_ids == random_ids
    assert llm.generate("Once upon a time", PARAMS)[0].outputs[0].token_ids == expected


def worker_threads() -> int:
    """How many threads of this process compute; Linux tells their names."""
    tasks = Path("/proc/self/task")
    count = 0
    for task in tasks.iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            count += (task / "comm").read_text().startswith("infer-worker")
    return count


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="thread names are read from /proc")
def test_engines_share_their_threads(bare_folder: Path) -> None:
    """Three engines of five threads: four workers beside the engines' own threads, and the same answers as alone."""
    gc.collect()
    before = worker_threads()
    prompt = [5, 6, 7, 8]
    with LLM(bare_folder, threads=5) as first:
        expected = first.generate(prompt, PARAMS)[0].outputs[0].token_ids
        with LLM(bare_folder, threads=5) as second, LLM(bare_folder, threads=5) as third:
            assert worker_threads() - before == 4
            engines = [first, second, third]
            found: list[list[int]] = []
            threads = [
                threading.Thread(target=lambda llm=llm: found.append(llm.generate(prompt, PARAMS)[0].outputs[0].token_ids))
                for llm in engines
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert found == [expected] * 3
    gc.collect()
    assert worker_threads() == before


def test_threads_end_with_the_model() -> None:
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("counting native threads needs /proc")
    before = len(os.listdir("/proc/self/task"))
    for _ in range(3):
        with LLM(threads=3) as llm:
            llm.generate("a", PARAMS)
            assert len(os.listdir("/proc/self/task")) > before
        assert len(os.listdir("/proc/self/task")) == before
    dropped = LLM(threads=3)
    dropped.generate("a", PARAMS)
    del dropped
    gc.collect()
    assert len(os.listdir("/proc/self/task")) == before
    assert "infer-events" not in [thread.name for thread in threading.enumerate() if not thread.is_alive()]


MEMORY = """
import gc, os
from infer import LLM, SamplingParams

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def once():
    with LLM(threads=1) as llm:
        llm.generate(["word " * 200] * 4, SamplingParams(max_tokens=8, temperature=0))
        return resident()

start = resident()
held = once()
after = []
for _ in range(16):
    once()
    gc.collect()
    after.append(resident())
print(start, held, min(after[:8]), min(after[8:]))
"""


def test_close_gives_the_memory_back(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    if not os.path.isdir("/proc/self"):
        pytest.skip("reading resident memory needs /proc")
    done = run_python(MEMORY)
    assert done.returncode == 0, done.stderr
    start, held, first, last = map(float, done.stdout.split())
    # The allocator keeps 10 to 40 MB of freed memory, now more, now less: the least of several rounds says what is held.
    assert held - start > 20, "the model is in memory while it is open"
    assert min(first, last) - start < 0.6 * (held - start), "and most of it is gone after close"
    assert last - first < 30, "and does not pile up: eight rounds that each kept their weights would hold 240 MB more"


FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")
from infer import LLM, InferError, SamplingParams
llm = LLM(threads=2)
params = SamplingParams(temperature=0, max_tokens=4)
before = llm.generate("Once", params)[0].outputs[0].token_ids
child = os.fork()
if child == 0:
    try:
        llm.generate("Once", params)
    except InferError as error:
        os._exit(0 if "fork" in str(error) else 2)
    os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(llm.generate("Once", params)[0].outputs[0].token_ids == before)
"""


def test_use_after_fork_is_refused(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_python(FORK)
    assert done.stdout.split() == ["0", "True"], done.stderr


FORKED_BLOCK = """
import os, sys
from infer import LLM
with LLM(threads=1) as llm:
    child = os.fork()
    if child == 0:
        llm.close(drain=True)
        sys.exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(llm.logits("a")))
"""


def test_a_forked_child_may_leave_the_block(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """`close` there raised, in the place of how the child ended."""
    done = run_python(FORKED_BLOCK)
    assert (done.stdout.split(), done.stderr) == (["7", "1"], "")


EXITS = {
    "open": "llm = LLM(threads=2); llm.generate('a', P)",
    "streaming": "llm = LLM(threads=2); stream = llm.stream('a', P); next(stream)",
    "async": "llm = LLM(threads=2)\nasync def main(): await llm.agenerate('a', P)\nasyncio.run(main())",
    "threads": "llm = LLM(threads=2); threading.Thread(target=llm.generate, args=('a', E), daemon=True).start(); time.sleep(0.1)",
}


@pytest.mark.parametrize("how", sorted(EXITS))
def test_the_interpreter_ends_cleanly(how: str, run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    start = "import asyncio, threading, time\nfrom infer import LLM, SamplingParams\nP = SamplingParams(max_tokens=4)\n"
    done = run_python(start + "E = SamplingParams(max_tokens=1500, ignore_eos=True)\n" + EXITS[how], timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


def test_model_info_needs_no_loading(bare_folder: Path) -> None:
    bundled, bare = model_info(), model_info(bare_folder)
    assert (bundled.architecture, bundled.container, bundled.layers) == ("LlamaForCausalLM", "gguf", 8)
    assert bundled.has_tokenizer
    assert bundled.chat_template is not None
    assert bundled.parameters == pytest.approx(27.8e6, rel=0.01)
    assert bundled.weight_bytes < 32 * 2**20
    assert (bare.container, bare.has_tokenizer) == ("safetensors", False)
    assert set(bundled.as_dict()) >= {"path", "architecture", "quantization", "layers", "heads", "vocabulary_size"}
