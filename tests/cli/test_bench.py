"""`infer bench`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from infer import system_info

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., subprocess.CompletedProcess[str]]

SMALL = ("--prompt-tokens", "64", "--generate-tokens", "8", "--repeat", "2", "--threads", "2")


def test_json(infer_cli: Cli) -> None:
    report = json.loads(infer_cli("bench", *SMALL, "--kv-cache-dtype", '{"value": "fp8"}', "--json").stdout)
    assert report["kv_cache_dtype"] == {"value": "fp8"}
    assert report["prefill_tokens_per_second"] > 0
    assert report["decode_tokens_per_second"] > 0
    assert len(report["prefill_runs"]) == len(report["decode_runs"]) == 2
    assert min(report["decode_runs"]) <= report["decode_tokens_per_second"] <= max(report["decode_runs"])
    assert (report["threads"], report["prompt_tokens"], report["generate_tokens"], report["batch"]) == (2, 64, 8, 1)
    assert report["isa"] in system_info()["available_isas"]


def test_table_without_a_tokenizer_and_with_a_batch(infer_cli: Cli, bare_folder: Path) -> None:
    done = infer_cli("bench", *SMALL, "--batch", "4", "--model", str(bare_folder))
    assert done.returncode == 0, done.stderr
    assert "prefill" in done.stdout
    assert "decode" in done.stdout
    assert "tokens/s" in done.stdout


def test_lengths_fit_the_model(infer_cli: Cli, bare_folder: Path) -> None:
    report = json.loads(infer_cli("bench", "--repeat", "1", "--batch", "600", "--json", "--model", str(bare_folder)).stdout)
    assert (report["prompt_tokens"], report["generate_tokens"]) == (127, 127)
    done = infer_cli("bench", "--prompt-tokens", "128", "--model", str(bare_folder))
    assert done.returncode == 1
    assert "--prompt-tokens must be at most 127" in done.stderr
    done = infer_cli("bench", "--context", "127", "--model", str(bare_folder))
    assert "--context must be at most 126" in done.stderr


def test_decode_after_a_context(infer_cli: Cli, bare_folder: Path) -> None:
    """The context is computed once; only the completions after it count."""
    options = ["--context", "100", "--prompt-tokens", "2", "--batch", "3", "--repeat", "1", "--json"]
    report = json.loads(infer_cli("bench", *options, "--model", str(bare_folder)).stdout)
    assert (report["context"], report["generate_tokens"]) == (100, 28)
    assert report["decode_tokens_per_second"] > 0
