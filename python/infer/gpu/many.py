"""Products of more rows than are streamed, and few enough to read weights at memory speed: cuda/linear_many.cu.

The division of the work among blocks, and so the order of sums, follows from the weight, the GPU, and whether there are more than
64 rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from infer.gpu.arrays import ACTIVATIONS, c_type
from infer.gpu.attention import AttentionOperations

if TYPE_CHECKING:
    from infer.gpu.arrays import Rows, Weight
    from infer.gpu.kernels import Kernels

STORE, ADD, GATED = 0, 1, 2
"""How a product ends, as in cuda/epilogue.cuh."""

TOKENS = (128, 96, 64, 32)
"""Rows of a launch, as many as shared memory holds."""

SPAN = 64  # columns
GROUP_ROWS = 64  # weight rows of four warps
MOST_GROUPS = 4  # of four warps, in a block
MOST_SPLITS = 8  # blocks of a cluster
LEAST_STAGES, MOST_STAGES = 4, 6
STATIC_BYTES = 1024  # of shared memory, that a kernel declares itself, at most
ALIGNED = 1024  # bytes that stages in shared memory are a multiple of
CLASSES = (64, 128)  # of rows: what a division is chosen for
# Microseconds on an H100, fitted to 180 divisions of 29 weights:
STEP_COST = 0.22  # of a step of a block,
UNPACKED_COST = 0.1  # and for each group whose weights are not bfloat16,
READ_COST = 0.23e-4  # and for each byte of weights,
INPUT_COST = 0.06e-4  # and of input rows,
SUM_COST = 0.63e-4  # and for each byte of sums, once


class Division(NamedTuple):
    """Groups of warps of a block along rows and columns of the weight, and blocks that share the columns."""

    row_groups: int
    column_groups: int
    splits: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.row_groups * self.column_groups * 128

    @property
    def block_rows(self) -> int:
        """Weight rows of a block."""
        return self.row_groups * GROUP_ROWS


class Layout(NamedTuple):
    """What of a weight its division follows from."""

    rows: int
    columns: int
    step: int
    """Columns that are multiplied at a time."""
    group_bytes: int
    """Of a step of a group's rows, with scales and minima."""

    @property
    def steps(self) -> int:
        """Steps of all columns."""
        return ceil_of(self.columns, self.step)


