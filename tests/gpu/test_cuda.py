"""Whole models on a GPU: every family against Hugging Face transformers, graphs against single launches, the engine's features.

Needs an NVIDIA GPU and CuPy; skipped elsewhere, where `test_bridge.py` tests all but the kernels.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from float8_folder import WAYS, float8_folders
from golden_table import GOLDEN, TOLERANCE, Golden, differences, goldens, read_safetensors
from samples import PROMPTS, choices, same_choices, texts

from infer import LLM, SamplingParams
from infer.gpu import attention
from infer.gpu.runner import Runner, Size

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("gpu")

GREEDY = SamplingParams(max_tokens=48, temperature=0.0)
SEEDED = SamplingParams(max_tokens=48, temperature=0.9, top_p=0.95, seed=5, repetition_penalty=1.05, n=2)
WITH_LOGPROBS = SamplingParams(max_tokens=48, temperature=0.0, logprobs=3)
QUANTIZED = ("llama", "gpt2", "qwen2", "starcoder2")  # models whose rows are whole groups of 32
BF16_TOLERANCE = 0.4
"""Largest difference of a logit with bfloat16 activations, in standard deviations of the expected logits."""


def load(model: Any = None, **options: Any) -> LLM:
    """An LLM on the GPU, in float32 unless told otherwise."""
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 256 << 20}
    return LLM(model, **{"dtype": "float32", "device": "cuda", **sizes, **options})


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    """The same from the CPU."""
    with LLM(dtype="float32", threads=2) as llm:
        return texts(llm, GREEDY, SEEDED)


@pytest.mark.parametrize("golden", list(goldens()), ids=lambda golden: golden.name)
def test_logits_and_greedy_text(golden: Golden, tmp_path: Path) -> None:
    largest, same = differences(golden, tmp_path, load)
    assert largest <= TOLERANCE
    assert same, "greedy decoding writes other tokens"


@pytest.mark.parametrize("golden", [golden for golden in goldens() if "/" not in golden.name], ids=lambda golden: golden.name)
def test_logits_in_bfloat16(golden: Golden) -> None:
    expected = read_safetensors(golden.expected)
    with load(golden.model, dtype="auto") as llm:
        length = min(len(expected["token_ids"]), llm.max_model_len)
        logits = llm.logits(expected["token_ids"][:length].tolist())
    reference = expected["logits"][:length]
    assert np.abs(logits - reference).max() <= BF16_TOLERANCE * reference.std()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"enable_prefix_caching": False},
        {"kv_cache_memory_bytes": 14 << 18, "max_model_len": 192, "max_num_seqs": 3},
        {"max_num_batched_tokens": 8, "max_num_seqs": 5},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1, "prompt_lookup_max": 3}},
        {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 3}},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "num_draft_tokens": 9, "prompt_lookup_min": 1}},
        {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 3, "num_draft_tokens": 9}},
    ],
    ids=str,
)
def test_texts_are_those_of_the_cpu(options: dict[str, Any], expected: list[Any]) -> None:
    """Batching, sharing, preemption, chunks, speculation: none of them changes a token in float32."""
    with load(**options) as llm:
        assert texts(llm, GREEDY, SEEDED) == expected


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_graphs_give_the_same_bits(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replayed step is computed again kernel by kernel, into the same pages."""
    compared: list[bool] = []
    sizes: set[bool] = set()
    original = Runner.enqueue

    def enqueue(self: Runner, work: Any) -> Any:
        before, after = (np.empty(self._host.choices.shape, np.int32) for _ in range(2))
        self._device.download(before, self._executor.choices)
        self._device.synchronize()
        outcome = original(self, work)
        size, kind = Size(*self.launcher.size(work)), work.draw_kind if any(work.drawn) else None
        if work.logit_rows and self._graphs.get((size, kind, False)) is not None:
            replayed, eager = (np.empty((work.logit_rows, self._host_logits.shape[1]), np.float32) for _ in range(2))
            pointer = self._executor.logits(work.logit_rows).pointer
            self._device.download(replayed, pointer)
            self._device.synchronize()
            self._device.clear(pointer, eager.nbytes)
            self._device.download(after, self._executor.choices)
            self._device.synchronize()
            self._device.upload(self._executor.choices, before)  # rows may follow what the step before chose
            self._executor.forward(self._launch(size, kind))
            self._device.download(eager, pointer)
            self._device.upload(self._executor.choices, after)
            self._device.synchronize()
            sizes.add(size.only_decode)
            compared.append(bool((replayed.view(np.int32) == eager.view(np.int32)).all()))
        return outcome

    monkeypatch.setattr(Runner, "enqueue", enqueue)
    monkeypatch.setattr(Runner, "_hand_over", lambda *_: None)  # or the core launches them itself
    with load(dtype=dtype, enable_prefix_caching=False) as llm:
        for prompts in (PROMPTS[:1], PROMPTS, PROMPTS * 3):
            for _ in range(3):  # a graph is made when a size comes the second time
                llm.generate(prompts, GREEDY)
            llm.generate(prompts, WITH_LOGPROBS)
    assert all(compared)
    assert sizes == {True, False}, "steps of decoding, and steps with prompts"
    assert len(compared) > 200


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_fused_steps_compute_what_they_stand_for(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = list(range(100, 164))
    with load(dtype=dtype) as llm:
        fused = llm.logits(prompt)
    with monkeypatch.context() as patch:
        patch.setattr("infer.gpu.executor.fuse", lambda steps, *_: steps)
        with load(dtype=dtype) as llm:
            plain = llm.logits(prompt)
    assert np.abs(fused - plain).max() <= (BF16_TOLERANCE if dtype == "auto" else 1e-5) * plain.std()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3", "qwen2", "gpt2"])
def test_weights_in_eight_bits(name: str) -> None:
    """Rounded weights change logits a little, where no expert is chosen otherwise for it."""
    folder = GOLDEN / name
    expected = read_safetensors(folder / "expected.safetensors")
    tokens = expected["token_ids"].tolist()
    with load(folder, dtype="auto", quantization="fp8") as llm:
        logits = llm.logits(tokens)
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)
        assert len(llm.generate([{"prompt_token_ids": tokens[:8]}] * 3, params)[2].outputs[0].token_ids) == 8
    difference = np.abs(logits - expected["logits"])
    assert difference.mean() <= 0.2 * expected["logits"].std()


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "qwen3", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "auto"},
        {"dtype": "float32"},
        {"dtype": "auto", "quantization": "fp8"},
        {"dtype": "auto", "kv_cache_dtype": "int8"},
    ],
    ids=str,
)
def test_deterministic_results_do_not_depend_on_company(name: str, options: dict[str, Any]) -> None:
    """Alone and among others, whole and in chunks, cached or not: the same tokens and log-probabilities, bit for bit."""
    expected = read_safetensors(GOLDEN / name / "expected.safetensors")
    tokens = expected["token_ids"].tolist()
    prompts = [tokens[:length] for length in (3, 9, 17, 5, 24, 11, 2, 13)]
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=4)
    seen: list[Any] = []
    sizes = ({}, {"max_num_batched_tokens": 16}, {"enable_prefix_caching": False}, {"enforce_eager": True})
    for others, size in zip((False, True, True, True), sizes, strict=True):
        with load(GOLDEN / name, deterministic=True, **options, **size) as llm:
            work = [{"prompt_token_ids": prompt} for prompt in prompts]
            outputs = llm.generate(work, params) if others else [llm.generate([one], params)[0] for one in work]
            seen.append([(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs])
    assert all(one == seen[0] for one in seen[1:])


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.1), ("auto", BF16_TOLERANCE)])
def test_keys_and_values_in_eight_bits(dtype: str, tolerance: float, kind: str) -> None:
    """The CPU rounds alike, but for numbers in the middle between two."""
    prompt = list(range(100, 180))
    with LLM(dtype="float32", threads=2, kv_cache_dtype=kind) as llm:
        expected = llm.logits(prompt)
    with load(dtype=dtype, kv_cache_dtype=kind) as llm:
        assert np.abs(llm.logits(prompt) - expected).max() < tolerance * expected.std()
        assert len(llm.generate([prompt, prompt[:7]], GREEDY)[1].outputs[0].token_ids) > 0


