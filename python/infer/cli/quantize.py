"""`infer quantize`: a model with rounded weights, as a file or a folder."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from infer import model_info
from infer import quantize as write
from infer.cli.common import JsonOption, ThreadsOption, print_json


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file or a hub id, its weights stored as floats.")
    ],
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUTPUT",
            help="NAME.gguf for a GGUF file, any other name for a folder of safetensors (compressed-tensors). Must not exist.",
        ),
    ],
    quantization: Annotated[
        str,
        typer.Option(
            "--quantization",
            "-q",
            help="'int8' (GGUF: Q8_0), 'int4' (Q4_0: a scale per 32 weights) or 'int4-g128' (a scale per 128; folders only).",
        ),
    ] = "int4",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Round a model's weights and write the result: what LLM(MODEL, quantization=...) computes with, bit for bit.

    Embedding and output head get 8 bits, or 6 beside 4; norms, biases and the routers of experts stay as they are. A folder
    keeps embedding and head whole on disk, as vLLM and transformers read them. The output appears when it is complete.
    """
    start = time.perf_counter()
    path = write(model, output, quantization, threads=threads)
    seconds = time.perf_counter() - start
    found = model_info(path)
    report = {
        "output": str(path),
        "quantization": found.quantization,
        "container": found.container,
        "weight_bytes": found.weight_bytes,
        "seconds": seconds,
    }
    if as_json:
        print_json(report)
    else:
        print(f"{path}: {found.container}, {found.quantization}, {found.weight_bytes / 2**20:,.1f} MiB, {seconds:.1f} s")
