"""`infer bench` and llama.cpp's `llama-bench` in turn on one GGUF file, with the same threads; the result is kept as data.

    python benches/compare.py --llama-bench PATH --model FILE.gguf [--model ...] [--threads 2] [--rounds 3]

Both measure prefill (a prompt of random tokens) and decode (tokens after an almost empty context) apart, and each run of a
program reports the median of its repetitions. Programs alternate, so a machine that slows down slows both; of the rounds
the better one counts, for both alike, since noise on a shared machine only ever takes away. Each file's result is
written to ``benches/results/<model>-<date>.json`` with the commands, the commit and the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import RESULTS, first_line, origin, save

TESTS = ("prefill", "decode")


def run(command: list[str]) -> Any:
    """The JSON that a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(command)}\nended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout)


def infer_speed(command: list[str]) -> dict[str, float]:
    """Tokens per second of one `infer bench --json`."""
    report = run(command)
    return {test: float(report[f"{test}_tokens_per_second"]) for test in TESTS}


def llama_speed(command: list[str]) -> tuple[dict[str, float], str]:
    """Tokens per second of one `llama-bench -o json` (the median; its own average is the mean), and its commit."""
    rows = run(command)
    speeds = {"decode" if row["n_gen"] else "prefill": statistics.median(row["samples_ts"]) for row in rows}
    return speeds, rows[0]["build_commit"]


def compare(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Alternate the two programs on one file; commands, every run, the better of each and the ratio."""
    sizes = [str(arguments.threads), str(arguments.prompt_tokens), str(arguments.generate_tokens), str(arguments.repeat)]
    threads, prompt, generate, repeat = sizes
    infer = [*shlex.split(arguments.infer), "bench", "--model", str(model), "--threads", threads, "--repeat", repeat]
    infer += ["--prompt-tokens", prompt, "--generate-tokens", generate, "--json"]
    llama = [str(arguments.llama_bench), "-m", str(model), "-t", threads, "-r", repeat, "-p", prompt, "-n", generate]
    llama += ["-o", "json"]
    runs: dict[str, list[dict[str, float]]] = {"infer": [], "llama.cpp": []}
    load = []
    llama_commit = ""
    for number in range(arguments.rounds):
        load.append(os.getloadavg()[0])
        if load[0] > 0.5:  # what came before this run; the runs themselves load the machine
            print(f"the machine is busy (load {load[0]:.1f}): threads that spin suffer most", file=sys.stderr)
        runs["infer"].append(infer_speed(infer))
        speeds, llama_commit = llama_speed(llama)
        runs["llama.cpp"].append(speeds)
        print(f"{model.name} round {number + 1}: infer {runs['infer'][-1]}, llama.cpp {runs['llama.cpp'][-1]}", file=sys.stderr)
    best = {name: {test: max(each[test] for each in those) for test in TESTS} for name, those in runs.items()}
    return {
        "model": model.name,
        "model_bytes": model.stat().st_size,
        "unit": "tokens per second",
        "best": best,
        "ratio": {test: best["infer"][test] / best["llama.cpp"][test] for test in TESTS},
        "runs": runs,
        "load_before": load,
        "commands": {"infer": shlex.join(infer), "llama.cpp": shlex.join(llama)},
        "infer_version": first_line([*shlex.split(arguments.infer), "--version"]),
        "llama.cpp_commit": llama_commit,
        **origin(),
    }


def main() -> None:
    """Compare on every file named, print a table and keep the results."""
    parser = argparse.ArgumentParser(description="infer beside llama.cpp on the same GGUF file.")
    parser.add_argument("--model", type=Path, action="append", required=True, help="a GGUF file; may be repeated")
    parser.add_argument("--llama-bench", type=Path, required=True, help="the llama-bench binary")
    parser.add_argument("--infer", default=f"{sys.executable} -m infer", help="how to start infer")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--generate-tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3, help="repetitions inside one run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program; the better counts")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    for model in arguments.model:
        result = compare(arguments, model)
        save(arguments.results, model.stem, result)
        for test in TESTS:
            ours, theirs = result["best"]["infer"][test], result["best"]["llama.cpp"][test]
            print(f"{model.name:32} {test:8} infer {ours:9.1f}  llama.cpp {theirs:9.1f}  ratio {result['ratio'][test]:.2f}")


if __name__ == "__main__":
    main()
