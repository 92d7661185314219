"""Products of 97 to 256 rows by the matrix instructions of warp groups, and of gates by more, against numpy in float64."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from device import device, error
from test_rows import activate, normal
from test_warp_group import KINDS, check_company, check_not_finite, multiplied_rows, weight_of

from infer.gpu import wide
from infer.gpu.operations import Operations

SUMS = {"e4m3": 4e-3, "bf16": 2e-5}
"""Relative error of what the matrix instructions add up: of E4M3 they keep few digits."""
WORKSPACE_BYTES = 128 << 20
SHAPES = ((64, 16), (208, 1168), (1040, 512), (2048, 4096), (256, 14336), (28672, 64))


@pytest.fixture(autouse=True)
def takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this kernel also where another is faster."""
    if device().kernels.capability != wide.CAPABILITY:
        pytest.skip("this GPU has no matrix instructions of warp groups")
    monkeypatch.setattr("infer.gpu.wide.is_faster", lambda *_: True)
    monkeypatch.setattr(device(), "ops", operations())


@cache
def operations() -> Operations:
    """Operations with more working memory than others have."""
    gpu = device()
    return Operations(gpu.kernels, gpu.stream.ptr, gpu.zeros(WORKSPACE_BYTES), WORKSPACE_BYTES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [97, 129, 160, 177, 224, 256])
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


GATED_SHAPES = [(64, 64), (416, 1168), (2048, 1024), (6176, 256), (40960, 128)]
LONG_GATED = [(257, (2048, 1024), "bf16"), (700, (416, 1168), "bf16"), (4500, (1040, 192), "bf16")]


@pytest.mark.parametrize(("rows", "shape", "kind"), [*itertools.product((129, 256), GATED_SHAPES, KINDS), *LONG_GATED])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_gated(rows: int, shape: tuple[int, int], name: str, kind: str) -> None:
    gpu, x = device(), normal(rows, shape[1]) / 8
    weight, exact, bias = weight_of(*shape, kind)
    source, width = gpu.rows(x, "bf16"), shape[0] // 2
    output, scratch = gpu.blank(rows, width, "bf16", width + 8), gpu.blank(rows, shape[0], "bf16")
    gpu.ops.linear_gated(source, output, weight, name, scratch)
    both = multiplied_rows(gpu, source, kind) @ exact.T + bias
    assert error(gpu.read(output), activate(name, both[:, :width]) * both[:, width:]) < 6e-3 + SUMS[kind]
    assert np.isnan(gpu.read(scratch)).all(), "it is one kernel"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [130, 256])
@pytest.mark.parametrize("splits", range(1, wide.MOST_SPLITS + 1))
@pytest.mark.parametrize("token_blocks", [1, 2])
@pytest.mark.parametrize("columns", [2192, 8192])
def test_divisions(token_blocks: int, splits: int, rows: int, columns: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks share tokens and columns, they give the product."""
    gpu, outputs = device(), 8720 if columns < 4096 else 528
    x = normal(rows, columns)
    weight, exact, bias = weight_of(outputs, columns, kind)
    monkeypatch.setattr("infer.gpu.wide.divide", lambda *_: wide.Division(token_blocks, splits))
    source, output = gpu.rows(x, "bf16"), gpu.blank(rows, outputs, "f32")
    gpu.ops.linear(source, output, weight)
    assert error(gpu.read(output), multiplied_rows(gpu, source, kind) @ exact.T + bias) < SUMS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_company_but_for_the_division(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infer.gpu.wide.divide", lambda *_: wide.Division(1, 2))
    check_company(kind, 256, [(0, 129), (0, 200), (3, 177), (36, 150)])


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_stay_in_their_rows(kind: str) -> None:
    check_not_finite(kind, 150)
