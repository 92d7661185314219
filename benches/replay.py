"""Real load: a recorded trace of many users, scaled to this machine, on the bundled model; beside it the same on plain FIFO.

    python benches/replay.py TRACE [--requests 200] [--rate 2] [--token-scale 0.03] [--threads 2] [--rounds 2]

TRACE is Mooncake's JSON lines (`timestamp` in ms, `input_length`, `output_length`, `hash_ids` of 512-token blocks: who shares a
prefix with whom) or Azure's CSV (`TIMESTAMP,ContextTokens,GeneratedTokens`), either may end in `.xz`. Lengths are multiplied by
`--token-scale` and cut to what the model takes; times are stretched until `--rate` requests arrive per second on average, so the
gaps keep their shape. A block's tokens follow from its hash, so prefixes meet exactly where they met in the trace. Every request
belongs to one of eight users of uneven appetite (the first brings half of all requests, the second a quarter, ...).

The engine as it is runs in turn with itself without prefix cache and users (first in, first out); the better round of each
counts, by throughput. Kept in `benches/results/replay-*.json`, with the distributions as a plot beside it where matplotlib is
installed.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import datetime
import json
import lzma
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from record import RESULTS, origin, plot, save

from infer import LLM, SamplingParams

BLOCK = 512  # tokens behind one hash in Mooncake's traces
USERS = 8


@dataclass
class Entry:
    """One request of a trace, scaled."""

    arrival: float
    prompt: list[int]
    output_tokens: int
    user: str


@dataclass
class Served:
    """When a request's tokens came, in seconds since the replay began."""

    entry: Entry
    times: list[float] = field(default_factory=list)


def _open(path: Path) -> IO[str]:
    return lzma.open(path, "rt") if path.suffix == ".xz" else path.open()


def _rows(path: Path, count: int) -> list[tuple[float, int, int, list[int] | None]]:
    """The first requests of a trace: seconds, prompt tokens, output tokens, block hashes if it has them."""
    with _open(path) as lines:
        if ".jsonl" in path.name:
            records = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
            return [(r["timestamp"] / 1000, r["input_length"], r["output_length"], r["hash_ids"]) for r in records]
        found = []
        for record, _ in zip(csv.DictReader(lines), range(count), strict=False):
            moment = datetime.datetime.fromisoformat(record["TIMESTAMP"][:26]).timestamp()
            found.append((moment, int(record["ContextTokens"]), int(record["GeneratedTokens"]), None))
        return found


def entries(path: Path, arguments: argparse.Namespace, longest: int, vocabulary: int) -> list[Entry]:
    """The trace as requests to this model."""
    rows = _rows(path, arguments.requests)
    first, last = rows[0][0], rows[-1][0]
    stretch = len(rows) / arguments.rate / max(last - first, 1e-9)
    block = max(1, round(BLOCK * arguments.token_scale))
    dice = random.Random(1)
    users = [f"user-{number}" for number in range(USERS)]
    shares = [2.0 ** -(number + 1) for number in range(USERS)]
    found = []
    for number, (moment, prompt_tokens, output_tokens, hashes) in enumerate(rows):
        wanted = min(max(1, round(prompt_tokens * arguments.token_scale)), longest * 3 // 4)
        output = min(max(1, round(output_tokens * arguments.token_scale)), longest - wanted)
        prompt: list[int] = []
        for name in hashes or [f"alone {number}"]:
            tokens = random.Random(str(name))
            prompt += [tokens.randrange(4, vocabulary) for _ in range(block if hashes else wanted)]
        # A last block that is shorter in the trace is shorter here.
        prompt = (prompt + [4 + number % (vocabulary - 4)] * wanted)[:wanted]
        found.append(Entry((moment - first) * stretch, prompt, output, dice.choices(users, shares)[0]))
    return found


async def _serve(llm: LLM, entry: Entry, began: float, with_users: bool) -> Served:
    await asyncio.sleep(max(0.0, began + entry.arrival - time.perf_counter()))
    served = Served(entry)
    params = SamplingParams(max_tokens=entry.output_tokens, temperature=0.0, ignore_eos=True)
    options: dict[str, Any] = {"user": entry.user} if with_users else {}
    async for piece in llm.astream(entry.prompt, params, **options):
        served.times += [time.perf_counter() - began] * len(piece.token_ids)
    return served


async def _replay(llm: LLM, trace: list[Entry], with_users: bool) -> list[Served]:
    began = time.perf_counter() + 0.1
    return await asyncio.gather(*(_serve(llm, entry, began, with_users) for entry in trace))


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {
        name: ordered[min(len(ordered) - 1, int(part * len(ordered)))]
        for name, part in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
    }
    return {"mean": statistics.fmean(ordered), **at, "max": ordered[-1]}


def figures(served: list[Served], metrics: dict[str, Any]) -> dict[str, Any]:
    """What users felt, and what it cost."""
    first = [one.times[0] - one.entry.arrival for one in served]
    gaps = [late - soon for one in served for soon, late in zip(one.times, one.times[1:], strict=False)]
    users: dict[str, list[float]] = {}
    for one, waited in zip(served, first, strict=True):
        users.setdefault(one.entry.user, []).append(waited)
    means = {user: statistics.fmean(waits) for user, waits in sorted(users.items())}
    end = max(one.times[-1] for one in served)
    return {
        "seconds": end,
        "generated_tokens_per_second": sum(len(one.times) for one in served) / end,
        "all_tokens_per_second": sum(len(one.times) + len(one.entry.prompt) for one in served) / end,
        "time_to_first_token": _percentiles(first),
        "inter_token_latency": _percentiles(gaps or [0.0]),
        "cached_share_of_prompts": metrics["cached_tokens"] / metrics["prompt_tokens"],
        "preemptions": metrics["preemptions"],
        "mean_time_to_first_token_of_users": means,
        # What the appetite of the heaviest user costs all others.
        "others_time_to_first_token": _percentiles([wait for user in sorted(users)[1:] for wait in users[user]]),
        "times_to_first_token": first,
    }


def run(arguments: argparse.Namespace, trace: list[Entry], plain: bool) -> dict[str, Any]:
    """One replay in a fresh engine."""
    options: dict[str, Any] = {"threads": arguments.threads, "max_num_seqs": arguments.max_num_seqs}
    if arguments.kv_cache_memory_bytes:
        options["kv_cache_memory_bytes"] = arguments.kv_cache_memory_bytes
    with LLM(arguments.model, enable_prefix_caching=not plain, **options) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4))
        before = llm.metrics()
        served = asyncio.run(_replay(llm, trace, not plain))
        after = llm.metrics()
    counters = {name: value - before[name] for name, value in after.items() if isinstance(value, int)}
    return figures(served, counters)


