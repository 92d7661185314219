"""Products of many rows in E4M3 whose input is rounded by what makes it: a norm, or a gated activation.

The numbers are the same as those of separate steps, bit for bit; what is saved is writing the rows and reading them again. Gates
are combined by the product itself where that is a kernel of ours, before they are rounded, as those of bfloat16 are: half of the
numbers are written and read then, and a layer of 64 rows took 2 % less time (Llama 8B and 70B, one H100).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infer.gpu.blas import can_multiply
from infer.gpu.linear import LinearOperations, can_pair, can_stream
from infer.gpu.many import GATED
from infer.gpu.rows import MOST_HELD_THREADS, held_threads, norm_shape, vector

if TYPE_CHECKING:
    from infer.gpu.arrays import Rows, Weight


class ScaledOperations(LinearOperations):
    """Matrix products, enqueued on one stream."""

    def norm_linear(self, source: Rows, output: Rows, weight: Weight, norm: int, epsilon: float, scratch: Rows) -> None:
        """See `LinearOperations`."""
        if not self._norm_product(source, output, weight, norm, epsilon):
            super().norm_linear(source, output, weight, norm, epsilon, scratch)

    def linear_gated(self, source: Rows, output: Rows, weight: Weight, activation: str, scratch: Rows) -> None:
        """See `LinearOperations`."""
        if self._combines(source, output, weight, scratch):
            rounded = self._rounded(source)
            self.round_rows(source, rounded.pointer, self._space)
            self._multiply_grouped(rounded, output, weight, GATED, activation=activation, scales=self._space)
        else:
            super().linear_gated(source, output, weight, activation, scratch)

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
        """See `LinearOperations`."""
        width, both = weight.rows // 2, scratch.part(0, weight.rows)
        if self._combines(source, output, weight, scratch) and norm_shape(source.width, norm, source)[0] == 8:
            rounded = self._rounded(source)
            self.norm_round(source, rounded.pointer, self._space, epsilon, norm)
            self._multiply_grouped(rounded, output, weight, GATED, activation=activation, scales=self._space)
        elif self._norm_product(source, both, weight, norm, epsilon):
            self.gated_activation(both.part(0, width), both.part(width, width), output, activation)
        else:
            super().norm_linear_gated(source, output, weight, activation, norm, epsilon, normed, scratch)

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
        """``norm_linear_gated`` into ``inner``, whose contents are of no interest afterwards, and ``linear_add`` of that."""
        width, both = weight.rows // 2, scratch.part(0, weight.rows)
        gate, up = both.part(0, width), both.part(width, width)
        is_whole = vector(width, gate, up) == 8 and held_threads(width) <= MOST_HELD_THREADS
        is_whole = is_whole and not self._combines(source, inner, weight, scratch)
        if is_whole and self._is_scaled(inner, destination, down) and self._norm_product(source, both, weight, norm, epsilon):
            rounded = self._rounded(inner)
            self.gated_round(gate, up, rounded.pointer, self._space, activation)
            self._rounded_product(rounded, destination, down, scale, 1.0)
            return
        self.norm_linear_gated(source, inner, weight, activation, norm, epsilon, normed, scratch)
        self.linear_add(inner, destination, down, scale)

    def _is_scaled(self, source: Rows, output: Rows, weight: Weight) -> bool:
        """Return whether rows are rounded to E4M3 for this product."""
        if weight.type != "e4m3" or source.rows == 0 or can_stream(source, output, weight):
            return False
        if self._is_many(source, output, weight) or can_multiply(source, weight, output):
            return False
        return self._can_unpack(source, output, weight) and self._can_scale(source, output, weight)

    def _combines(self, source: Rows, output: Rows, weight: Weight, scratch: Rows) -> bool:
        """Return whether the product of rows rounded to E4M3 combines gates itself."""
        is_scaled = can_pair(weight) and self._is_scaled(source, scratch.part(0, weight.rows), weight)
        return is_scaled and self._is_for_groups(source.rows, output, weight)

    def _norm_product(self, source: Rows, output: Rows, weight: Weight, norm: int, epsilon: float) -> bool:
        """Multiply the norm of rows, rounded to E4M3 at once; return whether that was possible."""
        if not self._is_scaled(source, output, weight) or norm_shape(source.width, norm, source)[0] != 8:
            return False
        rounded = self._rounded(source)
        self.norm_round(source, rounded.pointer, self._space, epsilon, norm)
        self._rounded_product(rounded, output, weight, 1.0, 0.0)
        return True
