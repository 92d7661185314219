"""The engine with an executor outside, on the numpy twin of a GPU: everything but the kernels, on any machine."""

from __future__ import annotations

import gc
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from float8_folder import WAYS, float8_folders
from golden_table import GOLDEN, TOLERANCE, Golden, differences, goldens, read_safetensors
from machine import patience
from samples import PROMPTS, choices, same_choices, texts

from infer import LLM, InferError, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy_executor import HostDevice

GREEDY = SamplingParams(max_tokens=10, temperature=0.0)
SEEDED = SamplingParams(max_tokens=10, temperature=0.9, top_p=0.95, seed=5, repetition_penalty=1.05, n=2)


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    """The same from the CPU."""
    with LLM(dtype="float32", threads=2) as llm:
        return texts(llm, GREEDY, SEEDED)


@pytest.mark.parametrize("golden", list(goldens()), ids=lambda golden: golden.name)
def test_every_family_and_container(golden: Golden, open_host: Callable[..., LLM], tmp_path: Path) -> None:
    largest, same = differences(golden, tmp_path, open_host)
    assert largest <= TOLERANCE
    assert same, "greedy decoding writes other tokens"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"deterministic": True},
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
def test_texts_are_those_of_the_cpu(options: dict[str, Any], expected: list[Any], open_host: Callable[..., LLM]) -> None:
    """Batching, sharing, preemption, chunks, speculation: none of them changes a token."""
    assert texts(open_host(**options), GREEDY, SEEDED) == expected


def test_a_llama_layer_is_five_kernels(host: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the embedding and the head; and rows that are drawn on the device cost the host no logits."""
    from infer.gpu import executor, runner

    programs: list[list[str]] = []
    taken: list[int] = []
    fuse, collect = executor.fuse, runner.Runner._collect

    def fused(*arguments: Any) -> Any:
        steps = fuse(*arguments)
        programs.append([kind for kind, _ in steps])
        return steps

    def collected(self: Any, *arguments: Any) -> Any:
        outcome = collect(self, *arguments)
        taken.append(outcome.logits.size)
        return outcome

    monkeypatch.setattr(executor, "fuse", fused)
    monkeypatch.setattr(runner.Runner, "_collect", collected)
    with LLM(device="cuda", dtype="float32", max_num_seqs=2, max_num_batched_tokens=16) as llm:
        layers = llm.info.layers
        llm.generate("Once", GREEDY)
        assert not any(taken)
        llm.generate("Once", SEEDED)
        assert not any(taken)
        llm.generate("Once", SamplingParams(max_tokens=2, logprobs=40))
        assert any(taken)
    layer = ["norm_qkv", "attend", "linear_add", "norm_gated_add"]
    before, after = ["embed", *layer * (layers - 1)], "norm_linear"
    assert programs[0] == [*before, *layer, "select", after]
    # With prompts, what comes after the last attention is for the rows only whose logits are wanted.
    assert programs[1] == [*before, *layer[:2], "select", "select", *layer[2:], after]
    assert len(programs) == 2


@pytest.mark.parametrize("config", [None, {"method": "ngram", "num_draft_tokens": 12, "prompt_lookup_min": 1}], ids=str)
def test_draws_on_the_device_are_the_cores(config: dict[str, Any] | None, open_host: Callable[..., LLM]) -> None:
    """All that sampling can be asked for, each beside all others: the same tokens and log-probabilities as on the CPU."""
    with LLM(dtype="float32", threads=2) as llm:
        expected = choices(llm)
    found = choices(open_host(speculative_config=config))
    assert same_choices(found, expected)


def test_graphs_are_replayed(host: HostDevice) -> None:
    with LLM(device="cuda", dtype="float32", max_num_seqs=4, max_num_batched_tokens=64) as llm:
        llm.generate(PROMPTS, GREEDY)
        assert 1 <= host.captured <= 3
        assert host.replayed >= 6
        logits = llm.logits("Once upon a time")
    assert host.closed
    assert np.isfinite(logits).all()


def test_a_session_comes_back(open_host: Callable[..., LLM], tmp_path: Path) -> None:
    """Pages are read out of the device and put back, the draft model's with them."""
    prompt = list(range(100, 180))
    config = {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 2}}
    first = open_host(**config)
    cold = first.generate(prompt, GREEDY)[0]
    assert first.save_session(tmp_path / "session", prompt)
    second = open_host(**config)
    assert second.load_session(tmp_path / "session")
    found = second.generate(prompt, GREEDY)[0]
    assert found.metrics.cached_tokens >= 64
    assert found.outputs[0].token_ids == cold.outputs[0].token_ids
    with pytest.raises(InferError, match="that of this model and its settings"):
        open_host().load_session(tmp_path / "session")


