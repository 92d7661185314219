"""The rules of the house that neither cargo nor a linter can guard. README's "Map" says them in words.

Collected by pytest (`python_files` in pyproject.toml). A rule that has an exception names it here with its reason, and an
exception that is no longer needed fails too.
"""

from __future__ import annotations

import ast
import re
import statistics
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "infer"
CRATES = sorted(path.parent for path in ROOT.glob("rust/*/Cargo.toml"))

# crate -> our own crates that it may name
MAY_IMPORT = {
    "formats": set(),
    "kernels": set(),
    "engine": set(),
    "text": set(),
    "store": set(),
    "model": {"formats", "kernels"},
    "bindings": {"formats", "kernels", "engine", "store", "text", "model"},
}
# third-party crates that belong to one room alone
ONE_ROOM = {
    "pyo3": "bindings",
    "numpy": "bindings",
    "tokenizers": "text",
    "minijinja": "text",
    "minijinja-contrib": "text",
    "memmap2": "model",
    "getrandom": "store",
}
# crate -> how many `unsafe` blocks, and types of foreign functions, it may hold; kernels are free, each block with its SAFETY
# line (clippy checks that)
UNSAFE_BLOCKS = {"formats": 0, "engine": 0, "store": 0, "text": 0, "bindings": 15, "model": 2}

MAX_FILE_LINES = 400
LONG_FILES: dict[str, str] = {}
MAX_FUNCTION_LINES = 60
LONG_FUNCTIONS = {
    "rust/model/src/interpreter.rs:step": "one arm per kind of step; the compiler sees that none is missing",
    "rust/bindings/src/steps.rs:fields": "one arm per kind of step; the compiler sees that none is missing",
    "rust/model/src/step.rs:fmt": "one line of text per kind of step",
    "rust/model/src/rope.rs:read": "one arm per kind of rope scaling",
}
# Instruction-set files and tables are lists of small things: their length is no sign of tangle.
UNLIMITED = ("rust/kernels/src/simd/", "rust/model/src/arch.rs", "python/infer/_core.pyi")

# files whose text says that something is unfinished, with the reason why nothing is
WORDS_AS_DATA = {"tests/text/compare_tokenizers.py": "a line of source code to tokenize"}

# ops and quant files of the CPU that have no CUDA twin, with the reason
REPACKED = "the GPU's loader unpacks it and stores a type that the GPU multiplies"
NO_CUDA_TWIN: dict[str, str] = {
    "ops/gated": "the GPU's products combine gates themselves, where that is faster",
    "ops/math": "CUDA has exp, tanh and erf",
    **{
        f"quant/{path.stem}": REPACKED
        for path in (ROOT / "rust" / "kernels" / "src" / "quant").glob("*.rs")
        if path.stem not in {"mod", "bfloat16", "float16", "float32"}
    },
    **{f"quant/{name}": "an element type of common.cuh" for name in ("bfloat16", "float16", "float32")},
}
# CUDA files that carry another stem than their CPU twin, or whose twin is no file of ops
CUDA_TWINS = {
    "attention_decode": "rust/kernels/src/ops/attention/mod.rs",
    "attention_plan": "rust/kernels/src/ops/attention/plan.rs",
    "attention_prefill": "rust/kernels/src/ops/attention/mod.rs",
    "attention_warp_group": "rust/kernels/src/ops/attention/mod.rs",
    "experts": "rust/model/src/experts.rs",
    "experts_grouped": "rust/model/src/experts.rs",
    "kv": "rust/kernels/src/kv.rs",
    "layers": "rust/model/src/interpreter.rs",
    "pages": "rust/kernels/src/kv.rs",
    "linear_many": "rust/kernels/src/ops/linear.rs",
    "linear_rope": "rust/kernels/src/ops/linear.rs",
    "linear_stream": "rust/kernels/src/ops/linear.rs",
    "linear_warp_group": "rust/kernels/src/ops/linear.rs",
    "linear_wide": "rust/kernels/src/ops/linear.rs",
    "logprobs": "rust/engine/src/logprobs.rs",
    "pack": "rust/kernels/src/quant/fit.rs",
    "random": "rust/model/src/dummy.rs",
    "rows": "rust/model/src/interpreter.rs",
    "sampler": "rust/engine/src/sampler.rs",
    "screen": "rust/engine/src/sampler.rs",
    "screen_many": "rust/kernels/src/ops/linear.rs",
    "screen_rough": "rust/kernels/src/ops/linear.rs",
}


