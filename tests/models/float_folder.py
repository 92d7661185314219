"""The bundled model as a Hugging Face folder of 16-bit floats: something real that may be rounded."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from infer import model_info

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_safetensors(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """Write float16 and float32 arrays."""
    header: dict[str, Any] = {}
    end = 0
    for name, values in tensors.items():
        kind = {"float16": "F16", "float32": "F32"}[values.dtype.name]
        header[name] = {"dtype": kind, "shape": values.shape, "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(values.tobytes())


def halves(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Queries and keys in the order of a folder: halves of each head instead of pairs."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return pairs.transpose(0, 2, 1, 3).reshape(rows.shape)


def float_folder(folder: Path) -> Path:
    """Write the bundled model to `folder`."""
    info = model_info()
    reader = gguf.GGUFReader(info.path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors: dict[str, NDArray[Any]] = {}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        name = tensor.name.removesuffix(".weight")
        prefix = ""
        if name.startswith("blk."):
            _, layer, name = name.split(".")
            prefix = f"model.layers.{layer}."
        if name in ("attn_q", "attn_k"):
            values = halves(values, info.head_dim)
        tensors[f"{prefix}{NAMES[name]}.weight"] = values.astype(np.float16)
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": info.hidden_size,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": info.layers,
        "num_attention_heads": info.heads,
        "num_key_value_heads": info.kv_heads,
        "head_dim": info.head_dim,
        "vocab_size": info.vocabulary_size,
        "max_position_embeddings": info.max_positions,
        "rms_norm_eps": float(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "eos_token_id": info.eos_token_ids,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(fields["tokenizer.huggingface.json"])
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "chat_template": info.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "LICENSE").write_text("apache-2.0\n")
    return folder
