"""The command `infer`. One file per command; each uses the package's public names, as any program would."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from infer import InferError, __version__
from infer.cli.common import complain

__all__ = ["app", "main"]

COMMANDS = ("generate", "chat", "info", "bench", "quantize", "diff")


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run a command. A reader that has gone (`infer generate ... | head`) ends it as SIGPIPE would, not as a mistake."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # a full disk is noticed here, not at the interpreter's end
        except BrokenPipeError:
            _forget_output()
            sys.exit(141)
        return result


app = typer.Typer(
    name="infer",
    cls=_Commands,
    help="Run large language models on this machine. Without --model, a small one that comes with the package is used.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"infer {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    pass


for _command in COMMANDS:
    _module = importlib.import_module(f"infer.cli.{_command}")
    app.command(name=_command)(getattr(_module, _command))


def _forget_output() -> None:
    """Let what is still buffered go nowhere, so that the interpreter does not try once more to write it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Put a stream that the caller closed (`infer info >&-`), for which Python has None, in the place of nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def main() -> None:
    """Run the command line; what a user can get wrong ends in one line on stderr, not in a traceback."""
    _open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that its encoding lacks are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except InferError as error:
        complain(str(error))
        sys.exit(1)
    except OSError as error:  # of the streams: what goes wrong with models is an InferError
        _forget_output()
        complain(f"input or output failed: {error.strerror or error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
