"""Speed on one NVIDIA GPU, with random weights of the Llama 1B, 8B and 70B shapes.

    python benches/gpu.py [--shapes llama-1b llama-8b llama-70b] [--folder DIR] [--rounds 3] [--eager] [--deterministic]
        [--dummy] [--quantization fp8|int8|int4|int4-g128] [--kv-cache-dtype TYPE] [--busy] [--out FILE.json]

batch 1:        prompt of 128 tokens, 256 generated; time per token is (T(256) - T(1)) / 255
64 concurrent:  64 prompts of 512 tokens, 256 generated each; tokens generated over the time of the whole call
256 requests:   the same with 256 prompts, all at once
first token:    time of a call that generates one token from a prompt of 2,048
start:          from a path to a model that is ready; and to its first token

With `--busy` batch 1 alone: first by itself, then beside a thread that computes in Python all the time.

Prompts are fresh random token ids, decoding is greedy and ignores the end of text, nothing is shared between prompts; medians of
`--rounds`, after calls of the same load in which kernels are compiled, products timed and most graphs captured. Joules come from
the GPU's own counter, over everything it did in the call. Weights are random, which changes nothing but the text; of shapes too
large to be written, and with `--dummy` of all, they are made on the GPU (`load_format="dummy"`), so that "start" reads nothing.
Results go to `benches/results/gpu-*.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from busy import busy_thread
from record import RESULTS, origin, save

from infer import LLM, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY = 128256
# hidden, layers, heads, key/value heads, inner width, width of a head, tied head
SHAPES = {
    "llama-tiny": (256, 2, 4, 2, 512, 64, True),
    "llama-1b": (2048, 16, 32, 8, 8192, 64, True),
    "llama-8b": (4096, 32, 32, 8, 14336, 128, False),
    "llama-70b": (8192, 80, 64, 8, 28672, 128, False),
}
UNWRITTEN = ("llama-70b",)  # of 141 GB
SCREEN_BYTES = 1 + 2 / 128
"""Of a weight of a bfloat16 head, which greedy steps of few rows read as a copy in 8 bits (cuda/screen.cu)."""
WEIGHT_BYTES = {
    None: (2, SCREEN_BYTES),
    "fp8": (1, SCREEN_BYTES),
    "int8": (1.0625, 1.0625),
    "int4": (0.5625, 1.0625),
    "int4-g128": (0.515625, 1.0625),
}
"""Bytes of a weight, scales included: of the layers' matrices, and of the head."""
POOL = 1 << 24  # values that weights are cut from


def config(shape: str) -> dict[str, Any]:
    """A Llama 3 configuration."""
    hidden, layers, heads, kv_heads, inner, head_dim, tied = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "head_dim": head_dim,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    }


