"""Watching an engine work: logs, traces, and what a model would take."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import pytest

from infer import LLM, InferError, SamplingParams, model_info

if TYPE_CHECKING:
    from pathlib import Path

SHORT = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


def test_logs_tell_of_models_and_requests(caplog: pytest.LogCaptureFixture) -> None:
    """INFO for the model's life, DEBUG for requests, WARNING for those that went wrong; figures are attributes of the records."""
    with caplog.at_level(logging.DEBUG, logger="infer"), LLM(threads=1, max_model_len=256) as llm:
        llm.generate(["One", "Two"], SHORT)
        list(llm.stream("Three", SHORT))
        llm.generate("Four", SamplingParams(max_tokens=200, ignore_eos=True), timeout=1e-6)
    records = [record for record in caplog.records if record.name == "infer"]
    assert [record.levelname for record in records] == ["INFO", "DEBUG", "DEBUG", "DEBUG", "WARNING", "INFO"]
    loaded, *requests, closing = records
    assert loaded.infer_max_model_len == 256
    assert "LlamaForCausalLM" in loaded.getMessage()
    assert [record.infer_finish_reason for record in requests] == ["length"] * 3 + ["timeout"]
    assert all(record.infer_generated_tokens == 4 for record in requests[:3])
    assert (closing.infer_requests_finished, closing.infer_requests_timed_out) == (3, 1)
    assert "3 requests finished" in closing.getMessage()


def test_a_trace_follows_every_request() -> None:
    """Queued, scheduled, first token, ended: in order, with wall-clock times, and each told once."""
    before = time.time()
    with LLM(threads=1, max_model_len=256, trace=True) as llm:
        llm.generate(list(range(5, 45)), SHORT)
        llm.generate(list(range(5, 45)), SHORT)
        events = llm.trace_events()
        assert llm.trace_events() == []
    after = time.time()
    names = ["queued", "scheduled", "first_token", "ended"]
    assert [event["event"] for event in events] == names * 2
    assert len({event["request_id"] for event in events}) == 2
    times = [event["time"] for event in events]
    assert times == sorted(times)
    assert before - 0.01 <= times[0] and times[-1] <= after + 0.01
    assert events[1]["cached_tokens"] == 0 < events[5]["cached_tokens"]
    assert events[3]["finish_reason"] == events[7]["finish_reason"] == "length"


def test_without_being_asked_nothing_is_traced() -> None:
    with LLM(threads=1, max_model_len=256) as llm:
        llm.generate("One", SHORT)
        with pytest.raises(InferError, match=r"trace_events: nothing is recorded; LLM\(trace=True\) keeps"):
            llm.trace_events()
        with pytest.raises(InferError, match=r"kv_events: nothing is recorded; LLM\(kv_events=True\) keeps"):
            llm.kv_events()
        with pytest.raises(InferError, match="trace"):
            LLM(trace="yes")  # type: ignore[arg-type]


def test_what_needs_the_prefix_cache_says_so(tmp_path: Path) -> None:
    for option in ({"kv_events": True}, {"kv_offload_dir": tmp_path / "kv"}):
        with pytest.raises(InferError, match=f"{next(iter(option))} needs enable_prefix_caching=True"):
            LLM(enable_prefix_caching=False, **option)  # type: ignore[arg-type]
    with LLM(threads=1, max_model_len=256, enable_prefix_caching=False) as llm:
        llm.generate([list(range(5, 45))], SHORT)
        with pytest.raises(InferError, match="save_session needs LLM"):
            llm.save_session(tmp_path / "session", list(range(5, 45)))
        with pytest.raises(InferError, match="load_session needs LLM"):
            llm.load_session(tmp_path / "session")


def test_the_cache_a_model_would_get_is_told_beforehand() -> None:
    info = model_info()
    assert info.kv_bytes_per_token == 2 * 2 * info.layers * info.kv_heads * info.head_dim
    with LLM(threads=1) as llm:
        pages = llm.metrics()["pages_total"]
        assert llm.info.kv_bytes_per_token == info.kv_bytes_per_token
    # Free memory may differ a little between the two looks, but not by half.
    assert info.kv_cache_tokens / 2 <= pages * 16 <= info.kv_cache_tokens * 2


def test_the_cache_is_told_in_the_types_it_would_have() -> None:
    def bytes_per_token(kind: object) -> int:
        return model_info(kv_cache_dtype=kind).kv_bytes_per_token  # type: ignore[arg-type]

    plain = model_info()
    half = plain.layers * plain.kv_heads * plain.head_dim  # elements of all keys, and of all values
    scale = 4 * plain.layers * plain.kv_heads
    groups = -(-plain.head_dim // 32)
    assert bytes_per_token("float32") == 8 * half
    assert bytes_per_token("fp8") == 2 * half + 2 * scale
    assert bytes_per_token("int8") == 2 * half + (groups + 1) * scale
    assert bytes_per_token({"key": "float16", "value": "int8"}) == 3 * half + scale
    every = list(range(plain.layers))
    assert bytes_per_token({"key": "int8", "value": "fp8", "skip_layers": every}) == plain.kv_bytes_per_token
    saved = bytes_per_token("float16") - bytes_per_token("fp8")
    one_kept = bytes_per_token({"key": "fp8", "value": "fp8", "skip_layers": [-1]})
    assert one_kept == bytes_per_token("fp8") + saved // plain.layers
    types = {"key": "int8", "value": "int8"}
    with LLM(threads=1, kv_cache_dtype=types, kv_cache_memory_bytes=1 << 20, max_model_len=64) as llm:
        assert llm.info.kv_bytes_per_token == bytes_per_token("int8")
        assert llm.metrics()["pages_total"] == (1 << 20) // (16 * bytes_per_token("int8"))
    with LLM(threads=1, dtype="float32", max_model_len=64) as llm:
        assert llm.info.kv_bytes_per_token == bytes_per_token("float32"), '"auto" is exact where dtype is'
