"""What the GPU kernels achieve: bytes and operations per second.

usage: gpu_kernels.py [--json FILE] [--only PART ...] [--weights TYPE ...]
(parts: decode, linear, experts, small, attention, prefill; default: all)

Random data, replayed as graphs over memory that outgrows the caches.

Every figure is the median of several replays, timed by events. "share" is of the reading rate that this script measures first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from infer.gpu.arrays import ELEMENT_BYTES, PAGE_TOKENS, KvLayer, RopeTable, Routes, Rows, StepInputs, Weight
from infer.gpu.attention import AttentionPlan, PlanSize
from infer.gpu.experts import ExpertMemory
from infer.gpu.kernels import Kernels
from infer.gpu.operations import Operations
from infer.gpu.packing import Packed, sizes

ROOT = Path(__file__).resolve().parent.parent
BYTES_OF_ROTATION = 1 << 30

KINDS = ("bf16", "e4m3", "int8", "int4", "int4-g128")
"""Types of weights."""


@dataclass(frozen=True)
class Shape:
    """The widths of a dense model."""

    name: str
    layers: int
    hidden: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


SHAPES = (
    Shape("1B", 16, 2048, 8192, 32, 8, 64, 128256),
    Shape("8B", 32, 4096, 14336, 32, 8, 128, 128256),
)


class Bench:
    """A device, its operations, and random arrays."""

    def __init__(self, kinds: list[str]) -> None:
        self.kinds = kinds  # of weights
        sources = {p.name: p.read_text(encoding="utf-8") for p in (ROOT / "cuda").iterdir() if p.suffix in (".cu", ".cuh")}
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.kernels = Kernels(sources)
        self.workspace = cupy.empty(64 << 20, np.uint8)
        self.ops = Operations(self.kernels, self.stream.ptr, self.workspace.data.ptr, self.workspace.nbytes)
        self.kept: list[Any] = []

    def random(self, count: int, dtype: str) -> int:
        """Return the address of random numbers with a deviation of 1/16."""
        if dtype == "e4m3":
            array = cupy.random.randint(0, 256, count, dtype=np.uint8) & np.uint8(0xBF)  # below 1, so no NaN
        else:
            array = cupy.empty(count, np.uint16 if dtype == "bf16" else np.float32)
            for start in range(0, count, 1 << 27):
                values = cupy.random.standard_normal(min(1 << 27, count - start), np.float32) / 16
                if dtype == "bf16":
                    values = (values.view(np.uint32) >> 16).astype(np.uint16)
                array[start : start + len(values)] = values
        self.kept.append(array)
        return int(array.data.ptr)

    def put(self, array: np.ndarray) -> int:
        """Copy an array to the device."""
        copy = cupy.asarray(array)
        self.kept.append(copy)
        return int(copy.data.ptr)

    def rows(self, rows: int, width: int, dtype: str = "bf16") -> Rows:
        """Return random rows."""
        return Rows(self.random(rows * width, dtype), rows, width, width, dtype)

    def weight(self, rows: int, columns: int, kind: str = "bf16") -> Weight:
        """Return a random weight; "int4-g128" has a scale for each 128 columns, "int4" and "int8" for each 32."""
        if kind.startswith("int"):
            name, group = kind[:4], 128 if "g128" in kind else 32
            size, scale_bytes, _ = sizes(rows, columns, Packed(name, group, False, 0, 0, 0))
            scales = self.put(np.full(scale_bytes // 2, 0.01, np.float16))
            return Weight(self.random(size, "e4m3"), rows, columns, name, scales=scales, group=group)
        scales = self.put(np.full(rows, 0.1, np.float32)) if kind == "e4m3" else 0
        return Weight(self.random(rows * columns, kind), rows, columns, kind, scales=scales, group=columns)

    def inputs(self, sequences: int, first: int, rows: int, pages: int) -> StepInputs:
        """Return inputs of equal sequences on shuffled pages."""
        each = -(-(first + rows) // PAGE_TOKENS)
        table = np.random.default_rng(0).permutation(pages)[: sequences * each].reshape(sequences, each).astype(np.int32)
        positions = np.tile(np.arange(first, first + rows, dtype=np.int32), sequences)
        owner = np.repeat(np.arange(sequences, dtype=np.int32), rows)
        slots = table[owner, positions // PAGE_TOKENS] * PAGE_TOKENS + positions % PAGE_TOKENS
        firsts = np.arange(0, sequences * rows + 1, rows, dtype=np.int32)
        arrays = [np.zeros_like(positions), positions, slots.astype(np.int32), positions, owner, firsts, table]
        return StepInputs(sequences * rows, sequences, *[self.put(array) for array in arrays], each)

    def layer(self, pages: int, kv_heads: int, head_dim: int, kind: str = "bf16") -> KvLayer:
        """Return random pages."""
        count = pages * kv_heads * PAGE_TOKENS
        keys, values = self.random(count * head_dim, kind), self.random(count * head_dim, kind)
        scales = [self.put(np.full(count, 0.1, np.float32)) for _ in range(2)] if kind == "e4m3" else [0, 0]
        return KvLayer(keys, values, kind, kind, kv_heads, head_dim, pages, *scales)

    def plan(self, inputs: StepInputs, shape: tuple[int, int, int], length: int, only_decode: bool) -> AttentionPlan:
        """Return room for the work lists."""
        size = PlanSize(inputs.rows, inputs.sequences, length, *shape)
        plan, scratch = cupy.zeros(size.plan_bytes, np.uint8), cupy.zeros(size.scratch_bytes, np.uint8)
        self.kept += [plan, scratch]
        result = AttentionPlan(plan.data.ptr, scratch.data.ptr, size, 0, only_decode)
        cupy.cuda.Device().synchronize()
        self.ops.attention_plan(inputs, result)
        self.stream.synchronize()
        return result

    def time(self, enqueue: Callable[[], None], repeats: int = 15) -> float:
        """Capture a graph and return the median microseconds of a replay."""
        cupy.cuda.Device().synchronize()
        enqueue()  # compiles
        with self.stream:
            self.stream.begin_capture()
            enqueue()
            graph = self.stream.end_capture()
        times = []
        for index in range(repeats + 3):
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record(self.stream)
            graph.launch(self.stream)
            end.record(self.stream)
            end.synchronize()
            if index >= 3:
                times.append(cupy.cuda.get_elapsed_time(begin, end) * 1000)
        return statistics.median(times)

    def release(self) -> None:
        """Give back what the last measurement used."""
        self.stream.synchronize()
        self.kept.clear()
        cupy.get_default_memory_pool().free_all_blocks()


def over(operation: Callable[..., None], cases: list[tuple[Any, ...]]) -> Callable[[], None]:
    """Return a function that enqueues an operation once for each case."""

    def enqueue() -> None:
        for case in cases:
            operation(*case)

    return enqueue


def reading_rate(bench: Bench) -> float:
    """Return the bytes per second of reading alone: a long product with one row, whose weights are all it reads."""
    source, output, weight = bench.rows(1, 8192), bench.rows(1, 1 << 18), bench.weight(1 << 18, 8192)
    microseconds = bench.time(lambda: bench.ops.linear(source, output, weight))
    bench.release()
    return (1 << 18) * 8192 * 2 / microseconds * 1e6


def decode(bench: Bench, rate: float) -> Iterator[dict[str, Any]]:
    """All kernels of a decode step of a dense model, but for the embedding, with a context of 256 tokens."""
    for shape in SHAPES:
        for kind in bench.kinds:
            for rows in (1, 8, 16):
                measured = decode_step(bench, shape, kind, rows, rate)
                yield {"part": "decode", "shape": shape.name, "weights": kind, "rows": rows, **measured}
                bench.release()


def decode_step(bench: Bench, shape: Shape, kind: str, rows: int, rate: float) -> dict[str, Any]:
    """Measure one shape and batch."""
    ops, dim = bench.ops, shape.head_dim
    all_heads = shape.heads + 2 * shape.kv_heads
    context, pages = 256, rows * 16 + 16
    weights = [
        (
            bench.weight(all_heads * dim, shape.hidden, kind),
            bench.weight(shape.hidden, shape.heads * dim, kind),
            bench.weight(2 * shape.width, shape.hidden, kind),
            bench.weight(shape.hidden, shape.width, kind),
            bench.layer(pages, shape.kv_heads, dim),
        )
        for _ in range(shape.layers)
    ]
    head = bench.weight(shape.vocabulary, shape.hidden, "int8" if kind.startswith("int") else "bf16")
    norm = bench.random(shape.hidden, "f32")
    hidden, qkv, attended = (bench.rows(rows, width) for width in (shape.hidden, all_heads * dim, shape.heads * dim))
    inner, both, normed = (bench.rows(rows, width) for width in (shape.width, 2 * shape.width, shape.hidden))
    logits = bench.rows(rows, shape.vocabulary, "f32")
    chosen, scratch = bench.put(np.zeros(rows, np.int32)), bench.put(np.zeros(rows * 16, np.uint8))
    table = RopeTable(bench.random(context * dim, "f32"), dim // 2)
    inputs = bench.inputs(rows, context - 1, 1, pages)
    plan = bench.plan(inputs, (shape.heads, shape.kv_heads, dim), context, only_decode=True)

    def step() -> None:
        ops.attention_plan(inputs, plan)
        for first, second, third, fourth, layer in weights:
            ops.qkv(inputs, hidden, qkv, first, layer, shape.heads, table, norm, 1e-5, normed)
            ops.attend(inputs, plan, qkv.part(0, shape.heads * dim), attended, layer, dim**-0.5)
            ops.linear_add(attended, hidden, second)
            ops.norm_gated_add(hidden, inner, hidden, third, fourth, "silu", norm, 1e-5, 1.0, normed, both)
        ops.norm_linear(hidden, logits, head, norm, 1e-5, normed)
        ops.argmax(logits, chosen, scratch)

    microseconds = bench.time(step)
    parts = [weight for group in weights for weight in group[:4]]
    read = sum(weight_bytes(weight) for weight in [*parts, head])
    read += rows * context * shape.kv_heads * dim * 4 * shape.layers
    return {
        "microseconds": microseconds,
        "tokens_per_second": rows / microseconds * 1e6,
        "bytes": read,
        "share": read / microseconds * 1e6 / rate,
    }


def weight_bytes(weight: Weight) -> int:
    """Return the bytes that a product reads of a weight."""
    scales = weight.rows * weight.columns // weight.group * 2 if weight.is_packed else 0
    return weight.rows * weight.row_bytes + scales


def linear(bench: Bench, rate: float) -> Iterator[dict[str, Any]]:
    """Products with each matrix of a layer, over as many copies as outgrow the caches."""
    cases = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (3072, 2048), (2048, 2048), (2048, 8192)]
    for outputs, columns in cases:
        for kind in bench.kinds:
            for rows in (1, 8, 16, 64, 2048):
                weights = [bench.weight(outputs, columns, kind)]
                size = weight_bytes(weights[0])
                weights += [bench.weight(outputs, columns, kind) for _ in range(max(4, BYTES_OF_ROTATION // size))]
                source, output = bench.rows(rows, columns), bench.rows(rows, outputs)
                each = bench.time(over(bench.ops.linear, [(source, output, weight) for weight in weights])) / len(weights)
                teraflops = 2 * rows * outputs * columns / each / 1e6
                measured = {"microseconds": each, "share": size / each * 1e6 / rate, "teraflops": teraflops}
                yield {"part": "linear", "outputs": outputs, "columns": columns, "weights": kind, "rows": rows, **measured}
                bench.release()


def small(bench: Bench, rate: float) -> Iterator[dict[str, Any]]:
    """What one kernel adds to a chain of kernels at batch 1: 64 launches of each, one after the other."""
    del rate
    ops, hidden, more = bench.ops, bench.rows(1, 4096), bench.rows(1, 4096)
    qkv, output, logits = bench.rows(1, 6144), bench.rows(1, 4096), bench.rows(1, 128256, "f32")
    norm, table = bench.random(4096, "f32"), RopeTable(bench.random(8192 * 128, "f32"), 64)
    chosen, scratch = bench.put(np.zeros(1, np.int32)), bench.put(np.zeros(16, np.uint8))
    cases: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
        "add": (ops.add, (hidden, more)),
        "norm": (ops.norm, (hidden, output, "rms", 1e-5, norm)),
        "add_norm": (ops.add_norm, (hidden, more, 1.0, output, "rms", 1e-5, norm)),
        "argmax": (ops.argmax, (logits, chosen, scratch)),
    }
    for context in (16, 128, 256, 1024, 4096):
        layer, inputs = bench.layer(512, 8, 128), bench.inputs(1, context - 1, 1, 512)
        plan = bench.plan(inputs, (32, 8, 128), context, only_decode=True)
        cases[f"rope_write_kv {context}"] = (ops.rope_write_kv, (inputs, qkv, layer, 32, table))
        cases[f"attend {context}"] = (ops.attend, (inputs, plan, qkv.part(0, 4096), output, layer, 0.1))
    for name, (operation, arguments) in cases.items():
        yield {"part": "small", "operation": name, "microseconds": bench.time(over(operation, [arguments] * 64)) / 64}
    bench.release()


def attention(bench: Bench, rate: float) -> Iterator[dict[str, Any]]:
    """Decode attention, 32 query heads on 8 key/value heads of 128."""
    for sequences, context in ((64, 4096), (256, 1024), (8, 8192), (1, 32768), (1, 4096), (64, 512), (1, 256)):
        for kind in ("bf16", "e4m3"):
            pages = sequences * context // PAGE_TOKENS
            size = sequences * context * 8 * 128 * 2 * ELEMENT_BYTES[kind]
            layers = [bench.layer(pages, 8, 128, kind) for _ in range(max(1, min(32, BYTES_OF_ROTATION // size)))]
            inputs = bench.inputs(sequences, context - 1, 1, pages)
            queries, output = bench.rows(sequences, 4096), bench.rows(sequences, 4096)
            plan = bench.plan(inputs, (32, 8, 128), context, only_decode=True)
            cases = [(inputs, plan, queries, output, layer, 128**-0.5) for layer in layers]
            each = bench.time(over(bench.ops.attend, cases)) / len(layers)
            measured = {"microseconds": each, "terabytes_per_second": size / each / 1e6, "share": size / each * 1e6 / rate}
            yield {"part": "attention", "sequences": sequences, "context": context, "keys_and_values": kind, **measured}
            bench.release()


def prefill(bench: Bench, rate: float) -> Iterator[dict[str, Any]]:
    """Prefill attention of whole prompts, 32 query heads on 8 key/value heads of 128."""
    del rate
    for sequences, tokens in ((1, 2048), (1, 16384), (16, 1024)):
        for kind in ("bf16", "e4m3"):
            pages, rows = sequences * tokens // PAGE_TOKENS, sequences * tokens
            layer, inputs = bench.layer(pages, 8, 128, kind), bench.inputs(sequences, 0, tokens, pages)
            queries, output = bench.rows(rows, 4096), bench.rows(rows, 4096)
            plan = bench.plan(inputs, (32, 8, 128), tokens, only_decode=False)

            each = bench.time(over(bench.ops.attend, [(inputs, plan, queries, output, layer, 128**-0.5)]))
            operations = 4 * sequences * 32 * 128 * tokens * (tokens + 1) / 2
            measured = {"microseconds": each, "teraflops": operations / each / 1e6}
            yield {"part": "prefill", "sequences": sequences, "tokens": tokens, "keys_and_values": kind, **measured}
            bench.release()


def experts(bench: Bench, rate: float) -> Iterator[dict[str, Any]]:
    """A layer's experts, chosen at random; the bytes are those of the experts that some row chose."""
    for name, count, used, hidden, width in (("Mixtral", 8, 2, 4096, 14336), ("Qwen3 30B", 128, 8, 2048, 768)):
        for kind in [kind for kind in bench.kinds if kind != "e4m3"]:
            gate_up, down = bench.weight(count * 2 * width, hidden, kind), bench.weight(count * hidden, width, kind)
            size = weight_bytes(gate_up) + weight_bytes(down)
            gate_up, down = replace(gate_up, rows=2 * width, experts=count), replace(down, rows=hidden, experts=count)
            dice = np.random.default_rng(0)
            for rows in (1, 2, 8, 32, 64, 256, 2048):
                chosen = np.stack([np.sort(dice.permutation(count)[:used]) for _ in range(rows)]).astype(np.int32)
                routes = Routes(bench.put(chosen), bench.put(np.full((rows, used), 0.5, np.float32)), used)
                sizes = (count * rows * 4, count * 4, rows * used * hidden * 2)
                memory = ExpertMemory(*(bench.put(np.zeros(n, np.uint8)) for n in sizes))
                source, output, inner = bench.rows(rows, hidden), bench.rows(rows, hidden), bench.rows(rows * used, width)
                case = (source, output, routes, gate_up, down, "silu", inner, memory)
                each = bench.time(over(bench.ops.experts, [case] * 4)) / 4
                read, operations = size * len(np.unique(chosen)) / count, 6 * rows * used * hidden * width
                measured = {"microseconds": each, "share": read / each * 1e6 / rate, "teraflops": operations / each / 1e6}
                yield {"part": "experts", "shape": name, "weights": kind, "rows": rows, **measured}
            bench.release()


PARTS = {"decode": decode, "linear": linear, "experts": experts, "small": small, "attention": attention, "prefill": prefill}


def main() -> None:
    """Measure, print a line each, and write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--weights", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    bench = Bench(options.weights)
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    rate = reading_rate(bench)
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "device": properties["name"].decode(),
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "reading_bytes_per_second": rate,
        "measurements": [],
    }
    print(f"{result['device']}: reads {rate / 1e12:.2f} TB/s", flush=True)
    for name in options.only:
        for measured in PARTS[name](bench, rate):
            result["measurements"].append(measured)
            print(" ".join(f"{k}={round(v, 3) if isinstance(v, float) else v}" for k, v in measured.items()), flush=True)
            if options.json:
                options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
