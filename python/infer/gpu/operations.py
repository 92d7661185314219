"""All operations of a program, enqueued on one stream: what the executor calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infer.gpu.experts import ExpertOperations
from infer.gpu.linear import LinearOperations

if TYPE_CHECKING:
    from infer.gpu.arrays import Rows
    from infer.gpu.kernels import Kernels

ARGMAX_PARTS = 64
ARGMAX_BYTES = 16
"""Bytes of scratch that argmax needs for each row."""


class Operations(LinearOperations, ExpertOperations):
    """Operations on one device and stream. They only enqueue, allocate nothing, and may be captured into a graph.

    ``workspace`` is device memory for products, used by one operation after the other.
    """

    def __init__(self, kernels: Kernels, stream: int, workspace: int, workspace_bytes: int) -> None:
        LinearOperations.__init__(self, kernels, stream, workspace, workspace_bytes)

    def argmax(self, logits: Rows, chosen: int, scratch: int) -> None:
        """``chosen[row]`` = id of the largest logit, the lowest among equals; -1 if a NaN or +inf is there, or nothing finite.

        ``logits`` is f32, ``chosen`` int32 (rows); ``scratch`` has ARGMAX_BYTES a row, zeroed once.
        """
        kernel = self.kernels.get("sampler.cu", "argmax")
        arguments = (logits.pointer, chosen, scratch, logits.stride, logits.width)
        kernel(self.stream, (min(ARGMAX_PARTS, -(-logits.width // 256)), logits.rows), 256, arguments)
