"""One model's steps from the engine's work to logits in host memory: padding, graphs, copies.

Steps of decoding, in which every row's logits are wanted and sequences have a few rows each, are padded to one of a few sizes;
each size is captured into a graph when it comes the second time (the first time, run as it comes, compiles its kernels), and
replayed from then on. Other steps hold prompts: they are enqueued kernel by kernel, which the GPU is busy enough to hide.

Tokens are drawn on the device, with all sampling parameters: of a vocabulary of 128,256 a row of logits is half a megabyte to
copy, and more work to look through on the host than a step takes on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from infer.gpu.arrays import LOGPROB_VALUES
from infer.gpu.attention import CHUNK_PAGES, DECODE_ROWS
from infer.gpu.executor import FULL, GREEDY, Launch
from infer.gpu.memory import STEPS_AT_ONCE, Plan

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from infer._core import Work
    from infer.gpu.device import Device
    from infer.gpu.executor import Executor

MOST_GRAPH_ROWS = 512


def padded(count: int) -> int:
    """Return the size that a count of rows or sequences is padded to: a power of two up to 8, then a multiple of 8, 16 or 32."""
    for size in (1, 2, 4, 8):
        if count <= size:
            return size
    step = 8 if count <= 64 else 16 if count <= 256 else 32
    return -(-count // step) * step


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
        self._device, self._executor, self._deterministic = device, executor, deterministic
        self.pages = executor.pages
        self._sequences = sequences
        self._plan = Plan(device, rows, sequences, pages, long_context_row, executor.choices)
        self._host_logits = device.pinned((logit_rows, vocabulary), "float32")
        self._host, self._other = (_PinnedOutcome(device, logit_rows) for _ in range(STEPS_AT_ONCE))
        self._most_graph_rows = min(MOST_GRAPH_ROWS, logit_rows, rows) if graphs else 0
        self._graphs: dict[tuple[int, int, int], Callable[[], None] | None] = {}

    def enqueue(self, work: Work) -> Outcome:
        """Enqueue a step; returns where its outcome will be once it is done."""
        self._plan.turn()
        self._host, self._other = self._other, self._host
        rows, sequences, wanted = work.rows, work.sequences, work.logit_rows
        size, drawn, kind = self._graph_size(work), work.drawn, work.draw_kind
        if kind != GREEDY:
            self._plan.send_draws(work, wanted if size is None else size[0])
        if size is None:
            launch = self._launch(work, rows, sequences, wanted, kind)
            self._plan.send(work, rows, sequences)
            self._executor.forward(launch)
            if any(drawn):
                self._executor.choose(launch)
        else:
            self._plan.send(work, *size)
            self._decode(work, size, kind)
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

    def _graph_size(self, work: Work) -> tuple[int, int] | None:
        """Return the padded rows and sequences of a step that a graph is made for: a decoding step that is not too large."""
        rows, sequences = work.rows, work.sequences
        if work.logit_rows != rows or rows > self._most_graph_rows or self._is_plain(work) or not self._only_decodes(work):
            return None
        size = padded(rows), padded(sequences)
        return size if size[0] <= self._most_graph_rows and size[1] <= self._sequences else None

    def _is_plain(self, work: Work) -> bool:
        if self._deterministic:
            return False
        return work.decode_pieces(CHUNK_PAGES, DECODE_ROWS) > self._executor.plans.size.items

    def _only_decodes(self, work: Work) -> bool:
        return work.most_rows <= DECODE_ROWS

    def _launch(self, work: Work, rows: int, sequences: int, wanted: int, kind: int) -> Launch:
        inputs, logit_rows = self._plan.inputs(rows, sequences), self._plan.logit_rows(rows)
        draws = self._plan.draws
        return Launch(inputs, rows, wanted, logit_rows, draws, kind, self._only_decodes(work), self._is_plain(work))

    def _decode(self, work: Work, size: tuple[int, int], kind: int) -> None:
        """Enqueue a decoding step of a padded size."""
        rows, sequences = size

        def run() -> None:
            launch = self._launch(work, rows, sequences, rows, kind)
            self._executor.forward(launch)
            self._executor.choose(launch)

        key = (*size, kind)
        if key not in self._graphs:
            self._graphs[key] = None
            run()
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = self._device.capture(run)
        graph()
