"""Packed weights: which formats of files they hold exactly, how large they are, and the kernel that makes them.

Weights of a quantized file are moved as they are stored and laid out anew on the device (cuda/pack.cu); floats are rounded there,
exactly as the CPU rounds them. What no packed layout holds exactly is expanded to the type of activations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from infer.gpu.arrays import BLOCK_COLUMNS, BLOCK_ROWS, PACKED_BITS, Weight
from infer.gpu.rows import RowOperations, element_macros

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Literal

    Form = Literal["f32", "bf16", "stored"]

RANDOM_THREADS = 256
SHARERS = 16  # threads of a group, as in cuda/pack.cu
FLOATS = ("F32", "F16", "BF16")


class Packed(NamedTuple):
    """How weights of a format are packed."""

    type: str
    group: int
    has_minima: bool
    number: int
    """FORMAT of cuda/pack.cu."""
    block: int
    """Columns of a block of the format in files, and the bytes of it."""
    block_bytes: int
    steps: str = ""
    """As of a `Weight`."""


FORMATS = {
    "Q8_0": Packed("int8", 32, False, 1, 32, 34),
    "Q4_0": Packed("int4", 32, False, 2, 32, 18),
    "Q4_1": Packed("int4", 32, True, 3, 32, 20),
    "INT4_G128": Packed("int4", 128, False, 4, 128, 66),
    "Q4_K": Packed("int4", 32, True, 5, 256, 144, "drops"),
    "Q5_K": Packed("int8", 32, True, 6, 256, 176, "drops"),
    "Q6_K": Packed("int8", 32, False, 7, 256, 210, "halves"),
}
"""Packed layouts by the names of formats (rust/kernels/src/quant)."""


class Plan(NamedTuple):
    """How a weight comes to the device."""

    packed: Packed
    form: Form
    """In which rows are read: "stored", or floats to be rounded."""

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row as it is read."""
        if self.form == "stored":
            return columns // self.packed.block * self.packed.block_bytes
        return columns * (2 if self.form == "bf16" else 4)


def plan(formats: Iterable[tuple[int, str, str]]) -> Plan | None:
    """Return how rows of (count, stored format, format to compute with) are packed; None if they are expanded."""
    stored, targets = (set(names) for names in list(zip(*formats, strict=True))[1:])
    target = next(iter(targets))
    if len(targets) > 1 or target not in FORMATS:
        return None
    if stored == targets:
        return Plan(FORMATS[target], "stored")
    if stored <= set(FLOATS):
        return Plan(FORMATS[target], "bf16" if stored == {"BF16"} else "f32")
    return None


def sizes(rows: int, columns: int, packed: Packed) -> tuple[int, int, int]:
    """Return the bytes of a packed matrix, of its scales or steps, and of its minima or units."""
    row_blocks, blocks = -(-rows // BLOCK_ROWS), -(-columns // BLOCK_COLUMNS)
    values = row_blocks * blocks * BLOCK_ROWS * BLOCK_COLUMNS
    scales = values // packed.group * 2
    minima = row_blocks * blocks * BLOCK_ROWS * 4 if packed.steps else scales if packed.has_minima else 0
    return values * PACKED_BITS[packed.type] // 8, scales, minima


def from_row(weight: Weight, first: int) -> Weight:
    """Return a packed matrix from a row on, which a block begins with."""
    kind = Packed(weight.type, weight.group, weight.minima != 0, 0, 0, 0, weight.steps)
    values, scales, minima = sizes(first, weight.columns, kind)
    return replace(
        weight,
        pointer=weight.pointer + values,
        rows=weight.rows - first,
        scales=weight.scales + scales,
        minima=weight.minima and weight.minima + minima,
    )


class PackOperations(RowOperations):
    """Packing, and making random weights, enqueued on one stream."""

    def random(self, output: int, element: str, seed: int, first: int, count: int) -> None:
        """Write the values of a random weight from number ``first`` on, as rust/model/src/dummy.rs makes them."""
        kernel = self.kernels.get("random.cu", "random_weights", **element_macros(element))
        kernel(self.stream, (-(-count // RANDOM_THREADS),), RANDOM_THREADS, (output, seed, first, count))

    def pack(self, source: int, weight: Weight, plan: Plan, rows: int, refused: int) -> None:
        """Fill the first rows of a packed matrix from rows as ``plan`` reads them, at ``source``.

        ``refused`` is an int32 that becomes 1 where a float is not finite, or exceeds half precision.
        """
        number, element = (plan.packed.number, {}) if plan.form == "stored" else (0, element_macros(plan.form))
        kernel = self.kernels.get("pack.cu", "pack", FORMAT=number, **element, **weight.macros)
        grid = (-(-weight.columns // BLOCK_COLUMNS), -(-rows // BLOCK_ROWS))
        threads = BLOCK_ROWS * BLOCK_COLUMNS // weight.group * SHARERS
        pointers = (source, weight.pointer, weight.scales, weight.minima, refused)
        kernel(self.stream, grid, threads, (*pointers, rows, weight.columns, plan.row_bytes(weight.columns)))
