"""Which of cuBLASLt's algorithms is the fastest for a product: timed once on the device, and kept on disk beside the kernels.

Its own first choice is within a few percent of the best for most shapes of decoding, but not for all: of long sums of few
outputs it was up to 16 % slower on an H100. Weights are read from memory when they are timed, as they are in a step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from functools import cache
from typing import TYPE_CHECKING, Any

from infer.gpu.kernels import cache_folder, keep

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REPEATS = 5
GAIN = 0.97
"""Of the first choice's time: only what is faster than that is taken in its place. Events tell times to half a microsecond."""
OUTGROWN = 64 << 20  # bytes that are read in between: more than the caches hold


def fastest(stream: int, products: list[Callable[[int], None]], weight: int, weight_bytes: int, space: int, size: int) -> int:
    """Return the number of the product that takes the least time.

    A product is called with a weight's address: the weight's own, or places in ``space``, whose contents are of no
    interest, so that the weight is no longer in the cache. A `RuntimeError` of CUDA is raised on.
    """
    from cupy.cuda import runtime

    count = min(-(-OUTGROWN // weight_bytes), size // weight_bytes) if weight_bytes < OUTGROWN else 0
    start, end = runtime.eventCreate(), runtime.eventCreate()
    try:
        times = []
        for product in products:
            each = []
            for _ in range(REPEATS):
                for place in range(count):
                    product(space + place * weight_bytes)
                runtime.eventRecord(start, stream)
                product(weight)
                runtime.eventRecord(end, stream)
                runtime.eventSynchronize(end)
                each.append(runtime.eventElapsedTime(start, end))
            times.append(min(each))
    finally:
        runtime.eventDestroy(start)
        runtime.eventDestroy(end)
    return times.index(min(times)) if min(times) < times[0] * GAIN else 0


def may_time(stream: int) -> bool:
    """Return whether products can be timed now: not while the stream captures."""
    from cupy.cuda import runtime

    return not runtime.streamIsCapturing(stream)


class Choices:
    """Algorithms that were chosen, as numbers by the shapes of products, on disk: one file for each GPU and version."""

    def __init__(self, version: int, workspace_bytes: int) -> None:
        name = hashlib.sha256(f"{_gpu_name()} {version} {workspace_bytes}".encode()).hexdigest()[:40]
        self._path: Path = cache_folder() / f"products-{name}.json"
        self._found: dict[str, list[int]] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                self._found = {key: words for key, words in found.items() if _is_algorithm(words)}

    def get(self, shape: str) -> list[int] | None:
        """Return the words of the algorithm that was chosen for a shape."""
        return self._found.get(shape)

    def put(self, shape: str, words: list[int]) -> None:
        """Keep a choice; a folder that cannot be written costs time in the next process, nothing else."""
        self._found[shape] = words
        with contextlib.suppress(OSError):
            keep(self._path, json.dumps(self._found, indent=0).encode())


def _is_algorithm(words: Any) -> bool:
    return isinstance(words, list) and len(words) == 8 and all(isinstance(word, int) and 0 <= word < 1 << 64 for word in words)


@cache
def _gpu_name() -> str:
    from cupy.cuda import runtime

    return str(runtime.getDeviceProperties(runtime.getDevice())["name"].decode())
