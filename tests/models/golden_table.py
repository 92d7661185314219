"""How far `infer` lies from every golden case: one line each.

    python tests/models/golden_table.py [case ...]

``test_golden.py`` asserts what this prints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infer import LLM, SamplingParams

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Golden:
    """One model to load, the file that says what it must compute, and the name of the pair."""

    name: str
    model: Path
    expected: Path
    config: Path | None = None  # stands in for the folder's config.json


def read_safetensors(path: Path) -> dict[str, NDArray[np.generic]]:
    """The int64 and float32 tensors of a safetensors file (a JSON header after its length, then raw little-endian data)."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    dtypes = {"I64": "<i8", "F32": "<f4"}
    return {
        name: np.frombuffer(content[start:][slice(*entry["data_offsets"])], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def goldens() -> Iterator[Golden]:
    """Every model of every case: the folder, the folder with its older configuration, and the GGUF files."""
    for folder in sorted(GOLDEN.iterdir()):
        expected = folder / "expected.safetensors"
        yield Golden(folder.name, folder, expected)
        if (old := folder / "config.v4.json").exists():
            yield Golden(f"{folder.name}/v4", folder, expected, old)
        for model in sorted(folder.glob("*.gguf")):
            rounded = model.with_name(model.name.replace("model", "expected")).with_suffix(".safetensors")
            yield Golden(f"{folder.name}/{model.name}", model, rounded)


def differences(golden: Golden, scratch: Path, load: Callable[..., LLM] = LLM) -> tuple[float, bool]:
    """Largest logit difference in float32, and whether greedy decoding writes the expected tokens.

    Parameters
    ----------
    golden : Golden
        What to load and compare with.
    scratch : Path
        An empty folder, used where the configuration is not the checkpoint's own.
    load : callable
        Opens the model, as `LLM` does.
    """
    model = golden.model
    if golden.config:
        for weights in model.glob("model*.safetensors*"):
            (scratch / weights.name).symlink_to(weights.resolve())
        (scratch / "config.json").write_bytes(golden.config.read_bytes())
        model = scratch
    expected = read_safetensors(golden.expected)
    token_ids = expected["token_ids"].tolist()
    prompt = token_ids[: int(expected["prompt_tokens"][0])]
    params = SamplingParams(max_tokens=len(expected["greedy"]), temperature=0, detokenize=False)
    with load(model, dtype="float32", threads=2) as llm:
        # llama.cpp's converter writes a context length for GLM that is shorter than the text: then its beginning is compared.
        length = min(len(token_ids), llm.max_model_len)
        logits = llm.logits(token_ids[:length])
        written = list(llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0].token_ids)
        complete = len(written) == min(len(expected["greedy"]), llm.max_model_len - len(prompt))
    same = complete and written == expected["greedy"][: len(written)].tolist()
    return float(np.abs(logits - expected["logits"][:length]).max()), same


def main() -> int:
    """Print the table; 1 where something is out of tolerance."""
    import tempfile

    bad = 0
    for golden in goldens():
        if sys.argv[1:] and golden.name.partition("/")[0] not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            try:
                largest, same = differences(golden, Path(scratch))
            except Exception as error:
                print(f"{golden.name:40} {error}")
                bad += 1
                continue
        bad += largest > TOLERANCE or not same
        print(f"{golden.name:40} {largest:.1e}  greedy {'same' if same else 'DIFFERS'}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
