"""How far a quantized GGUF file's answers are from its float32 original's: computed by `infer`, and by llama.cpp.

    python benches/quality.py --llama-cpp FOLDER --model FILE.f32.gguf --text FILE [--formats Q8_0 Q4_0 ...] [--window 256]

FOLDER holds llama.cpp's `llama-quantize` and `llama-perplexity`. Each program compares the file with the original as it computes
that itself, in windows that begin with the beginning-of-sequence token, over the second half of each: what `llama-perplexity
--kl-divergence` does. Both keep keys and values in half precision. Divergence is Kullback-Leibler in nats per token. The
result goes to benches/results.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from kv_divergence import divergences, read_text
from record import RESULTS, origin, save

from infer import LLM


def ours(original: Path, file: Path, text: str, window: int) -> dict[str, float]:
    """Mean divergence and the share of equal likeliest tokens, as infer computes both files."""
    options: dict[str, Any] = {"kv_cache_dtype": "float16", "enable_prefix_caching": False, "max_num_seqs": 1}
    with LLM(original, dtype="float32", **options) as exact, LLM(file, **options) as other:
        ids = list(exact.tokenizer.encode(text))
        windows = [[ids[0], *ids[start + 1 : start + window]] for start in range(0, len(ids) - window + 1, window)]
        second_half = slice(window // 2, -1)
        parts = [[part[second_half] for part in both] for both in divergences(exact, other, windows)]
    divergence, same = (np.concatenate(figures) for figures in zip(*parts, strict=True))
    return {"mean_divergence": float(divergence.mean()), "same_top": float(same.mean())}


def theirs(program: Path, base: Path, file: Path, window: int) -> dict[str, float]:
    """The same as llama.cpp computes them; `base` holds its distributions of the original."""
    command = [program, "-m", file, "-c", str(window), "-b", str(window), "--kl-divergence-base", base, "--kl-divergence"]
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, check=True)
        report = (done.stdout + done.stderr).decode(errors="replace")
        mean, same = re.search(r"Mean +KLD: +([\d.]+)", report), re.search(r"Same top p: +([\d.]+)", report)
        if mean and same:  # its log is written by a thread that may not come to its end
            return {"mean_divergence": float(mean[1]), "same_top": float(same[1]) / 100}
    raise SystemExit(f"llama-perplexity gave no figures for {file.name}")


def main() -> None:
    """Quantize, measure in both programs, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file in F32")
    parser.add_argument("--text", type=Path, required=True, help="a text, perhaps as .xz")
    parser.add_argument("--characters", type=int, default=60000, help="of the text")
    parser.add_argument("--formats", nargs="*", default=["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
    parser.add_argument("--window", type=int, default=256)
    arguments = parser.parse_args()
    text = read_text(arguments.text)[: arguments.characters]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").write_text(text, encoding="utf-8")
        perplexity, window = arguments.llama_cpp / "llama-perplexity", str(arguments.window)
        command = [perplexity, "-m", arguments.model, "-f", folder / "text", "-c", window, "-b", window]
        subprocess.run([*command, "--kl-divergence-base", folder / "base"], check=True, capture_output=True)
        for kind in arguments.formats:
            file = folder / f"{kind}.gguf"
            quantize = [arguments.llama_cpp / "llama-quantize", "--pure", arguments.model, file, kind]
            subprocess.run(quantize, check=True, capture_output=True)
            row = {
                "format": kind,
                "infer": ours(arguments.model, file, text, arguments.window),
                "llama.cpp": theirs(perplexity, folder / "base", file, arguments.window),
            }
            rows.append(row)
            means = [row[program]["mean_divergence"] for program in ("infer", "llama.cpp")]
            print(f"{kind:6} mean KL: infer {means[0]:.6f}, llama.cpp {means[1]:.6f}, ratio {means[0] / means[1]:.4f}")
    save(
        RESULTS,
        f"quality-{arguments.model.stem}",
        {"model": arguments.model.name, "window": arguments.window, "rows": rows, **origin()},
    )


if __name__ == "__main__":
    main()
