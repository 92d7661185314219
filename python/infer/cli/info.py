"""`infer info`: what a model is."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from infer import model_info, system_info
from infer.cli.common import JsonOption, KvCacheDtypeOption, kv_types, print_json


def info(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A folder, a .gguf file or a hub id; none: the bundled one.")
    ] = None,
    template: Annotated[bool, typer.Option("--template", help="Print the chat template, whole and nothing else.")] = False,
    kv_cache_dtype: KvCacheDtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show what a model is, from its headers alone: family, sizes, quantization, template, and the KV cache it would get here."""
    found = model_info(model, kv_cache_dtype=kv_types(kv_cache_dtype))
    if template:
        print(found.chat_template or "")
    elif as_json:
        print_json(found.as_dict())
    else:
        _table(found.as_dict())


def _table(fields: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in fields.items():
        table.add_row(name.replace("_", " "), _shown(name, value))
    machine = system_info()
    table.add_row("instruction set", f"{machine['isa']} (here: {', '.join(machine['available_isas'])})")
    # A program that reads this wants a long path in one piece.
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000).print(table)


def _shown(name: str, value: Any) -> str:
    if name == "chat_template":
        return f"{len(value)} characters (--template prints it)" if value else "none"
    if name == "parameters":
        return f"{value:,} ({_scaled(value, 1000, ('', ' thousand', ' million', ' billion'))})"
    if "bytes" in name:
        return f"{value:,} ({_scaled(value, 1024, (' B', ' KiB', ' MiB', ' GiB'))})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if value < base:
            return f"{value:,.1f}{unit}"
        value /= base
    return f"{value:,.1f}{units[-1]}"
