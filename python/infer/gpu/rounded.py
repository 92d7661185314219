"""Products of E4M3 weights and 17 to 128 rows that are rounded to E4M3, at memory speed: cuda/linear_rounded.cu.

The division of the work among blocks, and so the order of sums, follows from the weight and the GPU alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from infer.gpu.arrays import ELEMENT_BYTES, c_type
from infer.gpu.many import ALIGNED, ManyOperations, ceil_of, many_tokens
from infer.gpu.rows import STREAM_ROWS

if TYPE_CHECKING:
    from infer.gpu.arrays import Rows, Weight

MOST_ROUNDED = 96, 128
"""Most rows, and those for weights with no more rows than columns: with more, cuBLASLt is faster."""
MODEL_ROWS = 64
"""Input rows that a division is chosen for."""

CAPABILITY = 90  # compute capability: the only one with these matrix instructions
TILE_ROWS = 64  # weight rows of a warp group's tile
NEIGHBOUR_BYTES = 19 << 10  # of shared memory that are left to what else runs on the multiprocessor
MOST_STAGES = 12
PACED_BYTES = 64 << 10
"""Of weights that a block asks for at a time: what is asked for later, by other kernels too, waits behind it."""
# Microseconds on an H100, fitted to 150 divisions of 8 weights:
READ_COST = 0.35e-6  # of a byte of weights, for all blocks together
BLOCK_COSTS = (14e-6, 10e-6, 10e-6)  # of a byte of weights and input of one block, by SHAPES
SPLIT_COST = 1.0  # of adding up the sums of a cluster
WAVE_COST = 2.0  # of blocks that find no multiprocessor at first


class Shape(NamedTuple):
    """What a block multiplies at a time."""

    groups: int
    """Warp groups."""
    tiles: int
    """Tiles of weight rows of each."""
    span: int
    """Columns."""

    @property
    def rows(self) -> int:
        """Weight rows of a block."""
        return self.groups * self.tiles * TILE_ROWS

    @property
    def threads(self) -> int:
        """Threads of a block: those that multiply, a warp for each group that copies its weights, and two for input rows."""
        return 160 * self.groups + 64


SHAPES = (Shape(1, 1, 256), Shape(2, 1, 256), Shape(2, 2, 128))


class Division(NamedTuple):
    """Shape of a block, and blocks that share the columns."""

    shape: Shape
    splits: int


@lru_cache(maxsize=1024)
def divide(rows: int, columns: int, clusters: tuple[int, ...]) -> Division:
    """Return the division of a weight (rows, columns) that takes the least time with MODEL_ROWS input rows, by a rough model.

    ``clusters`` tells how many clusters of 1, 2 and more blocks run at once.
    """

    def cost(division: Division) -> float:
        shape, splits = division
        units, at_once = ceil_of(rows, shape.rows), clusters[splits - 1]
        own = ceil_of(ceil_of(columns, shape.span), splits) * shape.span
        least = (shape.rows + MODEL_ROWS) * own * BLOCK_COSTS[SHAPES.index(shape)]
        whole, rest = divmod(units, at_once)
        waves = [at_once] * whole + [rest] * (rest > 0)
        time = sum(max(least, count * splits * shape.rows * own * READ_COST) for count in waves)
        return time + WAVE_COST * (len(waves) - 1) + SPLIT_COST * (splits > 1)

    divisions = (Division(shape, splits) for shape in SHAPES for splits, count in enumerate(clusters, 1) if count > 0)
    return min(divisions, key=cost)


def stages_of(shape: Shape, tokens: int, shared_limit: int) -> int:
    """Return the stages of the ring, as many as fit."""
    return min(MOST_STAGES, (shared_limit - NEIGHBOUR_BYTES - ALIGNED) // _stage_bytes(shape, tokens))


def shared_bytes(shape: Shape, tokens: int, stages: int) -> int:
    """Return the bytes of dynamic shared memory: for the ring, or the sums."""
    return ALIGNED + max(stages * _stage_bytes(shape, tokens), tokens * (shape.rows + 4) * 4)


def _stage_bytes(shape: Shape, tokens: int) -> int:
    return (shape.rows + tokens) * shape.span


class RoundedOperations(ManyOperations):
    """Products of rounded rows, enqueued on one stream."""

    def _can_be_rounded(self, rows: int, output: Rows, weight: Weight) -> bool:
        """Return whether the kernel takes the product of so many rows, rounded, and is faster than others."""
        most = MOST_ROUNDED[weight.rows <= weight.columns]
        if not (self.kernels.capability == CAPABILITY and STREAM_ROWS < rows <= most and weight.type == "e4m3"):
            return False
        known = weight.scales != 0 and weight.group in (0, weight.columns) and output.dtype in ("bf16", "f32")
        whole = weight.columns % 16 == 0 and weight.rows % 16 == 0 and output.stride % 4 == 0
        return known and whole and weight.pointer % 16 == 0 and output.pointer % (4 * ELEMENT_BYTES[output.dtype]) == 0

    def _multiply_rounded(self, rounded: Rows, scales: int, output: Rows, weight: Weight, alpha: float, beta: float) -> None:
        """``output = alpha * (rounded * weight^T + bias) + beta * output``; ``scales`` are those of the rows, f32."""
        shape, splits = divide(weight.rows, weight.columns, self._clusters())
        tokens = many_tokens(rounded.rows)
        stages = stages_of(shape, tokens, self.kernels.shared_limit)
        kernel = self.kernels.get(
            "linear_rounded.cu",
            "linear_rounded",
            TOKENS=tokens,
            GROUPS=shape.groups,
            TILES=shape.tiles,
            SPAN=shape.span,
            STAGES=stages,
            PACE=min(stages, max(2, PACED_BYTES // (shape.rows * shape.span))),
            OUTPUT=c_type(output.dtype),
        )
        pointers = (rounded.pointer, scales, weight.pointer, weight.scales, weight.bias, output.pointer)
        arguments = (*pointers, output.stride, rounded.rows, weight.rows, weight.columns, splits, alpha, beta)
        blocks = ceil_of(weight.rows, shape.rows) * splits
        kernel(self.stream, (blocks,), shape.threads, arguments, shared_bytes(shape, tokens, stages), splits)
