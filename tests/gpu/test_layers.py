"""All layers in one kernel against their operations one by one, which tests of their own compare with numpy: the same bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from device import PAGE_TOKENS, Device, cupy, device, to_bits
from test_packing import KINDS, put, random_parts
from test_rows import normal

from infer.gpu import layers
from infer.gpu.arrays import KvLayer, RopeTable, StepInputs, Weight
from infer.gpu.attention import AttentionPlan, PlanSize
from infer.gpu.launch import DEPENDENT
from infer.gpu.layers import COUNTER_BYTES, Layer, Stack

LAYERS = 3
EPSILON = 1e-5


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernel where it can run, be it faster or not."""
    if device().kernels.capability < DEPENDENT:
        pytest.skip("the kernel needs compute capability 9.0")
    monkeypatch.setattr(layers, "pays", lambda _: True)


@dataclass
class Model:
    """The sizes of a dense model."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int

    @property
    def all_heads(self) -> int:
        """Of queries, keys and values."""
        return self.heads + 2 * self.kv_heads


SMALL, WIDE, ODD = Model(512, 8, 2, 64, 1024), Model(2048, 16, 2, 128, 4352), Model(640, 4, 4, 128, 1664)


def weight(gpu: Device, rows: int, columns: int, kind: str, has_bias: bool) -> Weight:
    """Return a random matrix."""
    bias = normal(rows) / 8 if has_bias else None
    if kind in KINDS:
        scales, integers, minima = random_parts(rows, columns, kind)
        small = np.float16(columns**-0.5)
        return put(gpu, (scales * small, integers, None if minima is None else minima * small), kind, bias)
    values = normal(rows, columns) * columns**-0.5
    more = {"scales": gpu.vector(abs(normal(rows, 1)) + 0.5), "group": columns} if kind == "e4m3" else {}
    return gpu.weight(values, kind, bias, **more)


class Case:
    """Layers of random weights, and sequences of one row or two."""

    def __init__(self, model: Model, kind: str, sequences: list[tuple[int, int]], has_bias: bool = False) -> None:
        self.gpu, self.model, rows = device(), model, sum(count for _, count in sequences)
        self.pages = sum(-(-(first + count) // PAGE_TOKENS) for first, count in sequences)
        self.inputs: StepInputs = self.gpu.inputs(sequences, pages=self.pages)
        longest = max(first + count for first, count in sequences)
        size = PlanSize(rows, len(sequences), longest, model.heads, model.kv_heads, model.head_dim)
        self.plan = AttentionPlan(self.gpu.zeros(size.plan_bytes), self.gpu.zeros(size.scratch_bytes), size, 0, True)
        self.start = to_bits(normal(rows, model.hidden), "bf16")
        angles = normal(longest, model.head_dim // 2)
        table = RopeTable(self.gpu.vector(np.stack([np.cos(angles), np.sin(angles)], -1)), model.head_dim // 2)
        blank = [self.gpu.rows(np.zeros((rows, width)), "bf16") for width in self._widths()]
        sizes = (model.all_heads * model.head_dim, model.hidden), (model.hidden, model.heads * model.head_dim)
        sizes += (2 * model.width, model.hidden), (model.hidden, model.width)
        self.layers = tuple(
            Layer(
                *blank,
                weights=tuple(weight(self.gpu, *size, kind, has_bias) for size in sizes),  # type: ignore[arg-type]
                norms=(self.gpu.vector(normal(model.hidden)), self.gpu.vector(normal(model.hidden))),
                epsilons=(EPSILON, EPSILON),
                scales=(1.0, 0.5),
                activation="silu",
                heads=model.heads,
                table=table,
                pages=self._pages(),
            )
            for _ in range(LAYERS)
        )

    def _widths(self) -> tuple[int, ...]:
        model = self.model
        width = model.all_heads * model.head_dim
        return model.hidden, width, model.heads * model.head_dim, model.width, 2 * model.width, model.hidden

    def _pages(self) -> KvLayer:
        count = self.pages * self.model.kv_heads * PAGE_TOKENS * self.model.head_dim
        keys, values = (self.gpu.put(to_bits(normal(count), "bf16")) for _ in range(2))
        return KvLayer(keys, values, "bf16", "bf16", self.model.kv_heads, self.model.head_dim, self.pages)

    def stack(self) -> Stack:
        """Return the layers as the kernel takes them."""
        records = self.gpu.ops.layer_records(self.layers)
        assert records is not None
        return Stack(self.layers, self.gpu.put(records), self.model.head_dim**-0.5, 0.0)

    def one_by_one(self) -> None:
        """Enqueue all operations."""
        ops = self.gpu.ops
        for layer in self.layers:
            first, attention, gate_up, down = layer.weights
            ops.qkv(
                self.inputs,
                layer.hidden,
                layer.qkv,
                first,
                layer.pages,
                layer.heads,
                layer.table,
                layer.norms[0],
                EPSILON,
                layer.normed,
            )
            ops.attend(self.inputs, self.plan, layer.queries, layer.attended, layer.pages, self.model.head_dim**-0.5)
            ops.linear_add(layer.attended, layer.hidden, attention, 1.0)
            scratch = (layer.normed, layer.both)
            ops.norm_gated_add(
                layer.hidden, layer.inner, layer.hidden, gate_up, down, "silu", layer.norms[1], EPSILON, 0.5, *scratch
            )

    def result(self, enqueue: Any) -> dict[str, np.ndarray]:
        """Return what all buffers and pages hold after running from the same start."""
        layer, gpu = self.layers[0], self.gpu
        start = cupy.asarray(self.start)
        cupy.cuda.get_current_stream().synchronize()
        cupy.cuda.runtime.memcpy(layer.hidden.pointer, start.data.ptr, self.start.nbytes, 3)
        cupy.cuda.get_current_stream().synchronize()
        gpu.ops.attention_plan(self.inputs, self.plan)
        enqueue()
        buffers = {"hidden": layer.hidden, "queries": layer.queries, "attended": layer.attended, "inner": layer.inner}
        found = {name: gpu.read(rows) for name, rows in buffers.items()}
        for number, own in enumerate(self.layers):
            count = self.pages * own.pages.kv_heads * PAGE_TOKENS * own.pages.head_dim
            found |= {
                f"keys {number}": gpu.ints(own.pages.keys, count, np.uint16),
                f"values {number}": gpu.ints(own.pages.values, count, np.uint16),
            }
        return found


def check(case: Case) -> None:
    """Compare what the kernel leaves with what the operations leave, twice."""
    expected, stack = case.result(case.one_by_one), case.stack()
    assert np.isfinite(expected["hidden"]).all() and abs(expected["hidden"]).max() > 0
    for _ in range(2):  # the second time finds the counts that the first one left
        found = case.result(lambda: run(case, stack))
        assert {
            name: int((found[name] != expected[name]).sum()) for name in expected if (found[name] != expected[name]).any()
        } == {}
    assert not case.gpu.ints(stack.pointer, COUNTER_BYTES // 4).any()


def run(case: Case, stack: Stack) -> None:
    """Enqueue the kernel."""
    assert case.gpu.ops.layers(case.inputs, case.plan, stack)


@pytest.mark.parametrize("model", [SMALL, WIDE, ODD], ids=["small", "wide", "odd"])
@pytest.mark.parametrize("kind", ["bf16", "e4m3", *KINDS])
@pytest.mark.parametrize("sequences", [[(255, 1)], [(0, 1)], [(700, 2)], [(31, 1), (1100, 1)]], ids=str)
def test_layers(model: Model, kind: str, sequences: list[tuple[int, int]]) -> None:
    check(Case(model, kind, sequences))


@pytest.mark.parametrize("kind", ["bf16", "e4m3", "int4"])
def test_biases(kind: str) -> None:
    check(Case(SMALL, kind, [(40, 1)], has_bias=True))


def test_graphs_replay() -> None:
    case = Case(WIDE, "e4m3", [(300, 1)])
    expected, stack = case.result(case.one_by_one), case.stack()
    with case.gpu.stream:
        case.gpu.stream.begin_capture()
        run(case, stack)
        graph = case.gpu.stream.end_capture()
    for _ in range(3):
        found = case.result(lambda: graph.launch(case.gpu.stream))
        assert (found["hidden"] == expected["hidden"]).all()


def test_what_is_not_taken() -> None:
    case = Case(SMALL, "bf16", [(255, 1)])
    layer, stack = case.layers[0], case.stack()
    assert case.gpu.ops.layer_records([]) is None
    assert case.gpu.ops.layer_records([replace(layer, pages=replace(layer.pages, key_type="e4m3"))]) is None
    mixed = (*layer.weights[:3], weight(case.gpu, 512, 1024, "e4m3", False))
    assert case.gpu.ops.layer_records([replace(layer, weights=mixed)]) is None
    assert not case.gpu.ops.layers(replace(case.inputs, rows=9), case.plan, stack)
    assert not case.gpu.ops.layers(case.inputs, replace(case.plan, only_decode=False), stack)
