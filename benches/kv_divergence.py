"""How far answers move when keys and values are stored in fewer bits.

    python benches/kv_divergence.py [--model FILE] [--text FILE] [--tokens 16384] [--window 1024]

cuts a text into windows, computes each window's next-token distributions with every type of keys and values, and compares them
with those of float32 keys and values. All else is computed exactly (`dtype="float32"`), so the types are the only difference.
Divergence is Kullback-Leibler, from float32 to the type, in nats per token, summed in float64; "same top" is the share of
positions whose likeliest token stays the same. The result goes to benches/results.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from record import RESULTS, ROOT, origin, save

from infer import LLM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

TEXT = ROOT.parent / "shared" / "data" / "text" / "wikitext2_valid.txt.xz"
REFERENCE = "float32"
TYPES: list[str | dict[str, Any]] = [
    "float16",
    "bfloat16",
    "int8",
    "fp8",
    {"key": "int8", "value": "float32"},
    {"key": "float32", "value": "int8"},
    {"key": "fp8", "value": "float32"},
    {"key": "float32", "value": "fp8"},
    {"key": "int8", "value": "fp8"},
    {"key": "float16", "value": "int8"},
    {"key": "fp8", "value": "fp8", "skip_layers": [0, -1]},
]


def read_text(path: Path) -> str:
    """A text file, perhaps compressed."""
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes()).decode()
    return path.read_text(encoding="utf-8")


def opened(model: str | None, kind: str | dict[str, Any], window: int) -> LLM:
    """The model with keys and values of one type, all else exact."""
    options: dict[str, Any] = {"max_num_seqs": 1, "enable_prefix_caching": False}
    return LLM(model, dtype="float32", kv_cache_dtype=kind, max_model_len=window, **options)


def logarithms(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities, (tokens, vocabulary)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def divergences(exact: LLM, other: LLM, windows: list[list[int]]) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Per window: the divergence at every position, and whether the likeliest token is the same."""
    for window in windows:
        reference, found = logarithms(exact.logits(window)), logarithms(other.logits(window))
        divergence = (np.exp(reference) * (reference - found)).sum(axis=1)
        yield divergence, reference.argmax(axis=1) == found.argmax(axis=1)


def compare(exact: LLM, other: LLM, windows: list[list[int]]) -> dict[str, Any]:
    """Divergence over all positions of all windows."""
    parts = list(divergences(exact, other, windows))
    divergence = np.concatenate([part[0] for part in parts])
    same = np.concatenate([part[1] for part in parts])
    return {
        "kv_bytes_per_token": other.info.kv_bytes_per_token,
        "mean_divergence": float(divergence.mean()),
        "p99_divergence": float(np.quantile(divergence, 0.99)),
        "max_divergence": float(divergence.max()),
        "same_top": float(same.mean()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The result for people, in Markdown."""
    lines = ["| keys and values | bytes per token | mean KL | 99 % | max KL | same top |", "|---|---|---|---|---|---|"]
    for row in rows:
        kind = row["kv_cache_dtype"]
        name = kind if isinstance(kind, str) else json.dumps(kind)
        figures = " | ".join(f"{row[f'{field}_divergence']:.1e}" for field in ("mean", "p99", "max"))
        lines.append(f"| {name} | {row['kv_bytes_per_token']} | {figures} | {row['same_top']:.2%} |")
    return "\n".join(lines)


def main() -> None:
    """Compare all types and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or .gguf file; without it the bundled model")
    parser.add_argument("--text", type=Path, default=TEXT if TEXT.exists() else ROOT / "CONTRIBUTING.md")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in all")
    parser.add_argument("--window", type=int, default=1024, help="tokens computed together, within the model's context")
    parser.add_argument("--note", default="", help="kept with the result")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    began = origin()
    rows = []
    with opened(arguments.model, REFERENCE, arguments.window) as exact:
        ids = exact.tokenizer.encode(read_text(arguments.text), add_special_tokens=False)[: arguments.tokens]
        length = arguments.window
        windows = [ids[start : start + length] for start in range(0, len(ids), length)]
        for kind in TYPES:
            with opened(arguments.model, kind, arguments.window) as other:
                rows.append({"kv_cache_dtype": kind, **compare(exact, other, windows)})
        model = Path(exact.info.path).name
        print(f"{model}, {len(ids)} tokens of {arguments.text.name} in windows of {arguments.window}")
        print(table(rows))
        result = {
            "model": model,
            "head_dim": exact.info.head_dim,
            "text": arguments.text.name,
            "tokens": len(ids),
            "window": arguments.window,
            "unit": "nats per token",
            "reference": {"kv_cache_dtype": REFERENCE, "kv_bytes_per_token": exact.info.kv_bytes_per_token},
            "note": arguments.note,
            "rows": rows,
            **began,
        }
    print(save(arguments.out, f"kv-divergence-{Path(model).stem}", result))


if __name__ == "__main__":
    main()
