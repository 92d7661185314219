"""Write ``model.gguf`` beside every golden checkpoint whose family llama.cpp's converter knows.

    python tests/models/generate_gguf.py --llama-cpp TREE [--quantize BINARY] [--library SO --bindings FOLDER] [case ...]

``TREE`` is a llama.cpp source tree; its converter runs in this process and writes no vocabulary
(``tokenizer.ggml.model = "none"``), only the vocabulary's size: tokenizers have their own tests. Weights keep the type that
the checkpoint stores, so the logits in ``expected.safetensors`` hold for both files.

With ``--quantize`` (llama.cpp's ``llama-quantize``) the cases that ask for it also get ``model.<format>.gguf``, and
``expected.<format>.safetensors``: what transformers computes in float32 from the weights that the blocks stand for.

With ``--library`` (``libllama.so``) and ``--bindings`` (the folder that holds the Python package ``llama_cpp`` of the same
version), llama.cpp evaluates every case and the largest difference from the expected logits is printed: it checks that a file
says everything that the checkpoint says. Where it differs and the file is right, ``DIFFERS`` says why.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from generate import GOLDEN, greedy, load_reference, token_logits
from golden_case import Case
from golden_cases import CASES
from safetensors.torch import load_file, save_file

# llama.cpp writes these families, but the file would not stand for the same model
NOT_CONVERTED = {
    "llama_rope_dynamic": "GGUF has no dynamic NTK rope",
    "gemma2": "llama.cpp takes the attention scale from the head size",
    "gemma3": "llama.cpp takes the attention scale from the head size",
    "gpt2_inner": "llama.cpp's gpt2 always uses the tanh GELU",
    "mistral": "GGUF's llama has no sliding window",
    "qwen2_window": "GGUF's qwen2 has no sliding window",
    "qwen2_moe_mixed": "llama.cpp's qwen2moe has no dense layers",
    "qwen3_moe_mixed": "llama.cpp's qwen3moe has no dense layers",
    "starcoder2": "GGUF's starcoder2 has no sliding window",
    "stablelm_qk_norm": "the converter stumbles over the per-head norms",
    "stablelm_parallel": "the converter stumbles over the per-head norms",
}

# the file holds what the checkpoint says, and llama.cpp does something else with it (each explanation was verified by
# giving transformers the configuration that llama.cpp follows: the logits then agree to 2e-5)
DIFFERS = {
    "llama_rope_yarn_options": "llama.cpp ignores rope.scaling.yarn_* in the llama family",
    "phi3": "llama.cpp ignores phi3.attention.sliding_window",
    "phi3_longrope_short": "llama.cpp chooses the factors by the size of the context, not by the text",
}


def converter_class(tree: Path, architecture: str) -> Any:
    """The converter of `architecture` in the source tree, or None where there is none."""
    conversion = importlib.import_module("conversion")
    try:
        return conversion.get_model_class(architecture)
    except NotImplementedError:
        return None


def convert(case: Case, tree: Path, path: Path, dtype: str) -> bool:
    """Write the GGUF file of one case with matrices of `dtype`; False where llama.cpp does not know the family."""
    import gguf

    folder = GOLDEN / case.name
    settings = json.loads((folder / "config.json").read_text())
    model_class = converter_class(tree, settings["architectures"][0])
    if model_class is None:
        return False

    def no_vocabulary(self: Any) -> None:
        self.gguf_writer.add_tokenizer_model("none")
        self.gguf_writer.add_vocab_size(settings["vocab_size"])

    model_class.set_vocab = no_vocabulary
    file_type = {
        "float32": gguf.LlamaFileType.ALL_F32,
        "float16": gguf.LlamaFileType.MOSTLY_F16,
        "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    }[dtype]
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        for source in folder.glob("model*.safetensors*"):
            (Path(scratch) / source.name).symlink_to(source.resolve())
        (Path(scratch) / "config.json").symlink_to((folder / "config.json").resolve())
        # Gemma's converter counts the tokens here, to drop embeddings of none
        vocabulary = {str(token): token for token in range(settings["vocab_size"])}
        tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": []}
        (Path(scratch) / "tokenizer.json").write_text(json.dumps(tokenizer))
        converter = model_class(Path(scratch), file_type, path, model_name=case.name)
        if settings["model_type"] == "gpt_neox":  # the converter knows only the older place of this number
            converter.hparams["rotary_pct"] = settings["rope_parameters"]["partial_rotary_factor"]
        converter.write()
    return True


def rounded_weights(model: Any, path: Path, block_format: str) -> int:
    """Replace weights of `model` by what the blocks in the GGUF file stand for.

    The converter only reorders rows, and blocks lie inside a row, so rounding the checkpoint's own rows gives the same
    numbers; that each rounded tensor holds exactly the file's rows is checked here.

    Returns
    -------
    int
        Number of tensors replaced.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[block_format]
    stored = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.tensor_type == kind]

    def rows(values: np.ndarray) -> bytes:
        return bytes(np.sort(values + 0.0, axis=0).tobytes())  # + 0.0: a negative zero sorts anywhere

    rows_in_file = {rows(gguf.dequantize(tensor.data, kind).reshape(-1, int(tensor.shape[0]))) for tensor in stored}
    replaced = 0
    for parameter in model.parameters():
        if parameter.ndim < 2:
            continue
        values = parameter.detach().numpy()
        rounded = gguf.dequantize(gguf.quantize(values, kind), kind)
        if rows(rounded) in rows_in_file:
            replaced += 1
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(rounded))
    if replaced != len(stored):
        raise SystemExit(f"{path}: {len(stored)} {block_format} tensors, {replaced} recognised")
    return replaced


