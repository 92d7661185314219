"""Every argument a user can get wrong is refused by an `InferError` that names it; none is accepted and ignored."""

from __future__ import annotations

import copy
import json
import os
import pickle
from typing import TYPE_CHECKING, Any

import pytest

from infer import LLM, InferError, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-45),  # as a 32-bit float makes an infinity of every logit
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
        ("logprobs", -2),
        ("logprobs", 2**32 - 1),
        ("prompt_logprobs", -2),
        ("allowed_token_ids", []),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", {1: 1e300}),
        ("logit_bias", {"1": 1.0}),
    ],
)
def test_sampling_parameters_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(InferError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", "hot"), ("n", 1.5), ("stop", 3), ("logit_bias", [1]), ("max_tokens", "x")]
)
def test_sampling_parameters_of_a_wrong_type(name: str, value: Any) -> None:
    with pytest.raises((InferError, TypeError), match=name):
        SamplingParams(**{name: value})


NUMBERS = ("n", "temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "min_tokens", "logprobs", "presence_penalty")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, True) for name in NUMBERS),
        ("stop_token_ids", [True]),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {1: True}),
    ],
)
def test_truth_values_are_no_numbers(name: str, value: Any, llm: LLM) -> None:
    with pytest.raises(InferError, match=f"{name}.*True"):
        SamplingParams(**{name: value})
    for option in ("priority", "timeout"):
        with pytest.raises(InferError, match=f"{option} must be .*True"):
            llm.generate("One", **{option: True})
    with pytest.raises(InferError, match=r"token_ids\[0\] is True"):
        llm.logits([True])


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(InferError, match="min_tokens"):
        SamplingParams(min_tokens=9, max_tokens=8)


def test_unknown_sampling_parameters_are_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]


def test_sampling_parameters_are_values() -> None:
    params = SamplingParams(temperature=0.5, stop="end", logit_bias={3: 1.0}, seed=2**63 - 1)
    assert params == SamplingParams(temperature=0.5, stop=["end"], logit_bias={3: 1.0}, seed=2**63 - 1)
    assert params != params.replace(seed=1)
    assert hash(params) == hash(params.replace())
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert "temperature=0.5" in repr(params)
    with pytest.raises(AttributeError):
        params.temperature = 1.0  # type: ignore[misc]
    with pytest.raises(InferError, match="top_p"):
        params.replace(top_p=2.0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("device", "tpu", "use 'auto', 'cpu' or 'cuda'"),
        ("device", "tpu", "'tpu' is unknown"),
        ("dtype", "int3", "dtype.*int3"),
        ("kv_cache_dtype", "int3", 'kv_cache_dtype must be .*"int8" or "fp8", got \'int3\''),
        ("kv_cache_dtype", {"key": "int3"}, r"kv_cache_dtype\[\"key\"\] must be .*\"fp8\", got 'int3'"),
        ("kv_cache_dtype", {"value": 8}, r"kv_cache_dtype\[\"value\"\].*got 8"),
        ("kv_cache_dtype", {"keys": "int8"}, 'kv_cache_dtype.*"key", "value" and "skip_layers", got \'keys\''),
        ("kv_cache_dtype", {3: "int8"}, "kv_cache_dtype.*got 3"),
        ("kv_cache_dtype", ["int8"], r"kv_cache_dtype.*dictionary.*got \['int8'\]"),
        ("kv_cache_dtype", {"skip_layers": 0}, r"skip_layers\"\] must be a list of numbers of layers.*got 0"),
        ("kv_cache_dtype", {"skip_layers": "01"}, r"skip_layers\"\] must be a list.*got '01'"),
        ("kv_cache_dtype", {"skip_layers": [0, 1.5]}, r"skip_layers\"\]\[1\].*number of a layer, got 1.5"),
        ("kv_cache_dtype", {"skip_layers": [10**20]}, r"skip_layers\"\]\[0\].*got 1000000"),
        ("kv_cache_dtype", {"value": "int8", "skip_layers": [99]}, r"skip_layers\"\] must name layers.*from -\d+ to \d+, got 99"),
        ("kv_cache_dtype", {"skip_layers": [True]}, r"skip_layers\"\]\[0\].*number of a layer, got True"),
        ("threads", 0, "threads.*0"),
        ("threads", True, "threads must be at least 1, got True"),
        ("max_model_len", 0, "max_model_len.*0"),
        ("max_model_len", 10**9, "max_model_len"),
        ("max_num_seqs", 0, "max_num_seqs.*0"),
        ("max_num_batched_tokens", 0, "max_num_batched_tokens.*0"),
        ("step_time_target", 0, "step_time_target must be a number of seconds greater than 0, got 0"),
        ("priority_patience", float("nan"), "priority_patience"),
        ("max_waiting", 2**64, "max_waiting must be at least 1, got 18446744073709551616, which is too large"),
        ("kv_cache_memory_bytes", 1, "kv_cache_memory_bytes"),
        ("kv_offload_max_bytes", 5, "kv_offload_max_bytes is 5, but there is no kv_offload_dir"),
        ("revision", "v2", "revision: 'v2' can be had of a hub id only"),
    ],
)
def test_engine_arguments_out_of_range(name: str, value: Any, words: str) -> None:
    with pytest.raises(InferError, match=words):
        LLM(**{name: value})


