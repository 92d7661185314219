"""Products of 97 to 256 rows on the matrix instructions of warp groups: cuda/linear_wide.cu.

Weights are in bfloat16, or in E4M3, and then rows are rounded to that. Fewer rows are multiplied by cuda/linear_warp_group.cu,
more by cuBLASLt, and so are weights that it multiplies as fast. Gates in bfloat16 are multiplied here by more rows, too, which
spares writing and reading both halves of the product. (Those of E4M3 are rounded afterwards, which takes what it spares.)
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from infer.gpu.arrays import ACTIVATIONS, ELEMENT_BYTES, Rows, c_type
from infer.gpu.launch import MAP_BYTES, check, driver
from infer.gpu.many import ADD, ALIGNED, GATED, STORE, ceil_of, many_tokens
from infer.gpu.rows import STREAM_ROWS, vector
from infer.gpu.warp_group import CAPABILITY, WarpGroupOperations

if TYPE_CHECKING:
    from infer.gpu.arrays import Weight

LEAST_WIDE, MOST_WIDE = 97, 256
"""Least and most rows, but for gates in bfloat16; and the most of a block."""
MOST_NARROW = 128
"""Most rows that linear_warp_group.cu takes."""
MOST_CLEAR = 224
"""Most rows with which E4M3 takes cuBLASLt notably longer, whatever the weight."""
LEAST_BYTES = 40 << 20
"""Of weights, whose products are short otherwise."""
BLAS_TILE, BLAS_BUSY, MULTIPROCESSORS = 128, 0.9, 132
"""Rows and columns of cuBLASLt's tiles of E4M3, and the share of multiprocessors that these keep busy where it is as fast."""
NARROW, LEAST_LONG = 2048, 320
"""Columns up to which gates of more than MOST_WIDE rows are always faster here, from so many rows on."""
LONG_BUSY, MOST_LONG = 0.95, 3072
"""Wider ones are faster if so many multiprocessors are busy, up to so many rows: with more, power is what limits both."""
TILE_ROWS = 128  # weight rows of a block
STEP_BYTES = 128  # of each row
THREADS = 288
STAGED_BYTES = 8 * 1536  # of shared memory, through which warps store
STATIC_BYTES = 2048  # of shared memory, that the kernel declares itself, at most
MOST_STAGES = 6
LEAST_STEPS = 4  # of a block that shares columns
MOST_SPLITS = 4
LEAST_TOKENS = 128  # of a block
# Microseconds on an H200, fitted to 60 divisions of 8 weights:
STEP_COST, TOKEN_COST = 0.02, 0.00225  # of a step of a block, and for each token
WAVE_COST = 3.5  # of a tile
SUM_COST = 2.0  # of adding what blocks that share columns have,
STORE_COST = 0.0066  # and for each token of a block,
PART_COST = 0.86e-6  # and for each number

UINT8, SWIZZLE_128B, PROMOTION_256B = 0, 3, 3  # CU_TENSOR_MAP_DATA_TYPE_, _SWIZZLE_ and _L2_PROMOTION_


class Division(NamedTuple):
    """How the work is shared out."""

    token_blocks: int
    """Blocks that share the input rows."""
    splits: int
    """Blocks that share the columns."""


@lru_cache(maxsize=1024)
def divide(rows: int, outputs: int, steps: int, blocks: int) -> Division:
    """Return the division of a weight that takes the least time, by a rough model; ``blocks`` run at once."""
    if rows > MOST_WIDE:
        return Division(ceil_of(rows, MOST_WIDE), 1)

    def cost(division: Division) -> float:
        token_blocks, splits = division
        waves = ceil_of(ceil_of(outputs, TILE_ROWS) * splits * token_blocks, blocks)
        tokens = tokens_of(rows, token_blocks)
        time = waves * (ceil_of(steps, splits) * (STEP_COST + TOKEN_COST * tokens) + WAVE_COST)
        return time + (SUM_COST + tokens * STORE_COST + splits * outputs * rows * PART_COST if splits > 1 else 0.0)

    counts = [splits for splits in range(1, MOST_SPLITS + 1) if splits == 1 or steps >= splits * max(splits, LEAST_STEPS)]
    return min((Division(tokens, splits) for splits in counts for tokens in (1, 2)[: 1 + (rows > LEAST_TOKENS)]), key=cost)


def tokens_of(rows: int, token_blocks: int) -> int:
    """Return the tokens that a block computes."""
    return max(LEAST_TOKENS, many_tokens(ceil_of(rows, token_blocks)))


def is_faster(rows: int, weight: Weight, is_gated: bool) -> bool:
    """Return whether others take longer, by what was measured on an H200 with the weights of Llama 1B, 8B and 70B."""
    if rows < LEAST_WIDE or weight.rows * weight.row_bytes < LEAST_BYTES:
        return False
    if rows > MOST_WIDE:
        pieces = ceil_of(weight.rows, TILE_ROWS) * ceil_of(rows, MOST_WIDE)
        is_busy = pieces >= LONG_BUSY * ceil_of(pieces, MULTIPROCESSORS) * MULTIPROCESSORS
        return rows >= LEAST_LONG if weight.columns <= NARROW else is_busy and rows <= MOST_LONG
    if rows <= MOST_NARROW:
        return weight.type == "e4m3" and weight.columns >= 2 * weight.rows
    if weight.type == "bf16":
        return is_gated or weight.columns >= 2 * weight.rows
    tiles = ceil_of(weight.rows, BLAS_TILE) * ceil_of(rows, BLAS_TILE)
    return rows <= MOST_CLEAR or tiles < BLAS_BUSY * ceil_of(tiles, MULTIPROCESSORS) * MULTIPROCESSORS


