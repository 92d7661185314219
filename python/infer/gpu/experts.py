"""Mixture of experts: routing, and running the chosen experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infer._core import InferError
from infer.gpu.arrays import ACTIVATIONS, Routes, Rows, Weight
from infer.gpu.rows import RowOperations, element_macros, vector

if TYPE_CHECKING:
    from infer.gpu.arrays import StepInputs

WARPS = 8  # as in cuda/experts.cu
MOST_EXPERTS = 1024


class ExpertOperations(RowOperations):
    """Routing and experts, enqueued on one stream."""

    def route(self, inputs: StepInputs, logits: Rows, renormalise: bool, routes: Routes) -> None:
        """Softmax over all experts, then the ``routes.used`` largest of each row, ascending."""
        if logits.width > MOST_EXPERTS:
            raise InferError(f"{logits.width} experts are more than the {MOST_EXPERTS} that the GPU path can route to")
        most = max(256, logits.width)
        kernel = self.kernels.get("experts.cu", "route", MAX_EXPERTS=most, **element_macros(logits.dtype))
        pointers = (logits.pointer, inputs.row_sequence, routes.chosen, routes.weights)
        kernel(self.stream, (logits.rows,), 32, (*pointers, logits.stride, logits.width, routes.used, int(renormalise)))

    def experts(
        self, source: Rows, output: Rows, routes: Routes, gate_up: Weight, down: Weight, activation: str, inner: Rows
    ) -> None:
        """Weighted sum of the chosen experts' gated networks.

        ``gate_up`` is (experts, 2 * width, hidden), gate first, ``down`` (experts, hidden, width); ``inner`` is working memory,
        (rows * routes.used, width), contiguous.
        """
        width = gate_up.rows // 2
        macros = {**element_macros(source.dtype), "ACTIVATION": ACTIVATIONS.index(activation)}
        v = vector(gate_up.columns, source) if gate_up.pointer % 16 == 0 else 1
        first = self.kernels.get("experts.cu", "experts_gate_up", VECTOR=v, **macros, **gate_up.macros)
        weight = (gate_up.pointer, gate_up.bias, gate_up.scales, gate_up.minima)
        pointers = (source.pointer, routes.chosen, *weight, inner.pointer)
        shape = (source.stride, gate_up.columns, width, routes.used, gate_up.group or gate_up.columns)
        first(self.stream, (-(-width // WARPS), source.rows * routes.used), WARPS * 32, (*pointers, *shape))
        v = vector(width, inner) if down.pointer % 16 == 0 else 1
        second = self.kernels.get("experts.cu", "experts_down", VECTOR=v, **macros, **down.macros)
        weight = (down.pointer, down.bias, down.scales, down.minima)
        arguments = (inner.pointer, routes.chosen, routes.weights, *weight, output.pointer)
        shape = (output.stride, down.rows, width, routes.used, down.group or down.columns)
        second(self.stream, (-(-down.rows // WARPS), source.rows), WARPS * 32, (*arguments, *shape))
