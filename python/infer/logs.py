"""What this package tells the standard library's `logging`: one logger, `infer`.

INFO says what was loaded and closed, WARNING which requests failed or ran out of time, DEBUG how each request went. Every
record carries its figures as attributes too (`logging`'s `extra`), all with the prefix `infer_`, for handlers that write JSON.
Nothing is computed for records that nobody wants.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from infer._core import InferError

if TYPE_CHECKING:
    from infer._core import Engine, Request

__all__ = ["closing", "ended", "loaded"]

_log = logging.getLogger("infer")
_log.addHandler(logging.NullHandler())  # a library does not write where nobody asked it to


def _write(level: int, message: str, fields: dict[str, Any]) -> None:
    _log.log(level, message, *fields.values(), extra={f"infer_{name}": value for name, value in fields.items()})


def loaded(engine: Engine) -> None:
    """Tell of a model that is ready."""
    outcome, warning = engine.packed_cache
    if warning is not None:
        _write(logging.WARNING, "%s", {"packed_cache": warning})
    if not _log.isEnabledFor(logging.INFO):
        return
    info = engine.info
    fields = {
        "model": info.path,
        "architecture": info.architecture,
        "quantization": info.quantization,
        "parameters": info.parameters,
        "threads": engine.threads,
        "max_model_len": engine.max_model_len,
        "kv_cache_tokens": engine.kv_cache_tokens,
        "packed_cache": outcome,
    }
    _write(
        logging.INFO,
        "loaded %s: %s, %s, %d parameters, %d threads, sequences of up to %d tokens, a KV cache of %d tokens; packed cache %s",
        fields,
    )


def closing(engine: Engine) -> None:
    """Tell of a model that is given up, and what it did."""
    if not _log.isEnabledFor(logging.INFO):
        return
    try:
        metrics = engine.metrics()
    except InferError:
        return  # another thread closed it meanwhile
    names = (
        "requests_finished",
        "requests_aborted",
        "requests_timed_out",
        "requests_failed",
        "generated_tokens",
        "cached_tokens",
    )
    fields = {"model": engine.info.path, **{name: metrics[name] for name in names}}
    _write(
        logging.INFO,
        "closing %s: %d requests finished, %d aborted, %d out of time, %d failed; %d tokens generated, %d prompt tokens cached",
        fields,
    )


def ended(request: Request, reason: str | None) -> None:
    """Tell how a request went; `reason` is how its last completion ended."""
    level = logging.WARNING if reason in ("error", "timeout") else logging.DEBUG
    if not _log.isEnabledFor(level):
        return
    metrics = request.metrics
    fields = {
        "request_id": request.request_id,
        "finish_reason": reason,
        "prompt_tokens": metrics.prompt_tokens,
        "cached_tokens": metrics.cached_tokens,
        "generated_tokens": metrics.generated_tokens,
        "total_time": metrics.total_time or 0.0,
        "error": request.error or "",
    }
    _write(level, "request %d ended (%s): %d prompt tokens, %d of them cached, %d generated, %.3f s %s", fields)
