"""The blocks of the streaming products: how far they copy ahead, and how two kernels share a multiprocessor.

cuda/linear_stream.cuh says what for. A block of one launch takes more than half of a multiprocessor's shared memory, one of the
next launch more than half of its registers; so two of different launches fit, and two of one do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from infer.gpu.arrays import PACKED_BITS

if TYPE_CHECKING:
    from infer.gpu.arrays import Weight

STREAM_WARPS, REGISTER_WARPS = 8, 16
"""Warps of a block that work: of linear_stream.cuh, and of linear_registers.cuh."""
RESERVED, UNIT = 1024, 1024
"""Bytes of shared memory that the system keeps for each block, and of which it gives out a multiple."""
MULTIPROCESSOR_REGISTERS = 65536
MOST_THREADS = 576
"""Most threads of a block, as the kernels are compiled."""
MOST_DEPTH = 12
"""Most steps that a warp has under way."""


class StreamShape(NamedTuple):
    """The blocks of a streaming product."""

    depth: int
    """Steps that each warp has under way."""
    is_resident: bool
    """Whether all of the input is kept in shared memory."""
    shared: int
    """Bytes of shared memory."""


def stream_tokens(rows: int) -> int:
    """Return the tokens that a kernel is compiled for."""
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

    Of several the first is taken that leaves a ring of two steps or more. Rows that are normalised are resident; others, where
    the ring becomes no shorter by it.
    """
    counted = next(count for count in (1, 2, 4, 8, 16) if rows <= count)  # so that there are few shapes
    best = StreamShape(0, False, 0)
    for room in rooms:
        shapes = []
        for is_resident in (True,) if has_norm else (True, False):
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
    """Return the bytes of squares, scales, sums, rings and all input rows, as in cuda/linear_stream.cuh."""
    tokens = stream_tokens(rows)
    head = (STREAM_WARPS + 1) * tokens * 4
    sums = STREAM_WARPS * 16 * (rows | 1) * 4 * (2 if tokens == 8 else 1)
    rings = STREAM_WARPS * depth * slot_bytes(weight, rows, is_resident)
    return head + sums + rings + (warp_steps(weight) * STREAM_WARPS * rows * stream_step(weight) * 2 if is_resident else 0)


def slot_bytes(weight: Weight, rows: int, is_resident: bool) -> int:
    """Return the bytes of a warp's step in its ring: weights, scales, and input rows."""
    step = stream_step(weight)
    if weight.is_packed:
        groups = step // weight.group
        minima = 2 if weight.steps else groups if weight.minima else 0
        weights = 16 * step * PACKED_BITS[weight.type] // 8 + 32 * (groups + minima)
    else:
        weights = 2048 + (64 if 0 < weight.group < weight.columns and weight.type == "e4m3" else 0)
    return weights + (0 if is_resident else rows * step * 2)


def stream_step(weight: Weight) -> int:
    """Return the columns of a step."""
    return 64 if weight.type == "bf16" else 128


class RegisterShape(NamedTuple):
    """The blocks of a streaming product whose ring of weights is in registers (cuda/linear_registers.cuh)."""

    warps: int
    """Of a team."""
    ring: int
    """Steps of input that each warp has under way; 0 where all of it is kept in shared memory."""
    shared: int
    """Bytes of shared memory."""


def register_shape(rows: int, weight: Weight, processors: int, limit: int) -> RegisterShape:
    """Choose the shape, by the multiprocessors and the shared memory that a block may have.

    A team has 8 warps, two teams on a multiprocessor, or 16 where that leaves fewer idle in the last round and rows are not
    short. It changes the order of sums, so it must not depend on the number of rows.
    """
    units, tokens, step = -(-weight.rows // 16), stream_tokens(rows), stream_step(weight)
    busy = {warps: units / (-(-units * warps // (16 * processors)) * processors * 16 // warps) for warps in (8, 16)}
    warps = 16 if weight.row_bytes >= 8192 and busy[16] > busy[8] + 0.1 else 8
    sums = 16 * tokens * 4 + 2 * 16 * 16 * (tokens + 1) * 4
    shared = sums + -(-weight.columns // (step * warps)) * warps * rows * step * 2
    if shared <= limit:
        return RegisterShape(warps, 0, shared)
    rings = (2, 1) if tokens * step > 1024 else (4, 2, 1)
    sizes = {ring: sums + REGISTER_WARPS * ring * tokens * step * 2 for ring in rings}
    ring = next((ring for ring in rings if sizes[ring] <= limit), 1)
    return RegisterShape(warps, ring, sizes[ring])
