"""The thread that does an engine's work on a device, and how the two are opened together.

The engine never calls Python: it lays its work on a desk (rust/engine/src/handover.rs), from which this thread takes it. The
thread keeps the device and the models alive, but not the engine: when that is closed or dropped there is no more work, and the
thread gives the memory back and ends. Whatever goes wrong here ends requests with a sentence; nothing waits for a thread that
is gone.

Steps that are a graph by now never come here: the core does them on this thread, inside `WorkLink.next_work` and without Python's
lock (rust/bindings/src/launcher.rs). The others are enqueued when they are begun and waited for when they are finished (by the
core, where there are no logits for the host): the engine begins the next one before, if it can, so that the device goes from one
to the other by itself.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from infer._core import DeviceModel, Engine, InferError, StepLauncher
from infer.gpu.arrays import MOST_BRANCHES, PAGE_TOKENS
from infer.gpu.energy import PowerMeter, PowerWatch
from infer.gpu.executor import Executor
from infer.gpu.fixed import fixed_rows
from infer.gpu.memory import STEPS_AT_ONCE
from infer.gpu.runner import Runner
from infer.gpu.weights import Weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from infer._core import Work, WorkLink
    from infer.gpu.device import Device
    from infer.gpu.runner import Outcome

__all__ = ["Worker", "open_engine"]


class Worker:
    """Does work until there is none.

    Parameters
    ----------
    device
        Where; closed at the end.
    link
        Where work comes from.
    target, draft
        The model, and the one that guesses for it, if there is one.
    """

    def __init__(self, device: Device, link: WorkLink, target: Runner, draft: Runner | None) -> None:
        self._device, self._link = device, link
        self._target, self._draft = target, draft
        joules = device.joules()
        self._watch = PowerWatch(PowerMeter(joules), link.report_power, link.wait_for_rows) if joules else None
        # A draft model computes the rows of each step, too.
        self._launcher = target.launcher if draft is None else None
        self._begun: deque[tuple[Work, Callable[[], Outcome]]] = deque()
        self._thread = threading.Thread(target=self._run, name="infer-gpu", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of a worker whose engine is closed."""
        self._thread.join()

    def close_at_exit(self, llm: Any) -> None:
        """Have an LLM closed when the interpreter exits, while this thread still runs; it is not kept alive for that."""
        reference = weakref.ref(llm)

        def close() -> None:
            if (alive := reference()) is not None:
                alive.close()

        atexit.register(close)
        weakref.finalize(llm, atexit.unregister, close).atexit = False

    def _run(self) -> None:
        try:
            self._device.use()
            while (work := self._link.next_work(launcher=self._launcher)) is not None:
                if (reason := self._attempt(work)) is not None:
                    self._link.stop(reason)
        except BaseException as error:
            self._link.stop(f"the GPU's thread stopped: {_describe(error)}")
        finally:
            if self._watch is not None:
                self._watch.close()
            self._device.close()

    def _attempt(self, work: Work) -> str | None:
        """Do one piece of work; returns why there can be no more of it."""
        try:
            self._do(work)
        except Exception as error:
            message = _describe(error)
            self._link.fail(work, message)
            if self._device.is_broken(error):
                return f"the GPU failed and cannot go on: {message}"
        return None

    def _do(self, work: Work) -> None:
        import numpy as np

        kind = work.kind
        if kind == "forward":
            self._begin(work)
        elif kind == "finish":
            step, wait = self._begun.popleft()
            self._finish(work, step, wait())
        elif kind == "draft":
            if self._draft is None:
                raise InferError("this engine has no draft model")
            for runner in self._runners():
                runner.copy_pages(work, runner is self._draft)
            if work.rounds > 1:
                self._link.finish_rounds(work, self._guess(self._draft, work))
                return
            outcome = self._draft.enqueue(work)
            self._device.synchronize()
            self._finish(work, work, outcome)
        elif kind == "export":
            self._link.finish_page(work, self._read(work.page))
        else:
            self._write(work.page, np.frombuffer(work.contents, np.uint8))
            self._link.finish(work)

    def _begin(self, work: Work) -> None:
        """Enqueue a step, and leave its end to the core, or keep what waits for its outcome or raises what went wrong already."""
        try:
            outcome = self._forward(work)
            if self._launcher is not None and self._launcher.leave(work):
                return
            mark = self._device.mark()
        except Exception as error:
            failure = error

            def fail() -> Outcome:
                raise failure

            self._begun.append((work, fail))
            return

        def wait() -> Outcome:
            self._device.reach(mark)
            return outcome

        self._begun.append((work, wait))

    def _forward(self, work: Work) -> Outcome:
        for runner in self._runners():
            runner.copy_pages(work, runner is self._target)
        if self._draft is not None and (rest := work.not_drafted()).rows:
            self._draft.enqueue(rest)
        return self._target.enqueue(work)

    def _guess(self, draft: Runner, work: Work) -> NDArray[np.int32]:
        """Have the draft model draw several tokens of each row, one after the other: (rounds, rows).

        What a round chooses is the next one's input on the device. The host waits for the round before the last only, since
        pinned memory is there for STEPS_AT_ONCE of them.
        """
        import numpy as np

        chosen = np.empty((work.rounds, work.rows), np.int32)
        begun: deque[tuple[int, Any, Outcome]] = deque()

        def take() -> None:
            number, mark, outcome = begun.popleft()
            self._device.reach(mark)
            if outcome.choices is not None:  # as all rows are drawn
                chosen[number] = outcome.choices

        for number in range(work.rounds):
            if len(begun) == STEPS_AT_ONCE:
                take()
            outcome = draft.enqueue(work if number == 0 else work.advanced(number))
            begun.append((number, self._device.mark(), outcome))
        while begun:
            take()
        return chosen

    def _finish(self, work: Work, step: Work, outcome: Outcome) -> None:
        self._link.finish_rows(work, step, outcome.logits, outcome.choices, outcome.logprobs)

    def _runners(self) -> list[Runner]:
        return [self._target] if self._draft is None else [self._target, self._draft]

    def _read(self, page: int) -> Any:
        """Read a page out: the model's, then the draft model's."""
        import numpy as np

        out = np.empty(sum(runner.pages.page_bytes for runner in self._runners()), np.uint8)
        start = 0
        for runner in self._runners():
            runner.pages.read(page, out[start : start + runner.pages.page_bytes])
            start += runner.pages.page_bytes
        self._device.synchronize()
        return out

    def _write(self, page: int, contents: Any) -> None:
        start = 0
        for runner in self._runners():
            runner.pages.write(page, contents[start : start + runner.pages.page_bytes])
            start += runner.pages.page_bytes
        if start != len(contents):
            raise InferError(f"a page takes {start} bytes, got {len(contents)}")
        self._device.synchronize()


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, InferError) else f"a bug in infer: {type(error).__name__}: {error}"


