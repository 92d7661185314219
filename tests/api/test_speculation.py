"""Tokens guessed ahead change how many steps a text takes, never the text."""

from __future__ import annotations

from typing import Any

import pytest

from infer import LLM, InferError, SamplingParams
from infer.hub import BUNDLED

PROMPTS = ["Once upon a time", "The cat sat on the mat. The cat sat on the", "one two three one two three one two"]
GREEDY = SamplingParams(max_tokens=48, temperature=0.0, logprobs=2)
SEEDED = SamplingParams(max_tokens=48, temperature=0.9, top_p=0.95, seed=5, repetition_penalty=1.05, presence_penalty=0.1, n=2)
STOPPED = SamplingParams(max_tokens=48, temperature=0.7, seed=9, stop=[" the", "."], min_tokens=6)

CONFIGS: list[dict[str, Any]] = [
    {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1, "prompt_lookup_max": 3},
    {"method": "draft_model", "num_speculative_tokens": 3},
    {"method": "ngram", "num_speculative_tokens": 5, "num_draft_tokens": 16, "prompt_lookup_min": 1, "prompt_lookup_max": 3},
    {"method": "draft_model", "num_speculative_tokens": 3, "num_draft_tokens": 9},
]


def texts(llm: LLM) -> list[Any]:
    """Everything that a caller sees of several kinds of request, alone and together."""
    seen: list[Any] = []
    for params in (GREEDY, SEEDED, STOPPED):
        for prompts in ([PROMPTS[0]], PROMPTS):
            for output in llm.generate(prompts, params):
                seen.append([(one.text, one.token_ids, one.logprobs, one.finish_reason) for one in output.outputs])
    return seen


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    """Without speculation."""
    with LLM(threads=2, seed=0) as llm:
        return texts(llm)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config['method']}-{config.get('num_draft_tokens', 'chain')}")
def test_nothing_changes_but_the_number_of_steps(plain: list[Any], config: dict[str, Any]) -> None:
    """Greedy and seeded, with penalties, logprobs, stop strings and company."""
    with LLM(threads=2, seed=0, speculative_config=config) as llm:
        assert texts(llm) == plain
        metrics = llm.metrics()
    assert 0 < metrics["accepted_tokens"] <= metrics["drafted_tokens"]
    assert metrics["generated_tokens"] > metrics["decode_steps"]
    assert (metrics["branch_tokens"] > 0) == ("num_draft_tokens" in config)


def test_a_perfect_draft_model_is_always_right() -> None:
    """The model itself as its own draft, sampled too: drafts are drawn with the request's own random numbers."""
    config = {"method": "draft_model", "model": str(BUNDLED), "num_speculative_tokens": 3}
    with LLM(threads=2, speculative_config=config) as llm:
        params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
        metrics = llm.generate("The wind", params)[0].metrics
    assert metrics.accepted_tokens == metrics.drafted_tokens >= 29
    assert metrics.decode_steps <= 12


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"method": "magic"}, 'must be "ngram" or "draft_model", got "magic"'),
        ({}, "'method' is needed"),
        ({"method": "ngram", "tokens": 3}, "unknown key 'tokens'"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"method": "ngram", "num_speculative_tokens": 1000}, "num_speculative_tokens must be from 1 to 64, got 1000"),
        ({"method": "ngram", "num_draft_tokens": 3}, "num_draft_tokens must be from num_speculative_tokens = 4, .* to 64, got 3"),
        ({"method": "draft_model", "num_draft_tokens": 65}, "num_draft_tokens must be from .* to 64, got 65"),
        ({"method": "ngram", "num_draft_tokens": "many"}, "num_draft_tokens"),
        ({"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 3}, "prompt_lookup_min must be from 1 to"),
        ({"method": "ngram", "model": str(BUNDLED)}, "'model' is for the method \"draft_model\""),
        ({"method": "ngram", "prompt_lookup_max": 0}, "prompt_lookup_max"),
        ({"method": "draft_model", "prompt_lookup_max": 3}, "'prompt_lookup_max' is for the method \"ngram\""),
        ("ngram", "a dictionary is needed"),
    ],
)
def test_wrong_configurations_are_refused(config: Any, message: str) -> None:
    """By the field that is wrong."""
    with pytest.raises(InferError, match=message):
        LLM(speculative_config=config)


def test_only_the_bundled_model_brings_a_draft_model(bare_folder: Any) -> None:
    """Any other needs one that is named."""
    with pytest.raises(InferError, match="must be given for the method"):
        LLM(bare_folder, speculative_config={"method": "draft_model"})


def test_a_draft_model_of_another_vocabulary_is_refused(bare_folder: Any) -> None:
    """Since its tokens would mean other texts."""
    with pytest.raises(InferError, match="needs the same vocabulary"):
        LLM(speculative_config={"method": "draft_model", "model": str(bare_folder)})
