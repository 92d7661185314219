"""Drawing tokens and telling log-probabilities on a GPU, against a full sort with the core's own arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device import device
from numpy.typing import NDArray
from numpy_sampler import CHANGE, DRAW, changed, drawn

from infer.gpu.arrays import LOGPROB_VALUES, Draws

pytestmark = pytest.mark.usefixtures("gpu")

F32 = np.float32
random = np.random.default_rng(5)
NOTHING = np.zeros(1, DRAW)
NOTHING["top_p"], NOTHING["repetition"] = 1, 1
NOTHING["allowed"] = NOTHING["logprobs"] = NOTHING["uncounted"] = -1


def exponential(x: NDArray[Any]) -> NDArray[Any]:
    """`exp` of rust/engine/src/vector.rs, bit for bit."""
    round_ = F32(12582912.0)
    clamped = np.maximum(x, F32(-87.0))
    shifted = clamped * F32(1.44269504) + round_
    n = shifted - round_
    r = (clamped - n * F32(0.6933594)) - n * F32(-2.1219444e-4)
    series = r * F32(1 / 5040) + F32(1 / 720)
    for factor in (F32(1 / 120), F32(1 / 24), F32(1 / 6), F32(0.5)):
        series = series * r + factor
    series = series * r * r + r + F32(1)
    exponent = shifted.view(np.uint32) - round_.view(np.uint32) + np.uint32(127)
    return np.where(x < F32(-87.0), F32(0), series * (exponent << np.uint32(23)).view(np.float32))


def expected_token(logits: NDArray[Any], draw: Any) -> int:
    """What the core chooses."""
    if np.isnan(logits).any() or (logits == np.inf).any():
        return -1
    if not np.isfinite(logits.max()):
        return -2
    return drawn(logits, draw, exponential)


def draws(count: int, **fields: Any) -> NDArray[Any]:
    """Draws of random seeds and positions."""
    rows = np.repeat(NOTHING, count)
    rows["seed"], rows["position"] = random.integers(0, 1 << 63, count, np.uint64), random.integers(0, 1 << 40, count, np.uint64)
    for name, value in fields.items():
        rows[name] = value
    return rows


def run(logits: NDArray[Any], rows: NDArray[Any], words: NDArray[Any], before: NDArray[Any], full: bool) -> tuple[Any, Any]:
    """Tokens and log-probabilities from the GPU."""
    gpu, count = device(), len(rows)
    told = gpu.zeros(count * LOGPROB_VALUES * 4)
    place = Draws(gpu.put(rows.view(np.uint8)), gpu.put(words), gpu.zeros(8 * count), told)
    chosen = gpu.put(before)
    gpu.ops.sample(gpu.rows(logits, "f32", logits.shape[1] + 5), place, chosen, full)
    tokens = gpu.ints(chosen, count)
    return tokens, gpu.ints(told, count * LOGPROB_VALUES).reshape(count, LOGPROB_VALUES)


def spread(count: int, width: int) -> NDArray[Any]:
    """Logits of which some rows are flat, some peaked, some full of equals."""
    logits = random.standard_normal((count, width)) * np.repeat([0.1, 1, 3, 8], -(-count // 4))[:count, None]
    logits[::3] = np.round(logits[::3] * 4) / 4
    return logits.astype(np.float32)


@pytest.mark.parametrize("width", [7, 1024, 32000, 128256])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 1, 0), (0, 1, 0.1), (5, 1, 0), (0, 0.9, 0), (50, 0.8, 0.01), (3000, 0.99, 0)]
)
def test_tokens_are_the_cores(width: int, top_k: int, top_p: float, min_p: float) -> None:
    count = 24
    logits = spread(count, width)
    logits[1, 2], logits[2] = np.nan, -np.inf
    logits[3, : width // 2] = -np.inf
    rows = draws(count, top_k=top_k, top_p=top_p, min_p=min_p)
    rows["inverse"] = np.where(np.arange(count) % 8 == 7, 0, 1 / (0.3 + random.random(count)))
    tokens, _ = run(logits, rows, np.zeros(4, np.uint32), np.zeros(count, np.int32), False)
    assert tokens.tolist() == [expected_token(values, draw) for values, draw in zip(logits, rows, strict=True)]
    again, _ = run(logits, rows, np.zeros(4, np.uint32), np.zeros(count, np.int32), False)
    assert (tokens == again).all()


@pytest.mark.parametrize("width", [40, 5000, 128256])
def test_changes_masks_and_log_probabilities(width: int) -> None:
    count, each = 12, 30
    logits = spread(count, width)
    rows = draws(count, repetition=1.3, frequency=0.4, presence=-0.6, inverse=1.1, top_p=0.95)
    rows["inverse"][::4] = 0
    rows["logprobs"] = np.arange(count) % 5 * 8 - 1  # none, 7, 15, 23, 31
    changes = np.zeros(count * each, CHANGE)
    for row in range(count):
        own = changes[row * each : (row + 1) * each]
        own["token"] = random.choice(width, each, replace=False)
        own["bias"] = np.where(np.arange(each) % 7 == 0, -np.inf, random.normal(size=each) * (np.arange(each) % 2))
        own["seen"] = np.arange(each) % 4
        rows["first"][row], rows["changes"][row] = row * each, each
    masks = random.integers(0, 1 << 32, (count, -(-width // 32)), np.uint32) | 1
    words = np.concatenate([changes.view(np.uint32), masks.reshape(-1)])
    rows["allowed"] = np.where(np.arange(count) % 3 == 0, changes.size * 4 + np.arange(count) * masks.shape[1], -1)
    rows["uncounted"] = np.where(np.arange(count) % 2 == 0, -1, np.arange(count)[::-1])
    before = random.integers(0, width, count, np.int32)
    before[-2] = changes["token"][each + 3]  # row 1 counts it
    tokens, told = run(logits, rows, words, before, True)
    host = np.ascontiguousarray(words)
    for row, (values, draw) in enumerate(zip(logits, rows, strict=True)):
        wanted = changed(values, draw, host.ctypes.data, before)
        if draw["allowed"] >= 0:
            wanted[np.unpackbits(masks[row].view(np.uint8), bitorder="little")[:width] == 0] = -np.inf
        assert tokens[row] == expected_token(wanted, draw), row
        if draw["logprobs"] >= 0:
            check_told(values, int(tokens[row]), int(draw["logprobs"]), told[row])


def check_told(logits: NDArray[Any], token: int, count: int, values: NDArray[Any]) -> None:
    """A row's log-probabilities are those of its logits before anything was changed."""
    shifted = exponential(logits - logits.max()).astype(np.float64)
    logprobs = (logits.astype(np.float64) - (float(logits.max()) + np.log(shifted.sum()))).astype(np.float32)
    order = np.lexsort((np.arange(len(logits)), -logits))
    assert values[1] == np.flatnonzero(order == token)[0] + 1
    assert values[2 : 2 + count].tolist() == order[:count].tolist()
    assert np.abs(values[:1].view(np.float32) - logprobs[token]) <= 1e-6 * abs(logprobs[token])
    assert np.allclose(values[34 : 34 + count].view(np.float32), logprobs[order[:count]], rtol=1e-6, atol=0)
