"""`infer` and llama.cpp in turn on one GGUF file, with the same threads; the result is kept as data, with a plot.

    python benches/compare.py --llama-cpp FOLDER --model FILE.gguf [--model ...] [--threads 2] [--rounds 2] [--only decode batch8]

FOLDER holds llama.cpp's `llama-bench` and `llama-batched-bench`. What is measured: prefill of 128, 512 and 2,048 tokens,
decode after 128 and 4,096 tokens, decode of 1 to 32 sequences at once (tokens of all together, each after 128), the time from
the program's start to its first token with the file in the system's page cache ("load") and with the file on the disk alone, as
after the computer's start ("cold_load"), and its peak memory (before the start, memory was taken and given back, so that neither
program waits for a virtual machine's host to supply it); "python_load" is the start beside that of llama.cpp's Python package.
Programs alternate test by test, so a machine that slows down slows both; of the rounds the better one counts, for both alike,
since noise on a shared machine only ever takes away. A way of rounding that GGUF lacks is measured with
``--quantization int4-g128`` on a file of floats, which `infer` rounds while loading, beside llama.cpp on the nearest file that it
has (``--peer-model``). Each file's result is written to ``benches/results/<model>-<date>.json`` with the commands, the commit and
the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from record import RESULTS, first_line, origin, plot, save

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPTS = (128, 512, 2048)
CONTEXTS = (128, 4096)
BATCHES = (1, 2, 4, 8, 16, 32)
GENERATED = 32
SPEED = "tokens per second"
# Where less is better.
COSTS = {"load": "seconds", "cold_load": "seconds", "memory": "MiB", "python_load": "seconds"}

FIRST_TOKEN = """
import sys
from infer import LLM, SamplingParams
llm = LLM(sys.argv[1], threads=int(sys.argv[2]), quantization=sys.argv[3] or None, packed_cache_dir=sys.argv[4] or None)
llm.generate([[1]], SamplingParams(max_tokens=int(sys.argv[5]), ignore_eos=True, detokenize=False), use_tqdm=False)
"""

# The same by llama.cpp's Python package.
PEER_FIRST_TOKEN = """
import sys
from llama_cpp import Llama
llm = Llama(sys.argv[1], n_threads=int(sys.argv[2]), n_threads_batch=int(sys.argv[2]), verbose=False)
llm.eval([1])
llm.sample(temp=0.0)
"""

# A process of its own: what a parent held counts as its children's peak memory.
READY_MEMORY = """
import mmap, sys
size = int(sys.argv[1])
with mmap.mmap(-1, size) as memory:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory[0 : size : mmap.PAGESIZE] = bytes(len(range(0, size, mmap.PAGESIZE)))
"""


def ready_memory(size: int) -> None:
    """Take and give back so many bytes: a virtual machine's host may have taken free memory away, and brings it back slowly."""
    subprocess.run([sys.executable, "-c", READY_MEMORY, str(size)], check=True)


