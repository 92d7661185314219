"""Signals reach whoever waits in the compiled core, and what does not wait for the engine either."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from machine import patience

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

SETUP = """
import os, signal, sys, threading, time
from infer._core import Engine, InferError, ReadyQueue, SamplingParams, Tokenizer
from infer.hub import BUNDLED

tokenizer = Tokenizer.from_path(BUNDLED)
text = "Once upon a time there was a fox. " * 300_000
sent = []

# Functions of their own: Python 3.11 takes an exception that is raised as a loop goes back for one of the line before the loop.
def load_for_ever():
    while True:
        Engine(BUNDLED, threads=1)

def close_for_ever():
    while True:
        engine = Engine(BUNDLED, threads=1)
        kept = engine.submit([5] * 2000, SamplingParams())
        time.sleep(0.01)
        engine.close()

def send():
    time.sleep(0.3)
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
"""

INTERRUPTED = """
thread = threading.Thread(target=send)
thread.start()
try:
    WAIT
    print("was not interrupted", flush=True)
except KeyboardInterrupt:
    print(time.monotonic() - sent[0], flush=True)
thread.join()
os._exit(0)
"""

WAITS = {
    "encode": "tokenizer.encode(text)",
    "queue": "ReadyQueue().wait()",
    "queue with timeout": "ReadyQueue().wait(60)",
    "request": "engine = Engine(BUNDLED, threads=1)\n    "
    "engine.submit([5], SamplingParams(max_tokens=None, ignore_eos=True, n=50), final_only=True).wait()",
    "load": "load_for_ever()",
    "close": "close_for_ever()",
}


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.parametrize("what", sorted(WAITS))
def test_ctrl_c_ends_every_wait(what: str, run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_python(SETUP + INTERRUPTED.replace("WAIT", WAITS[what]))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < patience(0.2)


HANDLED = """
seen = []
signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
threading.Thread(target=send).start()
assert ReadyQueue().wait(0.8) == []
print(len(seen))
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_a_handler_that_does_not_raise_ends_no_wait(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_python(SETUP + HANDLED)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


FORKED = """
import warnings
warnings.simplefilter("ignore")
engine = Engine(BUNDLED, threads=2)
queue = ReadyQueue()
request = engine.submit([5], SamplingParams(max_tokens=None, ignore_eos=True), ready=queue)
child = os.fork()
if child == 0:
    calls = [
        lambda: engine.submit([5], SamplingParams()), lambda: engine.logits([5]), engine.metrics, engine.close,
        request.poll, request.wait, request.cancel, lambda: request.finished, queue.wait, queue.wake,
    ]
    refused = 0
    for call in calls:
        try:
            call()
        except InferError as error:
            refused += "fork" in str(error)
    del engine, request, queue, call, calls
    os._exit(refused)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
request.cancel()
engine.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_is_told_so_and_never_hangs(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = run_python(SETUP + FORKED)
    assert done.stdout.strip() == "10", done.stdout + done.stderr