def sources(*suffixes: str) -> list[Path]:
    folders = ("rust", "python", "cuda", "tests", "benches", "tools", "examples")
    skipped = {"target", "__pycache__", ".venv", "work", "corpus", "artifacts"}
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and path.is_file() and not skipped & set(path.relative_to(ROOT).parts)
    )


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[str, str | None, ast.stmt]]:
    """Yield (module, imported name or None, statement) for every import, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                yield node.module or "", alias.name, node


def python_modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


# ---- Rust rooms


def test_every_crate_is_on_the_map() -> None:
    assert {crate.name for crate in CRATES} == set(MAY_IMPORT)


@pytest.mark.parametrize("crate", CRATES, ids=lambda crate: crate.name)
def test_crates_import_downwards_only(crate: Path) -> None:
    manifest = tomllib.loads((crate / "Cargo.toml").read_text(encoding="utf-8"))
    for section in ("dependencies", "dev-dependencies", "build-dependencies"):
        for dependency in manifest.get(section, {}):
            if dependency.startswith("infer-"):
                assert dependency.removeprefix("infer-") in MAY_IMPORT[crate.name], f"{crate.name} names {dependency}"
            if section == "dependencies" and dependency in ONE_ROOM:
                assert crate.name == ONE_ROOM[dependency], f"{dependency} belongs to {ONE_ROOM[dependency]}"
    assert manifest.get("lints") == {"workspace": True}, f"{crate.name} opts out of the workspace's lints"


@pytest.mark.parametrize("crate", sorted(UNSAFE_BLOCKS))
def test_unsafe_stays_in_kernels(crate: str) -> None:
    found = [
        f"{name_of(path)}:{number}"
        for path in sorted((ROOT / "rust" / crate / "src").rglob("*.rs"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\bunsafe\s*(\{|fn|impl|extern)", line.split("//")[0])
    ]
    assert len(found) <= UNSAFE_BLOCKS[crate], found
    files = {place.split(":")[0] for place in found}
    assert crate != "bindings" or files == {"rust/bindings/src/driver.rs"}, "the CUDA driver's functions have one file"


@pytest.mark.parametrize("crate", ["formats", "engine", "store"])
def test_rooms_that_parse_and_decide_forbid_unsafe(crate: str) -> None:
    assert "#![forbid(unsafe_code)]" in (ROOT / "rust" / crate / "src" / "lib.rs").read_text(encoding="utf-8")


def test_operations_and_formats_have_cuda_twins() -> None:
    kernels, cuda = ROOT / "rust" / "kernels" / "src", ROOT / "cuda"
    twins = {f"{room}/{path.stem}" for room, path in _kernel_stems(kernels)}
    stems = {path.stem for path in cuda.glob("*.cu")}
    assert set(CUDA_TWINS) <= stems, "each file that is said to have another twin is there"
    assert all((ROOT / twin).is_file() for twin in CUDA_TWINS.values()), "twins that moved"
    made = {f"ops/{stem}" for stem in stems - set(CUDA_TWINS)}
    made |= {f"quant/{path.stem}" for path in (cuda / "quant").glob("*.cuh")}
    assert twins - made == set(NO_CUDA_TWIN), "each operation and format has its CUDA twin or a reason"
    assert made <= twins, "CUDA files carry the stem of their CPU twin"


def test_the_extension_carries_every_kernel_source() -> None:
    text = (ROOT / "rust" / "bindings" / "src" / "sources.rs").read_text(encoding="utf-8")
    listed = re.findall(r'^    "([\w/.]+)",$', text, re.MULTILINE)
    present = {path.relative_to(ROOT / "cuda").as_posix() for path in (ROOT / "cuda").rglob("*.cu*")}
    assert sorted(present) == listed, "sources.rs names each file of cuda/ once, in order"


def test_the_gpu_executor_has_a_method_per_step() -> None:
    text = (ROOT / "rust" / "model" / "src" / "step.rs").read_text(encoding="utf-8")
    body = re.search(r"^pub enum Step \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    assert body is not None
    variants = re.findall(r"^    (\w+) \{$", body[1], re.MULTILINE)
    steps = {re.sub(r"(?<!^)(?=[A-Z])", "_", variant).lower() for variant in variants}
    assert len(steps) >= 16
    executor = next(
        node for node in parse(PACKAGE / "gpu" / "executor.py").body if isinstance(node, ast.ClassDef) and node.name == "Executor"
    )
    methods = {node.name for node in executor.body if isinstance(node, ast.FunctionDef) and _takes_a_launch(node)}
    assert methods - {"forward", "choose", "_rows"} == steps, "each kind of step has its method, and nothing else looks like one"


def _takes_a_launch(method: ast.FunctionDef) -> bool:
    return len(method.args.args) > 1 and method.args.args[1].arg == "launch"


def _kernel_stems(kernels: Path) -> Iterator[tuple[str, Path]]:
    for room in ("ops", "quant"):
        for path in sorted([*(kernels / room).glob("*.rs"), *(mod.parent for mod in (kernels / room).glob("*/mod.rs"))]):
            if path.stem not in {"mod", "tests"}:
                yield room, path


# ---- Python rooms


@pytest.mark.parametrize("path", python_modules(), ids=name_of)
def test_python_imports(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    public = _public_names()
    for module, name, statement in imports(parse(path)):
        place = f"{name_of(path)}:{statement.lineno}"
        whole = f"{module}.{name}" if name else module
        if module.split(".")[0] == "cupy":
            assert room == "gpu", f"{place}: cupy belongs to infer/gpu"
        if room == "cli" and module.split(".")[0] == "infer" and not whole.startswith("infer.cli"):
            assert module == "infer" and name in public, f"{place}: the command line uses public names, not {whole}"
        if room != "cli" and whole.startswith("infer.cli"):
            assert path.name == "__main__.py", f"{place}: nothing imports the command line"
        if whole.startswith("infer.gpu") and room != "gpu":
            assert statement.col_offset > 0, f"{place}: infer.gpu is imported inside the function that needs it"


@pytest.mark.parametrize("path", python_modules(), ids=name_of)
def test_python_keeps_no_ambient_state_and_validates_by_exception(path: Path) -> None:
    for node in ast.walk(parse(path)):
        assert not isinstance(node, ast.Global), f"{name_of(path)}:{node.lineno}: no globals that change"
        assert not isinstance(node, ast.Assert), f"{name_of(path)}:{node.lineno}: users' mistakes raise InferError"


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    """`import infer` stays fast and starts no thread (numpy's BLAS would)."""
    heavy = {"numpy", "typer", "rich", "huggingface_hub", "tqdm", "asyncio", "cupy"}
    for path in python_modules():
        if path.relative_to(PACKAGE).parts[0] == "cli":
            continue
        top = [node for node in parse(path).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for module, _, statement in imports(ast.Module(body=list(top), type_ignores=[])):
            assert module.split(".")[0] not in heavy, f"{name_of(path)}:{statement.lineno} imports {module} at the top"


def test_every_command_has_its_file_and_its_test() -> None:
    commands = {path.stem for path in (PACKAGE / "cli").glob("*.py")} - {"__init__", "common"}
    registered = (PACKAGE / "cli" / "__init__.py").read_text(encoding="utf-8")
    for command in commands:
        assert f'"{command}"' in registered, f"{command} is not registered in cli/__init__.py"
        assert (ROOT / "tests" / "cli" / f"test_{command}.py").is_file(), f"tests/cli/test_{command}.py is missing"


def _public_names() -> set[str]:
    for node in parse(PACKAGE / "__init__.py").body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError("infer/__init__.py has no __all__")


# ---- sizes


def test_files_stay_small() -> None:
    lengths = {
        name_of(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources(".rs", ".py", ".pyi", ".cu", ".cuh")
        if not name_of(path).startswith(UNLIMITED)
    }
    over = {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}
    assert set(over) == set(LONG_FILES), over


def test_functions_stay_small() -> None:
    lengths = {}
    for path in sources(".py"):
        if not name_of(path).startswith("tools/tinylm/t"):  # the training scripts are kept as they ran
            for node in ast.walk(parse(path)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    lengths[f"{name_of(path)}:{node.name}"] = _body_lines(node)
    for path in sources(".cu", ".cuh"):
        lengths.update({f"{name_of(path)}:{name}": lines for name, lines in _cuda_functions(path)})
    for path in sources(".rs"):
        if not name_of(path).startswith(UNLIMITED):
            lengths.update({f"{name_of(path)}:{name}": lines for name, lines in _rust_functions(path)})
    over = {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}
    assert set(over) == set(LONG_FUNCTIONS), over
    assert statistics.median(lengths.values()) <= 15


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines without its signature and docstring: a long table of parameters is no tangle."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def _rust_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (name, lines of body) of each function; rustfmt puts the closing brace under the first letter of its line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = re.compile(r"^(\s*)(?:pub(?:\([\w: ]+\))? )?(?:const |async |unsafe |extern \"C\" )*fn (\w+)")
    for start, line in enumerate(lines):
        if match := head.match(line):
            body = start
            while not lines[body].endswith(("{", "}", ";")):
                body += 1  # the signature goes on
            if lines[body].endswith("{"):
                end = next(number for number in range(body, len(lines)) if lines[number] == match[1] + "}")
                yield match[2], end - body - 1


def _cuda_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield (name, lines of body) of each function; the closing brace stands under the first letter of its line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = re.compile(r"^( *)(?:template <[^>]*> )?(?:DEVICE|KERNEL|BOUNDED_KERNEL\(.*\)) *(?:[\w:<> ]+ )?[*&]?([\w()]*)\(?")
    for start, line in enumerate(lines):
        if (match := head.match(line)) and not line.rstrip().endswith("}"):
            body = start
            while body < len(lines) and not lines[body].endswith(("{", "}", ";")):
                body += 1  # the signature goes on
            if body < len(lines) and lines[body].endswith("{"):
                end = next(number for number in range(body, len(lines)) if lines[number].rstrip(";") == match[1] + "}")
                yield match[2] or lines[start + 1].split("(")[0].strip(), end - body - 1


# ---- words


def test_nothing_is_left_unfinished() -> None:
    unfinished = re.compile(r"\b(todo!|unimplemented!|raise NotImplementedError|TO" r"DO|FIX" r"ME|XX" r"X)\b")
    hits = [
        f"{name_of(path)}:{number}"
        for path in sources(".rs", ".py", ".pyi", ".cu", ".cuh")
        if path != Path(__file__) and name_of(path) not in WORDS_AS_DATA
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if unfinished.search(line)
    ]
    assert not hits, hits


def test_no_path_of_one_machine() -> None:
    absolute = re.compile(r"(?<![\w.:~/-])/(home|root|work|Users)/\w")
    texts = [*sources(".rs", ".py", ".pyi", ".toml", ".md", ".cu", ".cuh"), *ROOT.glob("*.md"), *ROOT.glob("*.toml")]
    hits = [name_of(path) for path in texts if absolute.search(path.read_text(encoding="utf-8"))]
    assert not hits, hits


def test_start_is_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start = re.split(r"^## ", readme, flags=re.MULTILINE)
    section = next(part for part in start if part.startswith("Start\n"))
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "bash"]
    assert all(body.count("\n") == 1 and body.strip() for _, body in blocks), "one command line each"


def test_the_map_names_every_room() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = [f"{crate.name}/" for crate in CRATES] + ["python/infer/", "cuda/", "tests/", "benches/", "tools/"]
    assert not [room for room in rooms if room not in readme]
