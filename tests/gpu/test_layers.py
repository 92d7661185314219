"""All layers in one kernel against their operations one by one, which tests of their own compare with numpy.

The same bits, but for weights that warp groups multiply (cuda/layers_group.cuh) and attention to more than WHOLE tokens
(cuda/layers_parts.cuh): those add in another order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from device import PAGE_TOKENS, Device, cupy, device, error, from_bits, rounded, to_bits
from test_packing import KINDS, put, random_parts
from test_rows import activate, normal

from infer.gpu import layers
from infer.gpu.arrays import KvLayer, RopeTable, Rows, StepInputs, Weight
from infer.gpu.attention import AttentionPlan, PlanSize
from infer.gpu.launch import DEPENDENT
from infer.gpu.layers import MOST_LAYER_ROWS, NOT_THERE, Layer, Stack, handed_rows, set_bytes, words_at
from infer.gpu.warp_group import CAPABILITY

LAYERS = 3
EPSILON = 1e-5
WHOLE = 96
"""Tokens of a sequence whose pages are one for each warp of a block, and so added in the same order."""
NEAR = 2e-2
"""Most that sums in another order may change, of numbers that are rounded to bfloat16 again and again."""


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernel where it can run, be it faster or not."""
    if device().kernels.capability < DEPENDENT:
        pytest.skip("the kernel needs compute capability 9.0")
    monkeypatch.setattr(layers, "pays", lambda *_: True)
    monkeypatch.setattr(layers, "most_rows", lambda _: MOST_LAYER_ROWS)


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


def weight(gpu: Device, rows: int, columns: int, kind: str, has_bias: bool) -> tuple[Weight, np.ndarray, np.ndarray]:
    """Return a random matrix, and its numbers and scales before they are rounded, unless they are packed."""
    bias = normal(rows) / 8 if has_bias else None
    if kind in KINDS:
        scales, integers, minima = random_parts(rows, columns, kind)
        small = np.float16(columns**-0.5)
        return (
            put(gpu, (scales * small, integers, None if minima is None else minima * small), kind, bias),
            np.empty(0),
            np.empty(0),
        )
    values, scales = normal(rows, columns) * columns**-0.5, np.ones((rows, 1))
    more = {}
    if kind == "e4m3":
        values, scales = values * 64, ((abs(normal(rows, 1)) + 0.5) / 64).astype(np.float32)
        more = {"scales": gpu.vector(scales), "group": columns}
    return gpu.weight(values, kind, bias, **more), values, scales


