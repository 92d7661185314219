"""Attention against numpy in float64: what was stored by the kernels that store, read by each kernel that attends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from device import PAGE_TOKENS, device, error, from_bits, rounded, to_bits
from test_rows import norm, normal

from infer.gpu import attention
from infer.gpu.arrays import KvLayer, RopeTable, Rows, StepInputs
from infer.gpu.attention import AttentionPlan, PlanSize, is_fast


def stored(values: np.ndarray, kind: str, group: int) -> np.ndarray:
    """Return (tokens, heads, head_dim) as a cache of this type keeps them, integers with a scale for each ``group``."""
    if kind == "int8":
        parts = [values[..., first : first + group] for first in range(0, values.shape[-1], group)]
        most, top = [abs(part).max(-1, keepdims=True).astype(np.float32) for part in parts], np.float32(127)
        integers = [np.rint(part.astype(np.float32) * (top / own)) for part, own in zip(parts, most, strict=True)]
        return np.concatenate([number * (own / top).astype(np.float64) for number, own in zip(integers, most, strict=True)], -1)
    if kind != "e4m3":
        return rounded(values, kind)
    greatest = abs(values).max(-1, keepdims=True).astype(np.float32)
    return from_bits(to_bits(values * (np.float32(448) / greatest), kind), kind) * (greatest / np.float32(448))


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, scale: float, window: int, cap: float, sinks: np.ndarray | None
):
    """Attention of rows (rows, heads, dim) at positions from ``first`` on, over (tokens, kv_heads, dim)."""
    rows, heads, _ = q.shape
    group, output = heads // k.shape[1], np.empty_like(q)
    for row in range(rows):
        low = max(0, first + row + 1 - window) if window else 0
        for head in range(heads):
            scores = k[low : first + row + 1, head // group] @ q[row, head] * scale
            scores = cap * np.tanh(scores / cap) if cap else scores
            weights = np.exp(scores - scores.max())
            total = weights.sum() + (np.exp(sinks[head] - scores.max()) if sinks is not None else 0.0)
            output[row, head] = weights @ v[low : first + row + 1, head // group] / total
    return output


class Case:
    """Sequences, their keys and values in pages, and queries of the last rows."""

    def __init__(
        self, sequences: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, dtype: str, kinds: tuple[str, str]
    ) -> None:
        self.gpu, self.sequences, self.shape, self.dtype = device(), sequences, (heads, kv_heads, dim), dtype
        pages = sum(-(-(first + rows) // PAGE_TOKENS) for first, rows in sequences)
        self.layer: KvLayer = self.gpu.kv_layer(pages + 2, kv_heads, dim, *kinds)
        whole = [(0, first + rows) for first, rows in sequences]
        self.keys, self.values = (normal(sum(n for _, n in whole), kv_heads * dim) for _ in range(2))
        both = self.gpu.rows(np.concatenate([self.keys, self.values], 1), dtype)
        width = kv_heads * dim
        self.gpu.ops.write_kv(self.gpu.inputs(whole, pages=pages + 2), both.part(0, width), both.part(width, width), self.layer)
        self.inputs: StepInputs = self.gpu.inputs(sequences, padding=2, pages=pages + 2)
        self.queries = normal(self.inputs.rows, heads * dim)
        self.rows: Rows = self.gpu.rows(self.queries, dtype, heads * dim + 8 * (dim % 8 == 0))

    def plan(self, window: int, only_decode: bool) -> AttentionPlan:
        longest = max(first + rows for first, rows in self.sequences)
        size = PlanSize(self.inputs.rows, self.inputs.sequences, longest, *self.shape)
        plan = AttentionPlan(self.gpu.zeros(size.plan_bytes), self.gpu.zeros(size.scratch_bytes), size, window, only_decode)
        self.gpu.ops.attention_plan(self.inputs, plan)
        return plan

    def check(
        self, window: int = 0, cap: float = 0.0, sinks: bool = False, only_decode: bool = False, plain: bool = False
    ) -> None:
        heads, kv_heads, dim = self.shape
        sink_values = normal(heads) if sinks else None
        pointer = self.gpu.vector(sink_values) if sinks else 0
        plan, output = self.plan(window, only_decode), self.gpu.blank(self.inputs.rows, heads * dim, self.dtype)
        arguments = (self.inputs, plan, self.rows, output, self.layer, dim**-0.5, cap, pointer)
        for _ in range(2):  # the second time finds the counters that the first one left
            (self.gpu.ops.attend_plainly if plain else self.gpu.ops.attend)(*arguments)
        result = self.gpu.read(output)
        assert np.isnan(result[sum(rows for _, rows in self.sequences) :]).all(), "padded rows were written"
        key_row = query_row = 0
        for first, rows in self.sequences:
            span = slice(key_row, key_row + first + rows)
            k, v = (
                stored(rounded(x[span], self.dtype).reshape(-1, kv_heads, dim), kind, group)
                for x, kind, group in ((self.keys, self.layer.key_type, 32), (self.values, self.layer.value_type, dim))
            )
            q = rounded(self.queries[query_row : query_row + rows], self.dtype).reshape(rows, heads, dim)
            expected = reference(q, k, v, first, dim**-0.5, window, cap, sink_values).reshape(rows, -1)
            actual = result[query_row : query_row + rows]
            assert error(actual, expected) < (1e-5 if self.dtype == "f32" else 8e-3), (first, rows)
            key_row, query_row = key_row + first + rows, query_row + rows


DECODED = [(0, 1), (15, 1), (16, 1), (700, 1), (255, 1), (256, 1), (511, 3), (1030, 8)]
PREFILLED = [(0, 40), (5, 200), (300, 33), (256, 64), (31, 1), (600, 2)]


@pytest.mark.parametrize("sequences", [DECODED, PREFILLED], ids=["decode", "prefill"])
@pytest.mark.parametrize(("window", "cap", "sinks"), [(0, 0.0, False), (20, 0.0, False), (300, 5.0, True), (1, 0.0, False)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(8, 2, 128), (4, 4, 64), (6, 2, 96), (16, 2, 128), (16, 1, 64), (4, 2, 256)]
)
@pytest.mark.parametrize(
    "kinds", [("bf16", "bf16"), ("e4m3", "e4m3"), ("bf16", "e4m3"), ("int8", "int8"), ("int8", "bf16")], ids="-".join
)
def test_fast_attention(sequences, window, cap, sinks, heads, kv_heads, dim, kinds) -> None:
    case = Case(sequences, heads, kv_heads, dim, "bf16", kinds)
    assert is_fast(case.rows, case.rows, case.layer) == (dim != 96 or kinds == ("bf16", "bf16"))
    case.check(window, cap, sinks, only_decode=sequences is DECODED)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize(("window", "cap", "sinks"), [(0, 0.0, False), (20, 3.0, True)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (4, 4, 20), (3, 1, 80)])
@pytest.mark.parametrize(
    "kinds", [("f32", "f32"), ("bf16", "f16"), ("e4m3", "e4m3"), ("f32", "e4m3"), ("int8", "int8"), ("int8", "f32")], ids="-".join
)
def test_plain_attention(dtype, window, cap, sinks, heads, kv_heads, dim, kinds) -> None:
    Case([(0, 5), (200, 3), (31, 1)], heads, kv_heads, dim, dtype, kinds).check(window, cap, sinks, plain=True)


@pytest.mark.parametrize("window", [0, 1100])
@pytest.mark.parametrize(("count", "first"), [(5, 600), (24, 700), (24, 1700), (14, 2600)])
def test_chunks_grow_with_what_is_read(monkeypatch: pytest.MonkeyPatch, window: int, count: int, first: int) -> None:
    """A GPU of 4 multiprocessors has much to read soon: short last chunks are merged, then chunks doubled."""
    sequences = [(first + 37 * i, 1 + i % 3) for i in range(count)]
    case = Case(sequences, 8, 2, 64, "bf16", ("bf16", "bf16"))
    monkeypatch.setattr(case.gpu.ops.kernels, "multiprocessors", 4)
    case.check(window, only_decode=True)


@pytest.mark.parametrize("window", [0, 500])
@pytest.mark.parametrize(("count", "pieces"), [(16, 16), (17, 16 + 4), (18, 16 + 2 * 2), (19, 19)])
def test_the_last_round_is_shared_out(monkeypatch: pytest.MonkeyPatch, window: int, count: int, pieces: int) -> None:
    """Of four blocks for each head: sequences beyond four rounds are cut so that all of them have some."""
    case = Case([(799 if window == 0 else 1663, 1)] * count, 8, 2, 64, "bf16", ("bf16", "bf16"))
    monkeypatch.setattr(case.gpu.ops.kernels, "multiprocessors", 4)
    plan = case.plan(window, True)
    found = case.gpu.ints(plan.pointer, 2)[0]
    assert found == pieces if window == 0 else found >= count
    case.check(window, only_decode=True)


def test_decoded_rows_do_not_depend_on_company() -> None:
    """Where little is read: the same sequence alone, among others, and with its draft tokens verified at once: the same bits."""
    together = Case([(700, 1), (1290, 6)], 8, 2, 128, "bf16", ("bf16", "bf16"))
    plan, output = together.plan(0, True), together.gpu.blank(together.inputs.rows, 8 * 128, "bf16")
    together.gpu.ops.attend(together.inputs, plan, together.rows, output, together.layer, 0.1)
    expected = together.gpu.read(output)
    gpu, table = together.gpu, together.gpu.ints(together.inputs.page_table, 4 * together.inputs.page_stride).reshape(4, -1)
    for row, sequence, position in ((0, 0, 700), (1, 1, 1290), (4, 1, 1293), (6, 1, 1295)):
        inputs = StepInputs(1, 1, *[gpu.put(np.array(x, np.int32)) for x in ([0], [position], [-1], [0], [0], [0, 1])],
                            gpu.put(table[sequence]), table.shape[1])  # fmt: skip
        size = PlanSize(1, 1, 1296, 8, 2, 128)
        plan = AttentionPlan(gpu.zeros(size.plan_bytes), gpu.zeros(size.scratch_bytes), size, 0, True)
        gpu.ops.attention_plan(inputs, plan)
        query = gpu.rows(together.queries[row : row + 1], "bf16")
        alone = gpu.blank(1, 8 * 128, "bf16")
        gpu.ops.attend(inputs, plan, query, alone, together.layer, 0.1)
        assert (gpu.read(alone) == expected[row]).all(), (row, position)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (6, 2, 64), (4, 2, 256)])
@pytest.mark.parametrize("window", [0, 150])
@pytest.mark.parametrize("kind", ["bf16", "e4m3"])
def test_prefilled_rows_do_not_depend_on_chunks(heads: int, kv_heads: int, dim: int, window: int, kind: str) -> None:
    """A prompt whole, among others, and in chunks of some lengths: the same bits."""
    case = Case([(0, 20), (0, 700)], heads, kv_heads, dim, "bf16", (kind, kind))
    gpu, scale = case.gpu, dim**-0.5
    plan, output = case.plan(window, False), gpu.blank(case.inputs.rows, heads * dim, "bf16")
    gpu.ops.attend(case.inputs, plan, case.rows, output, case.layer, scale)
    expected = gpu.read(output)[20:720]
    stride = case.inputs.page_stride
    table = gpu.put(gpu.ints(case.inputs.page_table, 4 * stride).reshape(4, -1)[1])
    for first, rows in ((0, 700), (500, 200), (13, 101), (690, 9), (384, 128)):
        arrays = ([0], np.arange(first, first + rows), [-1] * rows, [0], [0] * rows, [0, rows])
        inputs = StepInputs(rows, 1, *[gpu.put(np.array(x, np.int32)) for x in arrays], table, stride)
        size = PlanSize(rows, 1, 700, heads, kv_heads, dim)
        plan = AttentionPlan(gpu.zeros(size.plan_bytes), gpu.zeros(size.scratch_bytes), size, window, False)
        gpu.ops.attention_plan(inputs, plan)
        queries = gpu.rows(case.queries[20 + first : 20 + first + rows], "bf16")
        alone = gpu.blank(rows, heads * dim, "bf16")
        gpu.ops.attend(inputs, plan, queries, alone, case.layer, scale)
        assert (gpu.read(alone) == expected[first : first + rows]).all(), (first, rows)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (5, 3, 64), (4, 2, 256), (32, 8, 128)])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("sequences", [[(7, 4), (250, 3)], [(5, 40), (0, 33), (16, 1)], [(256, 64)]])
def test_rotation_in_vectors(
    heads: int, kv_heads: int, dim: int, has_norm: bool, sequences: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored and rotated in vectors, against the kernel that takes everything."""
    gpu, pages = device(), 60
    turns = np.stack([np.cos(angles := normal(400, dim // 2) * 3), np.sin(angles)], -1).astype(np.float32)
    table, inputs = RopeTable(gpu.put(turns), dim // 2), gpu.inputs(sequences, padding=1, pages=pages)
    values = normal(inputs.rows, (heads + 2 * kv_heads) * dim)
    norms = [gpu.vector(normal(dim)) for _ in range(2)] if has_norm else [0, 0]
    found = []
    for vectors in (True, False):
        if not vectors:
            monkeypatch.setattr(attention, "can_rotate_halves", lambda *_: False)
        qkv, layer = gpu.rows(values, "bf16", values.shape[1] + 8), gpu.kv_layer(pages, kv_heads, dim, "bf16", "bf16")
        gpu.ops.rope_write_kv(inputs, qkv, layer, heads, table, *norms, 1e-6)
        size = pages * kv_heads * PAGE_TOKENS * dim
        stored = [gpu.ints(pointer, size, np.uint16) for pointer in (layer.keys, layer.values)]
        found.append((gpu.read(qkv.part(0, heads * dim)), *[from_bits(bits, "bf16") for bits in stored]))
    for own, other in zip(*found, strict=True):
        assert (np.isnan(own) == np.isnan(other)).all(), "other slots were written"
        own, other = np.nan_to_num(own), np.nan_to_num(other)
        assert (own == other).mean() > (0.99 if has_norm else 0.9995)
        assert error(own, other) < 2e-3


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(16, 2, 128), (8, 2, 128), (4, 1, 128), (32, 8, 128)])
@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("sequences", [DECODED, [(37 * i, 1) for i in range(40)], [(14, 8), (3, 2), (505, 8), (527, 1)]])
def test_decode_attention_rotates_and_stores(
    heads: int, kv_heads: int, dim: int, window: int, sequences: list[tuple[int, int]]
) -> None:
    """What attention rotates and stores itself, against the kernel that does it before: the same bits."""
    case = Case(sequences, heads, kv_heads, dim, "bf16", ("bf16", "bf16"))
    gpu, inputs, width = case.gpu, case.inputs, (heads + 2 * kv_heads) * dim
    turns = np.stack([np.cos(angles := normal(1600, dim // 2) * 3), np.sin(angles)], -1).astype(np.float32)
    table, values, found = RopeTable(gpu.put(turns), dim // 2), normal(inputs.rows, width), []
    size = case.layer.pages * kv_heads * PAGE_TOKENS * dim
    plan = case.plan(window, True)
    pages = case.layer.keys, case.layer.values
    before = [gpu.ints(pointer, size, np.uint16) for pointer in pages]
    for own in (None, plan, plan):
        layer = replace(case.layer, keys=gpu.put(before[0]), values=gpu.put(before[1]))
        qkv, output = gpu.rows(values, "bf16", width + 8), gpu.blank(inputs.rows, heads * dim, "bf16")
        gpu.ops.rope_write_kv(inputs, qkv, layer, heads, table, plan=own)
        gpu.ops.attend(inputs, plan, qkv.part(0, heads * dim), output, layer, dim**-0.5)
        stored = [gpu.ints(pointer, size, np.uint16) for pointer in (layer.keys, layer.values)]
        found.append([gpu.ints(output.pointer, inputs.rows * heads * dim, np.uint16), *stored])
        assert all((one != other).any() for one, other in zip(stored, before, strict=True))
    for other in found[1:]:
        assert all((one == two).all() for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(("dim", "pairs"), [(128, 64), (64, 16), (20, 10)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotation_and_storing(dtype: str, style: str, dim: int, pairs: int, has_norm: bool) -> None:
    """The fused kernel, and rotation alone, against numpy; what was stored is read back from the pages."""
    gpu, heads, kv_heads = device(), 5, 2
    angles, weights = normal(300, pairs) * 3, normal(2, dim)
    turns = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    table = RopeTable(gpu.put(turns), pairs, style)
    inputs, values = gpu.inputs([(7, 4), (250, 3)], padding=1), normal(8, (heads + 2 * kv_heads) * dim)
    qkv = gpu.rows(values, dtype, values.shape[1] + 8)
    layer = gpu.kv_layer(20, kv_heads, dim, "f32", "f32")
    exact = rounded(values, dtype)
    expected = rotate(exact.reshape(8, -1, dim), turns[gpu.ints(inputs.positions, 8)].astype(np.float64), style)
    if not has_norm:
        alone = gpu.rows(values, dtype)
        gpu.ops.rope(inputs, alone.part(0, heads * dim), heads, table)
        assert error(gpu.read(alone.part(0, heads * dim)), expected[:, :heads].reshape(8, -1)) < (
            6e-3 if dtype == "bf16" else 1e-6
        )
    norms = [gpu.vector(weight) for weight in weights] if has_norm else [0, 0]
    gpu.ops.rope_write_kv(inputs, qkv, layer, heads, table, *norms, 1e-6)
    if has_norm:
        factors = np.concatenate([np.tile(weights[0], heads), np.tile(weights[1], kv_heads)])
        both = norm(exact[:, : (heads + kv_heads) * dim], "rms", heads + kv_heads, 1e-6, factors, None)
        expected = rotate(both.reshape(8, -1, dim), turns[gpu.ints(inputs.positions, 8)].astype(np.float64), style)
    limit = 8e-3 if dtype == "bf16" else 2e-6
    assert error(gpu.read(qkv.part(0, heads * dim)), expected[:, :heads].reshape(8, -1)) < limit
    slots = gpu.ints(inputs.slots, 8)[:7]
    size = 20 * kv_heads * PAGE_TOKENS * dim
    for pointer, wanted in (
        (layer.keys, expected[:7, heads : heads + kv_heads]),
        (layer.values, exact.reshape(8, -1, dim)[:7, -kv_heads:]),
    ):
        pages = gpu.ints(pointer, size, np.float32).reshape(20, kv_heads, PAGE_TOKENS, dim)
        assert error(pages[slots // PAGE_TOKENS, :, slots % PAGE_TOKENS].astype(np.float64), wanted) < limit
        pages[slots // PAGE_TOKENS, :, slots % PAGE_TOKENS] = np.nan
        assert np.isnan(pages).all(), "a slot that belongs to no row was written"


@pytest.mark.parametrize("kind", ["bf16", "e4m3"])
@pytest.mark.parametrize("rows", [1, 8, 13, 20, 49])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 128), (4, 4, 64), (3, 1, 80), (32, 8, 128)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_product_with_rotation_and_storing(kind: str, rows: int, heads: int, kv_heads: int, dim: int, has_norm: bool) -> None:
    """Fused to one kernel or not: queries, keys and values of the product."""
    gpu, width = device(), (heads + 2 * kv_heads) * dim
    angles, weight, factors, bias = normal(300, dim // 2) * 3, normal(width, 256) / 8, normal(256), normal(width)
    turns = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
    table, inputs = RopeTable(gpu.put(turns), dim // 2), gpu.inputs([(250, rows)], padding=1, pages=20)
    x, layer = normal(rows + 1, 256), gpu.kv_layer(20, kv_heads, dim, "f32", "f32")
    source, qkv, scratch = gpu.rows(x, "bf16"), gpu.blank(rows + 1, width, "bf16"), gpu.blank(rows + 1, 256, "bf16")
    scales = abs(normal(width, 1)) + 0.5 if kind == "e4m3" else 1.0
    more = {"scales": gpu.vector(scales), "group": 256} if kind == "e4m3" else {}
    pointer = gpu.vector(factors) if has_norm else 0
    packed = gpu.weight(weight, kind, bias, **more)
    gpu.ops.qkv(inputs, source, qkv, packed, layer, heads, table, pointer, 1e-5, scratch)
    exact = rounded(x, "bf16")
    exact = norm(exact, "rms", 1, 1e-5, factors, None) if has_norm else exact
    product = (exact @ (rounded(weight, kind) * scales).T + bias).reshape(rows + 1, -1, dim)
    expected = rotate(product, turns[gpu.ints(inputs.positions, rows + 1)].astype(np.float64), "half")
    limit = 4e-2 if kind == "e4m3" and rows >= 16 else 8e-3  # many rows are multiplied in E4M3
    assert error(gpu.read(qkv.part(0, heads * dim)), expected[:, :heads].reshape(rows + 1, -1)) < limit
    slots = gpu.ints(inputs.slots, rows + 1)[:rows]
    for pointer, wanted in ((layer.keys, expected[:rows, heads:-kv_heads]), (layer.values, product[:rows, -kv_heads:])):
        pages = gpu.ints(pointer, 20 * kv_heads * PAGE_TOKENS * dim, np.float32).reshape(20, kv_heads, PAGE_TOKENS, dim)
        assert error(pages[slots // PAGE_TOKENS, :, slots % PAGE_TOKENS].astype(np.float64), wanted) < limit
        pages[slots // PAGE_TOKENS, :, slots % PAGE_TOKENS] = np.nan
        assert np.isnan(pages).all(), "a slot that belongs to no row was written"


def rotate(heads: np.ndarray, turns: np.ndarray, style: str) -> np.ndarray:
    """Rotate (rows, heads, dim) by (rows, pairs, 2)."""
    pairs, output = turns.shape[1], heads.copy()
    first, second = (
        (slice(0, pairs), slice(pairs, 2 * pairs)) if style == "half" else (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
    )
    a, b, cos, sin = heads[..., first], heads[..., second], turns[:, None, :, 0], turns[:, None, :, 1]
    output[..., first], output[..., second] = a * cos - b * sin, b * cos + a * sin
    return output
