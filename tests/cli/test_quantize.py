"""`infer quantize`, and rounding while loading on the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from float_folder import float_folder

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_a_file_and_a_folder(infer_cli: Cli, tmp_path: Path) -> None:
    source = str(float_folder(tmp_path / "source"))
    greedy = ("--temperature", "0", "-n", "12", "--no-echo")
    expected = infer_cli("generate", "Once upon a time", "-m", source, "-q", "int4", *greedy)
    assert expected.returncode == 0, expected.stderr
    for name, container in (("out.gguf", "gguf"), ("out", "safetensors")):
        path = str(tmp_path / name)
        done = infer_cli("quantize", source, path, "--quantization", "int4", "--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert (report["output"], report["container"]) == (path, container)
        assert infer_cli("generate", "Once upon a time", "-m", path, *greedy).stdout == expected.stdout
    shown = infer_cli("quantize", source, str(tmp_path / "again.gguf"), "-q", "Q8_0")
    assert "again.gguf: gguf, Q8_0, " in shown.stdout.replace("\n", "")


def test_mistakes_are_one_line(infer_cli: Cli, bare_folder: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((str(bare_folder), str(tmp_path)), "exists already"),
        ((str(bare_folder), str(tmp_path / "x"), "-q", "int5"), "quantization must be one of"),
        ((str(bare_folder), str(tmp_path / "x"), "-q", "int4-g128"), "multiple of 128"),
        ((str(bare_folder / "model.q8_0.gguf"), str(tmp_path / "x.gguf")), "quantized already (Q8_0)"),
    ):
        done = infer_cli("quantize", *arguments)
        assert done.returncode == 1
        assert words in done.stderr and "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1


def test_help_says_what_the_names_mean(infer_cli: Cli) -> None:
    shown = " ".join(infer_cli("quantize", "--help").stdout.split())
    for words in ("int4-g128", "Q4_0", "--quantization", "OUTPUT"):
        assert words in shown