@pytest.mark.parametrize("quantization", ["int4", "int8"])
@pytest.mark.parametrize("model", QUANTIZED)
def test_rounded_weights_are_those_of_the_cpu(model: str, quantization: str) -> None:
    """The same integers and scales: in float32 as there but for the order of sums; in bfloat16 near that, few rows and many."""
    folder = GOLDEN / model
    tokens = read_safetensors(folder / "expected.safetensors")["token_ids"][:24].tolist()
    with LLM(folder, dtype="float32", threads=2, quantization=quantization) as llm:
        expected = llm.logits(tokens)
    with load(folder, quantization=quantization) as llm:
        assert np.abs(llm.logits(tokens) - expected).max() <= 1e-4 * expected.std()
    for step in (256, 8):
        with load(folder, dtype="auto", quantization=quantization, max_num_batched_tokens=step, max_num_seqs=8) as llm:
            assert np.abs(llm.logits(tokens) - expected).max() <= BF16_TOLERANCE * expected.std()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_stored_eight_bit_floats_are_kept(name: str, way: str, tmp_path: Path) -> None:
    """Folders of 8-bit floats with scales, few rows and many: the float32 weights that they stand for."""
    coded, plain = float8_folders(GOLDEN / name, tmp_path, way)
    tokens = read_safetensors(GOLDEN / name / "expected.safetensors")["token_ids"][:24].tolist()
    with LLM(plain, dtype="float32", threads=2) as llm:
        expected = llm.logits(tokens)
    with load(coded) as llm:
        assert np.abs(llm.logits(tokens) - expected).max() <= 1e-4 * expected.std()
    with load(coded, dtype="auto", max_num_batched_tokens=8, max_num_seqs=8) as llm:  # an expert may be chosen otherwise
        assert np.abs(llm.logits(tokens) - expected).mean() <= 0.1 * expected.std()
    with load(coded, dtype="auto") as llm:  # many rows are rounded to E4M3 too
        assert np.abs(llm.logits(tokens) - expected).mean() <= 0.2 * expected.std()


