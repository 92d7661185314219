"""Routing and experts against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from device import DTYPES, TOLERANCE, device, error, rounded
from test_rows import activate, normal

from infer.gpu.arrays import Routes


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
