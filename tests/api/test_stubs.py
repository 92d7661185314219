"""`_core.pyi` says what the binary has. CI runs the thorough check (mypy.stubtest); this one takes no minute."""

from __future__ import annotations

import ast
from pathlib import Path

import infer
from infer import _core

STUB = Path(infer.__file__).parent / "_core.pyi"


def stub_names() -> dict[str, set[str]]:
    """Return class -> members, and module-level names under "" ."""
    found: dict[str, set[str]] = {"": set()}
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found[""].add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[""].add(node.target.id)
    return found


def test_stub_and_binary_have_the_same_names() -> None:
    names = stub_names()
    public = {name for name in dir(_core) if not name.startswith("_")} | {"__version__"}
    assert public == names.pop("") | set(names)
    for name, members in names.items():
        present = {member for member in dir(getattr(_core, name)) if not member.startswith("_")}
        if not name.endswith("Error"):
            assert present == {member for member in members if not member.startswith("_")}, name