def test_random_weights_are_those_of_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((GOLDEN / "llama" / "config.json").read_bytes())
    options: dict[str, Any] = {"load_format": "dummy", "seed": 2**63 + 5}
    tokens = list(range(5, 25))
    with LLM(tmp_path, dtype="float32", threads=2, **options) as llm:
        expected = llm.logits(tokens)
    with load(tmp_path, **options) as llm:
        assert np.abs(llm.logits(tokens) - expected).max() <= 1e-4 * expected.std()


def test_attention_that_rotates_by_itself_changes_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty sequences of one prompt, all of which decode together from the first token on."""
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 2048, "head_dim": 128}
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 2048, "hidden_act": "silu"}
    more = {"num_hidden_layers": 3, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps({**kind, **sizes, **more}), encoding="utf-8")
    prompt = {"prompt_token_ids": [j * j % 2048 for j in range(45)]}
    params = SamplingParams(n=30, seed=7, temperature=1.0, max_tokens=100, ignore_eos=True, detokenize=False)
    turned: list[bool] = []

    def found(rotates: bool) -> list[list[int]]:
        def can(*arguments: Any) -> bool:
            turned.append(rotates and attention_turns(*arguments))
            return turned[-1]

        monkeypatch.setattr(attention, "can_attend_turning", can)
        with load(tmp_path, dtype="auto", load_format="dummy", max_num_seqs=30) as llm:
            return [output.token_ids for output in llm.generate([prompt], params)[0].outputs]

    attention_turns = attention.can_attend_turning
    before = found(False)
    assert not any(turned)
    assert len({tuple(tokens) for tokens in before}) == 30
    assert found(True) == before
    assert any(turned)


def test_blocks_of_many_formats_are_those_of_the_cpu() -> None:
    """A model whose matrices are in the formats of Q4_K_M and others: packed, or expanded where no layout holds them."""
    path, tokens = GOLDEN.parent / "k_quants" / "model.gguf", list(range(1, 25))
    with LLM(path, dtype="float32", threads=2) as llm:
        expected = llm.logits(tokens)
    with load(path) as llm:
        assert np.abs(llm.logits(tokens) - expected).max() <= 1e-4 * expected.std()
    for step in (256, 8):
        with load(path, dtype="auto", max_num_batched_tokens=step, max_num_seqs=8) as llm:
            assert np.abs(llm.logits(tokens) - expected).max() <= BF16_TOLERANCE * expected.std()


def test_draws_on_the_gpu_are_the_cores() -> None:
    """All that sampling can be asked for, each beside all others: the same tokens and log-probabilities as on the CPU."""
    with LLM(dtype="float32", threads=2) as llm:
        expected = choices(llm)
    with load() as llm:
        found = choices(llm)
    assert same_choices(found, expected)


def test_a_session_comes_back(tmp_path: Path) -> None:
    prompt = list(range(100, 180))
    with load() as llm:
        cold = llm.generate(prompt, GREEDY)[0].outputs[0]
        llm.save_session(tmp_path / "session", prompt)
    with load() as llm:
        llm.load_session(tmp_path / "session")
        found = llm.generate(prompt, GREEDY)[0]
    assert found.metrics.cached_tokens >= 64
    assert found.outputs[0].token_ids == cold.token_ids


def test_memory_comes_back() -> None:
    from cupy.cuda import runtime

    def cycle() -> int:
        with load() as llm:
            llm.generate(PROMPTS, GREEDY)
        return int(runtime.memGetInfo()[0])

    first = cycle()  # modules and the driver's own memory stay
    assert first - cycle() < 32 << 20


def test_a_request_is_cancelled_and_an_engine_closed_at_work() -> None:
    with load() as llm:
        stream = llm.stream(PROMPTS[1], SamplingParams(max_tokens=200, ignore_eos=True))
        next(stream)
        stream.close()
        assert llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].token_ids
        other = llm.stream(PROMPTS[1], SamplingParams(max_tokens=200, ignore_eos=True))
        next(other)
