"""Packed weights in numpy: the rounding and the layout of cuda/pack.cu, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from numpy_sampler import view

from infer.gpu.arrays import Weight
from infer.gpu.packing import FORMATS, Packed, Plan, sizes

LANES = 16
FIT = range(56, 92)  # eighths that are tried, as in rust/kernels/src/quant/fit.rs
ROWS, COLUMNS = 8, 128  # of a block


def _lane_sum(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums of groups (..., group), in the order of sixteen lanes."""
    parts = values.reshape(*values.shape[:-1], -1, LANES)
    lanes = np.zeros_like(parts[..., 0, :])
    for index in range(parts.shape[-2]):
        lanes = lanes + parts[..., index, :]
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _nibble(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.rint(np.clip(values, np.float32(-8), np.float32(7)))


def round_to_nibbles(values: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
    """Scales (...) and integers (..., group) of groups that are rounded to 4 bits."""

    def least_squares(inverse: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        integers = _nibble(values * inverse[..., None])
        products, squares = _lane_sum(values * integers), _lane_sum(integers * integers)
        some = squares > 0
        return np.where(some, products / squares, 0), np.where(some, products * products / squares, 0)

    with np.errstate(all="ignore"):
        place = np.abs(values).argmax(-1)[..., None]
        greatest = np.take_along_axis(values, place, -1)[..., 0]
        best, best_gain = greatest / np.float32(-8), np.zeros_like(greatest)
        for eighths in FIT:
            scale, gain = least_squares(np.float32(eighths) / np.float32(-8) / greatest)
            better = gain > best_gain
            best, best_gain = np.where(better, scale, best), np.where(better, gain, best_gain)
        for _ in range(2):
            best, _ = least_squares(np.float32(1) / best)
        scales = np.where(greatest == 0, 0, np.clip(best, -65504, 65504)).astype(np.float16)
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales.astype(np.float32)).astype(np.float32)
    return scales, _nibble(values * inverse[..., None]).astype(np.int8)


def round_to_bytes(values: NDArray[np.float32]) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
    """The same with 8 bits: ties go away from zero."""
    scales = np.abs(values).max(-1) / np.float32(127)
    with np.errstate(all="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales).astype(np.float32)
    exact = values * inverse[..., None]
    return scales.astype(np.float16), (np.sign(exact) * np.floor(np.abs(exact) + np.float32(0.5))).astype(np.int8)


def groups_of(numbers: NDArray[np.float32], kind: str, group: int) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
    """Scales and integers of a matrix (rows, columns) that is rounded."""
    groups = numbers.reshape(len(numbers), -1, group).astype(np.float32)
    return (round_to_nibbles if kind == "int4" else round_to_bytes)(groups)


def blocks_of(name: str, data: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    """Scales, integers and minima of rows (rows, bytes) of a file's format; of K-quants steps (..., 2), integers and units."""
    size = FORMATS[name].block_bytes
    blocks = data.reshape(len(data), -1, size)
    if name.endswith("_K"):
        return k_quants_of(name, blocks)
    scales = blocks[..., :2].copy().view(np.float16)[..., 0]
    if name == "Q8_0":
        return scales, blocks[..., 2:].view(np.int8), None
    if name == "INT4_G128":
        pairs = blocks[..., 2:]
        return scales, np.stack([pairs & 15, pairs >> 4], -1).reshape(*pairs.shape[:-1], -1).astype(np.int8) - 8, None
    before = 4 if name == "Q4_1" else 2
    nibbles = np.concatenate([blocks[..., before:] & 15, blocks[..., before:] >> 4], -1).astype(np.int8)
    if name == "Q4_0":
        return scales, nibbles - 8, None
    return scales, nibbles, blocks[..., 2:4].copy().view(np.float16)[..., 0]


def k_quants_of(name: str, blocks: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Steps (rows, groups, 2), integers (rows, groups, 32) and units (rows, blocks, 2) of blocks of 256 weights."""
    rows, count = blocks.shape[:2]
    steps, integers = np.zeros((rows, count, 8, 2), np.int16), np.zeros((rows, count, 8, 32), np.int8)
    for group in range(8):
        if name == "Q6_K":
            low = blocks[..., group // 4 * 64 + group % 2 * 32 :][..., :32] >> (group % 4 // 2 * 4) & 15
            high = blocks[..., 128 + group // 4 * 32 :][..., :32] >> (2 * (group % 4)) & 3
            integers[..., group, :] = (low | high << 4).astype(np.int8) - 32
            steps[..., group, :] = blocks[..., 192 + 2 * group : 194 + 2 * group].view(np.int8)
            continue
        begin, at, bytes_ = (48 if name == "Q5_K" else 16), group % 4, blocks[..., 4:16]
        integers[..., group, :] = blocks[..., begin + group // 2 * 32 :][..., :32] >> (4 * (group % 2)) & 15
        if name == "Q5_K":
            integers[..., group, :] |= ((blocks[..., 16:48] >> group & 1) << 4).astype(np.int8)
        if group < 4:
            steps[..., group, 0], steps[..., group, 1] = bytes_[..., at] & 63, bytes_[..., 4 + at] & 63
        else:
            steps[..., group, 0] = bytes_[..., 8 + at] & 15 | bytes_[..., at] >> 6 << 4
            steps[..., group, 1] = bytes_[..., 8 + at] >> 4 | bytes_[..., 4 + at] >> 6 << 4
    units = np.zeros((rows, count, 2), np.float16)
    if name == "Q6_K":
        units[..., 0] = blocks[..., 208:210].copy().view(np.float16)[..., 0]
    else:
        units[:] = blocks[..., :4].copy().view(np.float16)
    return steps.reshape(rows, -1, 2), integers.reshape(rows, -1, 32), units


def k_quant_values(name: str, steps: NDArray[Any], integers: NDArray[Any], units: NDArray[Any]) -> NDArray[np.float32]:
    """What K-quants stand for: (rows, columns)."""
    each = units.astype(np.float32).repeat(8, 1)  # (rows, groups, 2)
    first = (each[..., 0] * steps[..., 0])[..., None].repeat(32, -1)
    if name == "Q6_K":
        first[..., 16:] = (each[..., 0] * steps[..., 1])[..., None]
        return (first * integers).reshape(len(integers), -1)
    return (first * integers - (each[..., 1] * steps[..., 1])[..., None]).reshape(len(integers), -1)


def values_of(scales: NDArray[Any], integers: NDArray[Any], minima: NDArray[Any] | None) -> NDArray[np.float32]:
    """What they stand for: (rows, columns)."""
    values = scales.astype(np.float32)[..., None] * integers.astype(np.float32)
    values = values if minima is None else values + minima.astype(np.float32)[..., None]
    return values.reshape(len(values), -1)


def _blocked(array: NDArray[Any], columns: int) -> NDArray[Any]:
    """(rows, n) as (row blocks, 8, column blocks, columns), with zeros at the edges."""
    rows, width = -(-len(array) // ROWS) * ROWS, -(-array.shape[1] // columns) * columns
    padded = np.zeros((rows, width), array.dtype)
    padded[: len(array), : array.shape[1]] = array
    return padded.reshape(rows // ROWS, ROWS, width // columns, columns)


def lay_out(scales: NDArray[Any], integers: NDArray[Any], kind: str, minima: NDArray[Any] | None = None) -> list[NDArray[Any]]:
    """Integers, scales and minima as they lie on the device."""
    group, rows = integers.shape[-1], len(integers)
    offset = 8 if kind == "int4" and minima is None else 0  # K-quants of 4 bits have drops
    codes = _blocked(integers.reshape(rows, -1).astype(np.int16) + offset, COLUMNS)
    if offset:  # what is missing at the edges stands for zero
        codes = np.where(_blocked(np.ones(integers.reshape(rows, -1).shape, np.int16), COLUMNS) == 0, 8, codes)
    words = codes.astype(np.uint8).reshape(*codes.shape[:-1], 4, 4, 8)  # (row blocks, g, steps, quarter, t, column)
    words = words.transpose(0, 2, 1, 4, 3, 5)  # (row blocks, steps, g, t, quarter, column)
    per_word = 8 if kind == "int4" else 4
    words = words.reshape(*words.shape[:-1], -1, per_word).astype(np.uint32)
    shifts = [16 * (j % 2) + (4 if kind == "int4" else 8) * (j // 2) for j in range(per_word)]
    packed = sum(words[..., j] << np.uint32(shift) for j, shift in enumerate(shifts))  # (..., g, t, quarter, words)
    if kind == "int8":  # the first 64 columns of all lanes before the others
        packed = packed.reshape(*packed.shape[:4], 2, 2, 2).transpose(0, 1, 4, 2, 3, 5, 6)
    result = [np.ascontiguousarray(packed).reshape(-1)]
    if scales.ndim == 3:  # K-quants: steps, and units for each block of 128 columns
        both = ((scales[..., 0] + 128) | (scales[..., 1] + 128) << 8).astype(np.uint16)
        pairs = np.ascontiguousarray(minima.repeat(2, 1)).view(np.uint32)[..., 0]  # type: ignore[union-attr]
        for array, columns in ((both, 4), (pairs, 1)):
            result.append(np.ascontiguousarray(_blocked(array, columns).transpose(0, 2, 1, 3)).reshape(-1))
        return result
    for numbers in (scales, minima):
        if numbers is not None:
            blocked = _blocked(numbers.view(np.uint16), COLUMNS // group).transpose(0, 2, 1, 3)
            result.append(np.ascontiguousarray(blocked).reshape(-1))
    return result


def read_back(
    packed: NDArray[np.uint32], scales: NDArray[Any], minima: NDArray[Any] | None, kind: str, shape: tuple[int, int], group: int
) -> NDArray[np.float32]:
    """The matrix (rows, columns) that a packed one stands for."""
    blocks = -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)
    if kind == "int8":
        packed = packed.reshape(*blocks, 2, 8, 4, 2, 2).transpose(0, 1, 3, 4, 2, 5, 6)
    words = packed.reshape(*blocks, 8, 4, 4, -1)  # (row blocks, steps, g, t, quarter, words)
    bits, per_word = (4, 8) if kind == "int4" else (8, 4)
    columns = [words >> np.uint32(16 * (j % 2) + bits * (j // 2)) & ((1 << bits) - 1) for j in range(per_word)]
    codes = np.stack(columns, -1).reshape(*blocks, 8, 4, 4, 8).transpose(0, 2, 1, 4, 3, 5)
    codes = codes.reshape(blocks[0] * 8, -1)
    integers = codes.astype(np.uint8).view(np.int8) if kind == "int8" else codes.astype(np.int8) - (8 if minima is None else 0)

    def of_columns(numbers: NDArray[Any]) -> NDArray[np.float32]:
        rows = numbers.view(np.float16).reshape(*blocks, 8, -1).transpose(0, 2, 1, 3).reshape(blocks[0] * 8, -1)
        return rows.astype(np.float32).repeat(group, 1)

    values = of_columns(scales) * integers
    values = values if minima is None else values + of_columns(minima)
    return values[: shape[0], : shape[1]]


def packed_weight(weight: Weight) -> NDArray[np.float32]:
    """All rows of packed integers, those of all experts."""
    shape = weight.experts * weight.rows, weight.columns
    kind = Packed(weight.type, weight.group, weight.minima != 0, 0, 0, 0, weight.steps)
    size, scale_bytes, minima_bytes = sizes(*shape, kind)
    packed = view(weight.pointer, (size // 4,), np.uint32)
    scales = view(weight.scales, (scale_bytes // 2,), np.uint16)
    minima = view(weight.minima, (minima_bytes // 2,), np.uint16) if weight.minima else None
    if not weight.steps:
        return read_back(packed, scales, minima, weight.type, shape, weight.group)
    ones = np.full_like(scales, np.float16(1).view(np.uint16))
    drops = np.zeros_like(scales) if weight.steps == "drops" else None
    integers = read_back(packed, ones, drops, weight.type, shape, weight.group)
    blocks = -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)

    def by_rows(numbers: NDArray[Any], each: int) -> NDArray[Any]:
        return numbers.reshape(*blocks, ROWS, each).transpose(0, 2, 1, 3).reshape(blocks[0] * ROWS, -1)[: shape[0]]

    steps = by_rows(scales, 4).astype(np.int32)
    units = by_rows(minima.view(np.uint32), 1)[:, ::2, None].copy().view(np.float16)  # type: ignore[union-attr]
    both = np.stack([(steps & 255) - 128, (steps >> 8) - 128], -1)[:, : shape[1] // 32]
    return k_quant_values("Q6_K" if weight.steps == "halves" else "Q4_K", both, integers.reshape(len(integers), -1, 32), units)


class NumpyPacking:
    """The operations of cuda/pack.cu and cuda/random.cu, done at once."""

    def random(self, output: int, element: str, seed: int, first: int, count: int) -> None:
        numbers = np.arange(first, first + count, dtype=np.uint64)
        with np.errstate(over="ignore"):
            words = np.uint64(seed) + (numbers // np.uint64(8) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            words = (words ^ words >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            words = (words ^ words >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
        values = (words >> numbers % np.uint64(8) * np.uint64(8)).astype(np.uint8).view(np.int8)
        exact = (2 * values.astype(np.float32) + 1) / 8192
        if element == "bf16":
            view(output, (count,), np.uint16)[:] = exact.view(np.uint32) >> 16
        else:
            view(output, (count,))[:] = exact

    def pack(self, source: int, weight: Weight, plan: Plan, rows: int, refused: int) -> None:
        data = view(source, (rows, plan.row_bytes(weight.columns)), np.uint8)
        if plan.form == "stored":
            name = next(name for name, packed in FORMATS.items() if packed == plan.packed)
            scales, integers, minima = blocks_of(name, data)
        else:
            wide = data.view(np.uint16).astype(np.uint32) << 16 if plan.form == "bf16" else data
            numbers = wide.view(np.float32)
            minima = None
            if not (np.abs(numbers) <= 65504).all():
                view(refused, (1,), np.int32)[0] = 1
                return
            scales, integers = groups_of(numbers, weight.type, weight.group)
        places = (weight.pointer, weight.scales, weight.minima)
        for place, array in zip(places, lay_out(scales, integers, weight.type, minima), strict=False):
            view(place, array.shape, array.dtype)[:] = array
