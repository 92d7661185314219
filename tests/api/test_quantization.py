"""Rounding while loading, and writing the result: `LLM(quantization=)` and `infer.quantize`."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from float_folder import float_folder

from infer import LLM, InferError, SamplingParams, model_info, quantize

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

TEXT = "Once upon a time there was a king who had three daughters, and the youngest of them was so fair"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16-bit floats."""
    return float_folder(tmp_path_factory.mktemp("quantization") / "source")


def logits(model: str | Path, **options: Any) -> NDArray[np.float32]:
    """What a model computes of the text."""
    with LLM(model, max_num_seqs=1, **options) as llm:
        return llm.logits(TEXT)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("name", ["int8", "int4", "int4-g128"])
def test_in_memory_and_on_disk_are_the_same(source: Path, tmp_path: Path, name: str, dtype: str) -> None:
    in_situ = logits(source, quantization=name, threads=2, dtype=dtype)
    assert np.array_equal(in_situ, logits(source, quantization=name.upper(), threads=1, dtype=dtype, mmap=False))
    folder = quantize(source, tmp_path / "folder", name)
    assert np.array_equal(in_situ, logits(folder, dtype=dtype))
    if name != "int4-g128":
        file = quantize(source, tmp_path / "file.gguf", name, threads=1)
        assert np.array_equal(in_situ, logits(file, dtype=dtype))
    exact = logits(source, dtype=dtype)
    error = np.abs(in_situ - exact).mean()
    assert 0 < error < {"int8": 0.05, "int4": 0.6, "int4-g128": 0.8}[name]


def test_what_the_models_say_of_themselves(source: Path, tmp_path: Path) -> None:
    with LLM(source, quantization="q4_0", max_num_seqs=1) as llm:
        assert llm.info.quantization == "int4"
        in_situ = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].text
    whole = model_info(source)
    assert whole.quantization == "F16"
    for output in (tmp_path / "x.gguf", tmp_path / "folder"):
        path = quantize(source, output, "int4")
        assert path == output
        info = model_info(path)
        assert info.quantization == {"x.gguf": "Q4_0", "folder": "int4"}[output.name]
        assert info.parameters == whole.parameters
        assert info.weight_bytes < whole.weight_bytes / 2
        assert (info.chat_template, info.eos_token_ids) == (whole.chat_template, whole.eos_token_ids)
        with LLM(path, max_num_seqs=1) as llm:
            assert llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].text == in_situ
    assert (tmp_path / "folder" / "LICENSE").read_text() == "apache-2.0\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.gguf"]


def test_a_file_ends_talks_and_samples_as_its_folder_does(tmp_path: Path) -> None:
    folder = float_folder(tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    tokenizer_end = config.pop("eos_token_id")  # the tokenizer alone names it
    (folder / "config.json").write_text(json.dumps(config))
    advice = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1, "max_new_tokens": 7}
    generation = {"eos_token_id": [20, 12, 15, 17, 19], **advice}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("tools: {{ tools[0].name }}")
    path = quantize(folder, tmp_path / "elsewhere.gguf", "int8")
    ends = model_info(path).eos_token_ids
    assert ends == model_info(folder).eos_token_ids == sorted({12, 15, 17, 19, 20, *tokenizer_end})
    with LLM(folder, max_num_seqs=1) as theirs, LLM(path, max_num_seqs=1) as ours:
        talk = [{"role": "user", "content": "Hi"}]
        tools = [{"name": "clock"}]
        assert ours.tokenizer.apply_chat_template(talk, tools=tools) == "tools: clock"
        assert ours.tokenizer.apply_chat_template(talk) == theirs.tokenizer.apply_chat_template(talk)
        params = ours.default_sampling_params()
        assert params == theirs.default_sampling_params()
        assert (params.temperature, params.top_k, params.max_tokens) == (0.7, 40, 7)
    keys = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert keys[gguf.Keys.Tokenizer.CHAT_TEMPLATES] == ["tool_use"]
    assert keys[gguf.Keys.General.SAMPLING_TOP_K] == 40
    assert keys["general.sampling.penalty_last_n"] == -1  # all tokens, as in transformers
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.2}')
    with LLM(path, max_num_seqs=1) as llm:
        assert (llm.default_sampling_params().temperature, llm.default_sampling_params().top_k) == (0.2, 40)


