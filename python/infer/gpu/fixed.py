"""Operations whose result for a row is the same bits whatever rows are computed beside it: `LLM(deterministic=True)`.

What is fast for one row and for a thousand adds in different orders. Here every matrix product is made of blocks of exactly
FIXED_ROWS rows, the last one filled up with rows that nobody reads: all choices that follow from the number of rows (of
kernels, of cuBLASLt's algorithms, of what is fused) are then the same for every step. Attention is always that of the prefill
kernel, whose pieces of positions are aligned to position 0. Everything else computes rows by themselves anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infer.gpu.operations import Operations

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from infer.gpu.arrays import KvLayer, RopeTable, Rows, StepInputs, Weight
    from infer.gpu.attention import AttentionPlan
    from infer.gpu.layers import Layer

FIXED_ROWS = 128
"""Buffers have a multiple of so many rows."""


def fixed_rows(count: int) -> int:
    """Return the rows that buffers must have for ``count`` of them."""
    return -(-count // FIXED_ROWS) * FIXED_ROWS


class FixedOperations(Operations):
    """As `Operations`, on buffers of whole blocks of rows."""

    decode_rows = 0
    always_groups = True
    is_timed = False

    def layer_records(self, layers: Sequence[Layer]) -> None:
        """See `Operations`: steps run one by one."""

    def can_screen(self, head: Weight) -> bool:
        """See `Operations`: the greatest of sums in another order might be another one."""
        return False

    def linear(self, source: Rows, output: Rows, weight: Weight) -> None:
        """See `Operations`."""
        for own, target in _blocks(source, output):
            super().linear(own, target, weight)

    def linear_add(self, source: Rows, destination: Rows, weight: Weight, scale: float = 1.0) -> None:
        """See `Operations`."""
        for own, target in _blocks(source, destination):
            super().linear_add(own, target, weight, scale)

    def linear_gated(self, source: Rows, output: Rows, weight: Weight, activation: str, scratch: Rows) -> None:
        """See `Operations`."""
        for own, target, space in _blocks(source, output, scratch):
            super().linear_gated(own, target, weight, activation, space)

    def norm_linear(self, source: Rows, output: Rows, weight: Weight, norm: int, epsilon: float, scratch: Rows) -> None:
        """See `Operations`."""
        for own, target, space in _blocks(source, output, scratch):
            super().norm_linear(own, target, weight, norm, epsilon, space)

    def norm_linear_gated(
        self,
        source: Rows,
        output: Rows,
        weight: Weight,
        activation: str,
        norm: int,
        epsilon: float,
        normed: Rows,
        scratch: Rows,
    ) -> None:
        """See `Operations`."""
        for own, target, rows, space in _blocks(source, output, normed, scratch):
            super().norm_linear_gated(own, target, weight, activation, norm, epsilon, rows, space)

    def norm_gated_add(
        self,
        source: Rows,
        inner: Rows,
        destination: Rows,
        weight: Weight,
        down: Weight,
        activation: str,
        norm: int,
        epsilon: float,
        scale: float,
        normed: Rows,
        scratch: Rows,
    ) -> None:
        """See `Operations`."""
        for own, middle, target, rows, space in _blocks(source, inner, destination, normed, scratch):
            super().norm_linear_gated(own, middle, weight, activation, norm, epsilon, rows, space)
            super().linear_add(middle, target, down, scale)

    def qkv(
        self,
        inputs: StepInputs,
        source: Rows,
        qkv: Rows,
        weight: Weight,
        layer: KvLayer,
        heads: int,
        table: RopeTable,
        norm: int,
        epsilon: float,
        scratch: Rows,
        plan: AttentionPlan | None = None,
    ) -> None:
        """See `Operations`."""
        if norm:
            self.norm_linear(source, qkv, weight, norm, epsilon, scratch)
        else:
            self.linear(source, qkv, weight)
        self.rope_write_kv(inputs, qkv, layer, heads, table)


def _blocks(*all_rows: Rows) -> Iterator[list[Rows]]:
    """Yield the blocks of several buffers' rows, whole ones, one after the other."""
    for first in range(0, all_rows[0].rows, FIXED_ROWS):
        yield [_block(rows, first) for rows in all_rows]


def _block(rows: Rows, first: int) -> Rows:
    return rows.from_row(first, FIXED_ROWS)
