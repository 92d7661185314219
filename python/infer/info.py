"""What a model is, without loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infer import _core, hub

if TYPE_CHECKING:
    import os

__all__ = ["model_info"]


def model_info(
    model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> _core.ModelInfo:
    """Describe a model from its headers alone; arguments as for `LLM`. A hub id is downloaded first.

    Examples
    --------
    >>> from infer import model_info
    >>> model_info().architecture
    'LlamaForCausalLM'
    """
    path = hub.resolve(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    return _core.inspect(path)
