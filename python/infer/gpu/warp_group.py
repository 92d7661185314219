"""Products of 17 to 128 rows at memory speed on the matrix instructions of warp groups: cuda/linear_warp_group.cu.

Weights are in bfloat16, or in E4M3, and then rows are rounded to that.

The division of the work among blocks, and so the order of sums, follows from the weight and the GPU alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from infer.gpu.arrays import ACTIVATIONS, ELEMENT_BYTES, c_type
from infer.gpu.many import ADD, ALIGNED, GATED, STORE, ManyOperations, ceil_of, many_tokens
from infer.gpu.rows import STREAM_ROWS

if TYPE_CHECKING:
    from infer.gpu.arrays import Rows, Weight

MOST_ROWS = {"e4m3": (96, 128), "bf16": (64, 64)}
"""Most rows by the weight's type, and those for weights with no more rows than columns: with more, cuBLASLt is faster."""
MOST_GATED = 96
"""Most rows of a product of bfloat16 that is combined as gates."""
MOST_WAVES = 2
"""Units of the greatest shape, for each multiprocessor, of weights: blocks that come later begin with nothing under way."""
MODEL_ROWS = 64
"""Input rows that a division is chosen for."""

CAPABILITY = 90  # compute capability: the only one with these matrix instructions
TILE_ROWS = 64  # weight rows of a warp group's tile
NEIGHBOUR_BYTES = 19 << 10  # of shared memory that are left to what else runs on the multiprocessor
MOST_STAGES = 12
PACED_BYTES = 64 << 10
"""Of weights that a block asks for at a time at first: what is asked for later, by other kernels too, waits behind it."""
# Microseconds on an H100, fitted to 150 divisions of 8 weights:
READ_COST = 0.35e-6  # of a byte of weights, for all blocks together
BLOCK_COSTS = (14e-6, 10e-6, 10e-6)  # of a byte of weights and input of one block, by SHAPES
SPLIT_COST = 0.5  # of a block of a cluster, for adding up their sums
WAVE_COST = 2.0  # of blocks that find no multiprocessor at first


class Shape(NamedTuple):
    """What a block multiplies at a time."""

    groups: int
    """Warp groups."""
    tiles: int
    """Tiles of weight rows of each."""
    span: int
    """Bytes of each row."""

    @property
    def rows(self) -> int:
        """Weight rows of a block."""
        return self.groups * self.tiles * TILE_ROWS

    @property
    def threads(self) -> int:
        """Threads of a block: those that multiply, a warp for each group that copies its weights, and two for input rows."""
        return 160 * self.groups + 64


SHAPES = (Shape(1, 1, 256), Shape(2, 1, 256), Shape(2, 2, 128))
GATED_SHAPES = tuple(shape for shape in SHAPES if shape.groups == 2)
"""Those that have gates, and what they are gates of."""


class Division(NamedTuple):
    """Shape of a block, and blocks that share the columns."""

    shape: Shape
    splits: int


@lru_cache(maxsize=1024)
def divide(rows: int, row_bytes: int, clusters: tuple[int, ...], shapes: tuple[Shape, ...] = SHAPES) -> Division:
    """Return the division of a weight that takes the least time with MODEL_ROWS input rows, by a rough model.

    ``row_bytes`` are those of a row; ``clusters`` tells how many clusters of 1, 2 and more blocks run at once.
    """

    def cost(division: Division) -> float:
        shape, splits = division
        units, at_once = ceil_of(rows, shape.rows), clusters[splits - 1]
        own = ceil_of(ceil_of(row_bytes, shape.span), splits) * shape.span
        least = (shape.rows + MODEL_ROWS) * own * BLOCK_COSTS[SHAPES.index(shape)]
        whole, rest = divmod(units, at_once)
        waves = [at_once] * whole + [rest] * (rest > 0)
        time = sum(max(least, count * splits * shape.rows * own * READ_COST) for count in waves)
        return time + WAVE_COST * (len(waves) - 1) + SPLIT_COST * splits * (splits > 1)

    divisions = (Division(shape, splits) for shape in shapes for splits, count in enumerate(clusters, 1) if count > 0)
    return min(divisions, key=cost)


