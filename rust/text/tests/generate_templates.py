"""Write what Jinja2, configured by transformers, renders for the chat templates of the tests.

    python rust/text/tests/generate_templates.py [--data ../shared/data/prompts/chat_templates]

`templates/own.json` keeps the full output for the templates of this repository; `templates/shared.json` keeps, for
templates that lie beside the repository and belong to others, only the length and the FNV-1a hash of each output.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import _alias_reasoning_fields, _compile_jinja_template

HERE = Path(__file__).resolve().parent
#: 2025-07-04 15:06:07 UTC; `strftime_now` in the tests stands still here.
NOW = 1_751_641_567


def fnv1a(data: bytes) -> str:
    """Return the 64-bit FNV-1a hash as hexadecimal text."""
    state = 0xCBF29CE484222325
    for byte in data:
        state = ((state ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return f"{state:016x}"


def render(source: str, request: dict[str, Any]) -> dict[str, str]:
    """Render one request; the result holds either `text` or `error`."""
    moment = datetime.datetime.fromtimestamp(NOW, datetime.UTC).replace(tzinfo=None)
    try:
        template = _compile_jinja_template(source)
        template.globals["strftime_now"] = moment.strftime
        context = {"documents": None, "bos_token": "<s>", "eos_token": "</s>", **request.get("extra", {})}
        context |= {"messages": _alias_reasoning_fields(request["messages"]), "tools": request.get("tools")}
        context["add_generation_prompt"] = request["add_generation_prompt"]
        return {"text": template.render(**context)}
    except Exception as error:  # a template may fail in any way; that it fails is the expectation
        return {"error": f"{type(error).__name__}: {error}"}


def shared_sources(data: Path) -> dict[str, str]:
    """Collect templates by a stable name: path, and index or name inside a JSON file."""
    sources = {}
    for path in sorted(data.rglob("*.jinja")):
        sources[path.relative_to(data).as_posix()] = path.read_text(encoding="utf-8")
    for path in sorted(data.rglob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        name = path.relative_to(data).as_posix()
        if isinstance(values, dict) and isinstance(values.get("chat_template"), str):
            sources[name] = values["chat_template"]
        if isinstance(values, dict) and "cases" in values:
            for index, case in enumerate(values["cases"]):
                sources[f"{name}#{index}"] = case["template"]
    return sources


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=HERE.parents[3] / "shared/data/prompts/chat_templates")
    parser.add_argument("--show", nargs=2, metavar=("TEMPLATE", "REQUEST"), help="print one rendering instead")
    arguments = parser.parse_args()
    requests = json.loads((HERE / "templates/requests.json").read_text(encoding="utf-8"))
    if arguments.show:
        source = shared_sources(arguments.data)[arguments.show[0]]
        request = next(request for request in requests if request["name"] == arguments.show[1])
        print(render(source, request))
        return
    own = {}
    for path in sorted((HERE / "templates").glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        own[path.name] = {request["name"]: render(source, request) for request in requests}
    write("own.json", own)
    if arguments.data.is_dir():
        shared = {}
        for name, source in shared_sources(arguments.data).items():
            results = {request["name"]: render(source, request) for request in requests}
            shared[name] = {key: digest(result) for key, result in results.items()}
        write("shared.json", shared)


def digest(result: dict[str, str]) -> str:
    """Return length and hash of an output, or the error."""
    if "error" in result:
        return f"error: {result['error'][:80]}"
    data = result["text"].encode()
    return f"{len(data)}:{fnv1a(data)}"


def write(name: str, values: dict[str, Any]) -> None:
    """Write a JSON file with one line per template."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    (HERE / "templates" / name).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