def enter_page_cache(path: Path) -> None:
    """Read a file, so that no program's first run waits for the disk."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def leave_page_cache(path: Path) -> None:
    """Make the system forget what it holds of a file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Programs:
    """How both programs are run, and every command that was."""

    def __init__(self, arguments: argparse.Namespace, model: Path) -> None:
        self.python = shlex.split(arguments.python)
        self.peer_python = shlex.split(arguments.peer_python)
        self.llama_cpp: Path = arguments.llama_cpp
        self.model = str(model)
        self.peer_model = str(arguments.peer_model or model)
        self.quantization: str = arguments.quantization
        self.packed_cache = str(arguments.packed_cache or "")
        self.threads = str(arguments.threads)
        self.repeat = str(arguments.repeat)
        self.commands: dict[str, dict[str, str]] = {}
        self.llama_commit = ""

    def run(self, test: str, program: str, command: list[str]) -> tuple[str, dict[str, float]]:
        """Run a command; what it prints, the seconds that it took and the most memory that it held."""
        self.commands.setdefault(test, {})[program] = shlex.join(command)
        started = time.perf_counter()
        with tempfile.TemporaryFile() as output, subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE) as process:
            errors = process.stderr.read() if process.stderr else b""
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            taken = time.perf_counter() - started
            output.seek(0)
            text = output.read().decode()
        if process.returncode != 0:
            sys.exit(f"{shlex.join(command)}\nended with {process.returncode}: {errors.decode(errors='replace').strip()[-2000:]}")
        return text, {"load": taken, "memory": usage.ru_maxrss / 1024}

    def infer(self, test: str, **options: int) -> dict[str, Any]:
        """Run `infer bench`."""
        command = [*self.python, "-m", "infer", "bench", "--model", self.model, "--threads", self.threads]
        if self.quantization:
            command += ["--quantization", self.quantization]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        report: dict[str, Any] = json.loads(self.run(test, "infer", [*command, "--repeat", self.repeat, "--json"])[0])
        return report

    def llama_bench(self, test: str, *options: str) -> float:
        """Run `llama-bench` with a single test; the median of its repetitions."""
        command = [
            str(self.llama_cpp / "llama-bench"),
            "-m",
            self.peer_model,
            "-t",
            self.threads,
            "-r",
            self.repeat,
            *options,
            "-o",
            "json",
        ]
        (row,) = json.loads(self.run(test, "llama.cpp", command)[0])
        self.llama_commit = row["build_commit"]
        samples = sorted(row["samples_ts"])
        middle = len(samples) // 2
        return float(samples[middle] if len(samples) % 2 else (samples[middle - 1] + samples[middle]) / 2)

    def prefill(self, tokens: int) -> dict[str, float]:
        """Tokens per second of a prompt."""
        test = f"prefill{tokens}"
        report = self.infer(test, prompt_tokens=tokens, generate_tokens=2)
        theirs = self.llama_bench(test, "-p", str(tokens), "-n", "0")
        return {"infer": report["prefill_tokens_per_second"], "llama.cpp": theirs}

    def decode(self, context: int) -> dict[str, float]:
        """Tokens per second of one sequence after so many tokens."""
        test = f"decode{context}"
        report = self.infer(test, prompt_tokens=1, context=context, generate_tokens=GENERATED)
        theirs = self.llama_bench(test, "-p", "0", "-n", str(GENERATED), "-d", str(context))
        return {"infer": report["decode_tokens_per_second"], "llama.cpp": theirs}

    def batch(self, sequences: int) -> dict[str, float]:
        """Tokens per second of several sequences together."""
        test = f"batch{sequences}"
        report = self.infer(test, prompt_tokens=1, context=128, generate_tokens=GENERATED, batch=sequences)
        room = str(sequences * (128 + GENERATED))
        command = [str(self.llama_cpp / "llama-batched-bench"), "-m", self.peer_model, "-t", self.threads, "-c", room]
        command += ["-npp", "128", "-ntg", str(GENERATED), "-npl", str(sequences), "--output-format", "jsonl"]
        lines = [line for line in self.run(test, "llama.cpp", command)[0].splitlines() if line.startswith("{")]
        return {"infer": report["decode_tokens_per_second"], "llama.cpp": float(json.loads(lines[-1])["speed_tg"])}

    def start(self) -> dict[str, dict[str, float]]:
        """Seconds to the first token, the file in memory and not, and the most memory held while more follow."""
        options = [self.model, self.threads, self.quantization, self.packed_cache]
        infer = [*self.python, "-c", FIRST_TOKEN, *options]
        peer = [str(self.llama_cpp / "llama-bench"), "-m", self.peer_model, "-t", self.threads]
        peer += ["-p", "1", "-n", "0", "-r", "1", "--no-warmup"]
        programs = {
            "infer": (self.model, [*infer, "1"]),
            "llama.cpp": (self.peer_model, peer),
        }
        room = 2 * max(Path(path).stat().st_size for path, _ in programs.values())
        found: dict[str, dict[str, float]] = {cost: {} for cost in ("load", "cold_load", "memory")}
        for name, (path, command) in programs.items():
            # The first one leaves the file in memory, and the second one its pages where they stay.
            for load in ("cold_load", "", "load"):
                ready_memory(room)
                if load == "cold_load":
                    leave_page_cache(Path(path))
                _, costs = self.run("start", name, command)
                if load:
                    found[load][name] = costs["load"]
            found["memory"][name] = costs["memory"]
        # Weights are packed with the tokens after the first one.
        found["memory"]["infer"] = self.run("memory", "infer", [*infer, str(GENERATED)])[1]["memory"]
        if self.peer_python:
            ready_memory(room)
            command = [*self.peer_python, "-c", PEER_FIRST_TOKEN, self.peer_model, self.threads]
            _, costs = self.run("python_start", "llama.cpp", command)
            found["python_load"] = {"infer": found["load"]["infer"], "llama.cpp": costs["load"]}
        return found


