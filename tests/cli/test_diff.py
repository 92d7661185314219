"""`infer diff`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from infer import InferError, model_info
from infer.cli.diff import compare

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    Cli = Callable[..., subprocess.CompletedProcess[str]]

EXACT = ("--first", "dtype=float32", "--first", "threads=2")


def test_the_same_way_twice_has_no_difference(infer_cli: Cli) -> None:
    done = infer_cli("diff", *EXACT, "--second", "dtype=float32", "--max-tokens", "8", "--json")
    found = json.loads(done.stdout)
    assert found["largest_difference"] == found["largest_kl_divergence"] == 0
    assert (found["same_likeliest_token"], found["generated_tokens"], found["first_divergent_token"]) == (1, 8, None)
    assert found["first"] == {"dtype": "float32", "threads": 2}


def test_rounding_shows(infer_cli: Cli) -> None:
    shown = infer_cli("diff", *EXACT, "--second", "kv_cache_dtype=int8", "--prompt", "Once upon a time", "-n", "4").stdout
    figures = dict(line.rsplit(maxsplit=1) for line in shown.splitlines() if not line.startswith(("first ", "second ")))
    assert 0 < float(figures["largest difference"]) < float(figures["standard deviation of logits"])
    assert 0 < float(figures["mean kl divergence"]) < 0.1


def test_one_way_may_end_before_the_other(infer_cli: Cli) -> None:
    done = infer_cli("diff", *EXACT, "--first", "max_model_len=60", "--second", "dtype=float32", "--json")
    found = json.loads(done.stdout)
    assert found["tokens"] + found["generated_tokens"] == 60 and found["first_divergent_token"] is None


def test_two_models(infer_cli: Cli) -> None:
    draft = str(Path(model_info().path).with_name("tinylm-draft.gguf"))
    done = infer_cli("diff", *EXACT, "--second", f"model={draft}", "--second", "threads=1", "-n", "4", "--json")
    found = json.loads(done.stdout)
    assert found["mean_kl_divergence"] > 0.1 and found["second"] == {"model": draft, "threads": 1}
    first, second = (np.zeros((3, 5), np.float32), [1]), (np.zeros((3, 6), np.float32), [1])
    with pytest.raises(InferError, match="--first has a vocabulary of 5 tokens, --second one of 6"):
        compare(first, second)


def test_another_vocabulary_is_told_before_anything_is_computed(infer_cli: Cli, bare_folder: Path) -> None:
    done = infer_cli("diff", *EXACT, "--second", f"model={bare_folder}", "-n", "4")
    assert done.returncode == 1
    assert "--second one of 80; only models of one vocabulary can be compared" in " ".join(done.stderr.split())


def test_what_no_way_is(infer_cli: Cli) -> None:
    for wrong, words in (
        ("devise=cuda", "--first: 'devise' is no option of LLM; did you mean 'device'?"),
        ("device", "--first: 'device' is no NAME=VALUE"),
        ("device=tpu", "tpu"),
    ):
        done = infer_cli("diff", "--first", wrong)
        assert done.returncode == 1
        assert words in done.stderr and "Traceback" not in done.stderr
    done = infer_cli("diff", *EXACT, "--second", "threads=x", "-n", "4")
    assert "--second: threads" in done.stderr