class Case:
    """Layers of random weights, and sequences of one row or two."""

    def __init__(
        self,
        model: Model,
        kind: str,
        sequences: list[tuple[int, int]],
        has_bias: bool = False,
        layers: int = LAYERS,
        padding: int = 0,
    ) -> None:
        self.gpu, self.model, self.kind, rows = device(), model, kind, sum(count for _, count in sequences) + padding
        longest = max(first + count for first, count in sequences)
        self.is_near = longest > WHOLE or (self.gpu.kernels.capability == CAPABILITY and kind not in KINDS)
        self.pages = sum(-(-(first + count) // PAGE_TOKENS) for first, count in sequences)
        self.inputs: StepInputs = self.gpu.inputs(sequences, padding, self.pages)
        size = PlanSize(rows, len(sequences) + padding, longest, model.heads, model.kv_heads, model.head_dim)
        self.plan = AttentionPlan(self.gpu.zeros(size.plan_bytes), self.gpu.zeros(size.scratch_bytes), size, 0, True)
        self.start = to_bits(normal(rows, model.hidden), "bf16")
        angles = normal(longest, model.head_dim // 2)
        self.table = np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
        table = RopeTable(self.gpu.vector(self.table), model.head_dim // 2)
        self.norms = normal(layers, 2, model.hidden).astype(np.float32)
        blank = [self.gpu.rows(np.zeros((rows, width)), "bf16") for width in self._widths()]
        sizes = (model.all_heads * model.head_dim, model.hidden), (model.hidden, model.heads * model.head_dim)
        sizes += (2 * model.width, model.hidden), (model.hidden, model.width)
        self.matrices = [[weight(self.gpu, *size, kind, has_bias) for size in sizes] for _ in range(layers)]
        self.layers = tuple(
            Layer(
                *blank,
                weights=tuple(own for own, *_ in self.matrices[index]),  # type: ignore[arg-type]
                norms=(self.gpu.vector(self.norms[index, 0]), self.gpu.vector(self.norms[index, 1])),
                epsilons=(EPSILON, EPSILON),
                scales=(1.0, 0.5),
                activation="silu",
                heads=model.heads,
                table=table,
                pages=self._pages(),
            )
            for index in range(layers)
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

    def stacked(self, stack: Stack, enqueue: Any = None) -> dict[str, np.ndarray]:
        """Return what all buffers, those that the kernel has of its own, and pages hold after it has run."""
        found = self.result(enqueue or (lambda: run(self, stack)))
        launches, *counts = map(int, self.gpu.ints(stack.pointer, 4))
        next_set = launches % 2
        assert not any(counts)
        begin, size = stack.pointer + words_at(self.layers), set_bytes(self.layers)
        assert (self.gpu.ints(begin + next_set * size, size, np.uint8) == NOT_THERE).all()
        own = handed_rows(self.layers[-1], len(self.layers) - 1)._asdict()
        places = {"queries": "qkv", "attended": "attended", "middle": "middle", "inner": "inner"}
        for name, place in places.items():
            shape = found["hidden" if name == "middle" else name].shape
            pointer = begin + (1 - next_set) * size + own[place].place
            found[name] = self.gpu.read(Rows(pointer, *shape, own[place].stride, "bf16"))
        return found

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
    """Compare what the kernel leaves with what the operations leave, three times."""
    expected, stack = case.result(case.one_by_one), case.stack()
    assert np.isfinite(expected["hidden"]).all() and abs(expected["hidden"]).max() > 0
    for _ in range(3):  # either set of rows, and one that was cleared
        found = case.stacked(stack)
        assert {name: differences(case, found[name], expected[name]) for name in expected} == dict.fromkeys(expected, 0)


def differences(case: Case, found: np.ndarray, expected: np.ndarray) -> float:
    """Return how many numbers are others, or the relative error where that may be and is too great, or else 0."""
    if not case.is_near:
        return int((found != expected).sum())
    if found.dtype == np.uint16:
        found, expected = from_bits(found, "bf16"), from_bits(expected, "bf16")
    off = error(found, expected)
    return off if off > NEAR else 0


def run(case: Case, stack: Stack) -> None:
    """Enqueue the kernel."""
    assert case.gpu.ops.layers(case.inputs, case.plan, stack)


@pytest.mark.parametrize("model", [SMALL, WIDE, ODD], ids=["small", "wide", "odd"])
@pytest.mark.parametrize("kind", ["bf16", "e4m3", *KINDS])
@pytest.mark.parametrize("sequences", [[(255, 1)], [(0, 1)], [(700, 2)], [(31, 1), (1100, 1)]], ids=str)
def test_layers(model: Model, kind: str, sequences: list[tuple[int, int]]) -> None:
    # Great queries choose where others weigh, and the next layers make much of a choice that is another one.
    is_whole = max(first + count for first, count in sequences) <= WHOLE
    check(Case(model, kind, sequences, layers=1 if kind in KINDS and not is_whole else LAYERS))


PARTED = [[(383, 1)], [(384, 1)], [(383, 2)], [(384, 2)], [(900, 2)], [(1535, 2)], [(1536, 1)]]
PARTED += [[(12, 1), (2500, 1)], [(9000, 1), (800, 1)]]


@pytest.mark.parametrize("model", [SMALL, WIDE, ODD], ids=["small", "wide", "odd"])
@pytest.mark.parametrize("sequences", PARTED, ids=str)
def test_attention_in_parts(model: Model, sequences: list[tuple[int, int]]) -> None:
    """Behind queries, keys and values of the same bits, attention is off by little more than its rounding."""
    case = Case(model, "int4", sequences, layers=1)
    expected, stack = case.result(case.one_by_one), case.stack()
    for _ in range(3):
        found = case.stacked(stack)
        assert all((found[name] == expected[name]).all() for name in ("queries", "keys 0", "values 0"))
        assert error(found["attended"], expected["attended"]) < 5e-3


@pytest.mark.parametrize("kind", ["bf16", "e4m3", "int4"])
@pytest.mark.parametrize("sequences", [[(15, 2)], [(511, 2)], [(510, 2)]], ids=str)
def test_rows_of_a_sequence_in_pieces_of_their_own(kind: str, sequences: list[tuple[int, int]]) -> None:
    """Eight heads share keys: each row is a piece, and sees the key of the row before it, maybe in another page or chunk."""
    check(Case(WIDE, kind, sequences))


@pytest.mark.parametrize("kind", ["bf16", "e4m3", "int4"])
def test_rows_that_are_not_numbers_end(kind: str) -> None:
    """A row of words that look as if they were not there yet makes a row of NaN, and nobody waits for ever."""
    case = Case(WIDE, kind, [(40, 1)])
    case.start[:] = 0xFFFF
    assert np.isnan(case.stacked(case.stack())["hidden"]).all()


@pytest.mark.parametrize("kind", ["bf16", "e4m3", "int4"])
def test_padded_rows(kind: str) -> None:
    case = Case(WIDE, kind, [(40, 1)], padding=1)
    expected, stack = case.result(case.one_by_one), case.stack()
    for _ in range(3):
        assert differences(case, case.stacked(stack)["hidden"][0], expected["hidden"][0]) == 0


@pytest.mark.parametrize("kind", ["bf16", "e4m3", "int4"])
def test_biases(kind: str) -> None:
    check(Case(SMALL, kind, [(40, 1)], has_bias=True))


@pytest.mark.parametrize("kind", ["e4m3", "int4"])
def test_graphs_replay_between_launches_of_other_sizes(kind: str) -> None:
    case = Case(WIDE, kind, [(300, 1), (40, 1)])
    both, one = case.inputs, replace(case.inputs, rows=1, sequences=1)
    expected, stack = case.result(case.one_by_one)["hidden"], case.stack()
    with case.gpu.stream:
        case.gpu.stream.begin_capture()
        run(case, stack)
        graph = case.gpu.stream.end_capture()
    for launches in ("graph", "graph", "one", "graph", "one", "one", "both", "graph", "both", "one", "graph"):
        case.inputs = one if launches == "one" else both
        found = case.stacked(stack, (lambda: graph.launch(case.gpu.stream)) if launches == "graph" else None)["hidden"]
        rows = case.inputs.rows
        assert differences(case, found[:rows], expected[:rows]) == 0, launches


def normed(values: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Return rows behind a norm."""
    return values / np.sqrt((values**2).mean(-1, keepdims=True) + EPSILON) * factors


def errors(case: Case, found: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the relative errors of what one layer's products left, of what they read, against float64."""
    model, (qkv, attention, gate_up, down) = (
        case.model,
        (rounded(values, case.kind) * scales for _, values, scales in case.matrices[0]),
    )
    start = from_bits(case.start, "bf16")
    shape = (len(start), model.heads, 2, model.head_dim // 2)
    first, second = np.moveaxis((normed(start, case.norms[0, 0]) @ qkv[: found["attended"].shape[1]].T).reshape(shape), 2, 0)
    angles = case.table[case.gpu.ints(case.inputs.positions, len(start))].astype(np.float64)[:, None]
    cos, sin = angles[..., 0], angles[..., 1]
    queries = np.stack([first * cos - second * sin, second * cos + first * sin], 2).reshape(len(start), -1)
    exact = start + found["attended"] @ attention.T
    found = {"middle": rounded(exact, "bf16"), **found}  # the operations one by one leave none
    middle = found["middle"]
    gate, up = np.split(normed(middle, case.norms[0, 1]) @ gate_up.T, 2, -1)
    expected = {"inner": activate("silu", gate) * up, "hidden": middle + 0.5 * (found["inner"] @ down.T), "queries": queries}
    expected["middle"] = exact
    return {name: error(found[name][:, : values.shape[1]], values) for name, values in expected.items()}


@pytest.mark.parametrize("model", [SMALL, WIDE, ODD], ids=["small", "wide", "odd"])
@pytest.mark.parametrize("kind", ["bf16", "e4m3"])
def test_products_are_as_near_as_one_by_one(model: Model, kind: str) -> None:
    case = Case(model, kind, [(31, 1), (40, 1)], layers=1)
    stack = case.stack()
    alone = errors(case, case.result(case.one_by_one))
    found = errors(case, case.stacked(stack))
    assert all(found[name] < 1.2 * alone[name] + 1e-5 for name in alone), (found, alone)


@pytest.mark.parametrize("kind", ["bf16", "e4m3", "int4"])
def test_a_row_alone(kind: str) -> None:
    case = Case(WIDE, kind, [(31, 1), (40, 1)])
    stack = case.stack()
    both = case.stacked(stack)["hidden"]
    case.inputs = replace(case.inputs, rows=1, sequences=1)
    alone = case.stacked(stack)["hidden"]
    assert (both[0] == alone[0]).all()


def test_what_is_not_taken() -> None:
    case = Case(SMALL, "bf16", [(255, 1)])
    layer, stack = case.layers[0], case.stack()
    assert case.gpu.ops.layer_records([]) is None
    assert case.gpu.ops.layer_records([replace(layer, pages=replace(layer.pages, key_type="e4m3"))]) is None
    mixed = (*layer.weights[:3], weight(case.gpu, 512, 1024, "e4m3", False)[0])
    assert case.gpu.ops.layer_records([replace(layer, weights=mixed)]) is None
    assert not case.gpu.ops.layers(replace(case.inputs, rows=9), case.plan, stack)
    assert not case.gpu.ops.layers(case.inputs, replace(case.plan, only_decode=False), stack)
