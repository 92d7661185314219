"""`infer generate`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from infer import SamplingParams

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    import pytest

    from infer import LLM

    Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_it_continues_a_prompt_with_the_bundled_model(infer_cli: Cli) -> None:
    done = infer_cli("generate", "Once upon a time", "-n", "32", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Once upon a time")
    assert len(done.stdout.split()) > 12
    assert done.stderr == "", "figures are for a terminal only"
    again = infer_cli("generate", "Once upon a time", "-n", "32", "--seed", "1", "--no-echo")
    assert "Once upon a time" + again.stdout == done.stdout


def test_json_holds_what_python_gives(infer_cli: Cli, llm: LLM) -> None:
    done = infer_cli("generate", "-", "-n", "12", "--temperature", "0", "--json", stdin="The king")
    document = json.loads(done.stdout)
    (output,) = llm.generate("The king", llm.default_sampling_params(max_tokens=12, temperature=0))
    (completion,) = document["outputs"]
    assert document["prompt"] == "The king"
    assert completion["token_ids"] == output.outputs[0].token_ids
    assert completion["text"] == output.outputs[0].text
    assert completion["finish_reason"] == "length"
    assert document["metrics"]["generated_tokens"] == 12
    assert document["model"].endswith("tinylm.gguf")


def test_any_field_of_the_parameters(infer_cli: Cli, llm: LLM) -> None:
    done = infer_cli("generate", "The king", "-n", "12", "--seed", "3", "-p", "n=2", "-p", "top_k=1", "-p", "stop=zzz", "--json")
    found = [completion["token_ids"] for completion in json.loads(done.stdout)["outputs"]]
    greedy = llm.generate("The king", SamplingParams(temperature=0, max_tokens=12))[0].outputs[0].token_ids
    assert found == [greedy, greedy]
    assert infer_cli("generate", "The king", "-n", "4", "-p", "n=2").stdout.count("--- ") == 2


def test_log_probabilities_are_in_the_json(infer_cli: Cli, llm: LLM) -> None:
    options = ("-n", "4", "--temperature", "0", "-p", "logprobs=2", "-p", "prompt_logprobs=1")
    document = json.loads(infer_cli("generate", "The king", *options, "-p", "stop= and", "--json").stdout)
    params = llm.default_sampling_params(max_tokens=4, temperature=0, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate("The king", params)
    (completion,) = output.outputs
    (found,) = document["outputs"]
    assert found["cumulative_logprob"] == completion.cumulative_logprob
    for rows, expected in (
        (found["logprobs"], completion.logprobs),
        (document["prompt_logprobs"][1:], output.prompt_logprobs[1:]),
    ):
        assert [[(one["token_id"], one["logprob"], one["rank"], one["decoded_token"]) for one in row] for row in rows] == [
            [(token, one.logprob, one.rank, one.decoded_token) for token, one in row.items()] for row in expected
        ]
    assert document["prompt_logprobs"][0] is None
    assert "logprobs is shown nowhere here; --json shows them" in infer_cli("generate", "The king", *options).stderr
    assert "logprobs is shown nowhere" in infer_cli("chat", "-p", "logprobs=1", stdin="Hi").stderr


def test_a_field_has_one_value(infer_cli: Cli) -> None:
    done = infer_cli("generate", "The king", "--seed", "3", "-p", "seed=4")
    assert (done.returncode, done.stderr) == (
        1,
        "error: --seed and --param seed=4 are two values for one field; give one of them\n",
    )


def test_biases_by_token(infer_cli: Cli) -> None:
    done = infer_cli("generate", "The king", "-n", "3", "--temperature", "0", "-p", 'logit_bias={"100": 100}', "--json")
    assert json.loads(done.stdout)["outputs"][0]["token_ids"] == [100, 100, 100]
    assert (
        "logit_bias must map token ids to finite numbers, got 'x': 1"
        in infer_cli("generate", "The", "-p", 'logit_bias={"x": 1}').stderr
    )


def test_output_whose_encoding_lacks_a_character(infer_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    options = ("-n", "2", "--temperature", "0")
    assert infer_cli("generate", "é 🙂", *options).stdout.startswith("\\xe9 \\U0001f642")
    assert json.loads(infer_cli("generate", "é 🙂", *options, "--json").stdout)["prompt"] == "é 🙂"


def test_a_device_that_is_none_is_refused(infer_cli: Cli) -> None:
    done = infer_cli("generate", "Once", "--device", "tpu")
    assert done.returncode != 0
    assert "device: 'tpu' is unknown; use 'auto', 'cpu' or 'cuda'" in " ".join(done.stderr.split())


def test_stop_ends_the_text(infer_cli: Cli) -> None:
    done = infer_cli("generate", "The king", "-n", "200", "--temperature", "0", "--stop", " the", "--stop", ",", "--no-echo")
    assert " the" not in done.stdout
    assert "," not in done.stdout


def test_standard_input_ends_without_its_newline(infer_cli: Cli) -> None:
    done = infer_cli("generate", "-", "-n", "4", "--temperature", "0", "--json", stdin="The king\n")
    assert json.loads(done.stdout)["prompt"] == "The king"


def test_a_prompt_that_is_refused_is_not_printed(infer_cli: Cli, bare_folder: Path) -> None:
    done = infer_cli("generate", "a b " * 3000)
    assert (done.returncode, done.stdout) == (1, "")
    done = infer_cli("generate", "Once", "--model", str(bare_folder))
    assert (done.returncode, done.stdout) == (1, "")
    assert "no tokenizer" in done.stderr
