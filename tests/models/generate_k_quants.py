"""Write ``k_quants/``: a tiny Llama model in the block formats of a Q4_K_M file and others, and what it computes.

    pip install gguf numpy safetensors
    python tests/models/generate_k_quants.py

The ``gguf`` package cannot quantize to most of these formats, so blocks are written directly, as random codes under
scales that give weights of a usual size; what they stand for is what the package's ``dequantize`` says. The logits are
those of a Llama forward pass in float64 below, which shares nothing with the kernels. ``expected.safetensors`` holds what
the golden cases' file does (see README.md); ``greedy`` steps lead the runner-up by more than 0.01.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, dequantize
from safetensors.numpy import save_file

FOLDER = Path(__file__).resolve().parent / "k_quants"
HIDDEN, HEADS, KV_HEADS, HEAD, WIDTH, VOCABULARY, LAYERS = 256, 4, 2, 32, 256, 64, 3
THETA, EPSILON = 10000.0, 1e-5
TOKENS, PROMPT, GENERATED = 40, 20, 12

# llama-quantize's Q4_K_M gives Q6_K to the head and to half of the value and down matrices, Q4_K to the rest; the last
# layer shows other formats. A matrix is (rows, columns); rows of 128 keep to formats with blocks of 32.
SHAPES = {
    "attn_q": (HEADS * HEAD, HIDDEN),
    "attn_k": (KV_HEADS * HEAD, HIDDEN),
    "attn_v": (KV_HEADS * HEAD, HIDDEN),
    "attn_output": (HIDDEN, HEADS * HEAD),
    "ffn_gate": (WIDTH, HIDDEN),
    "ffn_up": (WIDTH, HIDDEN),
    "ffn_down": (HIDDEN, WIDTH),
}
TYPES = [
    ("Q4_K", "Q4_K", "Q6_K", "Q5_0", "Q4_K", "Q4_K", "Q6_K"),
    ("Q5_K", "Q3_K", "Q2_K", "Q5_1", "IQ4_XS", "IQ4_XS", "Q4_K"),
    ("IQ2_S", "IQ3_S", "IQ1_M", "IQ4_NL", "MXFP4", "TQ2_0", "Q4_1"),
]

# format -> byte positions of a block's scale, of its minimum, and how large a weight is in units of the scale
SCALES: dict[str, tuple[int, int | None, float]] = {
    "Q4_1": (0, 2, 7.5),
    "Q5_0": (0, None, 9.0),
    "Q5_1": (0, 2, 15.0),
    "Q2_K": (80, 82, 15.0),
    "Q3_K": (108, None, 40.0),
    "Q4_K": (0, 2, 250.0),
    "Q5_K": (0, 2, 500.0),
    "Q6_K": (208, None, 1400.0),
    "IQ2_S": (0, None, 50.0),
    "IQ3_S": (0, None, 150.0),
    "IQ4_NL": (0, None, 65.0),
    "IQ4_XS": (0, None, 1200.0),
    "TQ2_0": (64, None, 1.0),
}


def blocks(generator: np.random.Generator, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Return random rows of `shape` weights in a format, as bytes (rows, bytes of a row), of weights around 1/16."""
    block_len, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    out = generator.integers(0, 256, (shape[0], shape[1] // block_len, block_bytes), dtype=np.uint8)
    size = 1 / 16
    if name == "MXFP4":
        out[..., 0] = generator.integers(119, 123, out.shape[:2])
    elif name == "IQ1_M":
        bits = int(np.float16(size / 7).view(np.uint16))
        for i in range(4):
            out[..., 49 + 2 * i] = out[..., 49 + 2 * i] & 0x0F | (bits >> (4 * i) & 0xF) << 4
    else:
        scale_at, minimum_at, units = SCALES[name]
        scale = generator.uniform(0.7, 1.4, out.shape[:2]) * size / units
        out[..., scale_at : scale_at + 2] = scale.astype("<f2")[..., None].view(np.uint8)
        if minimum_at is not None:  # centred: half of the greatest code
            codes = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}[name]
            out[..., minimum_at : minimum_at + 2] = (scale * codes).astype("<f2")[..., None].view(np.uint8)
    return out.reshape(shape[0], -1)


def rotate(values: np.ndarray) -> np.ndarray:
    """Rotate neighbouring pairs, as llama.cpp's files order them; (tokens, heads, HEAD)."""
    angles = np.arange(len(values))[:, None] * THETA ** (-np.arange(0, HEAD, 2) / HEAD)
    turned = (values[..., 0::2] + 1j * values[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(values.shape)


def norm(values: np.ndarray) -> np.ndarray:
    """Root mean square norm with weights of one."""
    return values / np.sqrt(np.mean(values**2, axis=-1, keepdims=True) + EPSILON)


def forward(weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Return logits (tokens, VOCABULARY)."""
    hidden = weights["token_embd"][tokens]
    mask = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for layer in range(LAYERS):
        own = {name: weights[f"blk.{layer}.{name}"] for name in SHAPES}
        state = norm(hidden)
        query = rotate((state @ own["attn_q"].T).reshape(-1, HEADS, HEAD))
        key = rotate((state @ own["attn_k"].T).reshape(-1, KV_HEADS, HEAD)).repeat(HEADS // KV_HEADS, axis=1)
        value = (state @ own["attn_v"].T).reshape(-1, KV_HEADS, HEAD).repeat(HEADS // KV_HEADS, axis=1)
        scores = np.einsum("thd,shd->hts", query, key) / np.sqrt(HEAD) + mask
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        hidden = hidden + np.einsum("hts,shd->thd", share, value).reshape(len(tokens), -1) @ own["attn_output"].T
        state = norm(hidden)
        gate = state @ own["ffn_gate"].T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * (state @ own["ffn_up"].T)) @ own["ffn_down"].T
    return norm(hidden) @ weights["output"].T


def write(path: Path, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Write the file; the values of its matrices by name without ``.weight``."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    matrices = {"token_embd": ("Q4_K", (VOCABULARY, HIDDEN)), "output": ("Q6_K", (VOCABULARY, HIDDEN))}
    for layer, types in enumerate(TYPES):
        for (name, shape), kind in zip(SHAPES.items(), types, strict=True):
            matrices[f"blk.{layer}.{name}"] = (kind, shape)
    values = {}
    for name, (kind, shape) in matrices.items():
        data = blocks(generator, kind, shape)
        values[name] = dequantize(data, GGMLQuantizationType[kind]).astype(np.float64).reshape(shape)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=GGMLQuantizationType[kind])
    ones = np.ones(HIDDEN, dtype=np.float32)
    for name in ["output_norm", *(f"blk.{i}.{kind}_norm" for i in range(LAYERS) for kind in ("attn", "ffn"))]:
        writer.add_tensor(f"{name}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def greedy(weights: dict[str, np.ndarray], prompt: list[int]) -> list[int]:
    """Continue `prompt`, and refuse steps that are too close."""
    tokens = list(prompt)
    for _ in range(GENERATED):
        logits = forward(weights, tokens)[-1]
        order = np.argsort(logits)
        if logits[order[-1]] - logits[order[-2]] < 0.01:
            raise SystemExit("a greedy step is too close; change the seed")
        tokens.append(int(order[-1]))
    return tokens[len(prompt) :]


def main() -> None:
    """Write both files."""
    FOLDER.mkdir(exist_ok=True)
    generator = np.random.default_rng(5)
    weights = write(FOLDER / "model.gguf", generator)
    tokens = [int(token) for token in generator.integers(3, VOCABULARY, TOKENS)]
    logits = forward(weights, tokens)
    print(f"weights' sizes: { {name: round(float(value.std()), 3) for name, value in weights.items()} }")
    print(f"logits between {logits.min():.2f} and {logits.max():.2f}")
    expected = {
        "token_ids": np.array(tokens),
        "logits": logits.astype(np.float32),
        "prompt_tokens": np.array([PROMPT]),
        "greedy": np.array(greedy(weights, tokens[:PROMPT])),
    }
    save_file(expected, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
