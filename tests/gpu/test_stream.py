"""The blocks of streaming products: which of them fit a multiprocessor together. Needs no GPU."""

from __future__ import annotations

import pytest

from infer.gpu.arrays import Weight
from infer.gpu.stream import (
    RESERVED,
    STREAM_WARPS,
    half_threads,
    prepared_bytes,
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
@pytest.mark.parametrize("kind", ["bf16", "e4m3", "int8", "int4"])
@pytest.mark.parametrize("columns", [8, 64, 2048, 4096, 14336, 28672])
def test_shapes_fit(kind: str, columns: int, limit: int) -> None:
    weight = Weight(0, 4096, columns, kind, group=32 if kind.startswith("int") else columns)
    for takes in (False, True):
        for rows in range(1, 17):
            shape = stream_shape(rows, weight, stream_rooms(limit, limit == LIMIT, takes), has_norm=False)
            assert shape.depth > 0
            assert stream_shared_bytes(shape.depth, shape.is_resident, rows, weight) <= shape.shared <= limit


@pytest.mark.parametrize("kind", ["bf16", "e4m3", "int4"])
def test_what_is_normalised_does_not_depend_on_the_launch_before(kind: str) -> None:
    for columns in (2048, 4096, 8192, 16384, 28672):
        weight = Weight(0, 4096, columns, kind, group=32 if kind == "int4" else columns)
        for rows in range(1, 9):
            found = {
                stream_shape(rows, weight, stream_rooms(LIMIT, True, takes), has_norm=True).is_resident for takes in (False, True)
            }
            assert len(found) == 1


def test_a_step_of_packed_weights_has_its_scales() -> None:
    assert slot_bytes(Weight(0, 64, 128, "int8", group=32), 1, is_resident=True) == 2048 + 2 * 8 * 4 * 2
    halves = Weight(0, 64, 128, "int8", group=32, minima=1, steps="halves")
    assert slot_bytes(halves, 1, is_resident=True) == 2048 + 2 * 8 * 4 * 2 + 2 * 8 * 2 * 2


def test_rows_are_prepared_once_where_they_do_not_fit() -> None:
    one, long = Weight(0, 4096, 14336, "int4", group=32), Weight(0, 4096, 28672, "e4m3", group=28672)
    rooms = stream_rooms(LIMIT, True, False)
    assert stream_shape(1, one, rooms, has_norm=False).is_resident
    assert stream_shape(1, long, rooms, has_norm=False).is_resident
    assert not stream_shape(16, long, rooms, has_norm=False).is_resident
    assert prepared_bytes(16, long) == 16 * 224 * 272
    assert prepared_bytes(16, Weight(0, 64, 128, "bf16")) == 0
