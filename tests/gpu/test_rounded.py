"""Products of rows that are rounded to E4M3, by the matrix instructions of warp groups, against numpy in float64."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from device import Device, device, error, from_bits, rounded
from test_rows import normal

from infer.gpu import rounded as rounding
from infer.gpu.arrays import Rows, Weight

SUMS = 4e-4
"""Relative error of what the matrix instructions add up: they keep few digits."""
SHAPES = ((64, 16), (208, 1168), (1040, 512), (2048, 4096), (256, 14336), (28672, 64))


@pytest.fixture(autouse=True)
def needs_warp_groups() -> None:
    if device().kernels.capability != rounding.CAPABILITY:
        pytest.skip("this GPU has no matrix instructions of warp groups")


@cache
def weight_of(outputs: int, columns: int) -> tuple[Weight, np.ndarray, np.ndarray]:
    """A weight on the device, what it stands for, and its bias."""
    gpu, w, scales, bias = device(), normal(outputs, columns) / 8, abs(normal(outputs)) + 0.5, normal(outputs)
    weight = gpu.weight(w, "e4m3", bias, scales=gpu.vector(scales), group=columns)
    return weight, rounded(w, "e4m3") * scales.astype(np.float32)[:, None], bias.astype(np.float32)


def rounded_rows(gpu: Device, source: Rows) -> np.ndarray:
    """Return what rows are once they are rounded."""
    codes, scales = gpu.zeros(source.rows * source.width), gpu.zeros(source.rows * 4)
    gpu.ops.round_rows(source, codes, scales)
    values = from_bits(gpu.ints(codes, source.rows * source.width, np.uint8), "e4m3").reshape(source.rows, source.width)
    return values * gpu.ints(scales, source.rows, np.float32).astype(np.float64)[:, None]


@pytest.mark.parametrize("rows", [17, 32, 50, 64, 91, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(rows: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infer.gpu.rounded.MOST_ROUNDED", (128, 128))
    gpu, x = device(), normal(rows, shape[1])
    weight, exact, bias = weight_of(*shape)
    source = gpu.rows(x, "bf16", shape[1] + 8)
    logits = gpu.blank(rows, shape[0], "f32", shape[0] + 8)
    assert gpu.ops._can_be_rounded(rows, logits, weight)
    product = rounded_rows(gpu, source) @ exact.T + bias
    gpu.ops.linear(source, logits, weight)
    assert error(gpu.read(logits), product) < SUMS
    output = gpu.blank(rows, shape[0], "bf16", shape[0] + 8)
    gpu.ops.linear(source, output, weight)
    before = gpu.read(output)
    assert error(before, product) < 4e-3
    gpu.ops.linear_add(source, output, weight, 0.5)
    assert error(gpu.read(output), before + 0.5 * product) < 4e-3


@pytest.mark.parametrize("rows", [40, 96, 128])
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("shape", rounding.SHAPES)
def test_divisions(shape: rounding.Shape, splits: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any division gives the product, though some have more blocks than there are steps."""
    gpu, (outputs, columns) = device(), (528, 1296)
    x = normal(rows, columns)
    weight, exact, bias = weight_of(outputs, columns)
    monkeypatch.setattr("infer.gpu.rounded.divide", lambda *_: rounding.Division(shape, splits))
    source, output = gpu.rows(x, "bf16"), gpu.blank(rows, outputs, "f32")
    gpu.ops.linear(source, output, weight)
    assert error(gpu.read(output), rounded_rows(gpu, source) @ exact.T + bias) < SUMS


def test_rows_do_not_depend_on_company() -> None:
    gpu, x = device(), normal(128, 4096)
    weight, _, _ = weight_of(2048, 4096)
    found = []
    for first, count in ((0, 128), (0, 64), (0, 80), (3, 17), (36, 28)):
        output = gpu.blank(count, 2048, "f32")
        gpu.ops.linear(gpu.rows(x[first : first + count], "bf16"), output, weight)
        found.append((first, gpu.read(output)))
    for first, result in found[1:]:
        assert (result == found[0][1][first : first + len(result)]).all()


def test_numbers_that_are_not_finite_stay_in_their_rows() -> None:
    gpu, x = device(), normal(20, 512)
    weight, _, _ = weight_of(256, 512)
    results = []
    for value in (1.0, np.nan):
        x[7, 100] = value
        output = gpu.blank(20, 256, "f32")
        gpu.ops.linear(gpu.rows(x, "bf16"), output, weight)
        results.append(np.delete(gpu.read(output), 7, axis=0))
    assert np.isfinite(results[0]).all()
    assert (results[0] == results[1]).all()
