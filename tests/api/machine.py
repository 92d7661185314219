"""How fast the machine is just now: bounds that prove "at once" must not fail on one that hardly gets to run."""

from __future__ import annotations

import time

LOOPS, USUAL = 100_000, 0.003  # seconds, on a machine of no great speed


def patience(seconds: float) -> float:
    """Stretch a bound by how much slower than usual this process computes."""
    start = time.perf_counter()
    for _ in range(LOOPS):
        pass
    return seconds * max(1.0, (time.perf_counter() - start) / USUAL)
