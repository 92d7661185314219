"""The command as a whole: help, version, and how mistakes look."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from machine import patience

import infer
from infer.cli import COMMANDS

if TYPE_CHECKING:
    from collections.abc import Callable

    Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_help_lists_every_command(infer_cli: Cli) -> None:
    done = infer_cli("--help")
    assert done.returncode == 0
    assert all(re.search(rf"\b{command}\b", done.stdout) for command in COMMANDS)
    for command in COMMANDS:
        assert infer_cli(command, "--help").returncode == 0


def test_version(infer_cli: Cli) -> None:
    assert infer_cli("--version").stdout.strip() == f"infer {infer.__version__}"


def test_the_script_and_the_module_are_one_command() -> None:
    script = Path(sys.executable).parent / "infer"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"infer {infer.__version__}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--model", "absent.gguf"], "'absent.gguf' does not exist here"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--param", "top_p"], "is no NAME=VALUE"),
        (["generate", "x", "--param", "top_p=7"], "top_p"),
        (["generate", "x", "--param", "top_p=" + "[" * 5000], "top_p must be a number, got"),
        (["generate", "x", "--param", "topp=1"], "did you mean 'top_p'?"),
        (["generate", "x", "--param", "no_such_field=7"], "'no_such_field' is no sampling parameter; known: "),
        (["chat", "--param", "n=2"], "n: 2"),
        (["generate", "x", "--dtype", "int3"], "dtype"),
        (["generate", ""], "no tokens"),
        (["info", "."], "error: "),
        (["bench", "--model", "absent.gguf"], "does not exist here"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(infer_cli: Cli, arguments: list[str], words: str) -> None:
    done = infer_cli(*arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_unknown_options_are_usage_errors(infer_cli: Cli) -> None:
    assert infer_cli("generate", "x", "--no-such-option").returncode == 2
    assert infer_cli("no-such-command").returncode == 2


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
@pytest.mark.parametrize(
    "command",
    ["--help", "--version", "info", "info --json", "generate x -n 2", "generate x -n 2 -p n=2", "generate x -n 2 --json", "chat"],
)
def test_output_that_cannot_be_written_is_one_line(command: str) -> None:
    start = [sys.executable, "-m", "infer", *command.split()]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(start, stdout=full, stderr=subprocess.PIPE, input="hi\n", text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: input or output failed: No space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
@pytest.mark.parametrize("command", ["info", "info --json", "generate x -n 2", "chat", "no-such-command"])
def test_closed_streams_are_no_mistake(command: str) -> None:
    shell = f"{sys.executable} -m infer {command} <&- >&- 2>&-"
    assert subprocess.run(shell, shell=True, check=False).returncode == (2 if command.startswith("no") else 0)


@pytest.mark.skipif(os.name != "posix", reason="signals and pipes of POSIX")
def test_interrupted_and_cut_off(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "infer", "generate", "Once", "-n", "1900", "-p", "ignore_eos=true"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.read(10)
        start = time.monotonic()
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=patience(20))
        assert time.monotonic() - start < patience(2.0)
        assert running.returncode == 130
        assert "Traceback" not in said
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.read(10)
        running.stdout.close()
        said = running.stderr.read()
        running.wait(timeout=patience(20))
        assert "Traceback" not in said
        assert "Exception ignored" not in said
        assert running.returncode == 141, "as SIGPIPE would end it"