def test_the_prefix_cache_survives_a_restart(open_host: Callable[..., LLM], tmp_path: Path) -> None:
    prompt = list(range(100, 180))
    for cached in (0, 64):
        llm = open_host(kv_offload_dir=tmp_path / "kv")
        output = llm.generate(prompt, GREEDY)[0]
        assert output.metrics.cached_tokens == cached
        llm.close()


def test_weights_in_eight_bits(open_host: Callable[..., LLM], bare_folder: Path, tmp_path: Path) -> None:
    """Close to the exact ones, never mixed with theirs, and a draft model keeps its own."""
    exact, rounded = (open_host(bare_folder, quantization=kind) for kind in (None, "fp8"))
    prompt = list(range(4, 40))
    expected, found = exact.logits(prompt), rounded.logits(prompt)
    assert 1e-4 < np.abs(found - expected).max() < expected.std()
    exact.generate(prompt, SamplingParams(max_tokens=2, detokenize=False))
    exact.save_session(tmp_path / "session", prompt)
    with pytest.raises(InferError, match="that of this model and its settings"):
        rounded.load_session(tmp_path / "session")


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_keys_and_values_in_eight_bits(kind: str, open_host: Callable[..., LLM], tmp_path: Path) -> None:
    """The CPU rounds alike, and pages are read out with their scales."""
    prompt = list(range(100, 180))
    with LLM(dtype="float32", threads=2, kv_cache_dtype=kind) as llm:
        expected = llm.logits(prompt)
    first = open_host(kv_cache_dtype=kind)
    assert np.abs(first.logits(prompt) - expected).max() < 0.1 * expected.std()
    cold = first.generate(prompt, GREEDY)[0].outputs[0].token_ids
    assert first.save_session(tmp_path / "session", prompt)
    second = open_host(kv_cache_dtype=kind)
    assert second.load_session(tmp_path / "session")
    assert second.generate(prompt, GREEDY)[0].outputs[0].token_ids == cold
    mixed = open_host(kv_cache_dtype={"key": "float16", "value": kind, "skip_layers": [0]})
    assert np.abs(mixed.logits(prompt) - expected).max() < 0.5 * expected.std()


