"""What operations are given: plain records over device memory that somebody else owns.

Pointers are device addresses as integers, widths and strides count elements. Nothing here imports cupy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PAGE_TOKENS = 16
"""Tokens of one page, as in rust/kernels/src/kv.rs and cuda/kv.cuh."""

ELEMENT_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "e4m3": 1, "int8": 1}
"""Bytes of each element type that kernels read; the names are those of the types in cuda/common.cuh, but for two."""

KEY_GROUP = 32
"""Dimensions of an int8 key that share a scale, as in rust/kernels/src/kv/element.rs."""

MOST_BRANCHES = 32
"""Sequences that a step may have beyond `max_num_seqs` where drafts are trees, as in rust/engine/src/draft_tree.rs."""
DRAW_BYTES = 72
"""Of a draw, as in rust/engine/src/draw_layout.rs."""

MOST_DRAW_WORDS = 1 << 20
"""Of changes and masks in a step, as in rust/engine/src/draw.rs."""

LOGPROB_VALUES = 66
"""Of a row, as in rust/engine/src/draw_layout.rs."""

ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf", "relu", "relu_squared")
"""In the order of the numbers in cuda/activation.cuh."""


PACKED_BITS = {"int4": 4, "int8": 8}
"""Bits of the integers of packed weights, by type."""

BLOCK_ROWS, BLOCK_COLUMNS = 8, 128
"""Of a block of a packed weight, as in cuda/weights.cuh."""


def c_type(element: str) -> str:
    """Return the name of an element type in the kernels' sources."""
    return {"f32": "float", "int8": "i8"}.get(element, element)


def key_scales(kind: str, head_dim: int) -> int:
    """Return how many scales keys of a type have for a token and head."""
    return {"e4m3": 1, "int8": -(-head_dim // KEY_GROUP)}.get(kind, 0)


class Rows(NamedTuple):
    """Some columns of a buffer of activations: (rows, width), row-major, ``stride`` elements from row to row.

    A tuple, because every launch makes some: a dataclass takes several times as long.
    """

    pointer: int
    rows: int
    width: int
    stride: int
    dtype: str
    """"bf16" or "f32"; "e4m3" where an operation says so."""

    def part(self, offset: int, width: int) -> Rows:
        """Return the columns from ``offset`` on, ``width`` of them."""
        return Rows(self.pointer + offset * ELEMENT_BYTES[self.dtype], self.rows, width, self.stride, self.dtype)

    def first(self, rows: int) -> Rows:
        """Return the first rows."""
        return Rows(self.pointer, rows, self.width, self.stride, self.dtype)

    def from_row(self, row: int, rows: int) -> Rows:
        """Return ``rows`` rows from one on."""
        pointer = self.pointer + row * self.stride * ELEMENT_BYTES[self.dtype]
        return Rows(pointer, rows, self.width, self.stride, self.dtype)


@dataclass(frozen=True)
class Weight:
    """A matrix (rows, columns), row-major and contiguous or packed, or with ``experts`` many of them one after the other."""

    pointer: int
    rows: int
    columns: int
    type: str
    """"bf16", "f16", "f32" or "e4m3"; "int4" or "int8" for packed integers, laid out as cuda/weights.cuh says."""
    bias: int = 0
    """f32 (rows), or (experts, rows); 0 for none."""
    scales: int = 0
    """f32 (rows, ceil(columns / group)) for e4m3; of packed integers f16, in their layout; else 0."""
    group: int = 0
    """Columns that share a scale. e4m3: 0 for all of a row, else a multiple of 8; 128 is streamed. Packed: 32 or 128."""
    experts: int = 1
    minima: int = 0
    """What is added to each group of packed integers, laid out as their scales, or the units that steps count in; 0 for none."""
    steps: str = ""
    """Steps in the place of packed integers' scales: of scales and "drops" that are taken off, or of scales of "halves"."""

    @property
    def is_packed(self) -> bool:
        """Whether these are packed integers."""
        return self.type in PACKED_BITS

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, without scales."""
        return self.columns * PACKED_BITS[self.type] // 8 if self.is_packed else self.columns * ELEMENT_BYTES[self.type]

    @property
    def macros(self) -> dict[str, int | str]:
        """What kernels are compiled with to read it."""
        if not self.is_packed:
            return {"WEIGHT": c_type(self.type)}
        has_minima = self.steps == "drops" if self.steps else self.minima != 0
        macros: dict[str, int | str] = {"WEIGHT": "u8", "PACKED": PACKED_BITS[self.type], "WEIGHT_GROUP": self.group}
        return {**macros, "MINIMA": int(has_minima), "STEPS": int(self.steps != ""), "HALVES": int(self.steps == "halves")}


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines: f32 (table rows, pairs, 2)."""

    pointer: int
    pairs: int
    style: str = "half"
    """"half" pairs values i and i + pairs, "interleaved" 2i and 2i + 1."""


@dataclass(frozen=True)
class KvLayer:
    """Pages of one layer: keys and values (pages, kv_heads, PAGE_TOKENS, head_dim) each, with types of their own."""

    keys: int
    values: int
    key_type: str
    value_type: str
    kv_heads: int
    head_dim: int
    pages: int
    key_scales: int = 0
    """f32 (pages, kv_heads, PAGE_TOKENS) for e4m3, (pages, kv_heads, head_dim / KEY_GROUP, PAGE_TOKENS) for int8, else 0."""
    value_scales: int = 0
    """f32 (pages, kv_heads, PAGE_TOKENS) for 8-bit types, else 0."""


@dataclass(frozen=True)
class StepInputs:
    """Which rows a step computes: int32 device arrays of fixed size, whose contents may change between replays of a graph.

    Rows of a sequence are neighbours, and sequences lie in order. Padded rows have token 0, position 0, slot -1 and
    row_sequence -1: they are computed like others, and nothing that lasts is written for them. Padded sequences have no rows.
    """

    rows: int
    sequences: int
    tokens: int
    """(rows)"""
    positions: int
    """(rows)"""
    slots: int
    """(rows): page * PAGE_TOKENS + place in the page, or -1."""
    rope_rows: int
    """(rows): row of the table of cosines and sines."""
    row_sequence: int
    """(rows): index of the row's sequence, or -1."""
    first_row: int
    """(sequences + 1): sequence s has the rows first_row[s] to first_row[s + 1]."""
    page_table: int
    """(sequences, page_stride): pages of each sequence, -1 for those that no row sees."""
    page_stride: int
    chosen: int = 0
    """(rows wanted by the step before): what that step chose; a token of -1 - i stands for the i-th of them."""
    copies: int = 0
    """(MOST_BRANCHES, 2): pages to copy first, from and to, or -1."""


@dataclass(frozen=True)
class Draws:
    """How the tokens of wanted rows are drawn, and where what is drawn with is: see cuda/draw.cuh."""

    pointer: int
    """(rows) of DRAW_BYTES"""
    words: int
    """Changes of logits, then masks: uint32."""
    latest: int
    """(rows) of 8 bytes: working memory."""
    told: int
    """int32 (rows, LOGPROB_VALUES): log-probabilities, where they are wanted."""


@dataclass(frozen=True)
class Routes:
    """Experts that rows have chosen: int32 and f32 (rows, used), ascending; -1 for padded rows."""

    chosen: int
    weights: int
    used: int
