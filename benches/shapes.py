"""Models of a real shape with random weights, for measuring: a Llama-3.2-1B-shaped GGUF file per format, without a vocabulary.

    python benches/shapes.py [--formats BF16 Q8_0 Q4_0] [--llama-quantize BINARY --quantized Q4_K_M ...] [--out benches/work]

Needs `pip install gguf`, whose writer and quantizers these are; further formats are made from the BF16 file by llama.cpp's
`llama-quantize`. Speed depends on shapes and formats, not on what the weights say; they are drawn so that activations stay of
order one.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from record import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

HIDDEN, LAYERS, FEED_FORWARD, VOCABULARY = 2048, 16, 8192, 128256
HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 32, 8, 64, 131072
SPREAD = 0.02


def tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, the embedding first; the head is tied to it."""
    yield "token_embd.weight", (VOCABULARY, HIDDEN)
    yield "output_norm.weight", (HIDDEN,)
    for layer in range(LAYERS):
        shapes = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FEED_FORWARD, HIDDEN),
            "ffn_up": (FEED_FORWARD, HIDDEN),
            "ffn_down": (HIDDEN, FEED_FORWARD),
        }
        for name, shape in shapes.items():
            yield f"blk.{layer}.{name}.weight", shape


def write(path: Path, kind: str) -> None:
    """One file: matrices in `kind`, norms in F32."""
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_name(path.stem)
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(int(getattr(gguf.LlamaFileType, f"MOSTLY_{kind}")))
    dice = np.random.default_rng(1)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, shape in tensors():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        weights: Any = dice.standard_normal(shape, np.float32) * np.float32(SPREAD)
        writer.add_tensor(name, gguf.quants.quantize(weights, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write what is missing."""
    parser = argparse.ArgumentParser(description="Models of a real shape with random weights.")
    parser.add_argument("--formats", nargs="*", default=["BF16", "Q8_0", "Q4_0"], help="what gguf quantizes itself")
    parser.add_argument("--llama-quantize", type=Path, help="the binary that makes the other formats")
    parser.add_argument("--quantized", nargs="*", default=[], help="such as Q4_K_M, Q6_K; from the BF16 file")
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "work")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for kind in arguments.formats:
        path = arguments.out / f"llama-1b-shape-{kind.lower()}.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            write(partial, kind)
            partial.rename(path)
        print(path)
    for kind in arguments.quantized:
        source, path = (arguments.out / f"llama-1b-shape-{name.lower()}.gguf" for name in ("BF16", kind))
        if not path.exists():
            subprocess.run([arguments.llama_quantize, source, path, kind], check=True, capture_output=True)
        print(path)


if __name__ == "__main__":
    main()
