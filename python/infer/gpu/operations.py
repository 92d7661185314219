"""All operations of a program, enqueued on one stream: what the executor calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infer._core import InferError
from infer.gpu.arrays import MOST_BRANCHES
from infer.gpu.experts import ExpertOperations
from infer.gpu.layers import LayerOperations
from infer.gpu.packing import PackOperations
from infer.gpu.screen import ScreenOperations

if TYPE_CHECKING:
    from infer.gpu.arrays import Draws, Rows, StepInputs
    from infer.gpu.kernels import Kernels
    from infer.gpu.memory import Parts

MOST_VOCABULARY = 1 << 19
ARGMAX_PIECE = 1024  # logits that a block of 256 threads reads at once
ARGMAX_BLOCKS = 8  # for each multiprocessor: more would end when they have hardly begun
LEAST_PARTS = 8
COPY_THREADS = 512
ARGMAX_BYTES = 16
"""Bytes of scratch that argmax needs for each row."""


class Operations(LayerOperations, ScreenOperations, ExpertOperations, PackOperations):
    """Operations on one device and stream. They only enqueue, allocate nothing, and may be captured into a graph.

    ``workspace`` is device memory for products, used by one operation after the other.
    """

    def __init__(self, kernels: Kernels, stream: int, workspace: int, workspace_bytes: int) -> None:
        LayerOperations.__init__(self, kernels, stream, workspace, workspace_bytes)

    def sample(self, logits: Rows, draws: Draws, chosen: int, full: bool) -> None:
        """``chosen[row]`` = a token drawn as on the CPU; -1 for rows that hold a NaN or +inf, -2 where none is left.

        ``full``: some rows have changes of their logits, or want log-probabilities; `chosen` then holds what the step before
        chose until it is written. Of rows with changes, logits are as they were only where log-probabilities are wanted.
        """
        if logits.width > MOST_VOCABULARY:
            raise InferError(
                f"a vocabulary of {logits.width} tokens is more than the {MOST_VOCABULARY} that the GPU path samples from"
            )
        grid = (logits.rows,)
        if full:
            kernel = self.kernels.get("sampler.cu", "change")
            kernel(self.stream, grid, 256, (logits.pointer, draws.pointer, draws.words, draws.latest, chosen, logits.stride))
        kernel = self.kernels.get("sampler.cu", "sample")
        kernel(self.stream, grid, 1024, (logits.pointer, draws.pointer, draws.words, chosen, logits.stride, logits.width))
        if full:
            kernel = self.kernels.get("logprobs.cu", "logprobs")
            pointers = (logits.pointer, draws.pointer, draws.words, draws.latest, chosen, draws.told)
            kernel(self.stream, grid, 1024, (*pointers, logits.stride, logits.width))

    def copy_page(self, parts: Parts, source: int, target: int) -> None:
        """Copy a page over another, in all layers."""
        self.kernels.get("pages.cu", "copy_page")(self.stream, (parts.count,), COPY_THREADS, (parts.pointer, source, target))

    def copy_pages(self, inputs: StepInputs, parts: Parts) -> None:
        """Copy the pages of a step."""
        grid = (parts.count, MOST_BRANCHES)
        self.kernels.get("pages.cu", "copy_pages")(self.stream, grid, COPY_THREADS, (parts.pointer, inputs.copies))

    def argmax(self, logits: Rows, chosen: int, scratch: int) -> None:
        """``chosen[row]`` = id of the largest logit, the lowest among equals; -1 if a NaN or +inf is there, or nothing finite.

        ``logits`` is f32, ``chosen`` int32 (rows); ``scratch`` has ARGMAX_BYTES a row, zeroed once.
        """
        kernel = self.kernels.get("sampler.cu", "argmax")
        arguments = (logits.pointer, chosen, scratch, logits.stride, logits.width)
        parts = max(LEAST_PARTS, ARGMAX_BLOCKS * self.kernels.multiprocessors // max(logits.rows, 1))
        kernel(self.stream, (min(parts, -(-logits.width // ARGMAX_PIECE)), logits.rows), 256, arguments)
