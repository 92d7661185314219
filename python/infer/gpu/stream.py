"""The blocks of the streaming products: how far they copy ahead, and how two kernels share a multiprocessor.

cuda/linear_stream.cuh says what for. A block of one launch takes more than half of a multiprocessor's shared memory, one of the
next launch more than half of its registers; so two of different launches fit, and two of one do not.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from infer.gpu.arrays import PACKED_BITS

if TYPE_CHECKING:
    from infer.gpu.arrays import Weight

STREAM_WARPS = 8
"""Warps of a block that work."""
RESERVED, UNIT = 1024, 1024
"""Bytes of shared memory that the system keeps for each block, and of which it gives out a multiple."""
MULTIPROCESSOR_REGISTERS = 65536
MOST_THREADS = 576
"""Most threads of a block, as the kernels are compiled."""
MOST_DEPTH = 12
"""Most steps that a warp has under way."""
PREPARED_BYTES = {"int4": 288, "e4m3": 272}
"""Bytes of an input row's step, by the types of weights whose rows are prepared (cuda/digits.cuh, halves.cuh)."""


class StreamShape(NamedTuple):
    """The blocks of a streaming product."""

    depth: int
    """Steps that each warp has under way."""
    is_resident: bool
    """Whether all of the input is kept in shared memory."""
    shared: int
    """Bytes of shared memory."""


def stream_tokens(rows: int, weight: Weight) -> int:
    """Return the tokens that a kernel is compiled for."""
    if rows == 1 and weight.type == "int4":
        return 1
    return 8 if rows <= 8 else 16


def half_threads(registers: int) -> int:
    """Return the threads of a block, of so many registers each, that has just over half of those of a multiprocessor."""
    warp_registers = -(-registers * 32 // 256) * 256
    return min(max(MULTIPROCESSOR_REGISTERS // 2 // warp_registers + 1, STREAM_WARPS) * 32, MOST_THREADS)


def stream_rooms(limit: int, is_dependent: bool, takes_registers: bool) -> tuple[int, ...]:
    """Return how much shared memory a block may have: beside another kernel's, and alone."""
    if not is_dependent:
        return (limit,)
    both = limit - RESERVED
    greater = both * 11 // 20 // UNIT * UNIT
    return (both - greater if takes_registers else greater, limit)


def stream_shape(rows: int, weight: Weight, rooms: tuple[int, ...], has_norm: bool) -> StreamShape:
    """Choose the shape of a streaming product's blocks, by the shared memory that a block may have, and has if that is not all.

    Of several the first is taken that leaves a ring of two steps or more. Rows that are normalised are resident; such as are
    prepared, where they fit; others, where the ring becomes no shorter by it.
    """
    counted = next(count for count in (1, 2, 4, 8, 16) if rows <= count)  # so that there are few shapes
    best = StreamShape(0, False, 0)
    ways: tuple[tuple[bool, ...], ...] = (
        ((True,),) if has_norm else ((True,), (False,)) if weight.type in PREPARED_BYTES else ((True, False),)
    )
    for either, room in product(ways, rooms):
        shapes = []
        for is_resident in either:
            left = room - stream_shared_bytes(0, is_resident, counted, weight)
            depth = min(left // (STREAM_WARPS * slot_bytes(weight, counted, is_resident)), MOST_DEPTH)
            shared = stream_shared_bytes(depth, is_resident, counted, weight) if room == rooms[-1] else room
            shapes.append(StreamShape(depth, is_resident, shared))
        best = max(shapes, key=lambda shape: shape.depth)
        if best.depth >= 2:
            break
    return best if best.depth > 0 else StreamShape(1, False, 0)


def warp_steps(weight: Weight) -> int:
    """Return the steps of a warp in each 16 rows."""
    return -(-weight.columns // (stream_step(weight) * STREAM_WARPS))


def stream_shared_bytes(depth: int, is_resident: bool, rows: int, weight: Weight) -> int:
    """Return the bytes of squares, sums, rings and all input rows, as in cuda/linear_stream.cuh."""
    tokens = stream_tokens(rows, weight)
    sums = STREAM_WARPS * 16 * (rows | 1) * 4 * (2 if tokens <= 8 else 1)
    rings = STREAM_WARPS * depth * slot_bytes(weight, rows, is_resident)
    return (
        STREAM_WARPS * tokens * 4
        + sums
        + rings
        + (warp_steps(weight) * STREAM_WARPS * rows * input_bytes(weight) if is_resident else 0)
    )


def slot_bytes(weight: Weight, rows: int, is_resident: bool) -> int:
    """Return the bytes of a warp's step in its ring: weights, scales, and input rows."""
    step = stream_step(weight)
    if weight.is_packed:
        groups = step // weight.group
        minima = 2 if weight.steps else groups if weight.minima else 0
        weights = 16 * step * PACKED_BITS[weight.type] // 8 + 32 * (groups + minima)
    else:
        weights = 2048 + (64 if 0 < weight.group < weight.columns and weight.type == "e4m3" else 0)
    return weights + (0 if is_resident else rows * input_bytes(weight))


def input_bytes(weight: Weight) -> int:
    """Return the bytes of an input row's step."""
    return PREPARED_BYTES.get(weight.type, 2 * stream_step(weight))


def stream_step(weight: Weight) -> int:
    """Return the columns of a step."""
    return 64 if weight.type == "bf16" else 128


def prepared_bytes(rows: int, weight: Weight) -> int:
    """Return the bytes of all rows where they are prepared, else 0."""
    return rows * -(-weight.columns // 128) * PREPARED_BYTES.get(weight.type, 0)
