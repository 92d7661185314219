"""Make the file that goes into the wheel: a trained checkpoint as one quantized GGUF file, tokenizer and template inside.

usage: bundle.py CHECKPOINT_FOLDER OUT.gguf [FORMAT]      (FORMAT: Q8_0 unless said)

Q8_0 is exact enough that greedy text is the checkpoint's own for hundreds of tokens, and fits the wheel's 32 MB; Q4_0 would
halve the file for a model this small at a visible loss.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from infer import _core

LIMIT = 32_000_000  # bytes in the wheel


def main() -> None:
    """Write the file and its advice on sampling, and say how large the file is."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = (source / "tokenizer.json").read_text(encoding="utf-8")
    ends = json.loads((source / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    metadata = {
        "general.name": "tinylm",
        "general.license": "apache-2.0",
        "general.description": "Bundled demo model of infer; see README.md beside this file",
        "tokenizer.huggingface.json": tokenizer,
        "tokenizer.chat_template": settings["chat_template"],
        "tokenizer.ggml.bos_token_id": ends[0],
        "tokenizer.ggml.eos_token_id": ends[0],
        "tokenizer.ggml.eot_token_id": ends[1],
        "tokenizer.ggml.add_bos_token": bool(settings["add_bos_token"]),
    }
    kind = sys.argv[3] if len(sys.argv) > 3 else "Q8_0"
    _core.export_gguf(source, target, embedding=kind, matrices=kind, metadata=metadata)
    shutil.copyfile(source / "generation_config.json", target.parent / "generation_config.json")
    size = target.stat().st_size
    if size > LIMIT:
        sys.exit(f"{target}: {size:,} bytes, more than the {LIMIT:,} that the wheel may carry")
    print(f"{target}: {size:,} bytes")


if __name__ == "__main__":
    main()
