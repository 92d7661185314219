"""Where the time of a layer goes on one GPU: all of it, and each of its operations by itself.

usage: gpu_layers.py [--json FILE] [--shapes 8B ...] [--weights bf16 e4m3 ...] [--rows 1 64 256 2048 ...]

Of up to 256 rows each is a sequence that decodes, behind a context of 512 tokens; more are one prompt. Weights are random and
those of several layers, so that they come from memory. Figures are medians of replayed graphs, in microseconds a layer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import numpy as np
from gpu_kernels import SHAPES, Bench, Shape, reading_rate, weight_bytes

from infer.gpu.arrays import PAGE_TOKENS, RopeTable
from infer.gpu.operations import Operations

ALL_SHAPES = (*SHAPES, Shape("70B", 80, 8192, 28672, 64, 8, 128, 128256))
MOST_DECODED = 256  # rows that are sequences of their own
CONTEXT = 512
WORKSPACE_BYTES = 288 << 20
MEMORY_BYTES = 6 << 30  # of weights, at most


def layer_times(bench: Bench, shape: Shape, kind: str, rows: int) -> dict[str, float]:
    """Return the microseconds of a layer and of its operations."""
    ops, dim, is_prompt = bench.ops, shape.head_dim, rows > MOST_DECODED
    heads, sequences, context = shape.heads + 2 * shape.kv_heads, 1 if is_prompt else rows, rows if is_prompt else CONTEXT
    pages = sequences * -(-context // PAGE_TOKENS) + 16
    outputs = ((heads * dim, shape.hidden), (shape.hidden, shape.heads * dim), (2 * shape.width, shape.hidden))
    sizes = (*outputs, (shape.hidden, shape.width))
    layers = max(2, min(16, MEMORY_BYTES // (2 * sum(a * b for a, b in sizes))))
    weights = [[bench.weight(*size, kind) for size in sizes] for _ in range(layers)]
    caches = [bench.layer(pages, shape.kv_heads, dim) for _ in range(min(layers, 4))]
    norm, table = bench.random(shape.hidden, "f32"), RopeTable(bench.random(context * dim, "f32"), dim // 2)
    hidden, qkv, attended = (bench.rows(rows, width) for width in (shape.hidden, heads * dim, shape.heads * dim))
    inner, both, normed = (bench.rows(rows, width) for width in (shape.width, 2 * shape.width, shape.hidden))
    inputs = bench.inputs(sequences, 0 if is_prompt else context - 1, rows if is_prompt else 1, pages)
    plan = bench.plan(inputs, (shape.heads, shape.kv_heads, dim), context, only_decode=not is_prompt)
    queries, gate, up = qkv.part(0, shape.heads * dim), both.part(0, shape.width), both.part(shape.width, shape.width)

    def attend(index: int) -> None:
        ops.attend(inputs, plan, queries, attended, caches[index % len(caches)], dim**-0.5)

    def feed_forward(index: int) -> None:
        first, second = weights[index][2:]
        ops.norm_gated_add(hidden, inner, hidden, first, second, "silu", norm, 1e-5, 1.0, normed, both)

    def layer(index: int) -> None:
        cache = caches[index % len(caches)]
        ops.qkv(inputs, hidden, qkv, weights[index][0], cache, shape.heads, table, norm, 1e-5, normed, plan)
        attend(index)
        ops.linear_add(attended, hidden, weights[index][1])
        feed_forward(index)

    parts: dict[str, Callable[[int], None]] = {
        "layer": layer,
        "norm": lambda _: ops.norm(hidden, normed, "rms", 1e-5, norm),
        "norm and product of queries, keys and values": lambda i: ops.norm_linear(hidden, qkv, weights[i][0], norm, 1e-5, normed),
        "rotation and storing": lambda i: ops.rope_write_kv(inputs, qkv, caches[i % len(caches)], shape.heads, table),
        "attention": attend,
        "product of attention": lambda i: ops.linear_add(attended, hidden, weights[i][1]),
        "feed forward": feed_forward,
        "product of gate and up": lambda i: ops.linear(normed, both, weights[i][2]),
        "gated activation": lambda _: ops.gated_activation(gate, up, inner, "silu"),
        "product of down": lambda i: ops.linear_add(inner, hidden, weights[i][3]),
    }
    times = {name: bench.time(lambda part=part: [part(i) for i in range(layers)], 9) / layers for name, part in parts.items()}
    times["bytes of weights"] = sum(weight_bytes(weight) for weight in weights[0])
    bench.release()
    return times


def main() -> None:
    """Measure what was asked for, and print it or keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", nargs="*", default=["8B"], choices=[shape.name for shape in ALL_SHAPES])
    parser.add_argument("--weights", nargs="*", default=["bf16", "e4m3"])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 64, 256, 2048])
    options = parser.parse_args()
    bench = Bench(options.weights)
    bench.workspace = cupy.zeros(WORKSPACE_BYTES, np.uint8)
    bench.ops = Operations(bench.kernels, bench.stream.ptr, bench.workspace.data.ptr, bench.workspace.nbytes)
    rate, measured = reading_rate(bench), []
    for shape in ALL_SHAPES:
        for kind in options.weights if shape.name in options.shapes else ():
            for rows in options.rows:
                times = layer_times(bench, shape, kind, rows)
                found: dict[str, Any] = {"shape": shape.name, "weights": kind, "rows": rows, "microseconds": times}
                measured.append(found)
                print(shape.name, kind, rows, {name: round(time, 1) for name, time in times.items()}, flush=True)
    if options.json:
        result = {"reading_bytes_per_second": rate, "measurements": measured}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
