"""Pages of keys and values in numpy, over raw pointers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy_sampler import view

from infer.gpu.arrays import PAGE_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from infer.gpu.arrays import KvLayer

DTYPES = {"f32": np.float32, "f16": np.float16, "e4m3": np.uint8}


def _e4m3(code: int) -> float:
    exponent, fraction = code >> 3 & 15, code & 7
    value = fraction / 512 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -value if code & 128 else value


E4M3 = np.array([_e4m3(code) for code in range(256)], np.float32)  # but for the two codes of NaN


class KvPart:
    """Keys (0) or values (1) of a layer: (pages, kv_heads, PAGE_TOKENS, head_dim), and the scales of 8-bit ones."""

    def __init__(self, layer: KvLayer, part: int) -> None:
        kind, shape = (layer.key_type, layer.value_type)[part], (layer.pages, layer.kv_heads, PAGE_TOKENS)
        self.pages = view((layer.keys, layer.values)[part], (*shape, layer.head_dim), DTYPES[kind])
        scales = (layer.key_scales, layer.value_scales)[part]
        self.scales = view(scales, shape) if scales else None

    def write(self, slots: NDArray[Any], values: NDArray[Any]) -> None:
        """Store (slots, kv_heads, head_dim)."""
        place = slots // PAGE_TOKENS, slice(None), slots % PAGE_TOKENS
        if self.scales is None:
            self.pages[place] = values
            return
        largest = np.abs(values).max(-1, keepdims=True)
        self.scales[place] = largest[..., 0] / np.float32(448)
        scaled = np.divide(values, largest / np.float32(448), out=np.zeros_like(values), where=largest > 0)
        nearest = np.abs(np.abs(scaled)[..., None] - E4M3[:127]).argmin(-1)
        self.pages[place] = nearest | np.where(values < 0, 128, 0)

    def read(self, slots: NDArray[Any]) -> NDArray[Any]:
        """Return (slots, kv_heads, head_dim)."""
        place = slots // PAGE_TOKENS, slice(None), slots % PAGE_TOKENS
        return self.pages[place] if self.scales is None else E4M3[self.pages[place]] * self.scales[place][..., None]
