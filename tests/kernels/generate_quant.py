"""Write what the quantized formats are checked against, and the grids of the IQ formats.

    pip install gguf numpy
    python tests/kernels/generate_quant.py

It writes ``blocks.bin`` beside this file, which ``rust/kernels/tests/quant.rs`` reads, and
``rust/kernels/src/quant/grids.bin``. Both come from the ``gguf`` package (the files here from 0.19.0): its ``dequantize``
says what blocks stand for, and its tables are the grids. Numbers are little-endian.

``blocks.bin`` holds for each format: the length of its name (one byte), the name, the numbers of weights and of bytes in a
block and of blocks (2 bytes each), the blocks, their values (float32), the number of bytes in a block whose bit 6 is cleared
in random blocks and where those are (2 bytes each), and a 64-bit hash: FNV-1a over the float32 values of ``RANDOM``
random blocks, which are not stored. Their bytes are those at bit 24 of the states of ``s = s * 1664525 + 1013904223``,
32 bits, from 1; clearing bit 6 of a half-precision number's upper byte keeps it finite.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quants

HERE = Path(__file__).resolve().parent
GRIDS = HERE.parent.parent / "rust" / "kernels" / "src" / "quant" / "grids.bin"
RANDOM = 300

# Format -> where the half-precision numbers of a block have their upper bytes (sign, exponent, two bits of mantissa).
UPPER_BYTES: dict[str, tuple[int, ...]] = {
    "Q4_0": (1,),
    "Q8_0": (1,),
    "Q4_1": (1, 3),
    "Q5_0": (1,),
    "Q5_1": (1, 3),
    "Q2_K": (81, 83),
    "Q3_K": (109,),
    "Q4_K": (1, 3),
    "Q5_K": (1, 3),
    "Q6_K": (209,),
    "IQ1_S": (1,),
    "IQ1_M": (55,),
    "IQ2_XXS": (1,),
    "IQ2_XS": (1,),
    "IQ2_S": (1,),
    "IQ3_XXS": (1,),
    "IQ3_S": (1,),
    "IQ4_NL": (1,),
    "IQ4_XS": (1,),
    "TQ1_0": (53,),
    "TQ2_0": (65,),
    "MXFP4": (),
}

# Upper bytes and lower bytes of telling scales: 0, -0, the smallest, the greatest subnormal, 1, -1.5, the greatest and its
# negative.
SCALES = (0x0000, 0x8000, 0x0001, 0x03FF, 0x3C00, 0xBE00, 0x7BFF, 0xFBFF)
FILLS = (0x00, 0xFF, 0x5A, None)  # None: bytes that count up, so that all codes occur


def random_bytes(count: int) -> np.ndarray:
    """Return what the docstring of this file describes."""
    state, out = 1, bytearray()
    for _ in range(count):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(state >> 24)
    return np.frombuffer(bytes(out), dtype=np.uint8).copy()


def set_scale(block: np.ndarray, name: str, bits: int) -> None:
    """Give every half-precision number of `block` these bits."""
    if name == "IQ1_M":  # its scale is in the upper halves of four bytes
        for i in range(4):
            block[49 + 2 * i] = block[49 + 2 * i] & 0x0F | (bits >> (4 * i) & 0xF) << 4
    elif name == "MXFP4":
        block[0] = bits >> 8
    for at in UPPER_BYTES[name]:
        if name != "IQ1_M":
            block[at], block[at - 1] = bits >> 8, bits & 0xFF


def edge_blocks(name: str, size: int) -> np.ndarray:
    """Return blocks (8, size) with telling scales and contents."""
    blocks = np.zeros((len(SCALES), size), dtype=np.uint8)
    for index, (block, scale) in enumerate(zip(blocks, SCALES, strict=True)):
        fill = FILLS[(index + 2) % len(FILLS)]
        block[:] = np.arange(size) * (2 * index + 1) if fill is None else fill
        set_scale(block, name, scale)
    return blocks


def record(name: str) -> bytes:
    """Return what ``blocks.bin`` holds for one format."""
    kind = GGMLQuantizationType[name]
    block_len, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = edge_blocks(name, block_bytes)
    many = random_bytes(RANDOM * block_bytes).reshape(RANDOM, block_bytes)
    for at in UPPER_BYTES[name]:
        many[:, at] &= 0xBF
    values, expected = dequantize(blocks, kind), dequantize(many, kind)
    if np.isnan(values).any() or np.isnan(expected).any():
        raise SystemExit(f"{name}: a NaN, whose bits mean nothing")
    digest = 0xCBF29CE484222325
    for byte in expected.astype("<f4").tobytes():
        digest = (digest ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    cleared = UPPER_BYTES[name]
    parts = [bytes([len(name)]), name.encode(), struct.pack("<3H", block_len, block_bytes, len(blocks))]
    parts += [blocks.tobytes(), values.astype("<f4").tobytes()]
    parts += [struct.pack(f"<H{len(cleared)}H", len(cleared), *cleared), struct.pack("<Q", digest)]
    return b"".join(parts)


def grid(format_class: type, digits: int, bits: int) -> bytes:
    """Return a grid's entries, two bytes each: `digits` indices of `bits` bits into its values, the first lowest."""
    format_class.init_grid()
    values = list(format_class.grid_map)
    entries = np.asarray(format_class.grid).reshape(-1, digits)
    codes = np.vectorize(lambda value: values.index(value))(entries).astype(np.uint32)
    return (codes << (np.arange(digits, dtype=np.uint32) * bits)).sum(axis=1).astype("<u2").tobytes()


def main() -> None:
    """Write both files."""
    pairs = [grid(format_class, 8, 2) for format_class in (quants.IQ1_S, quants.IQ2_XXS, quants.IQ2_XS, quants.IQ2_S)]
    triples = [grid(format_class, 4, 3) for format_class in (quants.IQ3_XXS, quants.IQ3_S)]
    GRIDS.write_bytes(b"".join(pairs + triples))
    (HERE / "blocks.bin").write_bytes(b"".join(record(name) for name in UPPER_BYTES))


if __name__ == "__main__":
    main()
