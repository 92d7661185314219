"""Products of 17 to 128 rows and some more against numpy in float64: every type of weight, split in every way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device import Device, device, error, rounded, same_in_any_company
from test_packing import KINDS as PACKED
from test_packing import put, random_parts
from test_packing import values_of as packed_values
from test_rows import activate, normal

from infer.gpu import many
from infer.gpu.arrays import Weight
from infer.gpu.linear import LinearOperations

KINDS = ("bf16", "e4m3", "e4m3 by 128", *PACKED)
TOLERANCE = {"bf16": 2e-5, "e4m3": 2e-5, "e4m3 by 128": 8e-3}  # scales are made bfloat16 where they are multiplied with weights
SHAPES = ((64, 128), (40, 256), (1000, 4096), (3072, 2048), (48, 11008), (20, 384), (4104, 640))


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this kernel also where another is faster."""
    monkeypatch.setattr("infer.gpu.linear.MOST_MANY", dict.fromkeys(("bf16", "e4m3", "int4", "int8"), 256))
    monkeypatch.setattr(LinearOperations, "_can_scale", lambda *_: False)


def weight_of(gpu: Device, kind: str, shape: tuple[int, int], bias: Any) -> tuple[Weight, Any]:
    """A weight on the device, and what it stands for."""
    if kind in PACKED:
        parts = random_parts(*shape, kind)
        return put(gpu, parts, kind, bias), packed_values(*parts).astype(np.float64)
    w, group = normal(*shape) / 8, 128 if "128" in kind else shape[1]
    scales = abs(normal(shape[0], -(-shape[1] // group))) + 0.5
    more = {"scales": gpu.vector(scales), "group": group} if kind != "bf16" else {}
    exact = rounded(w, kind.split()[0]) * (scales.repeat(group, 1)[:, : shape[1]] if more else 1.0)
    return gpu.weight(w, kind.split()[0], bias, **more), exact


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [17, 33, 64, 91, 128, 150])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(kind: str, rows: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, x, bias = device(), normal(rows, shape[1]), normal(shape[0])
    always(monkeypatch)
    weight, exact = weight_of(gpu, kind, shape, bias)
    source, tolerance = gpu.rows(x, "bf16", shape[1] + 8), TOLERANCE.get(kind, 8e-3)
    product = rounded(x, "bf16") @ exact.T + bias
    logits = gpu.blank(rows, shape[0], "f32", -(-shape[0] // 4) * 4)
    gpu.ops.linear(source, logits, weight)
    assert error(gpu.read(logits), product) < tolerance
    output = gpu.blank(rows, shape[0], "bf16", -(-shape[0] // 4) * 4 + 4)
    gpu.ops.linear(source, output, weight)
    before = gpu.read(output)
    assert error(before, product) < 4e-3 + tolerance
    gpu.ops.linear_add(source, output, weight, 0.5)
    assert error(gpu.read(output), before + 0.5 * product) < 4e-3 + tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [17, 70, 128])
@pytest.mark.parametrize("shape", [(128, 128), (80, 384), (2000, 2048), (6160, 256)])
def test_gated(kind: str, rows: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    gpu, x, bias = device(), normal(rows, shape[1]) / 8, normal(shape[0])
    weight, exact = weight_of(gpu, kind, shape, bias)
    source, output, scratch = gpu.rows(x, "bf16"), gpu.blank(rows, shape[0] // 2, "bf16"), gpu.blank(rows, shape[0], "bf16")
    gpu.ops.linear_gated(source, output, weight, "silu", scratch)
    both = rounded(x, "bf16") @ exact.T + bias
    expected = activate("silu", both[:, : shape[0] // 2]) * both[:, shape[0] // 2 :]
    assert error(gpu.read(output), expected) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("division", [(1, 4, 1), (1, 4, 8), (4, 1, 2), (2, 2, 4), (3, 1, 8), (2, 1, 1)])
def test_divisions(kind: str, division: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Any division gives the product, though some have more column groups than there are steps."""
    always(monkeypatch)
    gpu, shape, rows = device(), (520, 1408), 50
    if division[2] > 1 and gpu.kernels.capability < 90:
        pytest.skip("this GPU has no clusters")
    x = normal(rows, shape[1])
    weight, exact = weight_of(gpu, kind, shape, None)
    one = many.Division(*division)
    if many.many_shared(many.layout_of(weight), one, 32, many.LEAST_STAGES) > gpu.kernels.shared_limit - many.STATIC_BYTES:
        pytest.skip("no block has so much shared memory")
    monkeypatch.setattr("infer.gpu.many.divide", lambda *_: one)
    output = gpu.blank(rows, shape[0], "f32")
    gpu.ops.linear(gpu.rows(x, "bf16"), output, weight)
    assert error(gpu.read(output), rounded(x, "bf16") @ exact.T) < TOLERANCE.get(kind, 8e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [((0, 64), (0, 33), (3, 17), (36, 28)), ((0, 128), (0, 80), (60, 68))])
def test_rows_do_not_depend_on_company(kind: str, sizes: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    gpu = device()
    weight, _ = weight_of(gpu, kind, (1536, 4096), None)
    same_in_any_company(gpu, weight, normal(128, 4096), sizes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [101376, 166912])
def test_older_gpus(kind: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs without clusters, and with less shared memory."""
    always(monkeypatch)
    gpu, shape = device(), (272, 11008)
    monkeypatch.setattr(gpu.kernels, "shared_limit", limit)
    monkeypatch.setattr(gpu.ops, "_cluster_counts", (100,))
    for rows in (20, 128):
        x = normal(rows, shape[1])
        weight, exact = weight_of(gpu, kind, shape, None)
        output = gpu.blank(rows, shape[0], "f32")
        gpu.ops.linear(gpu.rows(x, "bf16"), output, weight)
        assert error(gpu.read(output), rounded(x, "bf16") @ exact.T) < TOLERANCE.get(kind, 8e-3)
