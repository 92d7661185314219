"""Pages of keys and values in numpy, over raw pointers."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy_sampler import view

from infer.gpu.arrays import KEY_GROUP, MOST_BRANCHES, PAGE_TOKENS, key_scales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from infer.gpu.arrays import KvLayer, StepInputs
    from infer.gpu.memory import Parts

DTYPES = {"f32": np.float32, "f16": np.float16, "e4m3": np.uint8, "int8": np.int8}


def _e4m3(code: int) -> float:
    exponent, fraction = code >> 3 & 15, code & 7
    value = fraction / 512 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -value if code & 128 else value


E4M3 = np.array([_e4m3(code) for code in range(256)], np.float32)  # but for the two codes of NaN


class NumpyCopies:
    """Copies of pages in all layers."""

    def copy_page(self, parts: Parts, source: int, target: int) -> None:
        """See `Operations`."""
        for pointer, size in view(parts.pointer, (parts.count, 2), np.uint64).tolist():
            ctypes.memmove(pointer + target * size, pointer + source * size, size)

    def copy_pages(self, inputs: StepInputs, parts: Parts) -> None:
        """See `Operations`."""
        for source, target in view(inputs.copies, (MOST_BRANCHES, 2), np.int32).tolist():
            if source >= 0:
                self.copy_page(parts, source, target)


class KvPart:
    """Keys (0) or values (1) of a layer: (pages, kv_heads, PAGE_TOKENS, head_dim), and the scales of 8-bit ones."""

    def __init__(self, layer: KvLayer, part: int) -> None:
        self.kind, shape = (layer.key_type, layer.value_type)[part], (layer.pages, layer.kv_heads)
        self.pages = view((layer.keys, layer.values)[part], (*shape, PAGE_TOKENS, layer.head_dim), DTYPES[self.kind])
        pointer, count = (layer.key_scales, layer.value_scales)[part], key_scales(self.kind, layer.head_dim) if part == 0 else 1
        self.scales = view(pointer, (*shape, count, PAGE_TOKENS)) if pointer else None
        self.group = KEY_GROUP if count > 1 else layer.head_dim

    def write(self, slots: NDArray[Any], values: NDArray[Any]) -> None:
        """Store (slots, kv_heads, head_dim)."""
        page, token = slots // PAGE_TOKENS, slots % PAGE_TOKENS
        if self.scales is None:
            self.pages[page, :, token] = values
            return
        greatest = np.float32(127 if self.kind == "int8" else 448)
        for number in range(self.scales.shape[2]):
            own = slice(number * self.group, (number + 1) * self.group)
            part = values[..., own]
            largest = np.abs(part).max(-1, keepdims=True)
            self.scales[page, :, number, token] = largest[..., 0] / greatest
            scaled = np.divide(part, largest / greatest, out=np.zeros_like(part), where=largest > 0)
            self.pages[page, :, token, own] = self.rounded(scaled)

    def rounded(self, scaled: NDArray[Any]) -> NDArray[Any]:
        """Numbers as they are stored."""
        if self.kind == "int8":
            return np.rint(scaled).astype(np.int8)
        nearest = np.abs(np.abs(scaled)[..., None] - E4M3[:127]).argmin(-1)
        return nearest | np.where(scaled < 0, 128, 0)

    def read(self, slots: NDArray[Any]) -> NDArray[Any]:
        """Return (slots, kv_heads, head_dim)."""
        page, token = slots // PAGE_TOKENS, slots % PAGE_TOKENS
        stored = self.pages[page, :, token]
        if self.scales is None:
            return stored
        numbers = E4M3[stored] if self.kind == "e4m3" else stored.astype(np.float32)
        scales = self.scales[page, :, :, token]  # (slots, kv_heads, groups)
        return numbers * np.repeat(scales, self.group, axis=2)[..., : numbers.shape[-1]]