class _Loaded:
    """A model whose weights and buffers are on the device."""

    def __init__(
        self,
        device: Device,
        operations: Any,
        model: DeviceModel,
        settings: dict[str, Any],
        rounded: bool,
        deterministic: bool,
    ) -> None:
        constants = model.constants
        self.vocabulary: int = constants["vocabulary"]
        self.long_context_row: int = settings["max_model_len"] or constants["max_positions"]
        sequences, tokens = settings["max_num_seqs"], settings["max_num_batched_tokens"]
        speculation = settings["speculation"]
        is_tree = speculation is not None and speculation[5] is not None
        self.sequences = StepLauncher.padded(sequences + (MOST_BRANCHES if is_tree else 0))
        self.rows = max(tokens, self.sequences)
        self.logit_rows = max(model.max_logit_rows(sequences, tokens), self.sequences)
        self._deterministic = deterministic
        if deterministic:
            self.rows, self.logit_rows = fixed_rows(self.rows), fixed_rows(self.logit_rows)
        weights = Weights(device, operations, model, self.long_context_row, rounded)
        self.executor = Executor(device, operations, model, weights, self.rows, self.sequences, self.logit_rows)
        self.executor.copies_pages = is_tree

    def runner(self, device: Device, pages: int, max_model_len: int, graphs: bool) -> Runner:
        """Make room for keys and values."""
        self.executor.allocate_pages(pages, max_model_len)
        return Runner(
            device,
            self.executor,
            rows=self.rows,
            sequences=self.sequences,
            pages=-(-max_model_len // PAGE_TOKENS),
            logit_rows=self.logit_rows,
            vocabulary=self.vocabulary,
            long_context_row=self.long_context_row,
            graphs=graphs,
            deterministic=self._deterministic,
        )


def open_engine(
    device: Device, path: Path, *, enforce_eager: bool, deterministic: bool, settings: dict[str, Any]
) -> tuple[Engine, Worker]:
    """Load a model, and perhaps one that guesses for it, and start an engine and its worker.

    Parameters
    ----------
    device
        Where; it belongs to the worker from here on, and is closed when this fails.
    path
        Folder or GGUF file.
    enforce_eager
        Capture no graphs.
    deterministic
        Compute each row with the same bits whatever is computed beside it.
    settings
        Keyword arguments of `Engine`.
    """
    try:
        return _open(device, path, not enforce_eager, deterministic, settings)
    except BaseException:
        device.close()
        raise


def _open(device: Device, path: Path, graphs: bool, deterministic: bool, settings: dict[str, Any]) -> tuple[Engine, Worker]:
    for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
        least = settings[name]
        if least is not None and (not isinstance(least, int) or least < 1):
            raise InferError(f"{name} must be at least 1, got {least!r}")
    quantization = settings["quantization"]
    rounded = quantization == "fp8"
    if settings["packed_cache_dir"] is not None:
        raise InferError("packed_cache_dir must be None with device='cuda', which packs no weights")
    speculation = settings["speculation"]
    paths = [path] if speculation is None or speculation[4] is None else [path, speculation[4]]
    options = {name: settings[name] for name in ("dtype", "kv_cache_dtype", "mmap", "load_format", "seed")}
    # A draft model is computed as it is stored. E4M3 is a matter of this device; the core knows the other ways of rounding.
    name = f"{device.name} fp8" if rounded else device.name
    models = [DeviceModel(path, backend=name, quantization=None if rounded else quantization, **options)]
    models += [DeviceModel(each, backend=device.name, **options) for each in paths[1:]]
    operations = device.operations(deterministic)
    loaded = [_Loaded(device, operations, model, settings, rounded and model is models[0], deterministic) for model in models]
    device.synchronize()
    outside = (models[0], models[1] if len(models) > 1 else None, device.free_bytes())
    engine = Engine(path, **{**settings, "quantization": None}, outside=outside)
    try:
        pages = engine.kv_cache_tokens // PAGE_TOKENS
        runners = [each.runner(device, pages, engine.max_model_len, graphs) for each in loaded]
        link = engine.work_link()
        if link is None:
            raise InferError("a bug in infer: the engine has no executor")
        worker = Worker(device, link, runners[0], runners[1] if len(runners) > 1 else None)
    except BaseException:
        engine.close()
        raise
    return engine, worker
