"""Make the files that go into the wheel: the trained checkpoints as quantized GGUF files.

usage: bundle.py FOLDER [OUT_FOLDER]      (FOLDER holds `target` and `draft`; python/infer/bundled unless said)

The target is Q8_0 and brings the tokenizer and the chat template; the draft model, which only guesses for it, is Q4_0 and needs
neither. The work is done by this project's own quantizer (`rust/model/examples/export_gguf.rs`); what the model's authors
advise on sampling is copied beside the files, where `LLM` looks for it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "python" / "infer" / "bundled"
LIMIT = 32_000_000  # bytes that the wheel may carry
EXPORT = ["cargo", "run", "--release", "--quiet", "--package", "infer-model", "--example", "export_gguf", "--"]


def export(checkpoint: Path, out: Path, kind: str, *flags: str) -> int:
    """Quantize one checkpoint; the bytes written."""
    subprocess.run([*EXPORT, *flags, str(checkpoint), str(out), kind, kind, out.stem, "apache-2.0"], cwd=ROOT, check=True)
    return out.stat().st_size


def main() -> None:
    """Write the files and say how large they are."""
    source, folder = Path(sys.argv[1]).resolve(), BUNDLED
    if len(sys.argv) > 2:
        folder = Path(sys.argv[2]).resolve()
    sizes = {
        "tinylm.gguf": export(source / "target", folder / "tinylm.gguf", "q8_0"),
        "tinylm-draft.gguf": export(source / "draft", folder / "tinylm-draft.gguf", "q4_0", "--weights-only"),
    }
    shutil.copyfile(source / "target" / "generation_config.json", folder / "generation_config.json")
    for name, size in sizes.items():
        print(f"{folder / name}: {size:,} bytes")
    if sum(sizes.values()) > LIMIT:
        sys.exit(f"{sum(sizes.values()):,} bytes, more than the {LIMIT:,} that the wheel may carry")


if __name__ == "__main__":
    main()