def tensors(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's weights."""
    hidden, layers, heads, kv_heads, inner, head_dim, tied = SHAPES[shape]
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (VOCABULARY, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (heads * head_dim, hidden)
        yield prefix + "self_attn.k_proj.weight", (kv_heads * head_dim, hidden)
        yield prefix + "self_attn.v_proj.weight", (kv_heads * head_dim, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, heads * head_dim)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)


def write_config(folder: Path, shape: str) -> None:
    """Write a folder's `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shape)), encoding="utf-8")


def write_model(folder: Path, shape: str) -> None:
    """Write a folder in Hugging Face layout; weights in bfloat16, pieces of one pool of normal numbers, norms of ones."""
    write_config(folder, shape)
    values = np.random.default_rng(1).standard_normal(POOL, np.float32) * np.float32(0.02)
    pool = np.concatenate([(values.view(np.uint32) >> 16).astype(np.uint16)] * 2)
    header, end = {}, 0
    for name, sizes in tensors(shape):
        start, end = end, end + 2 * int(np.prod(sizes))
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    dice = random.Random(1)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, sizes in tensors(shape):
            left = int(np.prod(sizes))
            if name.endswith("norm.weight"):
                file.write(np.full(left, 0x3F80, np.uint16).tobytes())
                continue
            while left:
                first, count = dice.randrange(POOL), min(left, POOL)
                file.write(pool[first : first + count].data)
                left -= count


def step_bytes(shape: str, context: int, quantization: str | None, deterministic: bool = False) -> float:
    """Bytes that a decoding step of one sequence must read: weights, the head and keys and values of its context (2 each)."""
    _, layers, _, kv_heads, _, head_dim, tied = SHAPES[shape]
    sizes = {name: int(np.prod(sizes)) for name, sizes in tensors(shape) if tied or "embed" not in name}
    layer, head = WEIGHT_BYTES[quantization]
    if deterministic and head == SCREEN_BYTES:
        head = 2  # no screen then
    weights = sum(size * (layer if "layers" in name else head) for name, size in sizes.items())
    return weights + 2 * context * layers * 2 * kv_heads * head_dim


class Energy:
    """The GPU's counter of joules, if the driver's library can be asked."""

    def __init__(self) -> None:
        self._read = None
        with contextlib.suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            self._read = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000

    def joules(self) -> float:
        """Joules since the driver was loaded; NaN where nobody counts."""
        return self._read() if self._read else float("nan")


def prompts(dice: random.Random, count: int, tokens: int) -> list[list[int]]:
    """Random token ids."""
    return [[dice.randrange(100, VOCABULARY - 300) for _ in range(tokens)] for _ in range(count)]


def timed(llm: LLM, energy: Energy, dice: random.Random, count: int, tokens: int, generated: int) -> tuple[float, float]:
    """Seconds and joules of one call."""
    work = [{"prompt_token_ids": prompt} for prompt in prompts(dice, count, tokens)]
    params = SamplingParams(max_tokens=generated, temperature=0.0, ignore_eos=True, detokenize=False)
    joules, start = energy.joules(), time.perf_counter()
    outputs = llm.generate(work, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == generated for output in outputs)
    return seconds, energy.joules() - joules


def measure(llm: LLM, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All loads on one model."""
    dice, energy = random.Random(7), Energy()

    def median(count: int, tokens: int, generated: int, times: int = arguments.rounds) -> tuple[float, float]:
        for _ in range(2):  # a size's first step compiles what it needs, the second is captured
            timed(llm, energy, dice, count, tokens, generated)
        runs = [timed(llm, energy, dice, count, tokens, generated) for _ in range(times)]
        return statistics.median(seconds for seconds, _ in runs), statistics.median(joules for _, joules in runs)

    one, _ = median(1, 128, 1)
    whole, joules = median(1, 128, 256)
    itl = (whole - one) / 255
    first, _ = median(1, 2048, 1)
    results: dict[str, Any] = {
        "batch_1": {
            "inter_token_latency_ms": itl * 1e3,
            "tokens_per_second": 1 / itl,
            "read_tb_per_second": step_bytes(shape, 256, arguments.quantization, arguments.deterministic) / itl / 1e12,
            "joules_per_token": joules / 256,
        },
        "first_token_2048_ms": first * 1e3,
    }
    for name, count in (("concurrent_64", 64), ("requests_256", 256)):
        seconds, joules = median(count, 512, 256)
        results[name] = {
            "output_tokens_per_second": count * 256 / seconds,
            "total_tokens_per_second": count * 768 / seconds,
            "joules_per_request": joules / count,
        }
    results["step_time"] = llm.metrics()["histograms"]["step_time"]
    return results


def measure_busy(llm: LLM, rounds: int) -> dict[str, Any]:
    """One sequence alone and beside a thread that computes in Python: tokens a second."""
    dice, energy = random.Random(7), Energy()
    found: dict[str, Any] = {}
    for _ in range(3):  # after which all sizes have their graph
        timed(llm, energy, dice, 1, 128, 256)
    for name, beside in (("alone", contextlib.nullcontext()), ("beside_a_busy_thread", busy_thread())):
        with beside:
            times = []
            for _ in range(rounds):
                one, whole = (timed(llm, energy, dice, 1, 128, count)[0] for count in (1, 256))
                times.append((whole - one) / 255)
        itl = statistics.median(times)
        found[name] = {"inter_token_latency_ms": itl * 1e3, "tokens_per_second": 1 / itl}
    return found


def run(shape: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write, load and measure one model."""
    dummy = arguments.dummy or shape in UNWRITTEN
    if dummy:
        write_config(folder, shape)
    elif not (folder / "model.safetensors").exists():
        write_model(folder, shape)
    start = time.perf_counter()
    options: dict[str, Any] = {"max_num_seqs": 256, "max_model_len": 4096, "enable_prefix_caching": False}
    options |= {"quantization": arguments.quantization, "kv_cache_dtype": arguments.kv_cache_dtype}
    options["deterministic"] = arguments.deterministic
    options["load_format"] = "dummy" if dummy else "auto"
    with LLM(folder, device="cuda", enforce_eager=arguments.eager, **options) as llm:
        ready = time.perf_counter()
        llm.generate([{"prompt_token_ids": [100, 200, 300]}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        answered = time.perf_counter()
        if arguments.busy:
            return measure_busy(llm, arguments.rounds)
        results = measure(llm, shape, arguments)
        results["start"] = {"ready_seconds": ready - start, "first_token_seconds": answered - start}
        results["kv_cache_tokens"] = llm._engine.kv_cache_tokens
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """The figures, a line per shape."""
    if any("alone" in found for found in results.values()):
        lines = ["shape        batch 1 tok/s   beside a busy thread"]
        for shape, found in results.items():
            alone, beside = (found[name]["tokens_per_second"] for name in ("alone", "beside_a_busy_thread"))
            lines.append(f"{shape:12} {alone:13.1f} {beside:22.1f}")
        return "\n".join(lines)
    lines = ["shape        batch 1 tok/s   TB/s   first token 2048 ms   64 concurrent tok/s   256 requests tok/s   ready s"]
    for shape, found in results.items():
        one, rest = found["batch_1"], (found["concurrent_64"], found["requests_256"])
        many = [f"{entry['output_tokens_per_second']:,.0f}" for entry in rest]
        lines.append(
            f"{shape:12} {one['tokens_per_second']:13.1f} {one['read_tb_per_second']:6.2f} {found['first_token_2048_ms']:21.1f} "
            f"{many[0]:>21} {many[1]:>20} {found['start']['ready_seconds']:9.1f}"
        )
    return "\n".join(lines)


def gpu_name() -> str:
    """What the GPU is called."""
    from cupy.cuda import runtime

    return str(runtime.getDeviceProperties(0)["name"].decode())


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-1b", "llama-8b"], choices=list(SHAPES))
    parser.add_argument("--folder", type=Path, help="where models are written; kept for the next time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantization", choices=[name for name in WEIGHT_BYTES if name], help="round weights while loading")
    parser.add_argument("--kv-cache-dtype", default="auto", help="type of keys and values")
    parser.add_argument("--dummy", action="store_true", help="write no weights, make them on the GPU")
    parser.add_argument("--eager", action="store_true", help="capture no graphs")
    parser.add_argument("--deterministic", action="store_true", help="what `LLM(deterministic=True)` costs")
    parser.add_argument("--busy", action="store_true", help="one sequence alone and beside a busy Python thread, nothing else")
    parser.add_argument("--out", type=Path, help="where results go instead of benches/results")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in arguments.shapes:
            results[shape] = run(shape, (arguments.folder or Path(scratch)) / shape, arguments)
            print(table(results), flush=True)
    report = {**origin(), "gpu": gpu_name(), "eager": arguments.eager, "quantization": arguments.quantization}
    report |= {"kv_cache_dtype": arguments.kv_cache_dtype, "deterministic": arguments.deterministic, "results": results}
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    else:
        save(RESULTS, "gpu-" + "-".join([*arguments.shapes, *["busy"] * arguments.busy]), report)


if __name__ == "__main__":
    main()
