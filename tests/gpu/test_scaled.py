"""Rows rounded to E4M3 by what makes them, against separate steps: the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from device import device, to_bits
from test_rows import normal

from infer.gpu.arrays import Rows


def rounded_bits(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return the E4M3 bits and scales of rows, by the operation that rounds them."""
    gpu = device()
    codes, scales = gpu.zeros(rows.rows * rows.width), gpu.zeros(rows.rows * 4)
    gpu.ops.round_rows(rows, codes, scales)
    return read(codes, scales, rows.rows, rows.width)


def read(codes: int, scales: int, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    gpu = device()
    return gpu.ints(codes, rows * width, np.uint8).reshape(rows, width), gpu.ints(scales, rows, np.float32)


@pytest.mark.parametrize("width", [64, 100, 4096, 8200, 20000, 28672, 33024])
@pytest.mark.parametrize("times", [1, 60])
def test_rows_as_they_are(width: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy: the greatest number becomes 448, and what is no number 0."""
    monkeypatch.setattr("infer.gpu.rows.ROW_THREADS", 0)  # so few rows, too, are taken one after the other
    gpu, values = device(), normal(6 * times, width) * np.tile([1.0, 1e-3, 50.0, 0.0, 1.0, 1.0], times)[:, None]
    values[4, 7] = np.nan
    source = gpu.rows(values, "bf16", width + 8)
    found, scales = rounded_bits(source)
    exact = gpu.read(source).astype(np.float32)
    greatest = np.nanmax(abs(exact), axis=1)
    factors = np.divide(np.float32(448), greatest, out=np.zeros_like(greatest), where=greatest > 0)
    assert (scales == greatest / np.float32(448)).all()
    assert found[4, 7] == 0
    expected = to_bits(np.nan_to_num(exact * factors[:, None]), "e4m3")
    assert ((found & 0x7F) == (expected & 0x7F)).all()
    assert (found == expected)[(expected & 0x7F) != 0].all()


@pytest.mark.parametrize("width", [64, 2048, 2880, 4096, 8192])
@pytest.mark.parametrize("rows", [5, 400])
def test_norm(width: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infer.gpu.rows.ROW_THREADS", 0)  # so few rows, too, are taken one after the other
    gpu = device()
    source, normed, weight = gpu.rows(3 * normal(rows, width), "bf16", width + 8), gpu.blank(rows, width, "bf16"), normal(width)
    factors = gpu.vector(weight)
    gpu.ops.norm(source, normed, "rms", 1e-5, factors)
    codes, scales = gpu.zeros(rows * width), gpu.zeros(rows * 4)
    gpu.ops.norm_round(source, codes, scales, 1e-5, factors)
    for found, expected in zip(read(codes, scales, rows, width), rounded_bits(normed), strict=True):
        assert (found == expected).all()


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [64, 8192, 14336, 28672])
@pytest.mark.parametrize("rows", [3, 300])
def test_gated_activation(name: str, width: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infer.gpu.rows.AHEAD_THREADS", 0)  # so few rows, too, are taken one after the other
    gpu = device()
    both, inner = gpu.rows(2 * normal(rows, 2 * width), "bf16", 2 * width + 8), gpu.blank(rows, width, "bf16")
    gate, up = both.part(0, width), both.part(width, width)
    gpu.ops.gated_activation(gate, up, inner, name)
    codes, scales = gpu.zeros(rows * width), gpu.zeros(rows * 4)
    gpu.ops.gated_round(gate, up, codes, scales, name)
    for found, expected in zip(read(codes, scales, rows, width), rounded_bits(inner), strict=True):
        assert (found == expected).all()


@pytest.mark.parametrize("kind", ["bf16", "e4m3"])
@pytest.mark.parametrize("rows", [4, 40, 200, 300])
@pytest.mark.parametrize("has_bias", [False, True])
def test_feed_forward(kind: str, rows: int, has_bias: bool) -> None:
    gpu, hidden, width = device(), 512, 1024
    x, factors = normal(rows, hidden), gpu.vector(normal(hidden))
    weights = []
    for outputs, columns in ((2 * width, hidden), (hidden, width)):
        more = {"scales": gpu.vector(abs(normal(outputs)) + 0.5), "group": columns} if kind == "e4m3" else {}
        weights.append(gpu.weight(normal(outputs, columns) / 8, kind, normal(outputs) if has_bias else None, **more))
    results = []
    for fused in (True, False):
        source, inner = gpu.rows(x, "bf16"), gpu.blank(rows, width, "bf16")
        normed, both = gpu.blank(rows, hidden, "bf16"), gpu.blank(rows, 2 * width, "bf16")
        if fused:
            gpu.ops.norm_gated_add(source, inner, source, *weights, "silu", factors, 1e-5, 0.5, normed, both)
        elif rows > 16:
            gpu.ops.norm(source, normed, "rms", 1e-5, factors)
            gpu.ops.linear_gated(normed, inner, weights[0], "silu", both)
            gpu.ops.linear_add(inner, source, weights[1], 0.5)
        else:
            gpu.ops.norm_linear_gated(source, inner, weights[0], "silu", factors, 1e-5, normed, both)
            gpu.ops.linear_add(inner, source, weights[1], 0.5)
        results.append(gpu.read(source))
    assert np.isfinite(results[0]).all()
    assert (results[0] == results[1]).all()
