"""`infer info`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from infer import model_info, system_info

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_a_table_for_people(infer_cli: Cli) -> None:
    shown = "".join(infer_cli("info").stdout.split())  # lines are broken where a long path would not fit
    for words in ("LlamaForCausalLM", "27,795,968(27.8million)", "8192", "tinylm.gguf", "--templateprintsit", "kvcachetokens"):
        assert words in shown
    assert f"instructionset{system_info()['isa']}(here:scalar" in shown


def test_json_for_programs(infer_cli: Cli, bare_folder: Path) -> None:
    assert json.loads(infer_cli("info", "--json").stdout) == model_info().as_dict()
    assert json.loads(infer_cli("info", str(bare_folder), "--json").stdout) == model_info(bare_folder).as_dict()


def test_the_template_alone(infer_cli: Cli) -> None:
    assert infer_cli("info", "--template").stdout.rstrip("\n") == (model_info().chat_template or "").rstrip("\n")


def test_a_long_path_stays_in_one_piece_and_units_fit(infer_cli: Cli, bare_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.symlink_to(bare_folder)
    shown = infer_cli("info", str(folder)).stdout
    assert str(folder) in shown
    assert "23,712 (23.7 thousand)" in shown
    assert "47,424 (46.3 KiB)" in shown


def test_the_cache_in_other_types(infer_cli: Cli, bare_folder: Path) -> None:
    types = {"key": "float16", "value": "int8", "skip_layers": [-1]}
    for given, expected in (("int8", "int8"), (json.dumps(types), types)):
        shown = infer_cli("info", str(bare_folder), "--kv-cache-dtype", given, "--json").stdout
        told = json.loads(shown)["kv_bytes_per_token"]
        assert told == model_info(bare_folder, kv_cache_dtype=expected).kv_bytes_per_token
        assert told < model_info(bare_folder).kv_bytes_per_token
    for wrong in ("int3", "{", '{"keys": "int8"}'):
        done = infer_cli("info", str(bare_folder), "--kv-cache-dtype", wrong)
        assert done.returncode == 1
        assert "kv" in done.stderr and "Traceback" not in done.stderr