def draw(axes: Any, results: dict[str, dict[str, Any]]) -> None:
    """How many requests had their first token after how long."""
    for name, result in results.items():
        waits = sorted(result["times_to_first_token"])
        axes.plot(waits, [(place + 1) / len(waits) for place in range(len(waits))], label=name)
    axes.set(xscale="log", xlabel="time to first token, seconds", ylabel="share of requests")
    axes.legend()


def main() -> None:
    """Replay both ways in turn, print a table and keep the result."""
    parser = argparse.ArgumentParser(description="A recorded trace on this engine, and on plain FIFO without a prefix cache.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--model", default=None, help="as for LLM; the bundled model unless said")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second on average")
    parser.add_argument("--token-scale", type=float, default=0.03, help="tokens here per token of the trace")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with LLM(arguments.model, threads=1) as llm:
        trace = entries(arguments.trace, arguments, llm.max_model_len, llm.info.vocabulary_size)
    runs: dict[str, list[dict[str, Any]]] = {"infer": [], "plain FIFO": []}
    for _ in range(arguments.rounds):
        for name in runs:
            runs[name].append(run(arguments, trace, plain=name != "infer"))
    best = {name: max(those, key=lambda one: one["generated_tokens_per_second"]) for name, those in runs.items()}
    result = {
        "trace": arguments.trace.name,
        "requests": len(trace),
        "prompt_tokens": sum(len(entry.prompt) for entry in trace),
        "output_tokens": sum(entry.output_tokens for entry in trace),
        "best": best,
        "runs": [
            {name: those[place]["generated_tokens_per_second"] for name, those in runs.items()}
            for place in range(arguments.rounds)
        ],
        **origin(),
    }
    path = save(RESULTS, f"replay-{arguments.trace.name.partition('.')[0]}", result)
    plot(path.with_suffix(".svg"), lambda axes: draw(axes, best))
    for name, one in best.items():
        first, gap, others = one["time_to_first_token"], one["inter_token_latency"], one["others_time_to_first_token"]
        print(
            f"{name:12} {one['generated_tokens_per_second']:7.1f} tok/s  TTFT p50 {first['p50']:.3f} p99 {first['p99']:.3f} s, "
            f"all but the heaviest user p50 {others['p50']:.3f} p99 {others['p99']:.3f} s  "
            f"ITL p50 {gap['p50'] * 1000:.1f} p99 {gap['p99'] * 1000:.1f} ms  cached {one['cached_share_of_prompts']:.0%}"
        )


if __name__ == "__main__":
    main()
