"""Requests that tests with and without a GPU send alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infer import LLM, SamplingParams

PROMPTS = ["Once upon a time", "The cat sat on the mat. The cat sat on the", "one two three one two three one two"]


def texts(llm: LLM, *kinds: SamplingParams) -> list[Any]:
    """What several kinds of request write, alone and together."""
    seen: list[Any] = []
    for params in kinds:
        for prompts in ([PROMPTS[0]], PROMPTS):
            for output in llm.generate(prompts, params):
                seen.append([(one.text, list(one.token_ids), one.finish_reason) for one in output.outputs])
    return seen
