"""Products against numpy in float64: streamed, by cuBLASLt and plain, with everything that is fused to them."""

from __future__ import annotations

import pytest
from device import DTYPES, TOLERANCE, device, error, rounded
from test_rows import activate, norm, normal

SHAPES = ((64, 64), (100, 200), (33, 8), (4096, 512), (1000, 4096), (48, 11008), (17, 9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["same", "f32", "e4m3", "e4m3 by 128"])
def test_linear(dtype: str, rows: int, shape: tuple[int, int], kind: str) -> None:
    gpu, x, w, bias = device(), normal(rows, shape[1]), normal(*shape) / 8, normal(shape[0])
    kind, group = dtype if kind == "same" else kind.split()[0], 128 if "128" in kind else shape[1]
    scales = abs(normal(shape[0], -(-shape[1] // group))) + 0.5
    more = {"scales": gpu.vector(scales), "group": group} if kind == "e4m3" else {}
    scales = scales.repeat(group, 1)[:, : shape[1]]
    weight = gpu.weight(w, kind, bias, **more)
    exact = rounded(w, kind) * (scales if more else 1.0)
    source, output = gpu.rows(x, dtype, shape[1] + 8), gpu.blank(rows, shape[0], dtype, -(-shape[0] // 8) * 8)
    gpu.ops.linear(source, output, weight)
    product = rounded(x, dtype) @ exact.T
    # Many rows: in E4M3 as the weights are, or weights times scales in bfloat16.
    wide = kind == "e4m3" and dtype == "bf16" and rows > 16
    tolerance = (4e-2 if group == shape[1] else 8e-3) if wide else TOLERANCE[dtype]
    assert error(gpu.read(output), product + bias) < tolerance
    before = gpu.read(output)
    gpu.ops.linear_add(source, output, weight, 0.5)
    assert error(gpu.read(output), before + 0.5 * (product + bias)) < tolerance
    logits = gpu.blank(rows, shape[0], "f32")
    gpu.ops.linear(source, logits, weight)
    assert error(gpu.read(logits), product + bias) < (tolerance if wide else 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 13, 20])
@pytest.mark.parametrize(("width", "columns"), [(64, 128), (40, 72), (1000, 2048)])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("has_norm", [False, True])
def test_gated(dtype: str, rows: int, width: int, columns: int, name: str, has_norm: bool) -> None:
    gpu, x, w, factors, bias = device(), normal(rows, columns), normal(2 * width, columns) / 8, normal(columns), normal(2 * width)
    source, output, scratch = gpu.rows(x, dtype), gpu.blank(rows, width, dtype), gpu.blank(rows, 2 * width, dtype)
    weight, exact = gpu.weight(w, dtype, bias), rounded(x, dtype)
    if has_norm:
        exact = norm(exact, "rms", 1, 1e-5, factors, None)
        normed = gpu.blank(rows, columns, dtype)
        gpu.ops.norm_linear_gated(source, output, weight, name, gpu.vector(factors), 1e-5, normed, scratch)
    else:
        gpu.ops.linear_gated(source, output, weight, name, scratch)
    both = exact @ rounded(w, dtype).T + bias
    expected = activate(name, both[:, :width]) * both[:, width:]
    assert error(gpu.read(output), expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [1, 8, 16, 20])
@pytest.mark.parametrize("shape", [(512, 64), (768, 4096), (8192, 256)])
def test_norm_linear(rows: int, shape: tuple[int, int]) -> None:
    gpu, x, w, factors = device(), 10 * normal(rows, shape[1]), normal(*shape) / 8, normal(shape[1])
    source, output, scratch = gpu.rows(x, "bf16"), gpu.blank(rows, shape[0], "bf16"), gpu.blank(rows, shape[1], "bf16")
    gpu.ops.norm_linear(source, output, gpu.weight(w, "bf16"), gpu.vector(factors), 1e-5, scratch)
    expected = norm(rounded(x, "bf16"), "rms", 1, 1e-5, factors, None) @ rounded(w, "bf16").T
    assert error(gpu.read(output), expected) < TOLERANCE["bf16"]


def test_streamed_rows_do_not_depend_on_company() -> None:
    gpu, x, w = device(), normal(16, 4096), normal(6144, 4096) / 8
    weight, alone = gpu.weight(w, "bf16"), []
    for first, count in ((0, 16), (0, 8), (8, 8), (3, 1), (5, 11)):
        output = gpu.blank(count, 6144, "f32")
        gpu.ops.linear(gpu.rows(x[first : first + count], "bf16"), output, weight)
        alone.append((first, gpu.read(output)))
    for first, result in alone[1:]:
        assert (result == alone[0][1][first : first + len(result)]).all()


@pytest.mark.parametrize("kind", ["bf16", "e4m3", "e4m3 by 128"])
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_little_shared_memory(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs whose blocks get 99 KiB: long rows of the input are brought by rings, the shorter the more rows there are."""
    gpu, shape = device(), (272, 11008)
    monkeypatch.setattr(gpu.kernels, "shared_limit", 101376)
    x, w, group = normal(rows, shape[1]), normal(*shape) / 8, 128 if "128" in kind else shape[1]
    scales = abs(normal(shape[0], -(-shape[1] // group))) + 0.5
    more = {"scales": gpu.vector(scales), "group": group} if kind != "bf16" else {}
    weight, output = gpu.weight(w, kind.split()[0], **more), gpu.blank(rows, shape[0], "f32")
    gpu.ops.linear(gpu.rows(x, "bf16"), output, weight)
    exact = rounded(w, kind.split()[0]) * (scales.repeat(group, 1)[:, : shape[1]] if more else 1.0)
    assert error(gpu.read(output), rounded(x, "bf16") @ exact.T) < 2e-5