def test_energy_is_shared_out(open_host: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    from infer.gpu import energy
    from infer.gpu.energy import PowerMeter

    now, taken = [0.0], [0.0]
    meter = PowerMeter(lambda: taken[0], lambda: now[0])
    watts = []
    for seconds in (0.05, 0.05, 0.05, 0.05, 0.06, 1.0, *[0.05] * 6):
        now[0], taken[0] = now[0] + seconds, taken[0] + seconds * (300 if seconds < 0.5 else 60)
        watts.append(meter.step())
    known = [value for value in watts if value is not None]
    assert np.allclose(known, [300, 300]), "what idling takes is no work's"
    monkeypatch.setattr(energy, "INTERVAL", 0.01)
    monkeypatch.setattr(energy, "IDLE", 10.0)
    llm = open_host()
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    llm.generate(PROMPTS, params)  # after which the power is known
    outputs = llm.generate(PROMPTS, params)
    total = sum(output.metrics.joules or 0 for output in outputs)
    metrics = llm.metrics()
    assert 0 < total <= metrics["joules"] <= 51 * metrics["histograms"]["step_time"]["sum"]


def test_cancelling_leaves_the_others_alone(open_host: Callable[..., LLM], expected: list[Any]) -> None:
    llm = open_host()
    stream = llm.stream(PROMPTS[1], SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    assert texts(llm, GREEDY, SEEDED) == expected
    assert llm.metrics()["requests_aborted"] == 1


def test_closing_ends_what_runs_and_the_thread(open_host: Callable[..., LLM]) -> None:
    llm = open_host()
    ended: list[BaseException | None] = []

    def work() -> None:
        try:
            llm.generate(PROMPTS, SamplingParams(max_tokens=4000, ignore_eos=True))
            ended.append(None)
        except InferError as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not llm.metrics()["generated_tokens"]:
        time.sleep(0.001)
    start = time.perf_counter()
    llm.close()
    thread.join()
    assert time.perf_counter() - start < patience(5)
    assert len(ended) == 1
    assert not workers()


def workers() -> list[threading.Thread]:
    """Threads that work for a device."""
    return [thread for thread in threading.enumerate() if thread.name == "infer-gpu"]


def test_an_llm_that_is_dropped_gives_its_device_back(host: HostDevice) -> None:
    llm = LLM(device="cuda", dtype="float32", max_num_seqs=2, max_num_batched_tokens=16)
    llm.generate("Once", SamplingParams(max_tokens=2))
    del llm
    gc.collect()
    deadline = time.perf_counter() + patience(5)
    while not host.closed and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert host.closed


def test_a_broken_device_fails_requests_and_says_so(host: HostDevice) -> None:
    with LLM(device="cuda", dtype="float32", max_num_seqs=2, max_num_batched_tokens=16) as llm:
        host.fail_after = 3
        with pytest.raises(InferError, match="illegal memory access"):
            llm.generate("Once", SamplingParams(max_tokens=20, ignore_eos=True))
        with pytest.raises(InferError, match="the GPU failed and cannot go on"):
            llm.generate("Once", SamplingParams(max_tokens=20))
    assert host.closed


def test_a_bug_in_one_step_fails_that_step(host: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(device="cuda", dtype="float32", max_num_seqs=2, max_num_batched_tokens=16) as llm:
        with monkeypatch.context() as patch:
            patch.setattr("infer.gpu.runner.Runner.enqueue", lambda self, work: 1 / 0)
            with pytest.raises(InferError, match="a bug in infer: ZeroDivisionError"):
                llm.generate("Once", GREEDY)
        assert llm.generate("Once", GREEDY)[0].outputs[0].text


def test_a_program_may_end_without_closing(run_python: Callable[..., Any]) -> None:
    """Neither a module's variable nor a thread that still generates keeps the interpreter from exiting."""
    from pathlib import Path

    program = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import infer.gpu.device
from numpy_executor import HostDevice
infer.gpu.device.Device = HostDevice
from infer import LLM, SamplingParams
llm = LLM(device="cuda", dtype="float32", max_num_seqs=2, max_num_batched_tokens=16)
other = LLM(device="cuda", dtype="float32", max_num_seqs=2, max_num_batched_tokens=16)
stream = llm.stream("Once", SamplingParams(max_tokens=500, ignore_eos=True))
print(next(stream).text)
"""
    result = run_python(program, str(Path(__file__).parent), timeout=60)
    assert result.returncode == 0, result.stderr


def test_what_the_gpu_cannot_is_refused(open_host: Callable[..., LLM]) -> None:
    with pytest.raises(InferError, match=r'quantization must be one of .*got "int3"'):
        open_host(quantization="int3")
    with pytest.raises(InferError, match="is quantized already"):
        open_host(quantization="int4")
    with pytest.raises(InferError, match="max_num_seqs must be at least 1, got 0"):
        open_host(max_num_seqs=0)
    with pytest.raises(InferError, match="enforce_eager must be True or False"):
        open_host(enforce_eager=1)
    with pytest.raises(InferError, match="deterministic must be True or False"):
        open_host(deterministic="yes")
    with pytest.raises(InferError, match="more than the device has free"):
        open_host(kv_cache_memory_bytes=1 << 40)
    assert not workers()


def test_without_cupy_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(InferError, match=r"needs CuPy.*pip install 'infer\[cuda13\]'"):
        LLM(device="cuda")


QUANTIZED = ("llama", "gpt2", "qwen2", "starcoder2")


@pytest.mark.parametrize("quantization", ["int4", "int8"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_rounded_weights_are_those_of_the_cpu(name: str, quantization: str, open_host: Callable[..., LLM]) -> None:
    """The same integers and scales, computed with in float32 here as there: logits differ by the order of sums alone."""
    folder = GOLDEN / name
    tokens = read_safetensors(folder / "expected.safetensors")["token_ids"][:24].tolist()
    with LLM(folder, dtype="float32", threads=2, quantization=quantization) as llm:
        expected = llm.logits(tokens)
    llm = open_host(folder, quantization=quantization)
    assert llm.info.quantization == quantization
    assert np.abs(llm.logits(tokens) - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_stored_eight_bit_floats_are_kept(name: str, way: str, open_host: Callable[..., LLM], tmp_path: Path) -> None:
    """Folders of 8-bit floats with scales: logits of the float32 weights that they stand for; and 8 bits on the device."""
    from infer.gpu.worker import Weights

    coded, plain = float8_folders(GOLDEN / name, tmp_path, way)
    tokens = read_safetensors(GOLDEN / name / "expected.safetensors")["token_ids"][:24].tolist()
    with LLM(plain, dtype="float32", threads=2) as llm:
        expected = llm.logits(tokens)
    with LLM(coded, dtype="float32", threads=2) as llm:
        assert (llm.logits(tokens) == expected).all()
        assert llm.info.quantization == "F8_E4M3"
    kinds: list[str] = []
    load = Weights._loaded

    def loaded(self: Any, *arguments: Any) -> Any:
        weight = load(self, *arguments)
        kinds.append(weight.type)
        return weight

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "_loaded", loaded)
        llm = open_host(coded)
    assert np.abs(llm.logits(tokens) - expected).max() <= 1e-4 * expected.std()
    assert kinds.count("e4m3") >= 4


def test_random_weights_are_those_of_the_cpu(open_host: Callable[..., LLM], tmp_path: Path) -> None:
    """Made by the device, in parts and rounded there: the same as in the core, for the same seed alone."""
    for name in ("qwen2", "gpt2", "qwen3_moe"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_bytes((GOLDEN / name / "config.json").read_bytes())
        options: dict[str, Any] = {"load_format": "dummy", "seed": 2**63 + 5}
        tokens = list(range(5, 25))
        for rounding in (None, "int8") if name != "qwen3_moe" else (None,):
            with LLM(folder, dtype="float32", threads=2, quantization=rounding, **options) as llm:
                expected = llm.logits(tokens)
            found = open_host(folder, quantization=rounding, **options).logits(tokens)
            assert np.abs(found - expected).max() <= 1e-4 * expected.std(), (name, rounding)
        other = open_host(folder, **{**options, "seed": 6}).logits(tokens)
        assert np.abs(other - expected).max() > 0.1 * expected.std()
    with pytest.raises(InferError, match='load_format must be "auto" or "dummy"'):
        open_host(folder, load_format="zeros")
    with pytest.raises(InferError, match=r"needs a folder with config\.json"):
        LLM(load_format="dummy")


def test_blocks_of_many_formats_are_those_of_the_cpu(open_host: Callable[..., LLM]) -> None:
    """A model whose matrices are in the formats of Q4_K_M and others: packed, or expanded where no layout holds them."""
    path = GOLDEN.parent / "k_quants" / "model.gguf"
    tokens = list(range(1, 25))
    with LLM(path, dtype="float32", threads=2) as llm:
        expected = llm.logits(tokens)
    llm = open_host(path)
    assert np.abs(llm.logits(tokens) - expected).max() <= 1e-4 * expected.std()
