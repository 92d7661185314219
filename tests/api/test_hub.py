"""Hub ids, against a hub on this machine. Each case runs in a process of its own: the library reads its settings once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hub_server import COMMIT, HubServer

from infer import InferError
from infer.hub import choose_gguf, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BIG = bytes(range(256)) * 49152  # 12 MiB: the library writes in pieces of 10 MiB
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})

REPOS = {
    "org/plain": {
        "config.json": b"{}",
        "generation_config.json": b"{}",
        "tokenizer.json": b"{}",
        "qwen.tiktoken": b"",
        "old/qwen.tiktoken": b"",
        "additional_chat_templates/tool_use.jinja": b"",
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"pickle",
        "onnx/model.onnx": b"onnx",
        "README.md": b"card",
    },
    "org/sharded": {
        "config.json": b"{}",
        "model.safetensors.index.json": INDEX.encode(),
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
        "model-00003-of-00003.safetensors": b"of something else",
    },
    "org/gguf": {"x-Q8_0.gguf": b"q8", "x-Q4_0.gguf": BIG, "x-IQ4_NL.gguf": b"iq4", "mmproj-x-f16.gguf": b"eyes"},
    "org/split": {"big/x-BF16-00001-of-00002.gguf": b"one", "big/x-BF16-00002-of-00002.gguf": b"two"},
    "org/gated": {"config.json": b"{}", "model.safetensors": b"weights"},
    "org/lying": {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "../../etc/passwd"}}'},
    "org/empty": {"README.md": b"nothing"},
}

PROGRAM = """
import sys
from infer import InferError
from infer.hub import resolve
try:
    print(resolve(sys.argv[1], revision=sys.argv[2] or None, cache_dir=sys.argv[3], local_files_only=sys.argv[4] == "yes"))
except InferError as error:
    print("InferError:", error)
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(REPOS) as server:
        server.gated.add("org/gated")
        yield server
        server.shutdown()


def ask(
    url: str, model: str, cache: Path, *, revision: str = "", local: str = "no", **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    more = {"HF_ENDPOINT": url, "HF_HOME": str(cache / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, model, revision, str(cache / "hub"), local],
        env={**clean, **more, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_a_folder_gets_what_is_read_and_nothing_else(server: HubServer, tmp_path: Path) -> None:
    from pathlib import Path

    folder = Path(ask(server.url, "org/plain", tmp_path).stdout.strip())
    assert sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()) == [
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qwen.tiktoken",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert folder.name == COMMIT


def test_shards_come_from_the_index(server: HubServer, tmp_path: Path) -> None:
    from pathlib import Path

    folder = Path(ask(server.url, "org/sharded", tmp_path).stdout.strip())
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == b"two"
    assert not (folder / "model-00003-of-00003.safetensors").exists()


def test_a_quantization_is_one_file(server: HubServer, tmp_path: Path) -> None:
    from pathlib import Path

    done = ask(server.url, "org/gguf:q4_0", tmp_path)
    assert Path(done.stdout.strip()).read_bytes() == BIG
    assert set(server.downloads()) == {"x-Q4_0.gguf"}
    assert "x-Q4_0.gguf" in done.stderr or "%" in done.stderr, "a progress bar is shown"


def test_a_split_model_is_all_its_parts(server: HubServer, tmp_path: Path) -> None:
    from pathlib import Path

    first = Path(ask(server.url, "org/split", tmp_path).stdout.strip())
    assert (first.name, first.read_bytes()) == ("x-BF16-00001-of-00002.gguf", b"one")
    assert (first.parent / "x-BF16-00002-of-00002.gguf").read_bytes() == b"two"


def test_a_broken_download_is_resumed(server: HubServer, tmp_path: Path) -> None:
    from pathlib import Path

    server.cut_after = 11 << 20
    found = ask(server.url, "org/gguf:Q4_0", tmp_path).stdout.strip()
    assert Path(found).read_bytes() == BIG
    ranges = [asked for method, path, asked in server.asked if method == "GET" and path.endswith("x-Q4_0.gguf")]
    assert ranges[0] is None
    assert any(asked and int(asked.removeprefix("bytes=").split("-")[0]) > 0 for asked in ranges[1:]), ranges


def test_offline_serves_the_cache_and_says_when_it_cannot(server: HubServer, tmp_path: Path) -> None:
    first = ask(server.url, "org/plain", tmp_path).stdout
    before = len(server.asked)
    assert ask(server.url, "org/plain", tmp_path, HF_HUB_OFFLINE="1").stdout == first
    assert ask(server.url, "org/plain", tmp_path, local="yes").stdout == first
    assert len(server.asked) == before, "offline mode asks nothing"
    assert ask("http://127.0.0.1:9", "org/plain", tmp_path).stdout == first, "without a network the cache serves"
    refused = ask(server.url, "org/gguf:Q8_0", tmp_path, HF_HUB_OFFLINE="1").stdout
    assert refused.startswith("InferError: model: 'org/gguf' is not in the local cache"), refused


@pytest.mark.parametrize(
    ("model", "revision", "words"),
    [
        ("org/nowhere", "", "neither a path here nor a repository on the hub"),
        ("org/plain", "no-such-branch", "no such revision"),
        ("org/gated", "", "gated"),
        ("org/plain:Q4_0", "", "holds no .gguf file"),
        ("org/gguf:Q5_K_M", "", "x-IQ4_NL.gguf, x-Q4_0.gguf, x-Q8_0.gguf"),
        ("org/lying", "", "'../../etc/passwd', which the repository does not hold"),
        ("org/empty", "", "holds neither model.safetensors"),
    ],
)
def test_refusals_say_what_is_wrong(server: HubServer, tmp_path: Path, model: str, revision: str, words: str) -> None:
    said = ask(server.url, model, tmp_path, revision=revision).stdout
    assert said.startswith("InferError: ")
    assert words in said


def test_no_network_is_one_clear_sentence(tmp_path: Path) -> None:
    done = ask("http://127.0.0.1:9", "org/plain", tmp_path)
    assert done.stdout.startswith("InferError: model: 'org/plain' is not in the local cache and the hub cannot be reached")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("files", "quant", "expected"),
    [
        (["m-Q4_0.gguf", "m-IQ4_0.gguf", "m-Q4_0_4_8.gguf"], "q4_0", "m-Q4_0.gguf"),
        (["m.BF16.gguf", "m.F16.gguf"], "F16", "m.F16.gguf"),
        (["Q8_0/m-Q8_0.gguf", "Q4_0/m-Q4_0.gguf"], None, "Q8_0/m-Q8_0.gguf"),
        (["m-Q8_0-00002-of-00002.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q4_0.gguf"], "Q8_0", "m-Q8_0-00001-of-00002.gguf"),
        (["only.gguf", "imatrix.gguf", "mmproj-F16.gguf"], None, "only.gguf"),
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], "a-q4_0.gguf", "a-Q4_0.gguf"),
    ],
)
def test_choosing_a_gguf(files: list[str], quant: str | None, expected: str) -> None:
    assert choose_gguf("org/name", files, quant)[0] == expected


