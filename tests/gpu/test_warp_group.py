"""Products of 17 to 128 rows by the matrix instructions of warp groups, against numpy in float64."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from device import Device, device, error, from_bits, rounded
from test_rows import activate, normal

from infer.gpu import warp_group
from infer.gpu.arrays import Rows, Weight

SUMS = {"e4m3": 4e-4, "bf16": 2e-5}
"""Relative error of what the matrix instructions add up: of E4M3 they keep few digits."""
KINDS = tuple(SUMS)
SHAPES = ((64, 16), (208, 1168), (1040, 512), (2048, 4096), (256, 14336), (28672, 64))


@pytest.fixture(autouse=True)
def takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this kernel also where another is faster."""
    if device().kernels.capability != warp_group.CAPABILITY:
        pytest.skip("this GPU has no matrix instructions of warp groups")
    monkeypatch.setattr("infer.gpu.warp_group.MOST_ROWS", dict.fromkeys(KINDS, (128, 128)))
    monkeypatch.setattr("infer.gpu.linear.MOST_GATED", 128)
    monkeypatch.setattr("infer.gpu.wide.is_faster", lambda *_: False)


@cache
def weight_of(outputs: int, columns: int, kind: str) -> tuple[Weight, np.ndarray, np.ndarray]:
    """A weight on the device, what it stands for, and its bias."""
    gpu, w, bias = device(), normal(outputs, columns) / 8, normal(outputs)
    scales, more = np.ones(outputs, np.float32), {}
    if kind == "e4m3":
        scales = (abs(normal(outputs)) + 0.5).astype(np.float32)
        more = {"scales": gpu.vector(scales), "group": columns}
    return gpu.weight(w, kind, bias, **more), rounded(w, kind) * scales[:, None], bias.astype(np.float32)


def multiplied_rows(gpu: Device, source: Rows, kind: str) -> np.ndarray:
    """Return the numbers that are multiplied."""
    return gpu.read(source) if kind == "bf16" else rounded_rows(gpu, source)


def rounded_rows(gpu: Device, source: Rows) -> np.ndarray:
    """Return what rows are once they are rounded."""
    codes, scales = gpu.zeros(source.rows * source.width), gpu.zeros(source.rows * 4)
    gpu.ops.round_rows(source, codes, scales)
    values = from_bits(gpu.ints(codes, source.rows * source.width, np.uint8), "e4m3").reshape(source.rows, source.width)
    return values * gpu.ints(scales, source.rows, np.float32).astype(np.float64)[:, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [17, 32, 50, 64, 91, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(rows: int, shape: tuple[int, int], kind: str) -> None:
    gpu, x = device(), normal(rows, shape[1])
    weight, exact, bias = weight_of(*shape, kind)
    source = gpu.rows(x, "bf16", shape[1] + 8)
    logits = gpu.blank(rows, shape[0], "f32", shape[0] + 8)
    assert gpu.ops._is_for_groups(rows, logits, weight)
    product = multiplied_rows(gpu, source, kind) @ exact.T + bias
    gpu.ops.linear(source, logits, weight)
    assert error(gpu.read(logits), product) < SUMS[kind]
    output = gpu.blank(rows, shape[0], "bf16", shape[0] + 8)
    gpu.ops.linear(source, output, weight)
    before = gpu.read(output)
    assert error(before, product) < 4e-3
    gpu.ops.linear_add(source, output, weight, 0.5)
    assert error(gpu.read(output), before + 0.5 * product) < 4e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [17, 64, 128])
@pytest.mark.parametrize("shape", [(64, 64), (416, 1168), (2048, 1024), (6176, 256)])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_gated(rows: int, shape: tuple[int, int], name: str, kind: str) -> None:
    gpu, x = device(), normal(rows, shape[1]) / 8
    weight, exact, bias = weight_of(*shape, kind)
    source, width = gpu.rows(x, "bf16"), shape[0] // 2
    output, scratch = gpu.blank(rows, width, "bf16", width + 8), gpu.blank(rows, shape[0], "bf16")
    gpu.ops.linear_gated(source, output, weight, name, scratch)
    both = multiplied_rows(gpu, source, kind) @ exact.T + bias
    assert error(gpu.read(output), activate(name, both[:, :width]) * both[:, width:]) < 6e-3
    assert np.isnan(gpu.read(scratch)).all(), "it is one kernel"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [40, 96, 128])
@pytest.mark.parametrize("splits", range(1, warp_group.MOST_SPLITS + 1))
@pytest.mark.parametrize("shape", warp_group.SHAPES)
def test_divisions(shape: warp_group.Shape, splits: int, rows: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any division gives the product, though some have more blocks than there are steps."""
    gpu, (outputs, columns) = device(), (528, 1296)
    x = normal(rows, columns)
    weight, exact, bias = weight_of(outputs, columns, kind)
    monkeypatch.setattr("infer.gpu.warp_group.divide", lambda *_: warp_group.Division(shape, splits))
    source, output = gpu.rows(x, "bf16"), gpu.blank(rows, outputs, "f32")
    gpu.ops.linear(source, output, weight)
    assert error(gpu.read(output), multiplied_rows(gpu, source, kind) @ exact.T + bias) < SUMS[kind]


def check_company(kind: str, whole_rows: int, parts: list[tuple[int, int]]) -> None:
    """Products of all rows and of parts of them, first row and count, have the same bits."""
    gpu, x = device(), normal(whole_rows, 4096)
    weight, _, _ = weight_of(2048, 4096, kind)
    found: list[tuple[int, list[np.ndarray]]] = []
    for first, count in [(0, whole_rows), *parts]:
        source, output = gpu.rows(x[first : first + count], "bf16"), gpu.blank(count, 2048, "f32")
        inner = gpu.blank(count, 1024, "bf16")
        gpu.ops.linear(source, output, weight)
        gpu.ops.linear_gated(source, inner, weight, "silu", gpu.blank(count, 2048, "bf16"))
        found.append((first, [gpu.read(output), gpu.read(inner)]))
    for first, results in found[1:]:
        for result, whole in zip(results, found[0][1], strict=True):
            assert (result == whole[first : first + len(result)]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_company(kind: str) -> None:
    check_company(kind, 128, [(0, 64), (0, 80), (3, 17), (36, 28)])


def check_not_finite(kind: str, rows: int) -> None:
    """A number that is not finite changes no other row."""
    gpu, x = device(), normal(rows, 512)
    weight, _, _ = weight_of(256, 512, kind)
    results = []
    for value in (1.0, np.nan):
        x[7, 100] = value
        output = gpu.blank(rows, 256, "f32")
        gpu.ops.linear(gpu.rows(x, "bf16"), output, weight)
        results.append(np.delete(gpu.read(output), 7, axis=0))
    assert np.isfinite(results[0]).all()
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_stay_in_their_rows(kind: str) -> None:
    check_not_finite(kind, 20)
