"""One model's steps from the engine's work to logits in host memory: padding, graphs, copies.

Steps are padded to one of a few sizes (rust/engine/src/padding.rs). Each size is captured into a graph when it comes the second
time (the first time, run as it comes, compiles its kernels), and replayed from then on: kernel by kernel, a step of 16 layers
takes Python 4 milliseconds. A graph is handed over to the core, which launches steps of its size without Python from then on, if
all of their tokens are drawn (rust/bindings/src/launcher.rs). A step with prompts takes the device longer than Python, so the
second one runs as it comes, too, and is captured while the device computes it. Steps whose every row's logits are wanted by the
caller, and those of many more sizes than are kept, run as they come.

Tokens are drawn on the device, with all sampling parameters: of a vocabulary of 128,256 a row of logits is half a megabyte to
copy, and more work to look through on the host than a step takes on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from infer._core import StepLauncher
from infer.gpu.arrays import LOGPROB_VALUES, MOST_BRANCHES
from infer.gpu.attention import CHUNK_PAGES, DECODE_ROWS
from infer.gpu.executor import FULL, GREEDY, Launch
from infer.gpu.memory import SMALL_TABLES, STEPS_AT_ONCE, Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from infer._core import Work
    from infer.gpu.device import Device, Graph
    from infer.gpu.executor import Executor

MOST_PROMPT_GRAPHS = 64


class Size(NamedTuple):
    """What a step is padded to."""

    rows: int
    sequences: int
    wanted: int
    """Rows with logits."""
    only_decode: bool
    is_plain: bool
    """There is no room for the pieces of its attention."""
    is_captured: bool


@dataclass
class Outcome:
    """What a step gives, in pinned memory: logits until the next step that gives some, the rest until the step after the next."""

    logits: NDArray[np.float32]
    """Of the rows that are not drawn, one after the other."""
    choices: NDArray[np.int32] | None
    """Of all wanted rows; None where none are drawn."""
    logprobs: NDArray[np.int32] | None
    """(wanted rows, LOGPROB_VALUES); None where nobody wants any."""


class _PinnedOutcome:
    """What one step's choices are copied to."""

    def __init__(self, device: Device, rows: int) -> None:
        self.choices = device.pinned((rows,), "int32")
        self.logprobs = device.pinned((rows, LOGPROB_VALUES), "int32")


