"""Writing a model in quantized form."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from infer import _core, hub

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["quantize"]


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    quantization: str = "int4",
    *,
    threads: int | None = None,
    mmap: bool = True,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Round a model's weights and write the result: what `LLM(model, quantization=...)` computes with, bit for bit.

    Weights are rounded to the nearest integers, with the scale of each group that leaves the least squared error. The output
    appears under its name when it is complete and on the disk.

    Parameters
    ----------
    model
        A model stored as floats: a folder, a `.gguf` file or a hub id.
    output
        A name that ends in `.gguf` makes a GGUF file for this program and llama.cpp, with tokenizer, chat templates and the
        advised sampling inside.
        Any other makes a folder of safetensors with its tokenizer files beside, in the format "pack-quantized" of
        compressed-tensors, for this program, vLLM and transformers. It must not exist.
    quantization
        "int8" (Q8_0 in GGUF), "int4" (Q4_0; a scale for each 32 weights), or "int4-g128" (one for each 128; folders only). In
        GGUF the embedding and the output head have 8 bits, or 6 beside 4; folders keep them whole, since the other programs
        read them so, and this one rounds them while loading.
    threads
        How many threads round; None takes one per physical core that this process may use.
    mmap
        Map the model's files instead of reading them.
    revision, token, cache_dir, local_files_only
        As for `LLM`.

    Returns
    -------
    Path
        The file or folder.

    Raises
    ------
    InferError
        If the model is quantized already, a tensor's width is no multiple of a group, the output exists or cannot be written,
        or a GGUF file cannot say everything that the model's configuration says.
    """
    path = hub.resolve(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    if not isinstance(output, (str, os.PathLike)) or not os.fspath(output):
        raise _core.InferError(f"output: the name of a .gguf file or of a folder is needed, got {output!r}")
    target = hub.expanded(output)
    _core.quantize(path, target, quantization, threads=threads, mmap=mmap)
    return target
