"""What a model is, without loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infer import _core, hub

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

__all__ = ["model_info"]


def model_info(
    model: str | os.PathLike[str] | None = None,
    *,
    kv_cache_dtype: str | Mapping[str, object] = "auto",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> _core.ModelInfo:
    """Describe a model from its headers alone; arguments as for `LLM`. A hub id is downloaded first.

    `kv_bytes_per_token` and `kv_cache_tokens` of the result are those of `kv_cache_dtype`.

    Examples
    --------
    >>> from infer import model_info
    >>> model_info().architecture
    'LlamaForCausalLM'
    """
    path = hub.resolve(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    return _core.inspect(path, kv_cache_dtype=kv_cache_dtype)
