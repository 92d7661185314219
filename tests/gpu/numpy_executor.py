"""The GPU path without a GPU: a device whose memory is this process's, and the kernels' operations in numpy over raw pointers.

Everything above the kernels runs on it as it stands (program, weights, pages, plan, graphs, thread, engine), so CI tests it
all; and the GPU is tested against the same operations. Weights and buffers are f32 here (`dtype="float32"`); norms, softmax and
attention are taken in float64.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from math import erf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from numpy_driver import HostDriver, HostEvent, HostGraph
from numpy_layers import NumpyLayers
from numpy_pages import E4M3, KvPart, NumpyCopies
from numpy_sampler import DRAW, choose, tell
from packed_weights import NumpyPacking, packed_weight, view

from infer.gpu.arrays import LOGPROB_VALUES, PAGE_TOKENS, Draws, KvLayer, RopeTable, Routes, Rows, StepInputs, Weight
from infer.gpu.attention import AttentionPlan

NO_PAGE = -1


def matrix(rows: Rows) -> NDArray[Any]:
    """Rows of a buffer as an array."""
    assert rows.dtype == "f32", "the twin computes in float32"
    if rows.rows == 0:
        return np.zeros((0, rows.width), np.float32)
    whole = view(rows.pointer, ((rows.rows - 1) * rows.stride + rows.width,))
    return np.lib.stride_tricks.as_strided(whole, (rows.rows, rows.width), (4 * rows.stride, 4), writeable=True)


def weight_of(weight: Weight, expert: int = 0) -> NDArray[Any]:
    """A matrix, or that of one expert."""
    if weight.is_packed:
        return packed_weight(weight)[expert * weight.rows : (expert + 1) * weight.rows]
    if weight.type == "e4m3":
        group = weight.group or weight.columns
        codes = view(weight.pointer, (weight.experts, weight.rows, weight.columns), np.uint8)[expert]
        scales = view(weight.scales, (weight.experts, weight.rows, -(-weight.columns // group)))[expert]
        return E4M3[codes] * np.repeat(scales, group, axis=1)[:, : weight.columns]
    return view(weight.pointer, (weight.experts, weight.rows, weight.columns))[expert]


def bias_of(weight: Weight, expert: int = 0) -> NDArray[Any] | float:
    return view(weight.bias, (weight.experts, weight.rows))[expert] if weight.bias else 0.0


def activate(name: str, x: NDArray[Any]) -> NDArray[Any]:
    """An activation function in float64."""
    x = x.astype(np.float64)
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu_tanh":
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    if name == "gelu_erf":
        return x / 2 * (1 + np.vectorize(erf)(x / np.sqrt(2)))
    positive = np.maximum(x, 0)
    return positive if name == "relu" else positive**2


class HostDevice:
    """A device in this process's memory: what is enqueued is done at once, and a graph is what enqueues it."""

    name = "numpy"
    stream = 0

    def __init__(self, free: int = 64 << 20) -> None:
        self.free = free
        self.blocks: list[Any] = []
        self.closed = False
        self.captured = 0
        self.replayed = 0
        self.fail_after: int | None = None  # synchronizations until the device breaks
        self.driver = HostDriver(self.synchronize)

    def use(self) -> None: ...

    def operations(self, deterministic: bool) -> NumpyOperations:
        return NumpyOperations()

    def allocate(self, size: int) -> int:
        block = np.full(max(size, 256) + 256, 0xFF, np.uint8)  # NaN: whatever is read must have been written
        self.blocks.append(block)
        return -(-block.ctypes.data // 256) * 256

    def give_back(self, pointer: int) -> None: ...

    def joules(self) -> Callable[[], float]:
        return lambda: 50 * time.monotonic()  # 50 watts

    def free_bytes(self) -> int:
        return self.free

    def pinned(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    def upload(self, pointer: int, array: NDArray[Any]) -> None:
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)

    def upload_columns(self, pointer: int, array: NDArray[Any], rows: int, columns: int) -> None:
        view(pointer, array.shape, array.dtype)[:rows, :columns] = array[:rows, :columns]

    def download(self, array: NDArray[Any], pointer: int) -> None:
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def clear(self, pointer: int, size: int) -> None:
        ctypes.memset(pointer, 0, size)

    def event(self) -> HostEvent:
        return HostEvent()

    def functions(self) -> dict[str, int]:
        return self.driver.addresses()

    def mark(self) -> None: ...

    def reach(self, mark: None) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        if self.fail_after is not None:
            if self.fail_after == 0:
                raise RuntimeError("an illegal memory access was encountered")
            self.fail_after -= 1

    def capture(self, enqueue: Callable[[], None]) -> HostGraph:
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            enqueue()

        return self.driver.graph(replay)

    def is_broken(self, error: BaseException) -> bool:
        return isinstance(error, RuntimeError)

    def close(self) -> None:
        self.closed = True
        self.blocks.clear()


class NumpyOperations(NumpyPacking, NumpyLayers, NumpyCopies):
    """The kernels' operations, done at once."""

    def attention_plan(self, inputs: StepInputs, plan: AttentionPlan) -> None: ...

    def embed(self, inputs: StepInputs, table: Weight, output: Rows, scale: float = 1.0) -> None:
        tokens = view(inputs.tokens, (inputs.rows,), np.int32).copy()
        for row in np.flatnonzero(tokens < 0):
            tokens[row] = view(inputs.chosen + 4 * ~int(tokens[row]), (1,), np.int32)[0]
        tokens = np.maximum(tokens, 0)  # whose step before found no number
        matrix(output)[:] = weight_of(table)[tokens] * np.float32(scale)

    def add_position(self, inputs: StepInputs, table: Weight, rows: Rows) -> None:
        positions = view(inputs.positions, (inputs.rows,), np.int32)
        matrix(rows)[:] += weight_of(table)[positions]

    def select(self, source: Rows, wanted: int, output: Rows) -> None:
        matrix(output)[:] = matrix(source)[view(wanted, (output.rows,), np.int32)]

    def norm(
        self,
        source: Rows,
        output: Rows,
        kind: str,
        epsilon: float,
        weight: int,
        bias: int = 0,
        groups: int = 1,
        per_group: bool = False,
    ) -> None:
        x = matrix(source).astype(np.float64).reshape(source.rows, groups, -1)
        if kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
        shape = x.shape[1:] if per_group else x.shape[2:]
        x = x * view(weight, shape) if weight else x
        x = x + view(bias, shape) if bias else x
        matrix(output)[:] = x.reshape(source.rows, -1)

    def linear(self, source: Rows, output: Rows, weight: Weight) -> None:
        matrix(output)[:] = matrix(source) @ weight_of(weight).T + bias_of(weight)

    def round_rows(self, source: Rows, output: int, scales: int) -> None:
        values = matrix(source)
        largest = np.abs(values).max(-1, keepdims=True)
        scale = np.where(largest > 0, largest / 448, 1).astype(np.float32)
        nearest = np.abs(np.abs(values / scale)[..., None] - E4M3[:127]).argmin(-1)
        view(output, values.shape, np.uint8)[:] = nearest | np.where(values < 0, 128, 0)
        view(scales, scale.shape)[:] = scale

    def rope(self, inputs: StepInputs, rows: Rows, heads: int, table: RopeTable) -> None:
        numbers = view(inputs.rope_rows, (inputs.rows,), np.int32)
        whole = view(table.pointer, (int(numbers.max()) + 1, table.pairs, 2))[numbers]
        cos, sin = whole[:, None, :, 0], whole[:, None, :, 1]
        values = matrix(rows)
        x = values.reshape(inputs.rows, heads, -1).copy()
        pairs = table.pairs
        halves, interleaved = (slice(pairs), slice(pairs, 2 * pairs)), (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
        first, second = halves if table.style == "half" else interleaved
        a, b = x[..., first].copy(), x[..., second].copy()
        x[..., first], x[..., second] = a * cos - b * sin, b * cos + a * sin
        values[:] = x.reshape(inputs.rows, -1)

    def write_kv(self, inputs: StepInputs, keys: Rows, values: Rows, layer: KvLayer) -> None:
        slots = view(inputs.slots, (inputs.rows,), np.int32)
        kept = np.flatnonzero(slots >= 0)
        for rows, part in ((keys, KvPart(layer, 0)), (values, KvPart(layer, 1))):
            split = matrix(rows).reshape(inputs.rows, layer.kv_heads, layer.head_dim)
            part.write(slots[kept], split[kept])

    def attend(
        self,
        inputs: StepInputs,
        plan: AttentionPlan,
        queries: Rows,
        output: Rows,
        layer: KvLayer,
        scale: float,
        softcap: float = 0.0,
    ) -> None:
        positions = view(inputs.positions, (inputs.rows,), np.int32)
        owners = view(inputs.row_sequence, (inputs.rows,), np.int32)
        tables = view(inputs.page_table, (inputs.sequences, inputs.page_stride), np.int32)
        group = queries.width // layer.head_dim // layer.kv_heads
        for row in range(inputs.rows):
            if owners[row] < 0:
                matrix(output)[row] = np.nan  # rubbish: nothing may depend on padding
                continue
            first = max(0, positions[row] + 1 - plan.window) if plan.window else 0
            seen = np.arange(first, positions[row] + 1)
            pages = tables[owners[row]][seen // PAGE_TOKENS]
            assert (pages != NO_PAGE).all() and (pages < layer.pages).all(), "a page that is seen is there"
            places = pages * PAGE_TOKENS + seen % PAGE_TOKENS
            keys = KvPart(layer, 0).read(places).astype(np.float64)  # (positions, kv_heads, head_dim)
            values = KvPart(layer, 1).read(places).astype(np.float64)
            query = matrix(queries)[row].reshape(layer.kv_heads, group, layer.head_dim).astype(np.float64)
            scores = np.einsum("hgd,phd->hgp", query, keys) * scale
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            matrix(output)[row] = np.einsum("hgp,phd->hgd", weights, values).reshape(-1)

    def argmax(self, logits: Rows, chosen: int, scratch: int) -> None:
        values = matrix(logits)
        bad = ~(values < np.inf).all(-1) | ~np.isfinite(values.max(-1, initial=-np.inf))
        view(chosen, (logits.rows,), np.int32)[:] = np.where(bad, -1, values.argmax(-1))

    def sample(self, logits: Rows, draws: Draws, chosen: int, full: bool) -> None:
        tokens = view(chosen, (logits.rows,), np.int32)
        kinds = view(draws.pointer, (logits.rows,), DRAW)
        before = view(chosen, (int(kinds["uncounted"].max()) + 1,), np.int32).copy()
        for row, (values, draw) in enumerate(zip(matrix(logits), kinds, strict=True)):
            tokens[row] = choose(values, draw, draws.words, before, full)
            if full and draw["logprobs"] >= 0 and tokens[row] >= 0:
                out = view(draws.told, (logits.rows, LOGPROB_VALUES), np.int32)[row]
                tell(values, int(tokens[row]), int(draw["logprobs"]), out)

    def gated_activation(self, gate: Rows, up: Rows, output: Rows, name: str) -> None:
        matrix(output)[:] = activate(name, matrix(gate)) * matrix(up)

    def activation(self, rows: Rows, name: str) -> None:
        matrix(rows)[:] = activate(name, matrix(rows))

    def add(self, destination: Rows, source: Rows, scale: float = 1.0) -> None:
        matrix(destination)[:] += np.float32(scale) * matrix(source)

    def add_gated(self, destination: Rows, source: Rows, gate: Rows) -> None:
        matrix(destination)[:] += matrix(source) / (1 + np.exp(-matrix(gate)))

    def scale(self, rows: Rows, factor: float) -> None:
        matrix(rows)[:] *= np.float32(factor)

    def softcap(self, rows: Rows, cap: float) -> None:
        matrix(rows)[:] = cap * np.tanh(matrix(rows).astype(np.float64) / cap)

    def route(self, inputs: StepInputs, logits: Rows, renormalise: bool, routes: Routes) -> None:
        scores = matrix(logits)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        order = np.argsort(-weights, axis=-1, kind="stable")[:, : routes.used]
        chosen = np.sort(order, axis=-1)
        shares = np.take_along_axis(weights, chosen, -1)
        total = shares.sum(-1, keepdims=True) if renormalise else weights.sum(-1, keepdims=True)
        padding = view(inputs.row_sequence, (inputs.rows,), np.int32) < 0
        view(routes.chosen, chosen.shape, np.int32)[:] = np.where(padding[:, None], -1, chosen)
        view(routes.weights, shares.shape)[:] = shares / total

    def experts(
        self, source: Rows, output: Rows, routes: Routes, gate_up: Weight, down: Weight, activation: str, *memory: Any
    ) -> None:
        chosen = view(routes.chosen, (source.rows, routes.used), np.int32)
        shares = view(routes.weights, (source.rows, routes.used))
        x, y = matrix(source), matrix(output)
        width = gate_up.rows // 2
        for row in range(source.rows):
            total = np.zeros(output.width)
            for expert, share in zip(chosen[row], shares[row], strict=True):
                if expert >= 0:
                    both = weight_of(gate_up, expert).astype(np.float64) @ x[row] + bias_of(gate_up, expert)
                    middle = activate(activation, both[:width]) * both[width:]
                    total += share * (weight_of(down, expert).astype(np.float64) @ middle + bias_of(down, expert))
            y[row] = total

    # ---- what fused steps are, in terms of others

    def add_norm(
        self, hidden: Rows, branch: Rows, scale: float, output: Rows, kind: str, epsilon: float, weight: int, bias: int = 0
    ) -> None:
        self.add(hidden, branch, scale)
        self.norm(hidden, output, kind, epsilon, weight, bias)

    def linear_add(self, source: Rows, destination: Rows, weight: Weight, scale: float = 1.0) -> None:
        matrix(destination)[:] += np.float32(scale) * (matrix(source) @ weight_of(weight).T + bias_of(weight))

    def linear_gated(self, source: Rows, output: Rows, weight: Weight, activation: str, scratch: Rows) -> None:
        self.linear(source, scratch, weight)
        width = weight.rows // 2
        self.gated_activation(scratch.part(0, width), scratch.part(width, width), output, activation)

    def norm_linear(self, source: Rows, output: Rows, weight: Weight, norm: int, epsilon: float, scratch: Rows) -> None:
        self.norm(source, scratch, "rms", epsilon, norm)
        self.linear(scratch, output, weight)

    def norm_linear_gated(
        self,
        source: Rows,
        output: Rows,
        weight: Weight,
        activation: str,
        norm: int,
        epsilon: float,
        normed: Rows,
        scratch: Rows,
    ) -> None:
        self.norm(source, normed, "rms", epsilon, norm)
        self.linear_gated(normed, output, weight, activation, scratch)

    def norm_gated_add(
        self, source: Rows, inner: Rows, destination: Rows, weight: Weight, down: Weight, activation: str, norm: int,
        epsilon: float, scale: float, normed: Rows, scratch: Rows,
    ) -> None:  # fmt: skip
        self.norm_linear_gated(source, inner, weight, activation, norm, epsilon, normed, scratch)
        self.linear_add(inner, destination, down, scale)

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
        queries, width = heads * layer.head_dim, layer.kv_heads * layer.head_dim
        keys, values = qkv.part(queries, width), qkv.part(queries + width, width)
        for rows, count, norm in ((qkv.part(0, queries), heads, query_norm), (keys, layer.kv_heads, key_norm)):
            if norm:
                self.norm(rows, rows, "rms", epsilon, norm, groups=count)
            if table:
                self.rope(inputs, rows, count, table)
        self.write_kv(inputs, keys, values, layer)
        matrix(keys)[:] = matrix(values)[:] = np.nan  # nobody may read them afterwards

    def qkv(
        self,
        inputs: StepInputs,
        source: Rows,
        qkv: Rows,
        weight: Weight,
        layer: KvLayer,
        heads: int,
        table: RopeTable,
        norm: int,
        epsilon: float,
        scratch: Rows,
        plan: AttentionPlan | None = None,
    ) -> None:
        self.norm_linear(source, qkv, weight, norm, epsilon, scratch)
        self.rope_write_kv(inputs, qkv, layer, heads, table)
