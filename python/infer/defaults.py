"""The sampling that a model's authors advise: `generation_config.json` in its folder, or beside its `.gguf` file.

A `.gguf` file may also say it itself (`general.sampling` in its metadata), which the core reads; the file beside it comes before.
As in vLLM these hold where a call names no parameters at all; a `SamplingParams` given by the caller is taken as it stands.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from infer._core import InferError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["read"]

# generation_config.json's name -> ours. `do_sample` and token ids are not sampling: the core reads the latter itself.
NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
MAX_BYTES = 1 << 20  # such a file has a few hundred bytes; more is no such file


def read(path: Path) -> dict[str, Any]:
    """Return the advised fields of `SamplingParams`; empty if there is no advice."""
    file = (path if path.is_dir() else path.parent) / "generation_config.json"
    try:
        if not file.is_file():
            return {}
        if file.stat().st_size > MAX_BYTES:
            raise InferError(f"{file}: larger than {MAX_BYTES} bytes, so this is no generation_config.json")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InferError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise InferError(f"{file}: an object is needed, got {type(found).__name__}")
    return {ours: found[theirs] for theirs, ours in NAMES.items() if found.get(theirs) is not None}
