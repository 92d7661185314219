"""Copies of pages in all layers, against their numpy twin."""

from __future__ import annotations

import numpy as np
import pytest
from device import Device, device

from infer.gpu.arrays import MOST_BRANCHES
from infer.gpu.memory import Parts

PAGES = 9
SIZES = (32768, 16, 4096, 1040)  # bytes of a page's part: keys of large heads, scales, what threads do not divide evenly
random = np.random.default_rng(3)


def layers(gpu: Device) -> tuple[Parts, list[tuple[int, np.ndarray]]]:
    """Return parts of random bytes, and where they lie with what they hold."""
    contents = [random.integers(0, 256, (PAGES, size), np.uint8) for size in SIZES]
    held = [(gpu.put(array), array) for array in contents]
    table = np.array([(pointer, array.shape[1]) for pointer, array in held], np.uint64)
    return Parts(gpu.put(table), len(held)), held


@pytest.mark.parametrize("copies", [[], [(4, 0)], [(2, 8), (2, 5), (1, 7)]], ids=str)
def test_pages_are_copied_and_others_left(copies: list[tuple[int, int]]) -> None:
    gpu = device()
    parts, held = layers(gpu)
    table = np.full((MOST_BRANCHES, 2), -1, np.int32)
    table[: len(copies)] = np.array(copies, np.int32).reshape(-1, 2)
    inputs = gpu.inputs([(0, 1)])
    gpu.ops.copy_pages(type(inputs)(**{**vars(inputs), "copies": gpu.put(table)}), parts)
    for pointer, array in held:
        expected = array.copy()
        for source, target in copies:
            expected[target] = array[source]
        assert (gpu.ints(pointer, array.size, np.uint8) == expected.ravel()).all()


def test_one_page_is_copied() -> None:
    gpu = device()
    parts, held = layers(gpu)
    gpu.ops.copy_page(parts, 3, 6)
    for pointer, array in held:
        expected = array.copy()
        expected[6] = array[3]
        assert (gpu.ints(pointer, array.size, np.uint8) == expected.ravel()).all()
