"""Kernels on rows against numpy in float64: odd and even widths, slices of buffers, both types."""

from __future__ import annotations

import math

import numpy as np
import pytest
from device import DTYPES, TOLERANCE, device, error, rounded

WIDTHS = (64, 77, 2048)
random = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return random.standard_normal(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("table", ["bf16", "f16", "f32"])
def test_embed(dtype: str, width: int, table: str) -> None:
    gpu, values = device(), normal(50, width)
    inputs, output = gpu.inputs([(3, 5), (0, 2)], padding=1), gpu.blank(8, width, dtype, width + 8)
    gpu.ops.embed(inputs, gpu.weight(values, table), output, scale=2.5)
    tokens = gpu.ints(inputs.tokens, 8)
    assert error(gpu.read(output), 2.5 * rounded(values, table)[tokens]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_position_and_select(dtype: str) -> None:
    gpu, table, values = device(), normal(16, 72), normal(7, 72)
    inputs, rows = gpu.inputs([(3, 5), (9, 2)]), gpu.rows(values, dtype)
    gpu.ops.add_position(inputs, gpu.weight(table, "f32"), rows)
    expected = rounded(values, dtype) + rounded(table, "f32")[gpu.ints(inputs.positions, 7)]
    assert error(gpu.read(rows), expected) < TOLERANCE[dtype]
    output, wanted = gpu.blank(3, 72, dtype, 80), np.array([6, 0, 3], np.int32)
    gpu.ops.select(rows, gpu.put(wanted), output)
    assert (gpu.read(output) == gpu.read(rows)[wanted]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "has_bias"), [("rms", False), ("layer", True)])
@pytest.mark.parametrize(("groups", "per_group"), [(1, False), (4, False), (4, True)])
@pytest.mark.parametrize("width", [64, 100, 4096, 12288])
@pytest.mark.parametrize("count", [5, 400])
def test_norm(
    dtype: str,
    kind: str,
    groups: int,
    per_group: bool,
    has_bias: bool,
    width: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("infer.gpu.rows.ROW_THREADS", 0)  # so few rows, too, are taken one after the other
    gpu, values = device(), normal(count, width) + 0.5
    each = width // groups
    weight, bias = normal(width if per_group else each), normal(width if per_group else each)
    rows, output = gpu.rows(values, dtype, width + 24, 8), gpu.blank(count, width, dtype)
    pointer = gpu.vector(bias) if has_bias else 0
    gpu.ops.norm(rows, output, kind, 1e-5, gpu.vector(weight), pointer, groups, per_group)
    expected = norm(rounded(values, dtype), kind, groups, 1e-5, weight, bias if has_bias else None)
    assert error(gpu.read(output), expected) < TOLERANCE[dtype]
    gpu.ops.norm(rows, rows, kind, 1e-5, gpu.vector(weight), pointer, groups, per_group)
    assert error(gpu.read(rows), expected) < TOLERANCE[dtype]


def norm(x: np.ndarray, kind: str, groups: int, epsilon: float, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    x = x.reshape(len(x), groups, -1)
    mean = x.mean(-1, keepdims=True) if kind == "layer" else 0.0
    y = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + epsilon)
    parts = (groups if len(weight) == y.shape[1] * y.shape[2] and groups > 1 else 1, -1)
    y = y * weight.reshape(parts)
    return (y if bias is None else y + bias.reshape(parts)).reshape(len(x), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [77, 2048])
def test_add_norm(dtype: str, kind: str, width: int) -> None:
    gpu, values, more, weight = device(), normal(3, width), normal(3, width), normal(width)
    hidden, output = gpu.rows(values, dtype), gpu.blank(3, width, dtype)
    gpu.ops.add_norm(hidden, gpu.rows(more, dtype), 0.5, output, kind, 1e-6, gpu.vector(weight))
    expected = rounded(values, dtype) + 0.5 * rounded(more, dtype)
    assert error(gpu.read(hidden), expected) < TOLERANCE[dtype]
    assert error(gpu.read(output), norm(gpu.read(hidden), kind, 1, 1e-6, weight, None)) < TOLERANCE[dtype]


def activate(name: str, x: np.ndarray) -> np.ndarray:
    erf = np.vectorize(math.erf)
    return {
        "silu": lambda: x / (1 + np.exp(-x)),
        "gelu_tanh": lambda: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "gelu_erf": lambda: 0.5 * x * (1 + erf(x / math.sqrt(2))),
        "relu": lambda: np.maximum(x, 0),
        "relu_squared": lambda: np.maximum(x, 0) ** 2,
    }[name]()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu_erf", "relu", "relu_squared"])
def test_activations(dtype: str, width: int, name: str) -> None:
    gpu, values, more = device(), 3 * normal(4, width), normal(4, width)
    both, output = gpu.rows(np.concatenate([values, more], 1), dtype), gpu.blank(4, width, dtype, width + 16, 8)
    gpu.ops.gated_activation(both.part(0, width), both.part(width, width), output, name)
    activated = activate(name, rounded(values, dtype))
    assert error(gpu.read(output), activated * rounded(more, dtype)) < TOLERANCE[dtype]
    rows = gpu.rows(values, dtype)
    gpu.ops.activation(rows, name)
    assert error(gpu.read(rows), activated) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_sums_and_scalings(dtype: str, width: int) -> None:
    gpu, values, more, gate = device(), normal(6, width), normal(6, width), normal(6, 1)
    destination, source = gpu.rows(values, dtype, width + 8, 8), gpu.rows(more, dtype)
    gpu.ops.add(destination, source, 0.3)
    expected = rounded(values, dtype) + 0.3 * rounded(more, dtype)
    assert error(gpu.read(destination), expected) < TOLERANCE[dtype]
    before = gpu.read(destination)
    gpu.ops.add_gated(destination, source, gpu.rows(gate, dtype, 8))
    expected = before + rounded(more, dtype) / (1 + np.exp(-rounded(gate, dtype)))
    assert error(gpu.read(destination), expected) < TOLERANCE[dtype]
    before = gpu.read(destination)
    gpu.ops.scale(destination, -1.7)
    assert error(gpu.read(destination), -1.7 * before) < TOLERANCE[dtype]
    before = gpu.read(destination)
    gpu.ops.softcap(destination, 2.0)
    assert error(gpu.read(destination), 2 * np.tanh(before / 2)) < TOLERANCE[dtype]


@pytest.mark.parametrize("gap", [3, 8])  # rows begin at multiples of 16 bytes, or do not
@pytest.mark.parametrize(("rows", "width"), [(9, 5), (9, 1000), (300, 1002), (9, 128256), (64, 128256)])
def test_argmax(rows: int, width: int, gap: int) -> None:
    gpu, values = device(), normal(rows, width).astype(np.float32)
    values[1] = -abs(values[1])
    values[2, [1, 4]] = 9.0  # the lower of equals
    values[3, 3] = np.nan
    values[4, 2] = np.inf
    values[5] = -np.inf
    values[6] = -np.inf
    values[6, 2] = -3e38
    values[7] = 0.0
    values[7, :2] = -0.0
    values[8, -1] = 9.0
    logits, chosen = gpu.rows(values, "f32", width + gap), gpu.zeros(rows * 4)
    scratch = gpu.zeros(rows * 16)
    for _ in range(2):
        gpu.ops.argmax(logits, chosen, scratch)
        expected = values.argmax(1)
        expected[[3, 4, 5]] = -1
        assert gpu.ints(chosen, rows).tolist() == expected.tolist()
