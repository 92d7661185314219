"""The blocks of streaming products: which of them fit a multiprocessor together. Needs no GPU."""

from __future__ import annotations

import pytest

from infer.gpu.arrays import Weight
from infer.gpu.stream import (
    RESERVED,
    STREAM_WARPS,
    half_threads,
    slot_bytes,
    stream_rooms,
    stream_shape,
    stream_shared_bytes,
)

LIMIT, PARTITION = 232448, 16384
"""Shared memory that a block may have on Hopper, and registers of one of the four parts of a multiprocessor."""


def fits(registers: int, *warps: int) -> bool:
    """Whether blocks of so many warps have enough registers, when their warps are dealt to the four parts."""
    return -(-sum(warps) // 4) * -(-registers * 32 // 256) * 256 <= PARTITION


@pytest.mark.parametrize("registers", [64, 72, 80, 88, 96])
def test_two_launches_share_a_multiprocessor_and_two_blocks_of_one_do_not(registers: int) -> None:
    greater, half = (stream_rooms(LIMIT, True, takes)[0] for takes in (False, True))
    assert greater + half + RESERVED <= LIMIT
    assert 2 * greater + RESERVED > LIMIT
    many = half_threads(registers) // 32
    assert fits(registers, STREAM_WARPS, many)
    assert not fits(registers, many, many)


@pytest.mark.parametrize("limit", [101376, 166912, LIMIT])
@pytest.mark.parametrize("kind", ["bf16", "e4m3", "int8"])
@pytest.mark.parametrize("columns", [8, 64, 2048, 4096, 14336, 28672])
def test_shapes_fit(kind: str, columns: int, limit: int) -> None:
    weight = Weight(0, 4096, columns, kind, group=32 if kind == "int8" else columns)
    for takes in (False, True):
        for rows in range(1, 17):
            shape = stream_shape(rows, weight, stream_rooms(limit, limit == LIMIT, takes), has_norm=False)
            assert shape.depth > 0
            assert stream_shared_bytes(shape.depth, shape.is_resident, rows, weight) <= shape.shared <= limit


def test_what_is_normalised_does_not_depend_on_the_launch_before() -> None:
    for columns in (2048, 4096, 8192, 16384, 28672):
        weight = Weight(0, 4096, columns, "bf16")
        for rows in range(1, 9):
            found = {
                stream_shape(rows, weight, stream_rooms(LIMIT, True, takes), has_norm=True).is_resident for takes in (False, True)
            }
            assert len(found) == 1


def test_a_step_of_packed_weights_has_its_scales() -> None:
    assert slot_bytes(Weight(0, 64, 128, "int8", group=32), 1, is_resident=True) == 2048 + 2 * 8 * 4 * 2
    halves = Weight(0, 64, 128, "int8", group=32, minima=1, steps="halves")
    assert slot_bytes(halves, 1, is_resident=True) == 2048 + 2 * 8 * 4 * 2 + 2 * 8 * 2 * 2