@pytest.mark.parametrize(
    ("advice", "words"),
    [
        ({"temperature": "warm"}, 'temperature is "warm"; expected a number'),
        ({"top_k": 1.5}, "top_k is 1.5; expected a whole number of 32 bits"),
        ({"max_new_tokens": 1 << 40}, "max_new_tokens is 1099511627776; expected a whole number of 32 bits"),
    ],
)
def test_advice_that_no_file_can_hold(bare_folder: Path, tmp_path: Path, advice: dict[str, Any], words: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((bare_folder / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(advice))
    with pytest.raises(InferError, match=re.escape(f"generation_config.json: {words}")):
        quantize(tmp_path, tmp_path / "x.gguf", "int8")


def test_advice_of_another_type(bare_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((bare_folder / name).read_bytes())
    (tmp_path / "generation_config.json").write_text('{"top_k": 40}')
    path = quantize(tmp_path, tmp_path / "x.gguf", "int8")
    key = b"general.sampling.top_k"
    whole, float32 = (kind.to_bytes(4, "little") for kind in (gguf.GGUFValueType.INT32, gguf.GGUFValueType.FLOAT32))
    path.write_bytes(path.read_bytes().replace(key + whole, key + float32))
    with pytest.raises(InferError, match=r"general\.sampling\.top_k.* \(f32\); expected a signed 64-bit integer"):
        model_info(path)


def test_a_file_without_a_tokenizer_has_its_ends(bare_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((bare_folder / name).read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5, 7, 9]}')
    path = quantize(tmp_path, tmp_path / "model.out.gguf", "int8")
    assert model_info(path).eos_token_ids == model_info(tmp_path).eos_token_ids


def test_the_gguf_package_reads_the_same_weights(source: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(quantize(source, tmp_path / "model.gguf", "int4"))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert fields["general.quantization_version"] == 2
    assert fields["tokenizer.ggml.eos_token_id"] in model_info(source).eos_token_ids
    kinds = {tensor.name.rsplit(".", 2)[-2]: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["ffn_down"] == kinds["attn_q"] == "Q4_0"
    assert kinds["token_embd"] == "Q6_K"
    assert kinds["attn_norm"] == kinds["output_norm"] == "F32"
    # The folder's integers and scales stand for the same numbers, read as compressed-tensors documents them.
    folder = quantize(source, tmp_path / "folder", "int4")
    name = "model.layers.1.mlp.down_proj.weight"
    packed, scale, shape = (read_tensor(folder, f"{name}_{part}") for part in ("packed", "scale", "shape"))
    nibbles = (packed[:, :, None] >> np.arange(0, 32, 4, dtype=np.int32)) & 15
    integers = nibbles.reshape(shape) - 8
    values = integers * np.repeat(scale.astype(np.float32), 32, axis=1)
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    assert np.array_equal(values, gguf.quants.dequantize(tensor.data, tensor.tensor_type))


def read_tensor(folder: Path, name: str) -> NDArray[Any]:
    """One tensor of a folder."""
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[name]
    start, end = entry["data_offsets"]
    kind = {"I32": np.int32, "F16": np.float16, "I64": np.int64}[entry["dtype"]]
    return np.frombuffer(data[8 + length + start : 8 + length + end], kind).reshape(entry["shape"])


def test_the_folder_says_what_other_programs_need(source: Path, tmp_path: Path) -> None:
    folder = quantize(source, tmp_path / "folder", "int4-g128")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
    }
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


def test_what_is_refused(source: Path, tmp_path: Path, bare_folder: Path) -> None:
    def refused(words: str, call: Callable[[], Any]) -> None:
        with pytest.raises(InferError, match=words):
            call()

    refused('quantization must be one of "int8" or "Q8_0".*got "int3"', lambda: LLM(source, quantization="int3"))
    refused("quantization must be None or a string", lambda: LLM(source, quantization=8))  # type: ignore[arg-type]
    refused('quantization is "int4", but .* is quantized already \\(Q8_0\\)', lambda: LLM(quantization="int4"))
    narrow = bare_folder.parent / "qwen3"
    refused(r"tensor `model.layers.0.mlp.down_proj.weight`.*\[32, 40\].*multiple of 32", lambda: LLM(narrow, quantization="int8"))
    refused('GGUF has no type for "int4-g128"; write a folder', lambda: quantize(source, tmp_path / "x.gguf", "int4-g128"))
    refused("output: .* is no .gguf file", lambda: quantize(bare_folder / "model.gguf", tmp_path / "x", "int4"))
    refused("output: .*folder that does not exist", lambda: quantize(source, tmp_path / "none" / "x.gguf", "int4"))
    refused("output: the name of", lambda: quantize(source, "", "int4"))
    (tmp_path / "there").mkdir()
    refused("output: .*there exists already", lambda: quantize(source, tmp_path / "there", "int4"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_disk_without_room_leaves_nothing_behind(
    source: Path, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    program = """
import resource, sys
from infer import InferError, quantize
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # stands for a disk that is full after a mebibyte
for output in sys.argv[2:]:
    try:
        quantize(sys.argv[1], output, "int8")
    except InferError as error:
        print(error)
"""
    outputs = [str(tmp_path / "model.gguf"), str(tmp_path / "folder")]
    done = run_python(program, str(source), *outputs)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line, output in zip(lines, outputs, strict=True):
        assert line.startswith(f"output: cannot write {output}") and "bytes are needed" in line
    assert list(tmp_path.iterdir()) == []