def stages_of(shape: Shape, tokens: int, shared_limit: int) -> int:
    """Return the stages of the ring, as many as fit."""
    return min(MOST_STAGES, (shared_limit - NEIGHBOUR_BYTES - ALIGNED) // _stage_bytes(shape, tokens))


def shared_bytes(shape: Shape, tokens: int, stages: int) -> int:
    """Return the bytes of dynamic shared memory: for the ring, or the sums."""
    return ALIGNED + max(stages * _stage_bytes(shape, tokens), tokens * (shape.rows + 4) * 4)


def _stage_bytes(shape: Shape, tokens: int) -> int:
    return (shape.rows + tokens) * shape.span


class WarpGroupOperations(ManyOperations):
    """Products by warp groups, enqueued on one stream."""

    def _is_for_groups(self, rows: int, output: Rows, weight: Weight, most: int = 0) -> bool:
        """Return whether the kernel takes the product of so many rows, of the weight's type, and is faster than others.

        ``most`` rows if that is not 0.
        """
        most = most or MOST_ROWS.get(weight.type, (0, 0))[weight.rows <= weight.columns]
        if not (self.kernels.capability == CAPABILITY and STREAM_ROWS < rows <= most and output.dtype in ("bf16", "f32")):
            return False
        known = weight.type == "bf16" or (weight.scales != 0 and weight.group in (0, weight.columns))
        whole = weight.row_bytes % 16 == 0 and weight.rows % 16 == 0 and output.stride % 4 == 0
        few = weight.rows <= MOST_WAVES * self.kernels.multiprocessors * SHAPES[-1].rows
        return few and known and whole and weight.pointer % 16 == 0 and output.pointer % (4 * ELEMENT_BYTES[output.dtype]) == 0

    def _is_grouped(self, source: Rows, output: Rows, weight: Weight, most: int = 0) -> bool:
        """Return whether the kernel takes the product of bfloat16 rows and weights, of ``most`` rows if that is not 0."""
        aligned = source.pointer % 16 == 0 and source.stride % 8 == 0
        return source.dtype == weight.type == "bf16" and aligned and self._is_for_groups(source.rows, output, weight, most)

    def _multiply_grouped(
        self,
        source: Rows,
        output: Rows,
        weight: Weight,
        epilogue: int,
        add: float = 1.0,
        activation: str = "silu",
        scales: int = 0,
    ) -> None:
        """The product of rows of the weight's type, ended as ``epilogue`` says; E4M3 rows have ``scales``, f32."""
        is_gated, tokens = epilogue == GATED, many_tokens(source.rows)
        shapes = GATED_SHAPES if is_gated else SHAPES
        shape, splits = divide(weight.rows, weight.row_bytes, self._clusters(), shapes)
        stages = stages_of(shape, tokens, self.kernels.shared_limit)
        kernel = self.kernels.get(
            "linear_warp_group.cu",
            "linear_warp_group",
            WEIGHT=c_type(weight.type),
            OUTPUT=c_type(output.dtype),
            TOKENS=tokens,
            GROUPS=shape.groups,
            TILES=shape.tiles,
            STEP_BYTES=shape.span,
            STAGES=stages,
            PACE=min(stages, max(2, PACED_BYTES // (shape.rows * shape.span))),
            PAIRED=int(is_gated),
            EPILOGUE=GATED if is_gated else STORE,
            ACTIVATION=ACTIVATIONS.index(activation),
        )
        pointers = (source.pointer, scales, weight.pointer, weight.scales, weight.bias, output.pointer)
        sizes = (source.stride, output.stride, source.rows, weight.rows, weight.columns, splits)
        arguments = (*pointers, *sizes, add if epilogue == ADD else 1.0, float(epilogue == ADD))
        blocks, shared = ceil_of(weight.rows, shape.rows) * splits, shared_bytes(shape, tokens, stages)
        kernel(self.stream, (blocks,), shape.threads, arguments, shared, splits)
