"""Packed weights: the kernel that makes them, bit for bit, and every product of them against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device import TOLERANCE, Device, device, error, rounded, same_in_any_company
from packed_weights import blocks_of, groups_of, k_quant_values, lay_out, read_back, values_of
from test_rows import activate, normal

from infer.gpu.arrays import Weight
from infer.gpu.packing import FORMATS, Plan, sizes

KINDS = {"int4": ("int4", 32), "int4 by 128": ("int4", 128), "int8": ("int8", 32), "int4 with minima": ("int4", 32)}
SHAPES = ((64, 128), (40, 256), (1000, 4096), (48, 11008), (17, 384))


def random_parts(rows: int, columns: int, kind: str) -> tuple[Any, Any, Any]:
    """Scales, integers and minima of a matrix."""
    name, group = KINDS[kind]
    dice = np.random.default_rng(rows + columns)
    low, high = {"int4": (-8, 8), "int8": (-128, 128)}[name]
    low, high = (0, 16) if "minima" in kind else (low, high)
    integers = dice.integers(low, high, (rows, columns // group, group)).astype(np.int8)
    scales = (dice.random((rows, columns // group)) / 8 + 0.01).astype(np.float16)
    return scales, integers, (dice.random(scales.shape) - 0.5).astype(np.float16) if "minima" in kind else None


def put(gpu: Device, parts: tuple[Any, Any, Any], kind: str, bias: Any = None) -> Weight:
    """A packed weight on the device."""
    name, group = KINDS[kind]
    scales, integers, minima = parts
    pointers = [gpu.put(array) for array in lay_out(scales, integers, name, minima)]
    more = {"minima": pointers[2]} if minima is not None else {}
    bias_pointer = 0 if bias is None else gpu.vector(bias)
    shape = len(integers), integers.shape[1] * group
    return Weight(pointers[0], *shape, name, bias=bias_pointer, scales=pointers[1], group=group, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout_is_read_as_it_is_written(kind: str, shape: tuple[int, int]) -> None:
    scales, integers, minima = random_parts(*shape, kind)
    name, group = KINDS[kind]
    packed, *numbers = lay_out(scales, integers, name, minima)
    read = read_back(packed, numbers[0], numbers[1] if minima is not None else None, name, shape, group)
    assert (read == values_of(scales, integers, minima)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_linear(kind: str, rows: int, shape: tuple[int, int], dtype: str) -> None:
    gpu, x, bias, parts = device(), normal(rows, shape[1]), normal(shape[0]), random_parts(*shape, kind)
    weight, exact = put(gpu, parts, kind, bias), values_of(*parts).astype(np.float64)
    source, output = gpu.rows(x, dtype, shape[1] + 8), gpu.blank(rows, shape[0], dtype, -(-shape[0] // 8) * 8)
    gpu.ops.linear(source, output, weight)
    product = rounded(x, dtype) @ exact.T
    wide = rows > 16 and dtype == "bf16"  # then weights are rounded to bfloat16
    assert error(gpu.read(output), product + bias) < TOLERANCE[dtype] * (1.5 if wide else 1)
    before = gpu.read(output)
    gpu.ops.linear_add(source, output, weight, 0.5)
    assert error(gpu.read(output), before + 0.5 * (product + bias)) < TOLERANCE[dtype] * (1.5 if wide else 1)
    logits = gpu.blank(rows, shape[0], "f32")
    gpu.ops.linear(source, logits, weight)
    assert error(gpu.read(logits), product + bias) < (TOLERANCE["bf16"] if wide else 2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 8, 13, 20])
@pytest.mark.parametrize(("width", "columns"), [(64, 128), (40, 384), (1000, 2048), (20, 128)])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_gated(kind: str, rows: int, width: int, columns: int, dtype: str) -> None:
    gpu, x, bias, parts = device(), normal(rows, columns) / 8, normal(2 * width), random_parts(2 * width, columns, kind)
    weight, exact = put(gpu, parts, kind, bias), values_of(*parts).astype(np.float64)
    source, output, scratch = (
        gpu.rows(x, dtype),
        gpu.blank(rows, width, dtype, -(-width // 8) * 8),
        gpu.blank(rows, 2 * width, dtype),
    )
    gpu.ops.linear_gated(source, output, weight, "silu", scratch)
    both = rounded(x, dtype) @ exact.T + bias
    expected = activate("silu", both[:, :width]) * both[:, width:]
    assert error(gpu.read(output), expected) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_rows_do_not_depend_on_company(kind: str) -> None:
    gpu = device()
    weight = put(gpu, random_parts(1536, 4096, kind), kind)
    same_in_any_company(gpu, weight, normal(16, 4096), ((0, 16), (0, 8), (8, 8), (3, 1), (5, 11)))


@pytest.mark.parametrize("kind", KINDS)
def test_embed(kind: str) -> None:
    gpu, parts = device(), random_parts(50, 256, kind)
    table, exact = put(gpu, parts, kind), values_of(*parts).astype(np.float64)
    inputs = gpu.inputs([(0, 5), (3, 2)])
    tokens = gpu.ints(inputs.tokens, 7)
    output = gpu.blank(7, 256, "f32")
    gpu.ops.embed(inputs, table, output, 2.0)
    assert error(gpu.read(output), 2 * exact[tokens]) < 1e-6


def packed(gpu: Device, source: Any, plan: Plan, shape: tuple[int, int]) -> tuple[list[Any], int]:
    """What the kernel makes of rows: integers, scales and minima as they lie, and whether it refused them."""
    size, scale_bytes, minima_bytes = sizes(*shape, plan.packed)
    pointers = [gpu.put(np.full(count, 0xAA, np.uint8)) if count else 0 for count in (size, scale_bytes, minima_bytes)]
    more = {"group": plan.packed.group, "steps": plan.packed.steps}
    weight = Weight(pointers[0], *shape, plan.packed.type, scales=pointers[1], minima=pointers[2], **more)
    refused = gpu.zeros(4)
    gpu.ops.pack(gpu.put(source), weight, plan, shape[0], refused)
    arrays = [gpu.ints(pointers[0], size // 4, np.uint32), gpu.ints(pointers[1], scale_bytes // 2, np.uint16)]
    if minima_bytes:
        kind = np.uint32 if plan.packed.steps else np.uint16
        arrays.append(gpu.ints(pointers[2], minima_bytes // np.dtype(kind).itemsize, kind))
    return arrays, int(gpu.ints(refused, 1)[0])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(64, 256), (21, 384), (9, 4096)])
def test_blocks_are_packed_exactly(name: str, shape: tuple[int, int]) -> None:
    plan = Plan(FORMATS[name], "stored")
    shape = shape[0], shape[1] // plan.packed.block * plan.packed.block
    data = np.random.default_rng(1).integers(0, 256, (shape[0], plan.row_bytes(shape[1])), np.uint8)
    found, refused = packed(device(), data, plan, shape)
    scales, integers, minima = blocks_of(name, data)
    expected = lay_out(scales, integers, plan.packed.type, minima)
    assert [(one == other).all() for one, other in zip(found, expected, strict=True)] == [True] * len(expected)
    assert not refused


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "INT4_G128"])
@pytest.mark.parametrize("form", ["bf16", "f32"])
@pytest.mark.parametrize("shape", [(64, 256), (21, 384), (40, 4096)])
def test_numbers_are_rounded_as_on_the_cpu(name: str, form: str, shape: tuple[int, int]) -> None:
    plan = Plan(FORMATS[name], form)
    numbers = rounded(normal(*shape) / 8, form).astype(np.float32)
    numbers[3] = 0
    numbers[4] *= np.float32(1e-9)  # scales below half precision
    numbers[5, ::2] = numbers[5, 1::2] = 0.5  # many of the greatest magnitude
    numbers[5, ::3] = -0.5
    source = (numbers.view(np.uint32) >> 16).astype(np.uint16) if form == "bf16" else numbers
    numbers = (source.astype(np.uint32) << 16).view(np.float32) if form == "bf16" else numbers
    found, refused = packed(device(), source, plan, shape)
    expected = lay_out(*groups_of(numbers, plan.packed.type, plan.packed.group), plan.packed.type)
    assert [(one == other).all() for one, other in zip(found, expected, strict=True)] == [True] * len(expected)
    assert not refused


@pytest.mark.parametrize("bad", [np.nan, np.inf, -70000.0])
def test_what_half_precision_cannot_hold_is_refused(bad: float) -> None:
    numbers = normal(8, 128).astype(np.float32)
    numbers[2, 5] = bad
    assert packed(device(), numbers, Plan(FORMATS["Q4_0"], "f32"), (8, 128))[1] == 1


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("rows", [1, 8, 13, 70, 130, 400])
@pytest.mark.parametrize("shape", [(64, 256), (1000, 4096), (21, 768), (48, 11008)])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_k_quants(name: str, rows: int, shape: tuple[int, int], dtype: str) -> None:
    """Products with weights in steps: streamed, of many rows, unpacked, and plain."""
    gpu, plan, dice = device(), Plan(FORMATS[name], "stored"), np.random.default_rng(2)
    data = dice.integers(0, 256, (shape[0], plan.row_bytes(shape[1])), np.uint8)
    blocks = data.reshape(shape[0], -1, plan.packed.block_bytes)
    units = (dice.random((*blocks.shape[:2], 2)) / 64 + 1e-3).astype(np.float16).view(np.uint8)
    if name == "Q6_K":
        blocks[..., 208:] = units[..., :2]
    else:
        blocks[..., :4] = units
    exact = k_quant_values(name, *blocks_of(name, data)).astype(np.float64)
    size = [gpu.zeros(max(count, 4)) for count in sizes(*shape, plan.packed)]
    more = {"group": 32, "steps": plan.packed.steps}
    weight = Weight(size[0], *shape, plan.packed.type, scales=size[1], minima=size[2], **more)
    gpu.ops.pack(gpu.put(data), weight, plan, shape[0], gpu.zeros(4))
    x = normal(rows, shape[1])
    output = gpu.blank(rows, shape[0], dtype, -(-shape[0] // 8) * 8)
    gpu.ops.linear(gpu.rows(x, dtype), output, weight)
    assert error(gpu.read(output), rounded(x, dtype) @ exact.T) < TOLERANCE[dtype] * 1.5
    few = gpu.blank(rows, shape[0], "f32")
    gpu.ops.linear(gpu.rows(x, dtype), few, weight)
    assert error(gpu.read(few), rounded(x, dtype) @ exact.T) < (2e-5 if rows <= 16 or dtype == "f32" else TOLERANCE["bf16"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_little_shared_memory(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs whose blocks get 99 KiB."""
    gpu, x, parts = device(), normal(rows, 11008), random_parts(272, 11008, kind)
    monkeypatch.setattr(gpu.kernels, "shared_limit", 101376)
    output = gpu.blank(rows, 272, "f32")
    gpu.ops.linear(gpu.rows(x, "bf16"), output, put(gpu, parts, kind))
    assert error(gpu.read(output), rounded(x, "bf16") @ values_of(*parts).astype(np.float64).T) < 2e-5