class Runner:
    """Runs one model.

    Parameters
    ----------
    device, executor
        The device, and the model on it.
    rows, sequences, pages
        The most rows and sequences of a step, and pages of a sequence.
    logit_rows, vocabulary
        The most rows whose logits a step gives, and their width.
    long_context_row
        First row of the tables of cosines and sines that long contexts use.
    graphs
        Whether to capture graphs.
    deterministic
        Whether the kernel that computes attention may not depend on the step.
    """

    def __init__(
        self,
        device: Device,
        executor: Executor,
        rows: int,
        sequences: int,
        pages: int,
        logit_rows: int,
        vocabulary: int,
        long_context_row: int,
        graphs: bool,
        deterministic: bool,
    ) -> None:
        self._device, self._executor = device, executor
        self.pages = executor.pages
        self._plan = Plan(device, rows, sequences, pages, long_context_row, executor.choices)
        self._host_logits = device.pinned((logit_rows, vocabulary), "float32")
        self._outcomes = [_PinnedOutcome(device, logit_rows) for _ in range(STEPS_AT_ONCE)]
        self._host = self._outcomes[0]
        self._graphs: dict[tuple[Size, int | None, bool], Graph | None] = {}
        self._handed: dict[tuple[Size, int | None], Graph] = {}
        self._prompt_graphs = 0
        pieces = None if deterministic else executor.plans.size.items
        limits = (rows, sequences, logit_rows, pieces, CHUNK_PAGES, DECODE_ROWS, graphs)
        self.launcher = self._launcher(limits, long_context_row)

    def _launcher(self, limits: tuple[int, int, int, int | None, int, int, bool], long_context_row: int) -> StepLauncher:
        """Return what launches steps that need no Python, from the same memory."""
        halves = []
        for plan, outcome in zip(self._plan.halves, self._outcomes, strict=True):
            event = self._device.event()
            arrays = (plan.rows, plan.draws, plan.words, plan.table, outcome.choices, outcome.logprobs)
            halves.append((*arrays, int(event.ptr), event))
        return StepLauncher(
            self._device.functions(),
            self._device.stream,
            limits=limits,
            places=(*self._plan.places, self._executor.choices, self._plan.draws.told),
            halves=(halves[0], halves[1]),
            long_context_row=long_context_row,
            small_tables=SMALL_TABLES,
            copies=self._executor.copies_pages,
        )

    def copy_pages(self, work: Work, in_step: bool) -> None:
        """Enqueue the copies that come before a step, unless the step itself makes them."""
        copies = work.copies
        if not (in_step and self._executor.copies_pages and len(copies) <= MOST_BRANCHES):
            for source, target in copies:
                self._executor.copy_page(source, target)

    def enqueue(self, work: Work) -> Outcome:
        """Enqueue a step; returns where its outcome will be once it is done."""
        half = self.launcher.turn()
        self._plan.turn(half)
        self._host = self._outcomes[half]
        size, drawn, kind = Size(*self.launcher.size(work)), work.drawn, work.draw_kind
        if kind != GREEDY:
            self._plan.send_draws(work, size.wanted)
        self._plan.send(work, size.rows, size.sequences)
        is_screened = kind == GREEDY and all(drawn) and self._executor.screens(size.wanted)
        self._compute(size, kind if any(drawn) else None, is_screened)
        if is_screened:
            self._executor.watch_screen()
        return self._collect(drawn, kind)

    def _collect(self, drawn: list[bool], kind: int) -> Outcome:
        """Enqueue copies of what is wanted: choices of all rows if of any, and logits of those that are not drawn."""
        place = 0
        logits = self._executor.logits(len(drawn))
        for one, run in groupby(range(len(drawn)), key=drawn.__getitem__):
            if not one:
                numbers = list(run)
                part = self._host_logits[place : place + len(numbers)]
                self._device.download(part, logits.pointer + 4 * logits.stride * numbers[0])
                place += len(numbers)
        outcome = Outcome(self._host_logits[:place], None, None)
        if place < len(drawn):
            outcome.choices = self._host.choices[: len(drawn)]
            self._device.download(outcome.choices, self._executor.choices)
        if kind == FULL:
            outcome.logprobs = self._host.logprobs[: len(drawn)]
            self._device.download(outcome.logprobs, self._plan.draws.told)
        return outcome

    def _compute(self, size: Size, kind: int | None, is_screened: bool) -> None:
        """Enqueue a step of a padded size, and the choice of tokens unless ``kind`` is None."""

        def run() -> None:
            launch = self._launch(size, kind, is_screened)
            self._executor.forward(launch)
            if kind is not None:
                self._executor.choose(launch)

        key = size, kind, is_screened
        if (graph := self._graphs.get(key)) is not None:
            graph()
            if is_screened:
                self._hand_over(size, kind, graph)
            return
        is_time = size.is_captured and self._is_time(size, key in self._graphs)
        if is_time and size.only_decode:
            self._capture(*key, run)()
            return
        run()
        if is_time:
            self._capture(*key, run)
        elif size.is_captured:
            self._graphs[key] = None

    def _capture(self, size: Size, kind: int | None, is_screened: bool, run: Callable[[], None]) -> Graph:
        """Make a graph of what ``run`` enqueues."""
        graph = self._graphs[size, kind, is_screened] = self._device.capture(run)
        # The core launches steps whose rows are all drawn. Screened ones it gets when they come the third time: then the first is
        # done, so that it is known whether the screen pays.
        if kind != GREEDY or not self._executor.screens(size.wanted):
            self._hand_over(size, kind, graph)
        return graph

    def _hand_over(self, size: Size, kind: int | None, graph: Graph) -> None:
        """Have the core launch a graph from now on, unless it does."""
        if self._handed.get((size, kind)) is not graph:
            self._handed[size, kind] = graph
            self.launcher.add(size, kind, graph.ptr, graph)

    def _launch(self, size: Size, kind: int | None, is_screened: bool = False) -> Launch:
        inputs, wanted = self._plan.inputs(size.rows, size.sequences), self._plan.logit_rows(size.rows)
        known = (self._plan.draws, GREEDY if kind is None else kind, size.only_decode, size.is_plain, is_screened)
        return Launch(inputs, size.rows, size.wanted, wanted, *known)

    def _is_time(self, size: Size, is_known: bool) -> bool:
        """Return whether a graph is made for a size now: when it comes the second time."""
        if not is_known or size.only_decode:
            return is_known
        self._prompt_graphs += 1
        return self._prompt_graphs <= MOST_PROMPT_GRAPHS
