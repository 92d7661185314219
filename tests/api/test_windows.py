"""Models some of whose layers see only a window: these give up pages that the others keep, and no answer tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from infer import LLM, InferError, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

CASES = ["cohere2", "gemma2", "gemma3"]
PROMPT = [5 + 7 * place % 70 for place in range(90)]
PARAMS = SamplingParams(max_tokens=24, temperature=0.8, seed=4, logprobs=2, ignore_eos=True, detokenize=False)


@pytest.fixture(params=CASES)
def folder(request: pytest.FixtureRequest, bare_folder: Path) -> Path:
    return bare_folder.parent / str(request.param)


def answer(llm: LLM, prompt: list[int] = PROMPT) -> tuple[Any, int]:
    """What a prompt is answered with, and how many of its tokens were found."""
    (output,) = llm.generate([prompt], PARAMS)
    return (output.outputs[0].token_ids, output.outputs[0].logprobs), output.metrics.cached_tokens


def test_few_pages_are_enough_for_layers_with_a_window(folder: Path) -> None:
    """The answer in the least memory that holds one sequence is the one in plenty."""
    with LLM(folder, threads=1) as llm:
        expected, cached = answer(llm)
        metrics = llm.metrics()
        assert cached == 0
        assert metrics["window_pages"] >= 4
        assert 0 < metrics["local_pages_total"] <= metrics["pages_total"]
        again, cached = answer(llm)
        assert again == expected
        assert cached >= 80, "the prompt's window is still there"
        all_layers = 8 * 16 * llm.info.kv_bytes_per_token
    small: dict[str, Any] = {"threads": 1, "max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 8}
    with pytest.raises(InferError, match="raise kv_cache_memory_bytes to") as refused:
        LLM(folder, kv_cache_memory_bytes=all_layers // 4, **small)
    least = int(str(refused.value).rsplit(" ", 1)[1])
    assert least < 0.7 * all_layers, "the windows are what saves memory"
    with LLM(folder, kv_cache_memory_bytes=least, **small) as llm:
        metrics = llm.metrics()
        assert metrics["pages_total"] == 8
        assert metrics["local_pages_total"] <= 4
        shorter = [answer(llm, PROMPT[:end])[0] for end in (40, 70, 40)]
        assert shorter[0] == shorter[2]
        assert answer(llm)[0] == expected
        assert answer(llm)[0] == expected


def test_windows_survive_restarts_and_sessions(folder: Path, tmp_path: Path) -> None:
    """Pages come back from disk with all of their layers."""
    with LLM(folder, threads=1) as llm:
        expected, _ = answer(llm)
        llm.save_session(tmp_path / "session", PROMPT)
    for found in (0, 80):
        with LLM(folder, threads=1, kv_offload_dir=tmp_path / "kv") as llm:
            assert answer(llm) == (expected, found)
    with LLM(folder, threads=1) as llm:
        assert llm.load_session(tmp_path / "session")
        again, cached = answer(llm)
        assert again == expected
        assert cached >= 80