def quantize(case: Case, binary: Path, block_format: str) -> Path:
    """Write ``model.<format>.gguf`` and ``expected.<format>.safetensors`` of one case; the first one's path."""
    folder = GOLDEN / case.name
    path = folder / f"model.{block_format.lower()}.gguf"
    command = [str(binary), "--pure", str(folder / "model.gguf"), str(path), block_format, "1"]
    subprocess.run(command, check=True, capture_output=True)
    model = load_reference(case, folder)
    rounded_weights(model, path, block_format)
    expected = load_file(folder / "expected.safetensors")
    token_ids = expected["token_ids"].tolist()
    expected["logits"] = token_logits(model, token_ids, case.token_by_token).contiguous()
    prompt = token_ids[: case.prompt_tokens]
    continuation = greedy(model, prompt, case.generated, case.token_by_token, model.config.eos_token_id)
    if continuation is None:
        raise SystemExit(f"{case.name}: a greedy step of the {block_format} model is too close; change the case")
    expected["greedy"] = torch.tensor(continuation)
    save_file(expected, folder / f"expected.{block_format.lower()}.safetensors")
    return path


def llama_cpp_logits(path: Path, token_ids: list[int], vocabulary: int) -> torch.Tensor:
    """Logits (tokens, vocabulary) of llama.cpp on one thread with a float32 cache and no flash attention."""
    llama = importlib.import_module("llama_cpp.llama_cpp")
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        raise RuntimeError(f"llama.cpp refuses {path}")
    options = llama.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = max(64, len(token_ids))
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = 0  # GGML_TYPE_F32
    options.flash_attn_type = 0
    context = llama.llama_init_from_model(model, options)
    batch = llama.llama_batch_init(len(token_ids), 0, 1)
    batch.n_tokens = len(token_ids)
    for i, token in enumerate(token_ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    try:
        if llama.llama_decode(context, batch) != 0:
            raise RuntimeError(f"llama.cpp cannot evaluate {path}")
        size = len(token_ids) * vocabulary
        pointer = ctypes.cast(llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float * size))
        values = np.ctypeslib.as_array(pointer.contents).copy()
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        llama.llama_model_free(model)
    return torch.from_numpy(values.reshape(len(token_ids), vocabulary))


def compare(case: Case, tree: Path) -> str:
    """One line about llama.cpp's logits for `case`, from a float32 file (it rounds activations for smaller types)."""
    expected = load_file(GOLDEN / case.name / "expected.safetensors")
    logits = expected["logits"]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.gguf"
        convert(case, tree, path, "float32")
        try:
            other = llama_cpp_logits(path, expected["token_ids"].tolist(), logits.shape[1])
        except RuntimeError as error:
            return str(error)
    return f"llama.cpp differs by {float((other - logits).abs().max()):.1e}"


def main() -> None:
    """Convert the cases named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description="Write the GGUF golden files.")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="llama.cpp source tree")
    parser.add_argument("--quantize", type=Path, help="llama-quantize binary")
    parser.add_argument("--library", type=Path, help="libllama.so to compare with")
    parser.add_argument("--bindings", type=Path, help="folder that holds the Python package llama_cpp")
    parser.add_argument("cases", nargs="*", help="names from golden_cases.py; all of them by default")
    arguments = parser.parse_args()
    sys.path[:0] = [str(arguments.llama_cpp), str(arguments.llama_cpp / "gguf-py")]
    if arguments.library:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(arguments.library.parent)
        # only its ctypes declarations: the package itself would import more than is installed
        package = types.ModuleType("llama_cpp")
        package.__path__ = [str(arguments.bindings / "llama_cpp")]
        sys.modules["llama_cpp"] = package
        llama = importlib.import_module("llama_cpp.llama_cpp")
        silent = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(silent, ctypes.c_void_p(0))
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for case in CASES:
        if arguments.cases and case.name not in arguments.cases:
            continue
        if case.name in NOT_CONVERTED:
            print(f"{case.name:26} not converted: {NOT_CONVERTED[case.name]}")
            continue
        path = GOLDEN / case.name / "model.gguf"
        if not convert(case, arguments.llama_cpp, path, case.dtype):
            print(f"{case.name:26} not converted: llama.cpp does not know the family")
            continue
        written = [path]
        if arguments.quantize:
            written += [quantize(case, arguments.quantize, block_format) for block_format in case.quantized]
        note = compare(case, arguments.llama_cpp) if arguments.library else ""
        note += f" ({DIFFERS[case.name]})" if note and case.name in DIFFERS else ""
        print(f"{case.name:26} {', '.join(path.name for path in written)} {note}", flush=True)


if __name__ == "__main__":
    main()
