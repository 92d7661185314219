"""Attention over paged keys and values, and storing them: which kernel runs, and how it is launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from infer.gpu.arrays import ELEMENT_BYTES, PAGE_TOKENS, KvLayer, RopeTable, Rows, StepInputs, c_type, key_scales
from infer.gpu.launch import DEPENDENT
from infer.gpu.rows import STREAM_ROWS, RowOperations, element_macros

if TYPE_CHECKING:
    from collections.abc import Iterable


CHUNK_PAGES = 32
"""Pages whose scores are weighed together when decoding, at least: more where a step reads many (cuda/attention_plan.cu)."""

DECODE_ROWS = 8
"""Most rows of a sequence that are decoded; beyond, its rows are prefilled. MOST_ROWS in cuda/attention_decode.cuh."""

PREFILL_PAGES = 2
PREFILL_ROWS = 128  # packed rows of a tile, as in cuda/attention_prefill.cu and attention_warp_group.cu
WARP_GROUP_THREADS = 384
GROUP_DIMS = (64, 96, 128, 192, 256)
"""Widths of heads that cuda/attention_warp_group.cu takes."""
ITEM_BYTES, TILE_BYTES, COUNT_BYTES = 32, 16, 16
DECODE_WARPS = 6
DECODE_BLOCKS = 2  # per multiprocessor
ROPE_BLOCKS = 8  # of rope_write_halves, for each multiprocessor, at most
LONG = 16384
"""Tokens of a sequence from which attention, not products, decides how fast a row is decoded."""


def packed_rows(group: int) -> int:
    """Return how many rows a decode tile has: its tokens times the query heads that share a key/value head, to whole eights."""
    return -(-group // 8) * 8


def decode_tokens(group: int) -> int:
    """Return the tokens of a decode tile."""
    return max(1, 8 // group)


def prefill_tokens(group: int) -> int:
    """Return the tokens of a prefill tile."""
    return max(1, PREFILL_ROWS // group)


@dataclass(frozen=True)
class PlanSize:
    """How much the work lists hold at most, for steps of up to ``rows`` rows of ``sequences`` sequences of ``length`` tokens."""

    rows: int
    sequences: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    most_items: int = 0
    """A limit that the caller sees to (``step_items``), 0 for none: all sequences are rarely long at once."""

    @property
    def items(self) -> int:
        """Pieces of decode attention."""
        chunks = -(-self.length // (CHUNK_PAGES * PAGE_TOKENS))
        tiles = min(self.rows, self.sequences * -(-DECODE_ROWS // decode_tokens(self.heads // self.kv_heads)))
        return min(tiles * chunks, self.most_items or tiles * chunks)

    def step_items(self, sequences: Iterable[tuple[int, int]], window: int) -> int:
        """Return the pieces that a step needs, for its sequences as (first position, rows)."""
        chunk, tokens, count = CHUNK_PAGES * PAGE_TOKENS, decode_tokens(self.heads // self.kv_heads), 0
        for first, rows in sequences:
            if 0 < rows <= DECODE_ROWS:
                begin = max(0, first + 1 - window) if window else 0
                count += -(-rows // tokens) * ((first + rows - 1) // chunk - begin // chunk + 1)
        return count

    @property
    def tiles(self) -> int:
        """Tiles of prefill attention."""
        return -(-self.rows // prefill_tokens(self.heads // self.kv_heads)) + self.sequences

    @property
    def plan_bytes(self) -> int:
        """Bytes of one plan: one for each distinct window."""
        return COUNT_BYTES + self.items * ITEM_BYTES + self.tiles * TILE_BYTES

    @property
    def counter_bytes(self) -> int:
        """Bytes at the start of the scratch that must be zero before it is first used, and are zero between uses."""
        return -(-self.items * self.kv_heads * 4 // 256) * 256

    @property
    def scratch_bytes(self) -> int:
        """Bytes of working memory, shared by all layers."""
        rows = packed_rows(self.heads // self.kv_heads)
        return self.counter_bytes + self.items * self.kv_heads * rows * (self.head_dim + 4) * 4


@dataclass(frozen=True)
class AttentionPlan:
    """The work lists of one step and window, on the device."""

    pointer: int
    """``size.plan_bytes`` bytes, aligned to 16."""
    scratch: int
    """``size.scratch_bytes`` bytes, aligned to 256, ``size.counter_bytes`` of them zeroed once."""
    size: PlanSize
    window: int
    """Tokens that a row sees, its own included; 0 for all."""
    only_decode: bool
    """No sequence has more than DECODE_ROWS rows, now and whenever the captured graph is replayed."""
    plain: bool = False
    """Attend plainly: for a step that needs more than ``size.items``."""

    @property
    def items(self) -> int:
        """Pointer to the pieces of decode attention."""
        return self.pointer + COUNT_BYTES

    @property
    def tiles(self) -> int:
        """Pointer to the tiles of prefill attention."""
        return self.items + self.size.items * ITEM_BYTES


class Turning(NamedTuple):
    """Queries and keys that decode attention rotates itself, and keys and values that it stores (cuda/attention_turn.cuh)."""

    inputs: StepInputs
    qkv: Rows
    layer: KvLayer
    heads: int
    table: RopeTable

    @property
    def arguments(self) -> tuple[int, int, int, int, int]:
        """What the kernel takes for it."""
        inputs = self.inputs
        return self.table.pointer, inputs.rope_rows, inputs.slots, inputs.first_row, self.layer.pages * PAGE_TOKENS


class AttentionOperations(RowOperations):
    """Attention, rotation and storing, enqueued on one stream."""

    decode_rows = DECODE_ROWS
    """Most rows of a sequence that are decoded; 0 prefills all."""

    def rope(self, inputs: StepInputs, rows: Rows, heads: int, table: RopeTable) -> None:
        """Rotate the heads of each row by its position."""
        head_dim = rows.width // heads
        macros = {**element_macros(rows.dtype), "HEAD_DIM": head_dim, "INTERLEAVED": int(table.style == "interleaved")}
        kernel = self.kernels.get("rope.cu", "rope", **macros)
        arguments = (rows.pointer, table.pointer, inputs.rope_rows, rows.stride, heads, table.pairs)
        kernel(self.stream, (-(-heads // 4), rows.rows), 128, arguments)

    def write_kv(self, inputs: StepInputs, keys: Rows, values: Rows, layer: KvLayer) -> None:
        """Store keys and values of the rows at their slots."""
        kernel = self.kernels.get("kv.cu", "write_kv", **element_macros(keys.dtype), **kv_macros(layer))
        pointers = (keys.pointer, values.pointer, layer.keys, layer.values, layer.key_scales, layer.value_scales, inputs.slots)
        shape = (keys.stride, values.stride, layer.kv_heads, layer.pages * PAGE_TOKENS)
        kernel(self.stream, (-(-2 * layer.kv_heads // 4), keys.rows), 128, (*pointers, *shape))

    def rope_write_kv(
        self,
        inputs: StepInputs,
        qkv: Rows,
        layer: KvLayer,
        heads: int,
        table: RopeTable | None,
        query_norm: int = 0,
        key_norm: int = 0,
        epsilon: float = 0.0,
        plan: AttentionPlan | None = None,
    ) -> None:
        """Normalise and rotate queries in place, normalise, rotate and store keys, and store values, in one kernel.

        ``qkv`` is (rows, (heads + 2 * kv_heads) * head_dim), queries first. The norms are root mean square, one weight
        (head_dim) for all heads. With a ``plan``, ``attend`` of the same rows, layer and plan is the next operation, and
        may do all of this itself.
        """
        if table and can_rotate_halves(qkv, layer, table, (query_norm, key_norm)):
            if plan and self.decode_rows and not query_norm and can_attend_turning(qkv, layer, heads, plan):
                self._left = Turning(inputs, qkv, layer, heads, table)
                return
            self._rope_write_halves(inputs, qkv, layer, heads, table, query_norm, key_norm, epsilon)
            return
        style = table.style if table else "half"
        macros = {**element_macros(qkv.dtype), **kv_macros(layer), "INTERLEAVED": int(style == "interleaved")}
        kernel = self.kernels.get("kv.cu", "rope_write_kv", **macros)
        turn = (table.pointer if table else 0, inputs.rope_rows, query_norm, key_norm)
        pages = (layer.keys, layer.values, layer.key_scales, layer.value_scales, inputs.slots)
        shape = (qkv.stride, heads, layer.kv_heads, table.pairs if table else 0, layer.pages * PAGE_TOKENS)
        all_heads = heads + 2 * layer.kv_heads
        kernel(self.stream, (-(-all_heads // 4), qkv.rows), 128, (qkv.pointer, *turn, *pages, *shape, epsilon))

    _left: Turning | None = None
    """What ``attend`` is to do before it attends."""

    def _rope_write_halves(
        self,
        inputs: StepInputs,
        qkv: Rows,
        layer: KvLayer,
        heads: int,
        table: RopeTable,
        query_norm: int,
        key_norm: int,
        epsilon: float,
    ) -> None:
        """``rope_write_kv`` in vectors; into how many parts a row's heads are divided changes no result."""
        kernel = self.kernels.get("kv.cu", "rope_write_halves", **kv_macros(layer))
        quads = -(-qkv.rows // 4)
        groups, pieces = -(-(heads + layer.kv_heads) * layer.head_dim // 512), -(-layer.kv_heads * layer.head_dim // 128)
        most = max(2, ROPE_BLOCKS * self.kernels.multiprocessors // max(quads, 1))
        parts = min(groups, most * groups // (groups + pieces) or 1)
        value_parts = min(pieces, most - parts)
        pointers = (qkv.pointer, table.pointer, inputs.rope_rows, query_norm, key_norm, layer.keys, layer.values, inputs.slots)
        shape = (qkv.stride, qkv.rows, heads, layer.kv_heads, layer.pages * PAGE_TOKENS, epsilon, parts)
        kernel(self.stream, (parts + value_parts, quads), 128, (*pointers, *shape))

    def attention_plan(self, inputs: StepInputs, plan: AttentionPlan) -> None:
        """Make the work lists of a step: once, before all layers, for each distinct window, and before any other operation.

        It is the one kernel that lets no successor start early, so that whatever comes after may read the step's inputs at once.
        """
        self._left = None  # by a step that failed
        group = plan.size.heads // plan.size.kv_heads
        kernel = self.kernels.get("attention_plan.cu", "attention_plan", CHUNK_PAGES=CHUNK_PAGES)
        pointers = (inputs.first_row, inputs.positions, plan.items, plan.tiles, plan.pointer)
        limits = (inputs.sequences, self.decode_rows, decode_tokens(group), prefill_tokens(group), plan.window)
        readers = max(1, self._decode_blocks(inputs.rows, plan) // plan.size.kv_heads)
        kernel(self.stream, (1,), 512, (*pointers, *limits, plan.size.items, plan.size.tiles, readers))

    def attend(
        self,
        inputs: StepInputs,
        plan: AttentionPlan,
        queries: Rows,
        output: Rows,
        layer: KvLayer,
        scale: float,
        softcap: float = 0.0,
        sinks: int = 0,
    ) -> None:
        """``output = softmax(scale * queries . keys) * values`` over what each row sees of its sequence.

        ``softcap`` 0 is none; ``sinks`` is f32 (heads), scores that have no value, or 0. Padded rows are left as they are.
        """
        left, self._left = self._left, None
        if plan.plain or not is_fast(queries, output, layer):
            if left:
                self._rope_write_halves(left.inputs, left.qkv, layer, left.heads, left.table, 0, 0, 0.0)
            self.attend_plainly(inputs, plan, queries, output, layer, scale, softcap, sinks)
            return
        heads = queries.width // layer.head_dim
        query_macros: dict[str, int | str] = {"GROUP": heads // layer.kv_heads, "SOFTCAP": int(softcap > 0)}
        macros = {**kv_macros(layer), **query_macros}
        wide = layer.head_dim > 128 or heads // layer.kv_heads > 8  # whose partial sums would not fit shared memory
        warps = 4 if wide else DECODE_WARPS
        sizes = {"DECODE_WARPS": warps, "DECODE_BLOCKS": DECODE_BLOCKS}
        pages = (layer.keys, layer.values, layer.key_scales, layer.value_scales, sinks)
        shape = (queries.stride, output.stride, inputs.page_stride, layer.kv_heads, plan.window, scale, softcap)
        rows = (queries.pointer, output.pointer)
        if self.decode_rows:
            shared = decode_shared_bytes(layer.head_dim, heads // layer.kv_heads, warps, left is not None)
            carveout = self._carveout(inputs.rows, shared)
            turning = left.arguments if left else (0, 0, 0, 0, 0)
            sizes |= {"ROTATES": 1} if left else {}
            decode = self.kernels.get("attention_decode.cu", "attention_decode", carveout, **macros, **sizes)
            partials = plan.scratch + plan.size.counter_bytes
            lists = (plan.items, plan.pointer, inputs.page_table, partials, plan.scratch)
            blocks = self._decode_blocks(inputs.rows, plan)
            if blocks > self.kernels.multiprocessors:
                blocks = min(blocks, plan.size.items * layer.kv_heads)
            limits = (*shape[:-2], plan.size.items, *shape[-2:])
            decode(self.stream, (blocks,), warps * 32, (*rows, *pages, *lists, *limits, *turning))
            self._streamed = 0
            if plan.only_decode:
                return
        most = -(-inputs.rows // prefill_tokens(heads // layer.kv_heads)) + inputs.sequences
        tiles, tables = min(most, plan.size.tiles), (plan.tiles, plan.pointer, inputs.page_table)
        if has_warp_groups(self.kernels.capability, layer):
            kernel = self.kernels.get("attention_warp_group.cu", "attention_warp_group", HEAD_DIM=layer.head_dim, **query_macros)
            arguments = (*rows, layer.keys, layer.values, sinks, *tables, *shape)
            blocks = min(self.kernels.multiprocessors, tiles * layer.kv_heads)
            kernel(self.stream, (blocks,), WARP_GROUP_THREADS, arguments, warp_group_shared_bytes(layer.head_dim))
            return
        prefill = self.kernels.get("attention_prefill.cu", "attention_prefill", **macros)
        threads = 256 if layer.head_dim > 128 else 128
        prefill(self.stream, (layer.kv_heads, tiles), threads, (*rows, *pages, *tables, *shape), prefill_shared_bytes(layer))

    _streamed = 0
    """Streaming products since the last decode attention. Those of odd numbers take registers, not shared memory (stream.py).

    The first one finds its place beside attention.
    """

    def _decode_blocks(self, rows: int, plan: AttentionPlan) -> int:
        """Return the blocks of decode attention: two for each multiprocessor.

        Among streaming products there is one, whether it has work or not, unless sequences may be long: then all of them begin
        beside the product before, and make room for the next one everywhere.
        """
        is_among = rows <= STREAM_ROWS and plan.size.length <= LONG and self.kernels.capability >= DEPENDENT
        return self.kernels.multiprocessors * (1 if is_among else DECODE_BLOCKS)

    def _carveout(self, rows: int, shared_bytes: int) -> int:
        """Return the hundredths of a multiprocessor's memory that decode attention takes as shared memory.

        Pages come through the rest, and are late where there is little of it: with 28 KB, on an H100, 64 sequences of 640 tokens
        take 60.3 us instead of 57.9, 40 of them 44.7 instead of 40.9. Among streaming products it is all, as for these, since
        dividing memory anew would cost more.
        """
        if rows <= STREAM_ROWS:
            return 100
        reserved = 1024  # of each block
        return min(100, -(-100 * DECODE_BLOCKS * (shared_bytes + reserved) // (self.kernels.shared_limit + reserved)))

    def attend_plainly(
        self,
        inputs: StepInputs,
        plan: AttentionPlan,
        queries: Rows,
        output: Rows,
        layer: KvLayer,
        scale: float,
        softcap: float,
        sinks: int,
    ) -> None:
        """``attend`` by the kernel that takes everything, at its own speed."""
        heads = queries.width // layer.head_dim
        kernel = self.kernels.get("attention.cu", "attention", **element_macros(queries.dtype), **kv_macros(layer))
        pages = (layer.keys, layer.values, layer.key_scales, layer.value_scales, sinks)
        where = (inputs.positions, inputs.row_sequence, inputs.page_table)
        shape = (queries.stride, output.stride, inputs.page_stride, heads, layer.kv_heads, plan.window, scale, softcap)
        kernel(self.stream, (heads, queries.rows), 256, (queries.pointer, output.pointer, *pages, *where, *shape))


def kv_macros(layer: KvLayer) -> dict[str, int | str]:
    """Return the macros that describe a layer's pages."""
    return {"KEY_TYPE": c_type(layer.key_type), "VALUE_TYPE": c_type(layer.value_type), "HEAD_DIM": layer.head_dim}


def is_fast(queries: Rows, output: Rows, layer: KvLayer) -> bool:
    """Return whether the kernels on matrix instructions take this attention."""
    types = queries.dtype == "bf16" and {layer.key_type, layer.value_type} <= {"bf16", "e4m3", "int8"}
    spans = max(64 // ELEMENT_BYTES[kind] for kind in (layer.key_type, layer.value_type))
    aligned = all(rows.pointer % 16 == 0 and rows.stride % 8 == 0 for rows in (queries, output))
    group = queries.width // layer.head_dim // layer.kv_heads
    return types and layer.head_dim % spans == 0 and layer.head_dim <= 256 and group <= 16 and aligned


def can_rotate_halves(qkv: Rows, layer: KvLayer, table: RopeTable, norms: tuple[int, int]) -> bool:
    """Return whether cuda/kv.cu rotates and stores these in vectors: never a question of how many rows there are."""
    types = qkv.dtype == layer.key_type == layer.value_type == "bf16"
    whole = table.style == "half" and 2 * table.pairs == layer.head_dim and layer.head_dim in (64, 128, 256)
    aligned = qkv.stride % 8 == 0 and all(pointer % 16 == 0 for pointer in (qkv.pointer, table.pointer, *norms))
    return types and whole and aligned and (norms[0] == 0) == (norms[1] == 0)


def can_attend_turning(qkv: Rows, layer: KvLayer, heads: int, plan: AttentionPlan) -> bool:
    """Return whether decode attention rotates and stores these itself: where nothing else attends.

    Other groups were not measured; with heads of 64, a layer of 64 rows took 0.3 % longer so, on an H100.
    """
    known = layer.head_dim == 128 and heads in (4 * layer.kv_heads, 8 * layer.kv_heads) and qkv.pointer % 16 == 0
    return plan.only_decode and not plan.plain and known


def has_warp_groups(capability: int, layer: KvLayer) -> bool:
    """Return whether cuda/attention_warp_group.cu takes prompts over these pages: never a question of how many rows there are."""
    return capability == 90 and layer.key_type == layer.value_type == "bf16" and layer.head_dim in GROUP_DIMS


def decode_shared_bytes(head_dim: int, group: int, warps: int, rotates: bool) -> int:
    """Return the shared memory of a block of cuda/attention_decode.cu: its warps' results, and what two pieces need to begin."""
    ahead = decode_tokens(group) * (head_dim * (4 + 2 * (group + 2)) + 4) + 12
    return warps * packed_rows(group) * (head_dim + 10) * 4 + 16 + 2 * ahead * rotates


def warp_group_shared_bytes(head_dim: int) -> int:
    """Return the shared memory of a block of cuda/attention_warp_group.cu: stages of queries, keys and values."""
    tokens, blocks = 64 if head_dim > 128 else 128, -(-head_dim // 64)
    stages, tiles = 2 if head_dim > 192 else 3, 1 if head_dim > 64 else 2
    return 1024 + tiles * blocks * PREFILL_ROWS * 128 + stages * tokens * (blocks * 128 + head_dim * 2)


def prefill_shared_bytes(layer: KvLayer) -> int:
    """Return the shared memory of a prefill block, as in cuda/attention_prefill.cu: queries, two stages of pages and scales."""
    elements = PAGE_TOKENS * layer.head_dim * (ELEMENT_BYTES[layer.key_type] + ELEMENT_BYTES[layer.value_type])
    queries = PREFILL_ROWS * -(-layer.head_dim // 64) * 64 * 2
    scales = max(key_scales(layer.key_type, layer.head_dim), 1) + 1
    return queries + 2 * PREFILL_PAGES * (elements + scales * PAGE_TOKENS * 4)
