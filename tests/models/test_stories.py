"""A real trained model (stories260K, GGUF, SentencePiece vocabulary) against the text a plain NumPy program wrote with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infer import LLM, SamplingParams

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights" / "stories260K"


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the shared data is not beside this clone")
def test_greedy_text_is_the_reference_programs() -> None:
    cases = json.loads((FOLDER / "EXPECTED.json").read_text(encoding="utf-8"))["cases"]
    with LLM(FOLDER / "stories260K.f32.gguf", dtype="float32", threads=2) as llm:
        for case in cases:
            prompt, expected = case["prompt_ids"], case["all_ids"]
            if case["prompt"]:
                assert llm.tokenizer.encode(case["prompt"]) == prompt
            count = len(expected) - len(prompt)
            params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False)
            written = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0].token_ids
            assert list(written) == expected[len(prompt) :], case["prompt"]
