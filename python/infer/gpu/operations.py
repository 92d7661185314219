"""All operations of a program, enqueued on one stream: what the executor calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infer._core import InferError
from infer.gpu.experts import ExpertOperations
from infer.gpu.linear import LinearOperations
from infer.gpu.packing import PackOperations

if TYPE_CHECKING:
    from infer.gpu.arrays import Rows
    from infer.gpu.kernels import Kernels

MOST_VOCABULARY = 1 << 19
ARGMAX_PARTS = 64
ARGMAX_BYTES = 16
"""Bytes of scratch that argmax needs for each row."""


class Operations(LinearOperations, ExpertOperations, PackOperations):
    """Operations on one device and stream. They only enqueue, allocate nothing, and may be captured into a graph.

    ``workspace`` is device memory for products, used by one operation after the other.
    """

    def __init__(self, kernels: Kernels, stream: int, workspace: int, workspace_bytes: int) -> None:
        LinearOperations.__init__(self, kernels, stream, workspace, workspace_bytes)

    def sample(self, logits: Rows, inverse_temperatures: int, min_ps: int, seeds: int, positions: int, chosen: int) -> None:
        """``chosen[row]`` = a token drawn as on the CPU, by temperature and min_p; the largest if the inverse temperature is 0.

        f32 (rows): ``min(1 / temperature, largest float)``, or 0 for greedy, and min_p; u64 (rows): the completion's seed, and
        the position of the token that is drawn. Rows of NaN or +inf, or without anything finite, give -1.
        """
        if logits.width > MOST_VOCABULARY:
            raise InferError(
                f"a vocabulary of {logits.width} tokens is more than the {MOST_VOCABULARY} that the GPU path samples from"
            )
        kernel = self.kernels.get("sampler.cu", "sample")
        arguments = (logits.pointer, inverse_temperatures, min_ps, seeds, positions, chosen, logits.stride, logits.width)
        kernel(self.stream, (logits.rows,), 1024, arguments)

    def argmax(self, logits: Rows, chosen: int, scratch: int) -> None:
        """``chosen[row]`` = id of the largest logit, the lowest among equals; -1 if a NaN or +inf is there, or nothing finite.

        ``logits`` is f32, ``chosen`` int32 (rows); ``scratch`` has ARGMAX_BYTES a row, zeroed once.
        """
        kernel = self.kernels.get("sampler.cu", "argmax")
        arguments = (logits.pointer, chosen, scratch, logits.stride, logits.width)
        kernel(self.stream, (min(ARGMAX_PARTS, -(-logits.width // 256)), logits.rows), 256, arguments)
