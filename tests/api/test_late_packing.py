"""Weights that are packed while a model is used: `rust/model/src/late.rs` as users meet it."""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from float_folder import float_folder

from infer import LLM, InferError, SamplingParams, quantize

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "Once upon a time there was a king who had three daughters"
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of 8-bit weights."""
    folder = tmp_path_factory.mktemp("late")
    quantize(float_folder(folder / "source"), folder / "model.gguf", "int8", threads=2)
    return folder / "model.gguf"


@pytest.mark.parametrize("wait", [0.0, 0.5])
def test_at_once_or_later_it_is_the_same(model: Path, wait: float) -> None:
    """As a file that is read whole, and packed before the model answers."""
    with LLM(model, threads=2, mmap=False) as llm:
        expected, text = llm.logits(TEXT), llm.generate(TEXT, GREEDY)[0].outputs[0].text
    with LLM(model, threads=2) as llm:
        time.sleep(wait)
        assert llm.generate(TEXT, GREEDY)[0].outputs[0].text == text
        assert np.array_equal(llm.logits(TEXT), expected)


def test_a_file_that_goes_or_changes_ends_no_process(model: Path, tmp_path: Path) -> None:
    """One that is deleted is read to its end; one that is cut short is told, unless it was read before."""
    with LLM(model, threads=1) as llm:
        text = llm.generate(TEXT, GREEDY)[0].outputs[0].text
    for number in range(6):
        copy = tmp_path / f"{number}.gguf"
        shutil.copy(model, copy)
        with LLM(copy, threads=1) as llm:
            if number % 2:
                os.truncate(copy, 4096)
            else:
                copy.unlink()
            try:
                assert llm.generate(TEXT, GREEDY)[0].outputs[0].text == text
            except InferError as error:
                assert number % 2
                assert "load the model again" in str(error)