def test_the_context_is_a_limit() -> None:
    with LLM(threads=1, max_model_len=64) as llm:
        assert llm.max_model_len == 64
        (output,) = llm.generate([[5] * 60], SamplingParams(max_tokens=100, ignore_eos=True))
        assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (4, "length")
        with pytest.raises(InferError, match="64"):
            llm.generate([[5] * 65])


@pytest.mark.parametrize(
    "kind",
    [
        "float32",
        "float16",
        "bfloat16",
        "int8",
        "fp8",
        "f32",
        "bf16",
        "fp8_e4m3",
        {"key": "f16", "value": "int8"},
        {"value": "fp8", "skip_layers": [0, -1]},
    ],
    ids=str,
)
def test_kv_cache_types_and_reading_instead_of_mapping(kind: Any, llm: LLM) -> None:
    prompt = "Once upon a time there was"
    params = SamplingParams(temperature=0, max_tokens=4)
    with LLM(threads=1, kv_cache_dtype=kind, mmap=False) as other:
        assert len(other.generate(prompt, params)[0].outputs[0].token_ids) == 4
        difference = abs(other.logits(prompt) - llm.logits(prompt))  # of logits that spread by 3.3
        assert difference.max() < 1.0
        assert difference.mean() < 0.15


@pytest.mark.parametrize("content", [b"", b"GGUF", b"x" * 100, b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_files_that_are_no_models(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(InferError):
        LLM(tmp_path / "model.gguf")
    with pytest.raises(InferError):
        LLM(tmp_path)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, bare_folder: Path) -> None:
    for file in bare_folder.iterdir():
        if file.name.startswith("model."):
            (tmp_path / file.name).symlink_to(file)
    settings = json.loads((bare_folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**settings, "architectures": ["NoSuchForCausalLM"]}), encoding="utf-8")
    with pytest.raises(InferError, match=r"NoSuchForCausalLM.*LlamaForCausalLM"):
        LLM(tmp_path)


def test_a_pipe_is_no_tokenizer(tmp_path: Path, bare_folder: Path) -> None:
    for file in bare_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    os.mkfifo(tmp_path / "tokenizer.json")  # whoever opens it would wait for ever
    with pytest.raises(InferError, match=r"tokenizer\.json: not a regular file"):
        LLM(tmp_path, threads=1)


def test_endless_times_are_times(llm: LLM) -> None:
    endless = float("inf")
    assert llm.generate("a", SamplingParams(max_tokens=1), timeout=endless)[0].outputs[0].finish_reason == "length"
    with LLM(threads=1, step_time_target=endless, priority_patience=1e300) as other:
        other.close(drain=True, timeout=endless)


@pytest.mark.parametrize("value", ["x", [1]])
def test_a_timeout_of_closing_that_is_no_number(value: Any) -> None:
    with LLM(threads=1) as llm, pytest.raises(InferError, match="timeout must be None or a number of seconds, got"):
        llm.close(drain=True, timeout=value)


def test_a_progress_bar_that_is_none(llm: LLM) -> None:
    with pytest.raises(InferError, match="use_tqdm must be True, False, None or a replacement for tqdm"):
        llm.generate("a", use_tqdm="yes")  # type: ignore[arg-type]


def advised(tmp_path: Path, bare_folder: Path, text: str) -> LLM:
    for file in bare_folder.iterdir():
        if file.name in ("config.json", "model.safetensors"):
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    return LLM(tmp_path, threads=1)


def test_the_models_own_advice_is_the_default(tmp_path: Path, bare_folder: Path) -> None:
    with advised(tmp_path, bare_folder, '{"temperature": 0.5, "top_k": 7, "max_new_tokens": 3, "do_sample": true}') as llm:
        assert llm.default_sampling_params() == SamplingParams(temperature=0.5, top_k=7, max_tokens=3)
        assert llm.default_sampling_params(top_k=0).top_k == 0
        assert len(llm.generate([[1, 2]])[0].outputs[0].token_ids) <= 3


@pytest.mark.parametrize("text", ["{", "[]", "[" * 5000, "1" * (1 << 21)])
def test_advice_that_is_no_advice(tmp_path: Path, bare_folder: Path, text: str) -> None:
    with pytest.raises(InferError, match="generation_config"):
        advised(tmp_path, bare_folder, text)


def test_advice_of_a_wrong_type(tmp_path: Path, bare_folder: Path) -> None:
    with advised(tmp_path, bare_folder, '{"temperature": "hot"}') as llm:
        with pytest.raises(InferError, match=r"generation_config\.json beside .*: temperature must be a number, got 'hot'"):
            llm.generate([[1, 2]])
        assert llm.default_sampling_params(temperature=0).temperature == 0


@pytest.mark.parametrize(
    ("prompt", "found"),
    [(3, "int"), (b"abc", "bytes"), (bytearray(b"abc"), "bytearray"), (["a", 3], "int"), ([1.5], "float"), ([["a"]], "'a'")],
)
def test_prompts_of_a_wrong_type(llm: LLM, prompt: Any, found: str) -> None:
    with pytest.raises(InferError, match=f"prompts.* got {found}"):
        llm.generate(prompt)


def test_threads_have_a_limit() -> None:
    with pytest.raises(InferError, match="threads must be at most 1024, got 1025"):
        LLM(threads=1025)


def test_prompt_logprobs_of_one_token_only_when_asked(llm: LLM) -> None:
    assert llm.generate([[5]], SamplingParams(max_tokens=1))[0].prompt_logprobs is None
    assert llm.generate([[5]], SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs == [None]
