"""`infer bench`: how fast a model reads (prefill) and writes (decode) on this machine.

The two are measured apart, as llama-bench does. Prefill: all prompts at once, until the last of them has its first token.
Decode: from the first generated token to the last, after prompts of `--context` tokens: one, unless asked otherwise. Longer
ones are computed once and then come from the prefix cache, which is off otherwise. Prompts are random token ids, other ones
in every run of prefill, so a model without a tokenizer can be measured and every token that counts is computed.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infer import LLM, InferError, SamplingParams, __version__, system_info
from infer.cli.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    KvCacheDtypeOption,
    ModelOption,
    QuantizationOption,
    ThreadsOption,
    kv_types,
    print_json,
)

MOST_REST = 10.0  # seconds
QUIET_SPANS = 3  # one after the other, so that waiting for a disk is not taken for rest

if TYPE_CHECKING:
    from collections.abc import Callable

    from infer import RequestMetrics


def bench(
    model: ModelOption = None,
    threads: ThreadsOption = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Length of each prompt; 512 or what fits.")] = None,
    generate_tokens: Annotated[int | None, typer.Option(min=2, help="Length of each completion; 128 or what fits.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens that each completion of the decode test follows.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of each kind, after two to warm up; the median counts.")] = 3,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure prefill and decode in tokens per second."""
    types = kv_types(kv_cache_dtype)
    with LLM(
        model,
        threads=threads,
        device=device,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=types,
        max_num_seqs=batch,
        max_num_batched_tokens=max(512, batch),
        enable_prefix_caching=context > 1,
    ) as llm:
        room = llm.max_model_len
        prompt_length = _length(llm, "--prompt-tokens", prompt_tokens, 512, room - 1)
        context = _length(llm, "--context", context, 1, room - 2)
        completion_length = _length(llm, "--generate-tokens", generate_tokens, 128, room - context)
        prefill = _repeat(repeat, lambda run: _prefill(llm, prompt_length, batch, run))
        decode = _repeat(repeat, lambda _: _decode(llm, context, completion_length, batch))
        report = {
            "infer": __version__,
            "model": llm.info.path,
            "architecture": llm.info.architecture,
            "quantization": llm.info.quantization,
            "parameters": llm.info.parameters,
            "weight_bytes": llm.info.weight_bytes,
            "isa": system_info()["isa"],
            "threads": llm.threads,
            "device": device,
            "dtype": dtype,
            "kv_cache_dtype": types,
            "kv_bytes_per_token": llm.info.kv_bytes_per_token,
            "prompt_tokens": prompt_length,
            "generate_tokens": completion_length,
            "context": context,
            "batch": batch,
            "repeat": repeat,
            "prefill_tokens_per_second": statistics.median(prefill),
            "decode_tokens_per_second": statistics.median(decode),
            "prefill_runs": prefill,
            "decode_runs": decode,
        }
    if as_json:
        print_json(report)
    else:
        _table(report)


def _length(llm: LLM, option: str, asked: int | None, usual: int, room: int) -> int:
    """Return a number of tokens, if there is room for so many beside the others of its test."""
    if asked is None:
        return min(usual, room)
    if asked > room:
        raise InferError(f"{option} must be at most {room} for a model of {llm.max_model_len} tokens, got {asked}")
    return asked


def _rest() -> None:
    """Wait until this process has nothing to do, as when all weights are packed, or for a while."""
    begin, quiet = time.monotonic(), 0
    while quiet < QUIET_SPANS and time.monotonic() - begin < MOST_REST:
        used = time.process_time()
        time.sleep(0.05)
        quiet = quiet + 1 if time.process_time() - used < 0.005 else 0


def _repeat(times: int, run: Callable[[int], float]) -> list[float]:
    run(0)  # pages touched, threads awake, contexts computed
    _rest()
    run(0)
    return [run(number) for number in range(1, times + 1)]


def _prefill(llm: LLM, prompt_tokens: int, batch: int, seed: int) -> float:
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
    done = _run(llm, prompt_tokens, batch, params, seed)
    return prompt_tokens * batch / max(metrics.time_to_first_token or 0.0 for metrics in done)


def _decode(llm: LLM, context: int, generate_tokens: int, batch: int) -> float:
    params = SamplingParams(max_tokens=generate_tokens, temperature=0, ignore_eos=True, detokenize=False)
    done = _run(llm, context, batch, params, 0)
    first = min(metrics.time_to_first_token or 0.0 for metrics in done)
    last = max(metrics.total_time or 0.0 for metrics in done)
    return (generate_tokens - 1) * batch / (last - first)


def _run(llm: LLM, prompt_tokens: int, batch: int, params: SamplingParams, seed: int) -> list[RequestMetrics]:
    rng = random.Random(seed)
    vocabulary = llm.info.vocabulary_size
    prompts = [[rng.randrange(vocabulary) for _ in range(prompt_tokens)] for _ in range(batch)]
    return [output.metrics for output in llm.generate(prompts, params, use_tqdm=False)]


def _table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    size = report["weight_bytes"] / 2**20
    print(f"{report['model']}: {report['architecture']}, {report['quantization']}, {size:,.1f} MiB")
    print(f"infer {report['infer']}, {report['isa']}, {report['threads']} threads")
    table = Table()
    for name in ("test", "tokens", "batch"):
        table.add_column(name, justify="left" if name == "test" else "right")
    table.add_column("tokens/s", justify="right", style="bold")
    table.add_column("spread", justify="right")
    for test, tokens in (("prefill", "prompt_tokens"), ("decode", "generate_tokens")):
        runs = report[f"{test}_runs"]
        table.add_row(
            test,
            str(report[tokens]),
            str(report["batch"]),
            f"{report[f'{test}_tokens_per_second']:.1f}",
            f"{min(runs):.1f} to {max(runs):.1f}",
        )
    Console(highlight=False).print(table)
