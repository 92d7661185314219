"""Keys and values outside memory: a prefix cache that survives its process, and sessions in files."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest

from infer import LLM, InferError, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = list(range(100, 400))
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=4, logprobs=3, ignore_eos=True)


def answer(llm: LLM, **options: Any) -> tuple[Any, int]:
    """What a request generates, and how much of its prompt was found."""
    (output,) = llm.generate(PROMPT, PARAMS, **options)
    one = output.outputs[0]
    return (one.token_ids, one.text, one.logprobs), output.metrics.cached_tokens


def test_the_prefix_cache_survives_a_restart(tmp_path: Path) -> None:
    """The second process computes a few tokens, and gets the same bits."""
    folder = tmp_path / "kv"
    with LLM(threads=2) as llm:
        cold, cached = answer(llm)
    assert cached == 0
    for expected in (0, 288):
        with LLM(threads=2, kv_offload_dir=folder) as llm:
            found, cached = answer(llm)
            offload = llm.metrics()["offload"]
        assert found == cold
        assert cached == expected
        assert offload["io_errors"] == 0
    with LLM(threads=2, kv_offload_dir=folder) as llm:
        assert answer(llm, cache_salt="other")[1] == 0, "tenants do not meet on disk either"
    with LLM(threads=2, kv_offload_dir=folder, dtype="float32") as llm:
        assert answer(llm)[1] == 0, "what was computed otherwise is another model's"


@pytest.mark.parametrize(
    "kind", ["int8", "fp8", {"key": "float16", "value": "int8"}, {"key": "int8", "value": "fp8", "skip_layers": [0]}], ids=str
)
def test_pages_of_every_type_survive_a_restart_and_never_mix(kind: Any, tmp_path: Path) -> None:
    """Scales go where their pages go; a cache of other types is another cache."""
    folder = tmp_path / "kv"
    with LLM(threads=2, kv_cache_dtype=kind) as llm:
        cold, _ = answer(llm)
        session = tmp_path / "session"
        llm.save_session(session, PROMPT)
    for expected in (0, 288):
        with LLM(threads=2, kv_offload_dir=folder, kv_cache_dtype=kind) as llm:
            assert answer(llm) == (cold, expected)
    with LLM(threads=2, kv_cache_dtype=kind) as llm:
        assert llm.load_session(session)
        found, cached = answer(llm)
        assert found == cold
        assert cached >= 288
    with LLM(threads=2, kv_offload_dir=folder) as llm:
        assert answer(llm)[1] == 0
        with pytest.raises(InferError, match="session"):
            llm.load_session(session)


def test_damaged_pages_are_computed_again(tmp_path: Path) -> None:
    """Whatever happens to the files costs time, never a result."""
    folder = tmp_path / "kv"
    with LLM(threads=2, kv_offload_dir=folder) as llm:
        cold, _ = answer(llm)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 1000)
    assert len(files) >= 18
    for number, path in enumerate(files):
        whole = path.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes([whole[:middle], b"", flipped][number % 3])
    with LLM(threads=2, kv_offload_dir=folder) as llm:
        found, cached = answer(llm)
        assert (found, cached) == (cold, 0)
    with LLM(threads=2, kv_offload_dir=folder) as llm:
        assert answer(llm) == (cold, 288), "and kept again"


def test_pages_that_fall_out_of_memory_come_back(tmp_path: Path) -> None:
    """A pool of a few hundred tokens serves a long prompt again from disk."""
    with LLM(threads=2, kv_offload_dir=tmp_path / "kv", max_model_len=512, kv_cache_memory_bytes=8 << 20) as llm:
        cold, _ = answer(llm)
        for first in range(1000, 1012):
            llm.generate([first] * 400, SamplingParams(max_tokens=1))
        found, cached = answer(llm)
        metrics = llm.metrics()
    assert found == cold
    assert cached >= 288
    assert metrics["saved_pages"] > 0


def test_a_session_goes_on_in_another_process(tmp_path: Path) -> None:
    """Its tokens come back with it."""
    file = tmp_path / "talk.session"
    with LLM(threads=2) as llm:
        (output,) = llm.generate(PROMPT, PARAMS)
        said = output.prompt_token_ids + output.outputs[0].token_ids
        kept = llm.save_session(file, said)
        again, _ = answer(llm)
    assert kept == len(said) - 1, "all but the last token, which was never computed"
    with LLM(threads=2) as llm:
        assert llm.load_session(file) == said[:kept]
        found, cached = answer(llm)
        assert found == again
        assert cached == len(PROMPT) - 1
        with pytest.raises(InferError, match="nothing of this prompt is in the cache"):
            llm.save_session(tmp_path / "none.session", [7, 8, 9])
    assert not (tmp_path / "none.session").exists()


def test_damaged_and_foreign_sessions_are_refused(tmp_path: Path) -> None:
    """In one sentence, and nothing of them is used."""
    file = tmp_path / "talk.session"
    with LLM(threads=2) as llm:
        answer(llm)
        llm.save_session(file, PROMPT)
        whole = file.read_bytes()
        for damaged in (whole[:-1], whole[: len(whole) // 2], b"", whole[:5000] + b"x" + whole[5001:], b"GGUF" + whole[4:]):
            file.write_bytes(damaged)
            with pytest.raises(InferError):
                llm.load_session(file)
        with pytest.raises(InferError):
            llm.load_session(tmp_path / "missing.session")
        file.write_bytes(whole)
        assert len(llm.load_session(file)) == len(PROMPT)
    with LLM(threads=2, dtype="float32") as llm, pytest.raises(InferError):
        llm.load_session(file)


def test_a_folder_that_holds_other_things_is_refused(tmp_path: Path) -> None:
    """Rather than filled, or emptied."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InferError, match="kv_offload_dir"):
        LLM(kv_offload_dir=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_that_takes_nothing_holds_nobody_up(tmp_path: Path) -> None:
    """Pages that cannot be kept are given up at once when the engine closes; it took five seconds."""
    folder = tmp_path / "kv"
    llm = LLM(threads=2, kv_offload_dir=folder)
    shutil.rmtree(folder)
    llm.generate([PROMPT * 6], SamplingParams(max_tokens=4))
    began = time.monotonic()
    llm.close()
    assert time.monotonic() - began < 3


def test_a_bound_that_no_page_fits_under_is_told(tmp_path: Path) -> None:
    """Not found out by a cache that never keeps anything."""
    with pytest.raises(InferError, match=r"^kv_offload_max_bytes is 10; expected more than the \d+ bytes that a single page"):
        LLM(kv_offload_dir=tmp_path / "kv", kv_offload_max_bytes=10)
