"""Where a model is computed: what `LLM(device=...)` starts.

"auto" is the CPU: a program that worked on one machine shall not need other software, or give other bits, because the next has
a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infer._core import Engine, InferError

if TYPE_CHECKING:
    from pathlib import Path

    from infer.gpu.worker import Worker

__all__ = ["start"]

# What a GPU's step may hold unless told otherwise; the core knows what a CPU's may.
GPU_STEP = {"max_num_seqs": 256, "max_num_batched_tokens": 8192}


def start(device: str, path: Path, *, enforce_eager: bool, deterministic: bool, **settings: Any) -> tuple[Engine, Worker | None]:
    """Load a model and start its engine, and the thread that computes for it where that is not the core's own."""
    if device not in ("auto", "cpu", "cuda"):
        raise InferError(f"device: {device!r} is unknown; use 'auto', 'cpu' or 'cuda'")
    if not isinstance(enforce_eager, bool):
        raise InferError(f"enforce_eager must be True or False, got {enforce_eager!r}")
    if not isinstance(deterministic, bool):
        raise InferError(f"deterministic must be True or False, got {deterministic!r}")
    if device != "cuda":  # whose results are deterministic anyway
        return Engine(path, **settings), None
    from infer.gpu.device import Device
    from infer.gpu.worker import open_engine

    settings |= {name: usual for name, usual in GPU_STEP.items() if settings[name] is None}
    return open_engine(Device(), path, enforce_eager=enforce_eager, deterministic=deterministic, settings=settings)
