"""Layers in one go on numpy: their operations one by one, for steps of as few rows as the kernel takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from infer.gpu.layers import COUNTER_BYTES, MOST_LAYER_ROWS, Layer, Stack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from infer.gpu.arrays import StepInputs, Weight
    from infer.gpu.attention import AttentionPlan


class NumpyLayers:
    """Whole layers."""

    qkv: Any
    attend: Any
    linear_add: Any
    norm_gated_add: Any

    def layer_records(self, layers: Sequence[Layer]) -> NDArray[np.uint8] | None:
        """See `LayerOperations`: nothing but zeros is kept."""
        return np.zeros(COUNTER_BYTES, np.uint8)

    def can_screen(self, head: Weight) -> bool:
        """None are here."""
        return False

    def layers(self, inputs: StepInputs, plan: AttentionPlan, stack: Stack) -> bool:
        """See `LayerOperations`."""
        if inputs.rows > MOST_LAYER_ROWS or not plan.only_decode:
            return False
        for layer in stack.layers:
            places = (layer.hidden, layer.qkv, layer.queries, layer.attended, layer.inner, layer.both, layer.normed)
            hidden, qkv, queries, attended, inner, both, normed = (rows.first(inputs.rows) for rows in places)
            first, attention, gate_up, down = layer.weights
            norms, epsilons, scales = layer.norms, layer.epsilons, layer.scales
            self.qkv(inputs, hidden, qkv, first, layer.pages, layer.heads, layer.table, norms[0], epsilons[0], normed)
            self.attend(inputs, plan, queries, attended, layer.pages, stack.attention_scale, stack.softcap)
            self.linear_add(attended, hidden, attention, scales[0])
            own = (layer.activation, norms[1], epsilons[1], scales[1], normed, both)
            self.norm_gated_add(hidden, inner, hidden, gate_up, down, *own)
        return True
