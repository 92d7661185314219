"""One model's steps from the engine's work to logits in host memory: padding, graphs, copies.

Steps are padded to one of a few sizes: steps of decoding, in which every row's logits are wanted and sequences have a few rows
each, finely; others, which hold prompts, by a thirty-second or so. Each size is captured into a graph when it comes the second
time (the first time, run as it comes, compiles its kernels), and replayed from then on: kernel by kernel, a step of 16 layers
takes Python 4 milliseconds. A step with prompts takes the device longer than Python, so the second one runs as it comes, too, and
is captured while the device computes it. Steps whose every row's logits are wanted by the caller, and those of many more sizes
than are kept, run as they come.

Tokens are drawn on the device, with all sampling parameters: of a vocabulary of 128,256 a row of logits is half a megabyte to
copy, and more work to look through on the host than a step takes on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

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
"""Most rows of a step of decoding that a graph is made for."""

MOST_PROMPT_GRAPHS = 64
MOST_PROMPT_WANTED = 256
"""Most rows with logits of other steps for which graphs are made."""


def padded(count: int) -> int:
    """Return the size that a count of rows or sequences is padded to: a power of two up to 8, then a multiple of 8, 16 or 32."""
    for size in (1, 2, 4, 8):
        if count <= size:
            return size
    step = 8 if count <= 64 else 16 if count <= 256 else 32
    return -(-count // step) * step


def padded_prompt(count: int) -> int:
    """Return the rows that a step with prompts is padded to: few sizes, and few rows for nothing where rows cost time.

    Steps that the engine cuts for their time (`whole_rows` in rust/engine/src/config.rs) are of such sizes already.
    """
    if count <= 64:
        return max(16, 1 << (count - 1).bit_length())
    step = 64 if count <= 1024 else max(128, 1 << ((count - 1).bit_length() - 5))
    return -(-count // step) * step


def padded_widely(count: int) -> int:
    """Return a power of four: what a step's sequences, and its rows with logits, are padded to."""
    return 1 << ((count - 1).bit_length() + 1 & ~1) if count > 1 else count


class Size(NamedTuple):
    """What a step is padded to."""

    rows: int
    sequences: int
    wanted: int
    """Rows with logits."""
    only_decode: bool
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
        self._device, self._executor, self._deterministic = device, executor, deterministic
        self.pages = executor.pages
        self._most = rows, sequences, logit_rows
        self._plan = Plan(device, rows, sequences, pages, long_context_row, executor.choices)
        self._host_logits = device.pinned((logit_rows, vocabulary), "float32")
        self._host, self._other = (_PinnedOutcome(device, logit_rows) for _ in range(STEPS_AT_ONCE))
        self._has_graphs = graphs
        self._graphs: dict[tuple[Size, int | None], Callable[[], None] | None] = {}
        self._prompt_graphs = 0

    def enqueue(self, work: Work) -> Outcome:
        """Enqueue a step; returns where its outcome will be once it is done."""
        self._plan.turn()
        self._host, self._other = self._other, self._host
        is_plain = self._is_plain(work)
        size, drawn, kind = self._size(work, is_plain), work.drawn, work.draw_kind
        if kind != GREEDY:
            self._plan.send_draws(work, size.wanted)
        self._plan.send(work, size.rows, size.sequences)
        self._compute(size, kind if any(drawn) else None, is_plain)
        return self._collect(drawn, kind)

    def _size(self, work: Work, is_plain: bool) -> Size:
        """Return what a step is padded to."""
        rows, sequences, wanted = work.rows, work.sequences, work.logit_rows
        most_rows, most_sequences, most_wanted = self._most
        only_decode = work.most_rows <= DECODE_ROWS
        if only_decode and wanted == rows:
            size, most = padded(rows), min(MOST_GRAPH_ROWS, most_wanted, most_rows)
            if self._has_graphs and not is_plain and size <= most and padded(sequences) <= most_sequences:
                return Size(size, padded(sequences), size, only_decode=True, is_captured=True)
            return Size(rows, sequences, wanted, only_decode, is_captured=False)
        size = min(padded_prompt(rows), most_rows)
        if is_plain or wanted > MOST_PROMPT_WANTED:
            return Size(size, sequences, wanted, only_decode, is_captured=False)
        sequences = min(padded_widely(sequences), most_sequences)
        if wanted > 1:  # nearly as many as sequences, then, and nearly free: one size for both
            wanted = min(max(min(sequences, MOST_PROMPT_WANTED), padded_widely(wanted)), most_wanted, size)
        return Size(size, sequences, wanted, only_decode=False, is_captured=self._has_graphs)

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

    def _is_plain(self, work: Work) -> bool:
        if self._deterministic:
            return False
        return work.decode_pieces(CHUNK_PAGES, DECODE_ROWS) > self._executor.plans.size.items

    def _compute(self, size: Size, kind: int | None, is_plain: bool) -> None:
        """Enqueue a step of a padded size, and the choice of tokens unless ``kind`` is None."""

        def run() -> None:
            launch = self._launch(size, kind, is_plain)
            self._executor.forward(launch)
            if kind is not None:
                self._executor.choose(launch)

        key = size, kind
        if (graph := self._graphs.get(key)) is not None:
            graph()
            return
        is_time = size.is_captured and self._is_time(size, key in self._graphs)
        if is_time and size.only_decode:
            graph = self._graphs[key] = self._device.capture(run)
            graph()
            return
        run()
        if is_time:
            self._graphs[key] = self._device.capture(run)
        elif size.is_captured:
            self._graphs[key] = None

    def _launch(self, size: Size, kind: int | None, is_plain: bool) -> Launch:
        inputs, wanted = self._plan.inputs(size.rows, size.sequences), self._plan.logit_rows(size.rows)
        known = (self._plan.draws, GREEDY if kind is None else kind, size.only_decode, is_plain)
        return Launch(inputs, size.rows, size.wanted, wanted, *known)

    def _is_time(self, size: Size, is_known: bool) -> bool:
        """Return whether a graph is made for a size now: when it comes the second time."""
        if not is_known or size.only_decode:
            return is_known
        self._prompt_graphs += 1
        return self._prompt_graphs <= MOST_PROMPT_GRAPHS
