"""Routing and experts against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from device import DTYPES, TOLERANCE, Device, device, error, rounded
from packed_weights import groups_of, lay_out, values_of
from test_rows import activate, normal

from infer.gpu.arrays import Routes, Weight
from infer.gpu.experts import GROUPED_ROWS, ExpertMemory


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "used"), [(8, 2), (60, 4), (128, 8), (5, 5)])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (24, 20)])
def test_experts(dtype: str, experts: int, used: int, renormalise: bool, hidden: int, width: int) -> None:
    gpu, inputs = device(), device().inputs([(3, 4), (9, 2)], padding=2)
    logits, x = normal(8, experts), normal(8, hidden)
    logits[0, :3] = 1.0  # ties go to the lower expert
    weights = [normal(experts, 2 * width, hidden), normal(experts, hidden, width)]
    biases = [normal(experts, 2 * width), normal(experts, hidden)]
    routes = Routes(gpu.zeros(8 * used * 4), gpu.zeros(8 * used * 4), used)
    gpu.ops.route(inputs, gpu.rows(logits, dtype, experts + 3), renormalise, routes)
    chosen = gpu.ints(routes.chosen, 8 * used).reshape(8, used)
    shares = gpu.ints(routes.weights, 8 * used, np.float32).reshape(8, used)
    exact = rounded(logits, dtype)
    assert (chosen[6:] == -1).all()
    for row in range(6):
        order = sorted(sorted(range(experts), key=lambda e: (-exact[row, e], e))[:used])
        assert chosen[row].tolist() == order
        softmax = np.exp(exact[row] - exact[row].max())
        expected = softmax[order] / (softmax[order].sum() if renormalise else softmax.sum())
        assert error(shares[row].astype(np.float64), expected) < 1e-6
    output, inner = gpu.blank(8, hidden, dtype), gpu.blank(8 * used, width, dtype)
    gate_up, down = (gpu.weight(w, dtype, b) for w, b in zip(weights, biases, strict=True))
    gpu.ops.experts(gpu.rows(x, dtype), output, routes, gate_up, down, "silu", inner)
    result, exact = gpu.read(output), rounded(x, dtype)
    for row in range(6):
        expected = np.zeros(hidden)
        for expert, share in zip(chosen[row], shares[row], strict=True):
            both = rounded(weights[0][expert], dtype) @ exact[row] + biases[0][expert]
            hidden_values = activate("silu", both[:width]) * both[width:]
            expected += share * (rounded(weights[1][expert], dtype) @ hidden_values + biases[1][expert])
        assert error(result[row], expected) < 3 * TOLERANCE[dtype]


def stack(gpu: Device, values: np.ndarray, kind: str, bias: np.ndarray) -> tuple[Weight, np.ndarray]:
    """Experts' matrices on the device, and what they stand for there."""
    if kind == "bf16":
        return gpu.weight(values, kind, bias), rounded(values, kind)
    experts, rows, columns = values.shape
    if kind == "e4m3":
        group = 16 if columns % 16 == 0 else columns
        scales = abs(normal(experts, rows, columns // group)).astype(np.float32) + 0.5
        weight = gpu.weight(values, kind, bias, scales=gpu.vector(scales), group=group)
        return weight, rounded(values, kind) * np.repeat(scales, group, axis=2)
    parts = groups_of(values.reshape(-1, columns).astype(np.float32), kind, 32)
    codes, scales = (gpu.put(array) for array in lay_out(*parts, kind))
    weight = Weight(codes, rows, columns, kind, bias=gpu.vector(bias), scales=scales, group=32, experts=experts)
    return weight, values_of(*parts, None).astype(np.float64).reshape(values.shape)


@pytest.mark.parametrize("kind", ["bf16", "e4m3", "int4", "int8"])
@pytest.mark.parametrize(
    ("experts", "used", "rows"), [(8, 2, 3), (8, 2, 70), (60, 4, 40), (128, 8, 600), (5, 5, 33), (4, 1, 2100)]
)
@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (224, 96), (72, 40)])
def test_experts_in_groups(kind: str, experts: int, used: int, rows: int, hidden: int, width: int) -> None:
    """Rows grouped by expert, against numpy; padded rows are zeros, and a row's result does not depend on its company."""
    if kind in ("int4", "int8") and (hidden % 32 or width % 32):
        pytest.skip("rows of packed weights are whole groups")
    gpu, dice, x = device(), np.random.default_rng(rows), normal(rows, hidden)
    chosen = np.stack([np.sort(dice.permutation(experts)[:used]) for _ in range(rows)]).astype(np.int32)
    chosen[rows // 3] = -1
    shares = dice.random((rows, used)).astype(np.float32)
    biases = [normal(experts, 2 * width), normal(experts, hidden)]
    gate_up, first = stack(gpu, normal(experts, 2 * width, hidden) / 8, kind, biases[0])
    down, second = stack(gpu, normal(experts, hidden, width) / 8, kind, biases[1])
    count = min(rows, GROUPED_ROWS)
    memory = ExpertMemory(gpu.zeros(experts * count * 4), gpu.zeros(experts * 4), gpu.zeros(count * used * hidden * 2))

    def run(begin: int, end: int) -> np.ndarray:
        routes = Routes(gpu.put(chosen[begin:end]), gpu.put(shares[begin:end]), used)
        output, inner = gpu.blank(end - begin, hidden, "bf16"), gpu.blank((end - begin) * used, width, "bf16")
        gpu.ops.experts(gpu.rows(x[begin:end], "bf16"), output, routes, gate_up, down, "silu", inner, memory)
        return gpu.read(output)

    result, exact, expected = run(0, rows), rounded(x, "bf16"), np.zeros((rows, hidden))
    for row in range(rows):
        for expert, share in zip(chosen[row], shares[row], strict=True):
            if expert >= 0:
                both = first[expert] @ exact[row] + biases[0][expert]
                expected[row] += share * (second[expert] @ (activate("silu", both[:width]) * both[width:]) + biases[1][expert])
    assert error(result, expected) < 3 * TOLERANCE["bf16"]
    assert (result[rows // 3] == 0).all()
    if rows <= GROUPED_ROWS and (rows - 1) * used > 4:
        assert (run(1, rows) == result[1:]).all()
