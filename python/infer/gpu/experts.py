"""Mixture of experts: routing, and running the chosen experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from infer._core import InferError
from infer.gpu.arrays import ACTIVATIONS, Routes, Rows, Weight
from infer.gpu.rows import THREADS, RowOperations, element_macros, vector

if TYPE_CHECKING:
    from infer.gpu.arrays import StepInputs

WARPS = 8  # as in cuda/experts.cu and cuda/experts_grouped.cu
MOST_EXPERTS = 1024
GROUPED_ROWS = 2048
"""Most rows whose choices are grouped at a time: what a larger step's rows chose is grouped in several parts."""
FEW_ENTRIES = 4
"""Most choices for which experts' weights are read once for each, plainly; or an eighth of the experts: few choose the same."""
TILES = {16: 4, 64: 3}
"""Entries of a tile of cuda/experts_grouped.cu, and its stages."""
TILE_OUTPUTS, TILE_STEP = 128, 64


@dataclass(frozen=True)
class ExpertMemory:
    """Working memory of grouped experts, for up to GROUPED_ROWS rows."""

    members: int
    """int32 (experts, rows)"""
    counts: int
    """int32 (experts)"""
    parts: int
    """bf16 (rows * used, hidden)"""


class ExpertOperations(RowOperations):
    """Routing and experts, enqueued on one stream."""

    always_groups = False
    """Group rows by expert however few they are, so that a row's bits do not depend on their number."""

    def route(self, inputs: StepInputs, logits: Rows, renormalise: bool, routes: Routes) -> None:
        """Softmax over all experts, then the ``routes.used`` largest of each row, ascending."""
        if logits.width > MOST_EXPERTS:
            raise InferError(f"{logits.width} experts are more than the {MOST_EXPERTS} that the GPU path can route to")
        most = max(256, logits.width)
        kernel = self.kernels.get("experts.cu", "route", MAX_EXPERTS=most, **element_macros(logits.dtype))
        pointers = (logits.pointer, inputs.row_sequence, routes.chosen, routes.weights)
        kernel(self.stream, (logits.rows,), 32, (*pointers, logits.stride, logits.width, routes.used, int(renormalise)))

    def experts(
        self,
        source: Rows,
        output: Rows,
        routes: Routes,
        gate_up: Weight,
        down: Weight,
        activation: str,
        inner: Rows,
        memory: ExpertMemory | None = None,
    ) -> None:
        """Weighted sum of the chosen experts' gated networks.

        ``gate_up`` is (experts, 2 * width, hidden), gate first, ``down`` (experts, hidden, width); ``inner`` is working memory,
        (rows * routes.used, width), contiguous. Without ``memory``, every row reads the weights of its experts by itself.
        """
        few = source.rows == 1 or source.rows * routes.used <= max(FEW_ENTRIES, gate_up.experts // 8)
        few = few and not self.always_groups
        if memory is None or few or not can_group(source, output, inner, gate_up, down):
            self._experts_plainly(source, output, routes, gate_up, down, activation, inner)
            return
        for first in range(0, source.rows, GROUPED_ROWS):
            rows = min(GROUPED_ROWS, source.rows - first)
            entry = first * routes.used * 4
            own = Routes(routes.chosen + entry, routes.weights + entry, routes.used)
            part = (
                source.from_row(first, rows),
                output.from_row(first, rows),
                inner.from_row(first * routes.used, rows * routes.used),
            )
            self._experts_grouped(*part, own, gate_up, down, activation, memory)

    def _experts_grouped(
        self,
        source: Rows,
        output: Rows,
        inner: Rows,
        routes: Routes,
        gate_up: Weight,
        down: Weight,
        activation: str,
        memory: ExpertMemory,
    ) -> None:
        entries, experts, used = source.rows * routes.used, gate_up.experts, routes.used
        kernel = self.kernels.get("experts_grouped.cu", "experts_members")
        pointers = (routes.chosen, memory.members, memory.counts)
        kernel(self.stream, (experts,), WARPS * 32, (*pointers, entries, source.rows))
        tile = 64 if entries >= 32 * experts else 16
        most_tiles = min(entries, -(-entries // tile) + experts)
        shared = TILES[tile] * (tile + TILE_OUTPUTS) * TILE_STEP * 2
        width = gate_up.rows // 2
        cases = ((gate_up, source, inner.pointer, width, 1, used), (down, inner, memory.parts, down.rows, 0, 1))
        for weight, rows, target, outputs, gated, divisor in cases:
            macros = {"TILE": tile, "GATED": gated, "ACTIVATION": ACTIVATIONS.index(activation), **weight.macros}
            kernel = self.kernels.get("experts_grouped.cu", "experts_grouped", **macros)
            grid = (-(-outputs // (TILE_OUTPUTS >> gated)), most_tiles)
            lists = (rows.pointer, memory.members, memory.counts)
            matrix = (weight.pointer, weight.bias, weight.scales, weight.minima)
            shape = (rows.stride, weight.columns, outputs, experts, source.rows, divisor, weight.group or weight.columns)
            kernel(self.stream, grid, WARPS * 32, (*lists, *matrix, routes.weights, target, *shape), shared)
        kernel = self.kernels.get("experts_grouped.cu", "experts_sum")
        grid = (-(-output.width // (THREADS * 8)), output.rows)
        kernel(self.stream, grid, THREADS, (routes.chosen, memory.parts, output.pointer, output.stride, output.width, used))

    def _experts_plainly(
        self, source: Rows, output: Rows, routes: Routes, gate_up: Weight, down: Weight, activation: str, inner: Rows
    ) -> None:
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


def can_group(source: Rows, output: Rows, inner: Rows, gate_up: Weight, down: Weight) -> bool:
    """Return whether the kernels that group rows by expert take these types, widths and alignments."""
    types = all(weight.type in ("bf16", "e4m3") or weight.is_packed for weight in (gate_up, down)) and source.dtype == "bf16"
    widths = (gate_up.columns, down.columns, down.rows, source.stride, output.stride)
    pointers = (gate_up.pointer, down.pointer, source.pointer, output.pointer, inner.pointer)
    return types and all(n % 8 == 0 for n in widths) and all(pointer % 16 == 0 for pointer in pointers)