@pytest.mark.parametrize(
    ("files", "quant", "words"),
    [
        (["a-Q4_0.gguf", "b-Q4_0.gguf"], "Q4_0", "several files for ':Q4_0': a-Q4_0.gguf, b-Q4_0.gguf"),
        (["m-Q2_K.gguf", "m-Q3_K_M.gguf"], None, "add ':' and a quantization"),
        (["m-Q8_0-00001-of-00003.gguf", "m-Q8_0-00003-of-00003.gguf"], "Q8_0", "2 of the 3 parts"),
    ],
)
def test_not_choosing_a_gguf(files: list[str], quant: str | None, words: str) -> None:
    with pytest.raises(InferError, match=words.replace(".", r"\.")):
        choose_gguf("org/name", files, quant)


@pytest.mark.parametrize(
    "model", ["", "a b", "./absent", "absent.gguf", "a/b/c", "org/name:", "\0", "x" * 5000, "../up", "~nobody/x"]
)
def test_names_that_are_nothing(model: str) -> None:
    with pytest.raises(InferError, match="model: "):
        resolve(model, local_files_only=True)


@pytest.mark.parametrize("model", [3, b"bytes", ["list"]])
def test_things_that_are_no_names(model: Any) -> None:
    with pytest.raises(InferError, match="a path, a hub id or None is needed"):
        resolve(model)


@pytest.mark.parametrize("name", ["revision", "token", "cache_dir", "local_files_only"])
@pytest.mark.parametrize("model", ["org/name", None])
def test_hub_options_of_a_wrong_type(name: str, model: str | None) -> None:
    with pytest.raises(InferError, match=f"{name}: .* or (None|False) is needed, got 5"):
        resolve(model, **{"local_files_only": True, name: 5})  # type: ignore[arg-type]


def test_what_is_here_has_no_revisions(tmp_path: Path) -> None:
    for model in (None, tmp_path):
        with pytest.raises(InferError, match=r"revision: 'v2' can be had of a hub id only, and .* is on this machine"):
            resolve(model, revision="v2")


def test_a_path_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "plain").mkdir(parents=True)
    assert resolve("org/plain") == Path("org/plain")
