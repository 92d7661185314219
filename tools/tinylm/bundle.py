"""Make the file that goes into the wheel: a trained checkpoint as one quantized GGUF file, tokenizer and template inside.

usage: bundle.py CHECKPOINT_FOLDER [OUT.gguf [FORMAT]]      (python/infer/bundled/tinylm.gguf and q8_0 unless said)

The work is done by this project's own quantizer (`rust/model/examples/export_gguf.rs`); what the model's authors advise on
sampling is copied beside the file, where `LLM` looks for it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "python" / "infer" / "bundled" / "tinylm.gguf"
LIMIT = 32_000_000  # bytes that the wheel may carry
EXPORT = ["cargo", "run", "--release", "--quiet", "--package", "infer-model", "--example", "export_gguf", "--"]


def main() -> None:
    """Write both files and say how large the model is."""
    source, target, kind = Path(sys.argv[1]).resolve(), BUNDLED, "q8_0"
    if len(sys.argv) > 2:
        target = Path(sys.argv[2]).resolve()
    if len(sys.argv) > 3:
        kind = sys.argv[3]
    subprocess.run([*EXPORT, str(source), str(target), kind, kind, "tinylm", "apache-2.0"], cwd=ROOT, check=True)
    shutil.copyfile(source / "generation_config.json", target.parent / "generation_config.json")
    size = target.stat().st_size
    if size > LIMIT:
        sys.exit(f"{target}: {size:,} bytes, more than the {LIMIT:,} that the wheel may carry")
    print(f"{target}: {size:,} bytes")


if __name__ == "__main__":
    main()
