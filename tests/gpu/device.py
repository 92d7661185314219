"""What the tests of kernels share: a device to run them on, arrays there, and numpy's idea of bfloat16 and E4M3."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

cupy = pytest.importorskip("cupy", reason="cupy is not installed")

from infer.gpu.arrays import ELEMENT_BYTES, PAGE_TOKENS, KvLayer, Rows, StepInputs, Weight, key_scales  # noqa: E402
from infer.gpu.kernels import Kernels  # noqa: E402
from infer.gpu.operations import Operations  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
TOLERANCE = {"bf16": 6e-3, "f32": 2e-6}
DTYPES = ("bf16", "f32")


def sources() -> dict[str, str]:
    """Return the kernels' sources as they lie in the repository."""
    return {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "cuda").iterdir() if path.suffix in (".cu", ".cuh")}


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to an element type, and return its bits."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "f32":
        return values
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint16)
    if dtype == "e4m3":
        middles = (E4M3[:0x7E] + E4M3[1:0x7F]) / 2  # of the numbers that are not negative
        nearest = np.searchsorted(middles, abs(values))
        nearest += (nearest & 1) & (middles[np.minimum(nearest, 0x7D)] == abs(values))  # ties to even
        return (nearest | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Return what bits of an element type stand for."""
    if dtype == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "f16":
        return bits.view(np.float16).astype(np.float64)
    if dtype == "e4m3":
        return E4M3[bits].astype(np.float64)
    return bits.astype(np.float64)


def _e4m3() -> np.ndarray:
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    magnitude = np.where(exponent == 0, mantissa / 512.0, (1 + mantissa / 8.0) * 2.0 ** (exponent - 7.0))
    return np.where(bits & 0x7F == 0x7F, 1e9, np.where(bits & 0x80, -magnitude, magnitude)).astype(np.float32)


E4M3 = _e4m3()


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values as an element type keeps them."""
    return from_bits(to_bits(values, dtype), dtype)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative error of a whole array; NaN counts as infinite."""
    difference = np.linalg.norm((actual - expected).ravel()) / max(np.linalg.norm(expected.ravel()), 1e-30)
    return float(difference) if np.isfinite(difference) else float("inf")


class Device:
    """A GPU, a stream, operations on it, and arrays that stay alive as long as this does."""

    def __init__(self) -> None:
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.kernels = Kernels(sources())
        workspace = cupy.zeros(36 << 20, np.uint8)
        self.kept = [workspace]
        self.ops = Operations(self.kernels, self.stream.ptr, workspace.data.ptr, workspace.nbytes)

    def put(self, array: np.ndarray) -> int:
        """Copy an array to the device and return its address."""
        copy = cupy.asarray(np.ascontiguousarray(array))
        cupy.cuda.get_current_stream().synchronize()
        self.kept.append(copy)
        return copy.data.ptr

    def zeros(self, size: int) -> int:
        """Return the address of zeroed bytes."""
        return self.put(np.zeros(size, np.uint8))

    def rows(self, values: np.ndarray, dtype: str, stride: int = 0, offset: int = 0) -> Rows:
        """Copy rows into a buffer of ``stride`` columns from ``offset`` on; all else there is NaN."""
        count, width = values.shape
        stride = stride or width
        buffer = np.full((count, stride), np.nan, np.float32)
        buffer[:, offset : offset + width] = values
        size = ELEMENT_BYTES[dtype]
        return Rows(self.put(to_bits(buffer, dtype)) + offset * size, count, width, stride, dtype)

    def blank(self, rows: int, width: int, dtype: str, stride: int = 0, offset: int = 0) -> Rows:
        """Return rows of NaN to be written."""
        return self.rows(np.full((rows, width), np.nan), dtype, stride, offset)

    def weight(self, values: np.ndarray, kind: str, bias: np.ndarray | None = None, **more: int) -> Weight:
        """Copy a matrix, or a stack of them."""
        *experts, rows, columns = values.shape
        pointer = 0 if bias is None else self.put(bias.astype(np.float32))
        return Weight(
            self.put(to_bits(values, kind)), rows, columns, kind, bias=pointer, experts=experts[0] if experts else 1, **more
        )

    def vector(self, values: np.ndarray) -> int:
        """Copy float32 values."""
        return self.put(values.astype(np.float32))

    def read(self, rows: Rows) -> np.ndarray:
        """Wait, and return rows as float64."""
        self.stream.synchronize()
        size = ELEMENT_BYTES[rows.dtype]
        kind = {4: np.float32, 2: np.uint16}[size]
        count = (rows.rows - 1) * rows.stride + rows.width
        memory = cupy.cuda.UnownedMemory(rows.pointer, count * size, self)
        flat = cupy.ndarray((count,), kind, cupy.cuda.MemoryPointer(memory, 0)).get()
        padded = np.zeros(rows.rows * rows.stride, kind)
        padded[:count] = flat
        return from_bits(padded.reshape(rows.rows, rows.stride)[:, : rows.width].copy(), rows.dtype)

    def ints(self, pointer: int, count: int, kind: type = np.int32) -> np.ndarray:
        """Wait, and return numbers."""
        self.stream.synchronize()
        memory = cupy.cuda.UnownedMemory(pointer, count * np.dtype(kind).itemsize, self)
        return cupy.ndarray((count,), kind, cupy.cuda.MemoryPointer(memory, 0)).get()

    def inputs(self, sequences: list[tuple[int, int]], padding: int = 0, pages: int = 0, seed: int = 0) -> StepInputs:
        """Return inputs for sequences of (first position, rows), on random pages, and padded rows."""
        random = np.random.default_rng(seed)
        needed = [-(-(first + rows) // PAGE_TOKENS) for first, rows in sequences]
        order = iter(random.permutation(max(pages, sum(needed))))
        table = np.full((len(sequences) + padding, max(needed, default=1)), -1, np.int32)
        positions, slots, owner, firsts = [], [], [], [0]
        for index, (first, rows) in enumerate(sequences):
            table[index, : needed[index]] = [next(order) for _ in range(needed[index])]
            for position in range(first, first + rows):
                positions.append(position)
                slots.append(table[index, position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS)
                owner.append(index)
            firsts.append(len(positions))
        count = len(positions) + padding
        arrays = [
            random.integers(0, 50, count),
            positions + [0] * padding,
            slots + [-1] * padding,
            positions + [0] * padding,
            owner + [-1] * padding,
            firsts + [firsts[-1]] * padding,
            table,
        ]
        pointers = [self.put(np.asarray(array, np.int32)) for array in arrays]
        return StepInputs(count, len(sequences) + padding, *pointers, table.shape[1])

    def kv_layer(self, pages: int, kv_heads: int, head_dim: int, key_type: str, value_type: str) -> KvLayer:
        """Return a layer's pages, full of NaN."""
        count = pages * kv_heads * PAGE_TOKENS
        keys, values = (
            self.put(np.full(count * head_dim * ELEMENT_BYTES[kind], 0xFF, np.uint8)) for kind in (key_type, value_type)
        )
        groups = (max(key_scales(key_type, head_dim), 1), 1)
        scales = [self.put(np.full(count * each, np.nan, np.float32)) for each in groups]
        return KvLayer(keys, values, key_type, value_type, kv_heads, head_dim, pages, *scales)


def same_in_any_company(gpu: Device, weight: Weight, x: np.ndarray, parts: tuple[tuple[int, int], ...]) -> None:
    """Assert that each row's product has the same bits in some parts (first, count) of the rows; the first is all of them."""
    whole = np.empty(0)
    for first, count in parts:
        output = gpu.blank(count, weight.rows, "f32")
        gpu.ops.linear(gpu.rows(x[first : first + count], "bf16"), output, weight)
        found = gpu.read(output)
        whole = whole if whole.size else found
        assert (found == whole[first : first + count]).all()


@cache
def device() -> Device:
    """Return the first GPU, or skip."""
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        count = 0
    if count == 0:
        pytest.skip("there is no GPU")
    return Device()
