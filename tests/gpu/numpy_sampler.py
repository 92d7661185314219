"""Drawing tokens and telling log-probabilities in numpy: what cuda/sampler.cu and cuda/logprobs.cu do."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAW = np.dtype(
    [
        ("seed", "u8"),
        ("position", "u8"),
        ("top_p", "f8"),
        *[(name, "f4") for name in ("inverse", "min_p")],
        ("top_k", "u4"),
        *[(name, "f4") for name in ("repetition", "frequency", "presence")],
        *[(name, "i4") for name in ("first", "changes", "allowed", "logprobs", "uncounted", "unused")],
    ]
)  # as in cuda/draw.cuh
CHANGE = np.dtype([("token", "i4"), ("bias", "f4"), ("seen", "u4"), ("saved", "f4")])


def view(pointer: int, shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
    """Memory at an address as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(pointer), dtype).reshape(shape)


def uniform(seed: int, position: int) -> float:
    """Philox4x32-10: the number in [0, 1) that the core draws for the token at a position."""
    key, word = [seed & 0xFFFFFFFF, seed >> 32], 0xFFFFFFFF
    state = [position & word, position >> 32, 0, 0]
    for _ in range(10):
        first, second = 0xD2511F53 * state[0], 0xCD9E8D57 * state[2]
        state = [(second >> 32) ^ state[1] ^ key[0], second & word, (first >> 32) ^ state[3] ^ key[1], first & word]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return float((state[1] << 32 | state[0]) >> 11) / (1 << 53)


def changed(logits: NDArray[Any], draw: Any, words: int, chosen: NDArray[Any]) -> NDArray[Any]:
    """A row with biases, bans and penalties applied."""
    logits = logits.copy()
    own = view(words + 16 * int(draw["first"]), (int(draw["changes"]),), CHANGE) if draw["changes"] else ()
    changes = {int(change["token"]): (change["bias"], int(change["seen"])) for change in own}
    latest = int(chosen[draw["uncounted"]]) if draw["uncounted"] >= 0 else -1
    if latest >= 0:
        bias, seen = changes.get(latest, (np.float32(0), 0))
        changes[latest] = bias, (seen | 1) + 2
    for token, (bias, seen) in changes.items():
        value = logits[token] + bias
        if seen & 1:
            value = value / draw["repetition"] if value > 0 else value * draw["repetition"]
        if seen >= 2:
            value = value - (draw["frequency"] * np.float32(seen >> 1) + draw["presence"])
        logits[token] = value
    return logits


def drawn(logits: NDArray[Any], draw: Any, exponential: Callable[[NDArray[Any]], NDArray[Any]] = np.exp) -> int:
    """The largest logit at an inverse temperature of 0; else a token by inverting the cumulative distribution of what is left."""
    if draw["inverse"] == 0:
        return int(logits.argmax())
    weights = exponential((logits - logits.max()) * draw["inverse"]).astype(np.float64)
    weights[weights < draw["min_p"]] = 0
    order = np.lexsort((np.arange(len(weights)), -weights))
    if draw["top_k"]:
        weights[order[draw["top_k"] :]] = 0
    if draw["top_p"] < 1:
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= draw["top_p"] * weights.sum()]] = 0
    total = np.cumsum(weights)
    place = np.searchsorted(total, uniform(int(draw["seed"]), int(draw["position"])) * total[-1], side="right")
    return int(min(place, np.flatnonzero(weights)[-1]))


def tell(logits: NDArray[Any], token: int, count: int, out: NDArray[Any]) -> None:
    """Log-probabilities of the chosen token and of the most likely ones."""
    shifted = (logits - logits.max()).astype(np.float64)
    logprobs = (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
    order = np.lexsort((np.arange(len(logits)), -logits))
    out[:2] = logprobs[token].view(np.int32), np.flatnonzero(order == token)[0] + 1
    out[2 : 2 + count] = order[:count]
    out[34 : 34 + count] = logprobs[order[:count]].view(np.int32)


def choose(raw: NDArray[Any], draw: Any, words: int, chosen: NDArray[Any], full: bool) -> int:
    """The token of a row, or why there is none."""
    values = changed(raw, draw, words, chosen) if full else raw.copy()
    if draw["allowed"] >= 0:
        mask = view(words + 4 * int(draw["allowed"]), (-(-len(raw) // 32),), np.uint32)
        values[np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(values)] == 0] = -np.inf
    if not (raw < np.inf).all():
        return -1
    return drawn(values, draw) if np.isfinite(values.max(initial=-np.inf)) else -2