def tests(programs: Programs) -> dict[str, Callable[[], dict[str, Any]]]:
    """What can be measured, by name; a test gives figures of one kind or of several."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for tokens in PROMPTS:
        found[f"prefill{tokens}"] = lambda tokens=tokens: programs.prefill(tokens)
    for context in CONTEXTS:
        found[f"decode{context}"] = lambda context=context: programs.decode(context)
    for sequences in BATCHES:
        found[f"batch{sequences}"] = lambda sequences=sequences: programs.batch(sequences)
    found["start"] = programs.start
    return found


def compare(arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Alternate the two programs on one file; commands, every run, the better of each and the ratio."""
    programs = Programs(arguments, model)
    for path in {model, Path(programs.peer_model)}:
        enter_page_cache(path)
    runs: dict[str, list[dict[str, float]]] = {}
    for number in range(arguments.rounds):
        for name, measure in tests(programs).items():
            if arguments.only and not any(name.startswith(wanted) for wanted in arguments.only):
                continue
            found = measure()
            for test, figures in found.items() if name == "start" else [(name, found)]:
                runs.setdefault(test, []).append(figures)
                print(f"{model.name} round {number + 1} {test}: {figures}", file=sys.stderr)
    best: dict[str, dict[str, float]] = {}
    for test, those in runs.items():
        better = min if test in COSTS else max
        best[test] = {program: better(each[program] for each in those) for program in ("infer", "llama.cpp")}
    return {
        "model": model.name,
        "quantization": programs.quantization or None,
        "peer_model": Path(programs.peer_model).name,
        "model_bytes": model.stat().st_size,
        "threads": arguments.threads,
        "unit": {test: COSTS.get(test, SPEED) for test in best},
        "best": best,
        "ratio": {test: figures["infer"] / figures["llama.cpp"] for test, figures in best.items()},
        "runs": runs,
        "commands": programs.commands,
        "infer_version": first_line([*programs.python, "-m", "infer", "--version"]),
        "llama.cpp_commit": programs.llama_commit,
        **origin(),
    }


def table(result: dict[str, Any]) -> None:
    """Print every test with both programs' figures."""
    for test, figures in result["best"].items():
        ours, theirs, ratio = figures["infer"], figures["llama.cpp"], result["ratio"][test]
        unit = result["unit"][test]
        print(f"{result['model']:32} {test:12} infer {ours:9.2f}  llama.cpp {theirs:9.2f}  ratio {ratio:5.2f}  ({unit})")


def ratios(result: dict[str, Any]) -> Callable[[Any], None]:
    """How to draw the ratios: infer's speed by llama.cpp's, or llama.cpp's cost by infer's."""

    def draw(axes: Any) -> None:
        names = list(result["ratio"])
        heights = [1 / result["ratio"][name] if name in COSTS else result["ratio"][name] for name in names]
        axes.bar(names, heights)
        axes.axhline(1, color="black", linewidth=1)
        axes.set_ylabel("times better than llama.cpp")
        axes.tick_params(axis="x", rotation=60)

    return draw


def main() -> None:
    """Compare on every file named, print a table and keep the results."""
    parser = argparse.ArgumentParser(description="infer beside llama.cpp on the same GGUF file.")
    parser.add_argument("--model", type=Path, action="append", required=True, help="a GGUF file; may be repeated")
    parser.add_argument("--quantization", default="", help="how infer rounds the file while loading")
    parser.add_argument("--packed-cache", type=Path, help="the folder where infer keeps packed weights, for the start")
    parser.add_argument("--peer-model", type=Path, help="the file that llama.cpp takes in the model's place")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of llama-bench and llama-batched-bench")
    parser.add_argument(
        "--peer-python", default="", help="a Python that has llama_cpp: its start is measured too, as python_load"
    )
    parser.add_argument("--python", default=sys.executable, help="the Python that has infer")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeat", type=int, default=2, help="repetitions inside one run; the median counts")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each program; the better counts")
    parser.add_argument("--only", nargs="*", default=[], help="tests whose names begin so, such as prefill decode128 batch start")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    for model in arguments.model:
        result = compare(arguments, model)
        stem = f"{model.stem}-{arguments.quantization}" if arguments.quantization else model.stem
        path = save(arguments.results, stem, result)
        plot(path.with_suffix(".svg"), ratios(result))
        table(result)


if __name__ == "__main__":
    main()
