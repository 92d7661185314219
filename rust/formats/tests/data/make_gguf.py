"""Write the GGUF files of this folder with the reference implementation's Python package.

Run with the package of a llama.cpp checkout: the released one may lag behind the newest tensor types::

    PYTHONPATH=llama.cpp/gguf-py python make_gguf.py

Writes ``every_type.gguf`` (each metadata type, arrays of each, nested arrays, one tensor of each tensor type),
``vocabulary.gguf`` (the tokenizer keys of a small vocabulary, alignment 64) and ``ggml_types.json`` (type id,
elements and bytes per block of every tensor type), against which ``gguf_reference.rs`` checks the reader.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

FOLDER = Path(__file__).parent
EXTREMES: dict[GGUFValueType, list[int | float | bool | str]] = {
    GGUFValueType.UINT8: [0, 1, 255],
    GGUFValueType.INT8: [-128, 0, 127],
    GGUFValueType.UINT16: [0, 1, 65535],
    GGUFValueType.INT16: [-32768, 0, 32767],
    GGUFValueType.UINT32: [0, 1, 4294967295],
    GGUFValueType.INT32: [-2147483648, 0, 2147483647],
    GGUFValueType.FLOAT32: [-1.5, 0.0, 3.4028234663852886e38],
    GGUFValueType.UINT64: [0, 1, 18446744073709551615],
    GGUFValueType.INT64: [-9223372036854775808, 0, 9223372036854775807],
    GGUFValueType.FLOAT64: [-1.5, 5e-324, 1.7976931348623157e308],
    GGUFValueType.BOOL: [True, False, True],
    GGUFValueType.STRING: ["", "text", "naïve 文字 🦙\n\0"],
}


def write_every_type() -> None:
    """Write one scalar and one array of each metadata type, and one tensor of each tensor type."""
    writer = GGUFWriter(FOLDER / "every_type.gguf", "llama")
    for value_type, values in EXTREMES.items():
        name = value_type.name.lower()
        writer.add_key_value(f"scalar.{name}", values[-1], value_type)
        writer.add_key_value(f"array.{name}", values, GGUFValueType.ARRAY, sub_type=value_type)
    writer.add_key_value("array.nested", [[1, -2], [[3.5], ["deep"]], [True]], GGUFValueType.ARRAY)
    for tensor_type, (block_len, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        # The numpy shape is that of the bytes: two rows of two blocks.
        stored = np.full((2, 2 * block_bytes), int(tensor_type), dtype=np.uint8)
        writer.add_tensor(f"tensor.{tensor_type.name}", stored, raw_dtype=tensor_type)
        assert block_len > 0
    finish(writer)


def write_vocabulary() -> None:
    """Write what a converted tokenizer looks like, with another alignment and a one-dimensional tensor."""
    writer = GGUFWriter(FOLDER / "vocabulary.gguf", "qwen2")
    writer.add_custom_alignment(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "Ġab", "<|endoftext|>"])
    writer.add_token_types([1, 1, 1, 3])
    writer.add_token_scores([-1.0, -2.0, -3.5, 0.0])
    writer.add_token_merges(["Ġ a", "Ġa b"])
    writer.add_head_count_kv([2, 4])
    writer.add_rope_freq_base(1e6)
    writer.add_add_bos_token(False)
    writer.add_tensor("output_norm.weight", np.arange(3, dtype=np.float32))
    writer.add_tensor("output.weight", np.arange(6, dtype=np.float16).reshape(2, 3))
    finish(writer)


def finish(writer: GGUFWriter) -> None:
    """Write all sections and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_types() -> None:
    """Write the reference implementation's table of tensor types."""
    table = {t.name: [int(t), *gguf.GGML_QUANT_SIZES[t]] for t in GGMLQuantizationType}
    (FOLDER / "ggml_types.json").write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    write_every_type()
    write_vocabulary()
    write_types()
