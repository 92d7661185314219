"""Golden folders in 8-bit floats, as the hub has them, and what their numbers times their scales are.

Three ways: one scale for a tensor (`fp8`, static activations), one for each row (compressed-tensors), one for each block of rows
and columns (`fp8` with `weight_block_size`, as DeepSeek's).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Tensors = dict[str, tuple[str, NDArray[Any]]]

WAYS = ("tensor", "channel", "block")
BLOCK = 16
KEPT = "layers.1.mlp.down_proj"  # a module that is not converted
MATRIX = re.compile(r"(_proj|\.w[123])\.weight$")
TYPES = {"BF16": np.uint16, "F32": np.float32, "F8_E4M3": np.uint8}


def e4m3() -> NDArray[np.float32]:
    """What each byte stands for; NaN for two."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    magnitude = np.where(exponent == 0, mantissa / 512.0, (1 + mantissa / 8.0) * 2.0 ** (exponent - 7.0))
    return np.where(bits & 0x7F == 0x7F, np.nan, np.where(bits & 0x80, -magnitude, magnitude)).astype(np.float32)


def to_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest numbers, by looking at all of them."""
    nearest = np.abs(np.abs(values)[..., None] - e4m3()[:127]).argmin(-1)
    return (nearest | np.where(values < 0, 128, 0)).astype(np.uint8)


def read(folder: Path) -> Tensors:
    """Types and values of a folder's tensors, bfloat16 as bits."""
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors: Tensors = {}
    for name, entry in header.items():
        part = data[start:][slice(*entry["data_offsets"])]
        tensors[name] = entry["dtype"], np.frombuffer(part, TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    """Write a folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header, end = {}, 0
    for name, (kind, values) in tensors.items():
        header[name] = {"dtype": kind, "shape": values.shape, "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in tensors.values():
            file.write(np.ascontiguousarray(values).tobytes())
    return folder


def quantization_config(way: str) -> dict[str, Any]:
    """What `config.json` says."""
    if way == "channel":
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
        activations = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
        method = {"quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed"}
        return {**method, "ignore": ["lm_head", f"model.{KEPT}"], "config_groups": {"group_0": group}}
    config = {"quant_method": "fp8", "fmt": "e4m3", "modules_to_not_convert": ["lm_head", f"model.{KEPT}"]}
    if way == "tensor":
        return {**config, "activation_scheme": "static"}
    return {**config, "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def float8_folders(source: Path, folder: Path, way: str) -> tuple[Path, Path]:
    """Write a golden folder in 8-bit floats, and one in float32 with the weights that those stand for."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    coded: Tensors = {}
    plain: Tensors = {}
    for name, (kind, bits) in read(source).items():
        values = (bits.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else bits.astype(np.float32)
        if not MATRIX.search(name) or KEPT in name:
            coded[name], plain[name] = (kind, bits), ("F32", values)
            continue
        rows, columns = values.shape
        height, width = {"tensor": (rows, columns), "channel": (1, columns), "block": (BLOCK, BLOCK)}[way]
        down, across = -(-rows // height), -(-columns // width)
        scales = np.zeros((down, across), np.float32)
        for i in range(down):
            for j in range(across):
                scales[i, j] = np.abs(values[i * height : (i + 1) * height, j * width : (j + 1) * width]).max() / 448
        if way == "channel":  # which are stored as bfloat16
            scales = ((scales.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)
        spread = np.repeat(np.repeat(scales, height, 0), width, 1)[:rows, :columns]
        codes = to_e4m3(values / spread)
        plain[name] = ("F32", e4m3()[codes] * spread)
        coded[name] = ("F8_E4M3", codes)
        if way == "channel":
            coded[f"{name}_scale"] = ("BF16", (scales.view(np.uint32) >> 16).astype(np.uint16))
        elif way == "tensor":
            coded[f"{name}_scale"] = ("F32", scales.reshape(()))
            coded[name.replace(".weight", ".input_scale")] = ("F32", np.ones((), np.float32))
        else:
            coded[f"{name}_scale_inv"] = ("F32", scales)
    folder.mkdir(parents=True, exist_ok=True)
    stated = {**config, "quantization_config": quantization_config(way)}
    return write(folder / f"{way}-coded", stated, coded), write(folder / f"{way}-plain", config, plain)