@lru_cache(maxsize=8192)
def tensor_map(pointer: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """Return what the copy engine needs of a matrix of bytes; strides of all dimensions but the first, which are neighbours."""
    room = ctypes.create_string_buffer(MAP_BYTES + 64)
    place = -(-ctypes.addressof(room) // 64) * 64
    rank = len(sizes)
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place),
        UINT8,
        ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        0,
        SWIZZLE_128B,
        PROMOTION_256B,
        0,
    )
    check(status, "describing a matrix to the copy engine")
    return ctypes.string_at(place, MAP_BYTES)


def weight_map(weight: Weight, is_gated: bool) -> bytes:
    """Return the map of a weight: its rows by eights, two of which lie side by side, gates and what they are gates of."""
    row, eights = weight.row_bytes, weight.rows // 8
    strides = (row, weight.rows // 2 * row, 8 * row) if is_gated else (row, 8 * row, 16 * row)
    return tensor_map(weight.pointer, (row, 8, 2, eights // 2), strides, (STEP_BYTES, 8, 2, TILE_ROWS // 16))


class WideOperations(WarpGroupOperations):
    """Products by warp groups, enqueued on one stream."""

    def _is_for_groups(self, rows: int, output: Rows, weight: Weight, most: int = 0) -> bool:
        """See `WarpGroupOperations`."""
        return self._is_wide(rows, output, weight, most > 0) or super()._is_for_groups(rows, output, weight, most)

    def _is_wide(self, rows: int, output: Rows, weight: Weight, is_gated: bool) -> bool:
        """Return whether the kernel takes the product of so many rows, of the weight's type, and is faster than others."""
        most = rows if is_gated and weight.type == "bf16" else MOST_WIDE
        if not (self.kernels.capability == CAPABILITY and STREAM_ROWS < rows <= most and output.dtype in ("bf16", "f32")):
            return False
        known = weight.type == "bf16" or (weight.type == "e4m3" and weight.scales != 0 and weight.group in (0, weight.columns))
        whole = weight.row_bytes % 16 == 0 and weight.rows % 16 == 0 and output.stride % 8 == 0
        # Sums lie behind rounded rows; gates have neither.
        parts = self._divide(rows, weight).splits * rows * weight.rows * 4 + rows * (weight.columns + 4) + 512
        fits = is_gated or parts <= self._space_bytes
        whole = whole and is_faster(rows, weight, is_gated)
        return fits and known and whole and weight.pointer % 16 == 0 and output.pointer % 16 == 0

    def _divide(self, rows: int, weight: Weight) -> Division:
        return divide(rows, weight.rows, ceil_of(weight.row_bytes, STEP_BYTES), self.kernels.multiprocessors)

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
        """See `WarpGroupOperations`."""
        if not self._is_wide(source.rows, output, weight, epilogue == GATED):
            super()._multiply_grouped(source, output, weight, epilogue, add, activation, scales)
            return
        is_gated, (token_blocks, splits) = epilogue == GATED, self._divide(source.rows, weight)
        if is_gated or (epilogue == STORE and splits == 1):
            division, name = Division(token_blocks if splits == 1 else 1, 1), activation if is_gated else ""
            self._multiply_wide(source, output, weight, division, weight.bias, name, scales)
            return
        size = splits * source.rows * weight.rows * 4
        parts = Rows(self._space + (self._space_bytes - size) // 256 * 256, source.rows, weight.rows, weight.rows, "f32")
        self._multiply_wide(source, parts, weight, Division(token_blocks, splits), 0, "", scales)
        v = vector(weight.rows, output) if weight.bias % 16 == 0 else 1
        alpha, beta = (add, 1.0) if epilogue == ADD else (1.0, 0.0)
        arguments = (output.pointer, parts.pointer, weight.bias, output.stride, weight.rows, splits, alpha, beta)
        self._over_columns("elementwise.cu", "add_parts", output, weight.rows, v, arguments)

    def _multiply_wide(
        self, source: Rows, output: Rows, weight: Weight, division: Division, bias: int, activation: str, scales: int
    ) -> None:
        """Launch the kernel; ``activation`` of gates, "" where there are none."""
        tokens = tokens_of(source.rows, division.token_blocks)
        limit = self.kernels.shared_limit - STATIC_BYTES - ALIGNED - STAGED_BYTES
        stage = (TILE_ROWS + tokens) * STEP_BYTES
        stages = min(MOST_STAGES, limit // stage)
        kernel = self.kernels.get(
            "linear_wide.cu",
            "linear_wide",
            WEIGHT=c_type(weight.type),
            OUTPUT=c_type(output.dtype),
            TOKENS=tokens,
            STAGES=stages,
            PAIRED=int(activation != ""),
            EPILOGUE=GATED if activation else STORE,
            ACTIVATION=ACTIVATIONS.index(activation or "silu"),
        )
        stride = source.stride * ELEMENT_BYTES[source.dtype]
        inputs = tensor_map(source.pointer, (weight.row_bytes, source.rows), (stride,), (STEP_BYTES, tokens))
        outputs = weight.rows // 2 if activation else weight.rows
        pointers = (scales, weight.scales, bias, output.pointer)
        part = source.rows * output.stride if division.splits > 1 else 0
        sizes = (output.stride, part, source.rows, outputs, ceil_of(weight.row_bytes, STEP_BYTES))
        pieces = ceil_of(weight.rows, TILE_ROWS) * division.splits * division.token_blocks
        blocks = min(pieces, self.kernels.multiprocessors)
        shared = ALIGNED + stages * stage + STAGED_BYTES
        arguments = (weight_map(weight, activation != ""), inputs, *pointers, *sizes, division.splits, division.token_blocks)
        kernel(self.stream, (blocks,), THREADS, arguments, shared)
