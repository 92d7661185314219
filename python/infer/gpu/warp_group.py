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
NEIGHBOUR_BYTES = {"e4m3": 8 << 10, "bf16": 16 << 10}
"""Of shared memory that are left, at least, to what else runs on the multiprocessor. With 8 KB the ring has a stage more for most
shapes: an H100 took 2.6 us less for a layer of Llama 70B in E4M3, and 64 rows, but 1.3 us more for one of 8B in bfloat16."""
MOST_STAGES = 12
SHORT_SPAN = 128
PACED_BYTES = {"e4m3": 32 << 10, "bf16": 64 << 10}
"""Of weights that a block asks for at a time at first: what is asked for later, by other kernels too, waits behind it. With 32 KB
in place of 64 an H100 took 1.6 us less for a layer of Llama 8B in E4M3, and 64 rows, but 0.9 us more in bfloat16."""
MOST_SPLITS = 2
"""Blocks that share the columns: of clusters of 4, a GPU with 132 multiprocessors has 30, so 12 of these have nothing to do."""
# Microseconds on an H200, fitted to 44 divisions of 8 weights with MODEL_ROWS rows:
READ_COST = 0.17e-6  # of a byte of weights, for all blocks together
BLOCK_COST = 8e-6  # of a byte of weights and input of one block
SPLIT_COST = 1.5  # of two blocks that add their sums
WAVE_COST = 2.0  # of blocks that find no multiprocessor at first


class Shape(NamedTuple):
    """What a block multiplies at a time."""

    groups: int
    """Warp groups."""
    group_rows: int
    """Weight rows of each."""
    span: int
    """Bytes of each row."""

    @property
    def rows(self) -> int:
        """Weight rows of a block."""
        return self.groups * self.group_rows

    @property
    def threads(self) -> int:
        """Threads of a block: those that multiply, a warp for each group that copies its weights, and two for input rows."""
        return 160 * self.groups + 64


SHAPES = (
    Shape(1, 48, 256),
    Shape(1, 64, 256),
    Shape(2, 40, 256),
    Shape(2, 64, 256),
    Shape(2, 112, 128),
    Shape(2, 128, 128),
)
"""Whole tiles, and such that the weights of Llama are 128 blocks, or 256."""
GATED_SHAPES = tuple(shape for shape in SHAPES if shape.group_rows > TILE_ROWS)
"""Those of two tiles: one has gates, and the other what they are gates of."""


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
        own = (shape.rows + MODEL_ROWS) * ceil_of(ceil_of(row_bytes, shape.span), splits) * shape.span
        waves = ceil_of(units, at_once)
        time = units * shape.rows * row_bytes * READ_COST + waves * own * BLOCK_COST
        return time + WAVE_COST * (waves - 1) + SPLIT_COST * (splits - 1)

    sizes = [splits for splits, count in enumerate(clusters[:MOST_SPLITS], 1) if count > 0]
    divisions = (Division(shape, splits) for shape in shapes for splits in sizes)
    return min(divisions, key=cost)


def stages_of(shape: Shape, tokens: int, splits: int, shared_limit: int, kind: str) -> int:
    """Return the stages of the ring, as many as fit, of weights of a type."""
    room = shared_limit - NEIGHBOUR_BYTES[kind] - ALIGNED - _exchanged_bytes(shape, tokens, splits)
    return min(MOST_STAGES, room // _stage_bytes(shape, tokens))


def shared_bytes(shape: Shape, tokens: int, splits: int, stages: int) -> int:
    """Return the bytes of dynamic shared memory: for the ring, and for what comes from the other block."""
    return ALIGNED + stages * _stage_bytes(shape, tokens) + _exchanged_bytes(shape, tokens, splits)


def _stage_bytes(shape: Shape, tokens: int) -> int:
    return (shape.rows + tokens) * shape.span


def _exchanged_bytes(shape: Shape, tokens: int, splits: int) -> int:
    """Sums of half of the tokens, of all rows of the tiles."""
    return (splits - 1) * shape.groups * ceil_of(shape.group_rows, TILE_ROWS) * TILE_ROWS * (tokens // 2) * 4


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
        if splits > 1 and tokens > MODEL_ROWS:
            shape = shape._replace(span=SHORT_SPAN)  # long steps and what is exchanged leave no room for three stages
        stages = stages_of(shape, tokens, splits, self.kernels.shared_limit, weight.type)
        kernel = self.kernels.get(
            "linear_warp_group.cu",
            "linear_warp_group",
            WEIGHT=c_type(weight.type),
            OUTPUT=c_type(output.dtype),
            TOKENS=tokens,
            GROUPS=shape.groups,
            ROWS=shape.group_rows,
            STEP_BYTES=shape.span,
            STAGES=stages,
            PACE=min(stages, max(2, PACED_BYTES[weight.type] // (shape.rows * shape.span))),
            PAIRED=int(is_gated),
            EPILOGUE=GATED if is_gated else STORE,
            ACTIVATION=ACTIVATIONS.index(activation),
        )
        pointers = (source.pointer, scales, weight.pointer, weight.scales, weight.bias, output.pointer)
        sizes = (source.stride, output.stride, source.rows, weight.rows, weight.columns, splits)
        arguments = (*pointers, *sizes, add if epilogue == ADD else 1.0, float(epilogue == ADD))
        blocks, shared = ceil_of(weight.rows, shape.rows) * splits, shared_bytes(shape, tokens, splits, stages)
        kernel(self.stream, (blocks,), shape.threads, arguments, shared, splits)
