"""Which steps of a program are whole dense layers, one after the other, so that they may be one kernel (layers.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infer.gpu.layers import Layer

if TYPE_CHECKING:
    from infer.gpu.executor import Executor
    from infer.gpu.fused import Step

KINDS = ("norm_qkv", "attend", "linear_add", "norm_gated_add")
"""The fused steps of a layer."""


def stack_of(steps: list[Step]) -> slice:
    """Return where the program's layers are, if all that attend are such as go together; else an empty place."""
    starts = [place for place in range(len(steps) - 3) if _is_layer(steps[place : place + 4])]
    attending = sum(kind == "attend" for kind, _ in steps)
    if not starts or len(starts) != attending or starts != list(range(starts[0], starts[0] + 4 * len(starts), 4)):
        return slice(0, 0)
    return slice(starts[0], starts[0] + 4 * len(starts))


def _is_layer(steps: list[Step]) -> bool:
    if tuple(kind for kind, _ in steps) != KINDS:
        return False
    qkv, attend, added, gated = (fields for _, fields in steps)
    hidden = qkv["input"]
    buffer, start, width = qkv["qkv"]
    queries = attend["queries"]
    return bool(
        added["destination"] == hidden == gated["input"] == gated["destination"]
        and queries[:2] == (buffer, start)
        and queries[2] <= width
        and attend["output"] == added["input"]
        and not attend["window"]
        and attend["layer"] == qkv["layer"]
    )


def layers_of(executor: Executor, fields: list[dict[str, Any]]) -> tuple[Layer, ...]:
    """Return the layers of these steps' fields, four for each, with buffers of all rows."""
    return tuple(executor.layer(*fields[place : place + 4]) for place in range(0, len(fields), 4))
