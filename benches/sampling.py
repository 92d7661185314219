"""What sampling costs a batch: tokens per second of as many sequences at once, by their sampling parameters.

    python benches/sampling.py --model MODEL [--batch 16] [--threads 2] [--tokens 24] [--rounds 3] [--beside DIR]

Prompts are token ids. With `--beside`, another build of the package, in that folder, takes turns, each in processes of its
own. The best of `--rounds`. Kept in `benches/results/sampling-*.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from record import RESULTS, origin, save

from infer import LLM, SamplingParams

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k and top_p": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "penalty and top_p": {"temperature": 0.8, "top_p": 0.95, "presence_penalty": 0.5},
    "greedy, 5 logprobs": {"temperature": 0.0, "logprobs": 5},
}


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second by kind, of one round."""
    prompts = [{"prompt_token_ids": [(7 * row + place) % 1000 for place in range(32)]} for row in range(arguments.batch)]
    with LLM(arguments.model, threads=arguments.threads, max_num_seqs=arguments.batch) as llm:
        found = {}
        for name, kind in {"warm": {}, **KINDS}.items():
            params = SamplingParams(max_tokens=arguments.tokens, ignore_eos=True, detokenize=False, seed=1, **kind)
            begin = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            found[name] = arguments.batch * arguments.tokens / (time.perf_counter() - begin)
    return {name: found[name] for name in KINDS}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description="What sampling costs a batch.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", default=None, help="a folder with another build of the package")
    parser.add_argument("--once", action="store_true", help="one round, printed as JSON")
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(measure(arguments)))
        return
    builds = {"this": None} if arguments.beside is None else {"this": None, "beside": arguments.beside}
    best: dict[str, dict[str, float]] = {name: {} for name in builds}
    for _ in range(arguments.rounds):
        for name, folder in builds.items():
            path = os.environ.get("PYTHONPATH", "")
            environment = {**os.environ, "PYTHONPATH": path if folder is None else os.pathsep.join([folder, path])}
            command = [sys.executable, __file__, *sys.argv[1:], "--once"]
            output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
            for kind, value in json.loads(output).items():
                best[name][kind] = max(best[name].get(kind, 0.0), value)
    for kind in KINDS:
        print(f"{kind}: " + ", ".join(f"{name} {values[kind]:.0f} tok/s" for name, values in best.items()))
    settings = {name: getattr(arguments, name) for name in ("model", "batch", "threads", "tokens", "rounds", "beside")}
    print(save(RESULTS, "sampling", {**settings, "tokens_per_second": best, **origin()}))


if __name__ == "__main__":
    main()
