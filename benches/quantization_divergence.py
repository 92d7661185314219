"""How far answers move when weights are rounded.

    python benches/quantization_divergence.py [--model FOLDER] [--file FILE.gguf ...] [--device cpu|cuda] [--text FILE]
        [--tokens 16384] [--window 1024]

cuts a text into windows, computes each window's next-token distributions with the weights as they are stored, and compares with
them what every `quantization=` makes of the model while loading, and further files of the same model, which other programs may
have rounded. Keys and values are float32. "exact" computes with float32 activations, so that the weights are the only
difference; "auto" is what users get: activations of 8 bits too. On a GPU the reference is computed there in float32 and only
"auto" is compared; "fp8" is one more way there: weights and activations in E4M3, a scale for each row of either. Divergence is
Kullback-Leibler, from the model as it is stored to the rounded one, in nats per token, summed in float64; "same top" is the
share of positions whose likeliest token stays the same. The result goes to benches/results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from kv_divergence import TEXT, divergences, read_text
from record import RESULTS, ROOT, origin, save

from infer import LLM

MODEL = ROOT.parent / "shared" / "tinylm" / "target"
NAMES = {"cpu": ("int8", "int4", "int4-g128"), "cuda": ("int8", "int4", "int4-g128", "fp8")}
DTYPES = {"cpu": ("float32", "auto"), "cuda": ("auto",)}


def opened(model: Path, quantization: str | None, dtype: str, arguments: argparse.Namespace) -> LLM:
    """A model with keys and values in float32."""
    options: dict[str, Any] = {"max_num_seqs": 1, "enable_prefix_caching": False, "kv_cache_dtype": "float32"}
    window, device = arguments.window, arguments.device
    return LLM(model, dtype=dtype, quantization=quantization, max_model_len=window, device=device, **options)


def compare(exact: LLM, other: LLM, windows: list[list[int]]) -> dict[str, float]:
    """Divergence over all positions of all windows."""
    parts = list(divergences(exact, other, windows))
    divergence = np.concatenate([part[0] for part in parts])
    same = np.concatenate([part[1] for part in parts])
    return {
        "mean_divergence": float(divergence.mean()),
        "p99_divergence": float(np.quantile(divergence, 0.99)),
        "max_divergence": float(divergence.max()),
        "same_top": float(same.mean()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The result for people, in Markdown."""
    lines = ["| weights | activations | mean KL | 99 % | max KL | same top |", "|---|---|---|---|---|---|"]
    for row in rows:
        figures = " | ".join(f"{row[f'{field}_divergence']:.2e}" for field in ("mean", "p99", "max"))
        lines.append(f"| {row['weights']} | {row['dtype']} | {figures} | {row['same_top']:.2%} |")
    return "\n".join(lines)


def main() -> None:
    """Compare all ways of rounding and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder or .gguf file of floats")
    parser.add_argument(
        "--file", type=Path, action="append", default=[], help="a rounded file of the same model; may be repeated"
    )
    parser.add_argument("--device", default="cpu", choices=list(NAMES))
    parser.add_argument("--quantization", nargs="*", help="ways to round while loading; all that the device has unless said")
    parser.add_argument("--text", type=Path, default=TEXT if TEXT.exists() else ROOT / "CONTRIBUTING.md")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in all")
    parser.add_argument("--window", type=int, default=1024, help="tokens computed together, within the model's context")
    parser.add_argument("--note", default="", help="kept with the result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names = NAMES[arguments.device] if arguments.quantization is None else arguments.quantization
    began = origin()
    rows = []
    with opened(arguments.model, None, "float32", arguments) as exact:
        ids = exact.tokenizer.encode(read_text(arguments.text), add_special_tokens=False)[: arguments.tokens]
        windows = [ids[start : start + arguments.window] for start in range(0, len(ids), arguments.window)]
        ways = [(arguments.model, name) for name in names] + [(file, None) for file in arguments.file]
        for model, name in [(arguments.model, None), *ways]:
            for dtype in DTYPES[arguments.device]:
                if name is None and model == arguments.model and dtype == "float32":
                    continue  # the reference itself
                with opened(model, name, dtype, arguments) as other:
                    weights = name or ("as stored" if model == arguments.model else model.name)
                    row = {"weights": weights, "dtype": {"float32": "exact", "auto": "auto"}[dtype]}
                    rows.append({**row, **compare(exact, other, windows)})
        stored = exact.info.quantization
    print(f"{arguments.model.name} ({stored}), {len(ids)} tokens of {arguments.text.name} in windows of {arguments.window}")
    print(table(rows))
    result = {
        "model": arguments.model.name,
        "device": arguments.device,
        "stored": stored,
        "text": arguments.text.name,
        "tokens": len(ids),
        "window": arguments.window,
        "unit": "nats per token",
        "note": arguments.note,
        "rows": rows,
        **began,
    }
    print(save(arguments.out, f"quantization-divergence-{arguments.model.stem}", result))


if __name__ == "__main__":
    main()
