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
            return super().invoke(ctx)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered has nowhere to go
            sys.exit(141)


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


def main() -> None:
    """Run the command line; what a user can get wrong ends in one line on stderr, not in a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that its encoding lacks are escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except InferError as error:
        complain(str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
