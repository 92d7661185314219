"""`LLM.logits`: the model itself, without sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from infer import LLM, InferError, SamplingParams


def test_shape_and_agreement_with_greedy_decoding(llm: LLM) -> None:
    (output,) = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=8))
    token_ids = output.prompt_token_ids + output.outputs[0].token_ids
    logits = llm.logits(token_ids)
    assert (logits.dtype, logits.shape) == (np.float32, (len(token_ids), llm.info.vocabulary_size))
    assert np.isfinite(logits).all()
    start = len(output.prompt_token_ids) - 1
    assert logits[start:-1].argmax(axis=1).tolist() == output.outputs[0].token_ids


def test_chunks_do_not_show(llm: LLM) -> None:
    token_ids = llm.tokenizer.encode("In the beginning there was a little house by the sea. " * 60)[:600]
    with LLM(threads=1, max_num_batched_tokens=64) as small:
        assert np.array_equal(small.logits(token_ids), llm.logits(token_ids)), "bit for bit, whatever chunks and threads"
    assert np.array_equal(llm.logits(token_ids[:100]), llm.logits(token_ids)[:100])


def test_text_is_encoded_first(llm: LLM) -> None:
    assert np.array_equal(llm.logits("a small test"), llm.logits(llm.tokenizer.encode("a small test")))


def test_float32_is_the_reference_path(llm: LLM) -> None:
    token_ids = llm.tokenizer.encode("There was a king who had a daughter")
    with LLM(threads=2, dtype="float32") as exact:
        reference = exact.logits(token_ids)
    assert np.abs(reference - llm.logits(token_ids)).max() < 1.0, "activations rounded to 8 bits stay near"


@pytest.mark.parametrize("token_ids", [[], [8192], [-1], [1] * 5000])
def test_what_is_refused(llm: LLM, token_ids: Any) -> None:
    with pytest.raises(InferError):
        llm.logits(token_ids)