def ceil_of(count: int, unit: int) -> int:
    """Return how many units hold ``count``."""
    return -(-count // unit)


def layout_of(weight: Weight) -> Layout:
    """Return how a weight is read: steps are those of cuda/stream_plain.cuh and stream_packed.cuh."""
    step = 64 if weight.type == "bf16" else 128
    row = step * weight.row_bytes // weight.columns
    if weight.is_packed:
        scales = 2 * step // weight.group
        row += scales + (4 if weight.steps else scales if weight.minima else 0)
    elif 0 < weight.group < weight.columns:
        row += 4
    return Layout(weight.rows, weight.columns, step, GROUP_ROWS * row)


@lru_cache(maxsize=1024)
def divide(layout: Layout, rows: int, clusters: tuple[int, ...], shared_limit: int) -> Division:
    """Return the division of a product with so many rows that takes the least time, by a rough model.

    ``clusters`` tells how many clusters of 1, 2 and more blocks run at once.
    """

    def cost(division: Division) -> float:
        row_groups, column_groups, splits = division
        tokens = min(rows, most_tokens(layout, division, shared_limit))
        steps = ceil_of(layout.steps, column_groups * splits)
        waves = ceil_of(ceil_of(layout.rows, division.block_rows), clusters[splits - 1]) * ceil_of(rows, tokens)
        step = STEP_COST + row_groups * column_groups * (layout.group_bytes * READ_COST + UNPACKED_COST * (layout.step > SPAN))
        step += column_groups * tokens * layout.step * 2 * INPUT_COST
        return waves * (steps * step + division.block_rows * column_groups * tokens * 4 * SUM_COST)

    divisions = [
        Division(row_groups, column_groups, splits)
        for row_groups in range(1, MOST_GROUPS + 1)
        for column_groups in (1, 2, 4)
        for splits in range(1, len(clusters) + 1)
        if row_groups * column_groups <= MOST_GROUPS and clusters[splits - 1] > 0
    ]
    return min((one for one in divisions if most_tokens(layout, one, shared_limit)), key=cost)


def most_tokens(layout: Layout, division: Division, shared_limit: int) -> int:
    """Return the most rows of a launch, 0 if there is too little shared memory for any."""
    limit = shared_limit - STATIC_BYTES
    return next((tokens for tokens in TOKENS if many_shared(layout, division, tokens, LEAST_STAGES) <= limit), 0)


def arranged_bytes(layout: Layout, tokens: int) -> int:
    """Return the bytes of arranged input rows."""
    return layout.steps * layout.step * tokens * 2


def many_tokens(rows: int) -> int:
    """Return the tokens that are computed: a multiple of 32."""
    return ceil_of(rows, 32) * 32


def many_shared(layout: Layout, division: Division, tokens: int, stages: int) -> int:
    """Return the bytes of shared memory of a block."""
    row_groups, column_groups, _ = division
    stage = column_groups * (row_groups * layout.group_bytes + tokens * layout.step * 2)
    sums = column_groups * tokens * (division.block_rows + 4) * 4
    return ALIGNED + max(stages * ceil_of(stage, ALIGNED) * ALIGNED, sums)


def many_stages(layout: Layout, division: Division, tokens: int, shared_limit: int) -> int:
    """Return the stages of the ring."""
    counts = range(MOST_STAGES, LEAST_STAGES, -1)
    limit = shared_limit - STATIC_BYTES
    return next((count for count in counts if many_shared(layout, division, tokens, count) <= limit), LEAST_STAGES)


class ManyOperations(AttentionOperations):
    """Products of many rows, enqueued on one stream. ``space`` is device memory that is used by one operation after the other."""

    def __init__(self, kernels: Kernels, stream: int, space: int, space_bytes: int) -> None:
        super().__init__(kernels, stream)
        self._space, self._space_bytes = space, space_bytes
        self._cluster_counts: tuple[int, ...] = ()

    def _can_be_many(self, source: Rows, output: Rows, weight: Weight) -> bool:
        """Return whether the kernel takes this product, up to the number of rows."""
        whole = 16 if weight.type == "e4m3" else 8
        aligned = weight.columns % whole == 0 and source.stride % 2 == 0 and source.pointer % 4 == 0
        aligned = aligned and all(
            pointer % 16 == 0 for pointer in (weight.pointer, weight.minima, *[weight.scales] * weight.is_packed)
        )
        aligned = aligned and output.stride % 4 == 0 and output.pointer % (8 if output.dtype == "bf16" else 16) == 0
        types = source.dtype == "bf16" and output.dtype in ("bf16", "f32")
        known = weight.type == "bf16" or weight.is_packed or (weight.type == "e4m3" and weight.group in (0, 128, weight.columns))
        return aligned and types and known and arranged_bytes(layout_of(weight), TOKENS[0]) <= self._space_bytes

    def _many(
        self,
        source: Rows,
        output: Rows,
        weight: Weight,
        epilogue: int,
        add: float = 1.0,
        activation: str = "silu",
    ) -> None:
        """Multiply by cuda/linear_many.cu, as many rows at a time as fit."""
        layout, limit = layout_of(weight), self.kernels.shared_limit
        division = divide(layout, CLASSES[source.rows > CLASSES[0]], self._clusters(), limit)
        blocks = ceil_of(weight.rows, division.block_rows) * division.splits
        macros: dict[str, int | str] = {"EPILOGUE": epilogue, "PAIRED": int(epilogue == GATED), "OUTPUT": c_type(output.dtype)}
        macros |= {**weight.macros, "GROUPED": int(0 < weight.group < weight.columns and not weight.is_packed)}
        macros |= {"ACTIVATION": ACTIVATIONS.index(activation)}
        most = most_tokens(layout, division, limit)
        for first in range(0, source.rows, most):
            rows = min(most, source.rows - first)
            tokens = many_tokens(rows)
            stages = many_stages(layout, division, tokens, limit)
            macros |= {"TOKENS": tokens, "STAGES": stages}
            own, target = source.from_row(first, rows), output.from_row(first, rows)
            arrange = self.kernels.get("linear_many.cu", "arrange", **macros)
            grid = (layout.steps * layout.step // SPAN, ceil_of(rows, 8))
            arrange(self.stream, grid, 256, (own.pointer, self._space, own.stride, rows, weight.columns))
            kernel = self.kernels.get("linear_many.cu", "linear_many", **macros)
            pointers = (self._space, weight.pointer, weight.bias, weight.scales, weight.minima, target.pointer)
            shape = (target.stride, rows, weight.rows, weight.columns, division.row_groups, division.splits)
            shared = many_shared(layout, division, tokens, stages)
            kernel(self.stream, (blocks,), division.threads, (*pointers, *shape, add), shared, division.splits)

    def _clusters(self) -> tuple[int, ...]:
        """Return how many clusters of 1, 2 and more blocks run at once, a block on a multiprocessor; clusters need 9.0."""
        if not self._cluster_counts:
            counts = [self.kernels.multiprocessors]
            if self.kernels.capability >= 90:
                kernel, shared = (
                    self.kernels.get("linear_many.cu", "linear_many", TOKENS=32),
                    self.kernels.shared_limit - STATIC_BYTES,
                )
                counts += [kernel.most_clusters(size, MOST_GROUPS * 128, shared) for size in range(2, MOST_SPLITS + 1)]
            self._cluster_counts = tuple(counts)
        return self._cluster_counts
