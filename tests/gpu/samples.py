"""Requests that tests with and without a GPU send alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infer import LLM, SamplingParams

PROMPTS = ["Once upon a time", "The cat sat on the mat. The cat sat on the", "one two three one two three one two"]


def kinds() -> list[SamplingParams]:
    """Requests that ask for everything that sampling can do."""
    from infer import SamplingParams

    options: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "min_p": 0.05},
        {"temperature": 0.0},
        {"temperature": 1.5, "top_p": 0.9},
        {"top_k": 7},
        {"top_k": 2000, "top_p": 0.8, "temperature": 2.0},
        {"repetition_penalty": 1.3, "temperature": 0.0},
        {"presence_penalty": 1.5, "frequency_penalty": 0.7, "temperature": 0.8, "logprobs": 2},
        {"repetition_penalty": 1.2, "frequency_penalty": -0.5, "top_p": 0.95, "logprobs": 0},
        {"logit_bias": {300: 5.0, 301: 4.0, 302: -100.0}, "temperature": 1.0, "logprobs": 5},
        {"allowed_token_ids": list(range(250, 330))},
        {"allowed_token_ids": [40, 41, 42, 43], "temperature": 0.0, "logprobs": 1, "logit_bias": {42: 3.0}},
        {"temperature": 0.0, "logprobs": 20},
        {"min_tokens": 9, "stop_token_ids": list(range(100, 400)), "repetition_penalty": 1.1},
        {"logprobs": 40},
    ]
    return [SamplingParams(**{"max_tokens": 12, "ignore_eos": True, "seed": seed, **own}) for seed, own in enumerate(options)]


def choices(llm: LLM, params: list[SamplingParams] | None = None) -> list[tuple[list[int], Any]]:
    """Tokens and log-probabilities of requests, of all `kinds` if not told otherwise, all at once."""
    params = kinds() if params is None else params
    outputs = llm.generate([PROMPTS[1]] * len(params), params)
    return [(list(output.outputs[0].token_ids), output.outputs[0].logprobs) for output in outputs]


def texts(llm: LLM, *kinds: SamplingParams) -> list[Any]:
    """What several kinds of request write, alone and together."""
    seen: list[Any] = []
    for params in kinds:
        for prompts in ([PROMPTS[0]], PROMPTS):
            for output in llm.generate(prompts, params):
                seen.append([(one.text, list(one.token_ids), one.finish_reason) for one in output.outputs])
    return seen


def same_choices(found: list[tuple[list[int], Any]], expected: list[tuple[list[int], Any]]) -> bool:
    """Whether tokens agree, and log-probabilities nearly; which of two nearly equal tokens comes first is nobody's fault."""
    if [tokens for tokens, _ in found] != [tokens for tokens, _ in expected]:
        return False
    pairs = [(ours or [], theirs or []) for (_, ours), (_, theirs) in zip(found, expected, strict=True)]
    rows = [row for ours, theirs in pairs for row in zip(ours, theirs, strict=True)]
    values = [([own.logprob for own in row.values()] for row in both) for both in rows]
    return all(abs(a - b) < 1e-3 for ours, theirs in values for a, b in zip(ours, theirs, strict=True))
