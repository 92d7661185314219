"""What verifying trees of drafts gains over chains: tokens of a step, and tokens per second.

    python benches/draft_tree.py [--model MODEL] [--device cuda] [--text FILE] [--tokens 128] [--rounds 3] [--temperatures 0 0.8]
        [--only ngram draft_model] [--out FILE.json]

Plain decoding, chains and trees of several sizes (`num_speculative_tokens`, `num_draft_tokens`) write on from the same prompts in
turn: stories, and with `--text` (plain, or ending in .xz) pieces of 2,400 letters of it. On a CPU, what they write is checked to
be the same, token for token. Seconds are from the first token to the last, the best of `--rounds`. Kept in
`benches/results/draft-tree-*.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
from pathlib import Path
from typing import Any

from engine import TEXTS
from record import RESULTS, origin, save

from infer import LLM, SamplingParams

PIECES, LETTERS, APART = 6, 2400, 100_000
SIZES = {"ngram": ((4, None), (4, 8), (4, 16)), "draft_model": ((2, None), (2, 4), (2, 6), (3, None), (3, 6), (3, 9))}
COUNTERS = ("generated_tokens", "decode_steps", "drafted_tokens", "accepted_tokens", "branch_tokens", "copied_pages")


def prompts(path: Path | None) -> dict[str, list[str]]:
    """Texts to write on from."""
    found = {"stories": TEXTS["stories"]}
    if path is not None:
        text = (lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()).decode()
        found[path.name] = [text[at : at + LETTERS] for at in range(APART, (PIECES + 1) * APART, APART)]
    return found


def configs(methods: list[str]) -> list[dict[str, Any] | None]:
    """None, then each `speculative_config`."""
    every: list[dict[str, Any] | None] = [None]
    for method in methods:
        for chain, tree in SIZES[method]:
            config: dict[str, Any] = {"method": method, "num_speculative_tokens": chain}
            every.append(config if tree is None else {**config, "num_draft_tokens": tree})
    return every


def measure(llms: list[LLM], texts: list[str], params: SamplingParams, rounds: int, exact: bool) -> list[dict[str, Any]]:
    """Tokens per step and second of each."""
    seconds, before = [0.0] * len(llms), [llm.metrics() for llm in llms]
    for text in texts:
        times: list[list[float]] = [[] for _ in llms]
        expected: list[int] | None = None
        for _ in range(rounds):
            for own, llm in zip(times, llms, strict=True):
                output = llm.generate(text, params, use_tqdm=False)[0]
                tokens = list(output.outputs[0].token_ids)
                expected = tokens if expected is None or not exact else expected
                assert tokens == expected, "drafts changed what was written"
                assert output.metrics.total_time is not None and output.metrics.time_to_first_token is not None
                own.append(output.metrics.total_time - output.metrics.time_to_first_token)
        seconds = [total + min(own) for total, own in zip(seconds, times, strict=True)]
    rows = []
    for llm, first, took in zip(llms, before, seconds, strict=True):
        after = llm.metrics()
        counts = {name: after[name] - first[name] for name in COUNTERS}
        steps = counts["decode_steps"]
        per_second = len(texts) * ((params.max_tokens or 1) - 1) / took
        rows.append({"tokens_per_step": counts["generated_tokens"] / steps, "tokens_per_second": per_second, **counts})
    return rows


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description="What trees of drafts gain over chains.")
    parser.add_argument("--model", default=None, help="as for LLM; the bundled model unless said")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.0, 0.8])
    parser.add_argument("--only", nargs="*", default=list(SIZES))
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    options: dict[str, Any] = {"threads": arguments.threads}
    if arguments.device != "cpu":
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 1 << 28}
        options = {"device": arguments.device, **sizes}
    every, found = configs(arguments.only), []
    with contextlib.ExitStack() as stack:
        llms = [stack.enter_context(LLM(arguments.model, speculative_config=config, **options)) for config in every]
        for temperature in arguments.temperatures:
            params = SamplingParams(max_tokens=arguments.tokens, temperature=temperature, seed=5, ignore_eos=True)
            for name, texts in prompts(arguments.text).items():
                rows = measure(llms, texts, params, arguments.rounds, arguments.device == "cpu")
                for config, row in zip(every, rows, strict=True):
                    ratio = row["tokens_per_second"] / rows[0]["tokens_per_second"]
                    found.append({"text": name, "temperature": temperature, "config": config, "ratio": ratio, **row})
                    size = "plain" if config is None else " ".join(str(value) for value in config.values())
                    print(
                        f"{name} {temperature} {size}: {row['tokens_per_step']:.3f} tokens a step, "
                        f"{row['tokens_per_second']:.0f} tok/s, {ratio:.2f}x",
                        flush=True,
                    )
    result = {"device": arguments.device, "tokens": arguments.tokens, "rounds": arguments.rounds, "results": found, **origin()}
    if arguments.out is None:
        print(save(RESULTS, f"draft-tree-{arguments.device}", result))
    else:
        arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
