"""Token ids and decoded text against the `tokenizers` wheel: the bundled model's, and every `tokenizer.json` of the shared data.

`compare_tokenizers.py` is the whole comparison (20,000 texts, SentencePiece too); this is a part that takes seconds.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import compare_tokenizers
import pytest

from infer._core import Tokenizer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
JSON = {name: pair for name, pair in compare_tokenizers.VOCABULARIES.items() if pair[1] == "tokenizer.json"}


def metadata_text(model: Path, key: str) -> str:
    """Return a string of a GGUF file's metadata: key, the type 8, the length in 8 bytes, the text."""
    with model.open("rb") as file:
        head = file.read(4 << 20)
    start = head.index(key.encode()) + len(key)
    assert int.from_bytes(head[start : start + 4], "little") == 8
    length = int.from_bytes(head[start + 4 : start + 12], "little")
    return head[start + 12 : start + 12 + length].decode()


def test_the_bundled_vocabulary_equals_the_wheels(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    model = resources.files("infer") / "bundled" / "tinylm.gguf"
    ours = Tokenizer.from_path(str(model))
    assert ours is not None
    (tmp_path / "tokenizer.json").write_text(metadata_text(Path(str(model)), "tokenizer.huggingface.json"), encoding="utf-8")
    encode, decode = compare_tokenizers.reference(tmp_path / "tokenizer.json")
    lines = list(compare_tokenizers.texts(tmp_path))[::10]  # no corpora there: sentences of many scripts, and random text
    assert len(lines) > 1000
    for line in lines:
        ids = ours.encode(line, add_special_tokens=False)
        assert ids == encode(line), line
        assert ours.decode(ids, skip_special_tokens=False) == decode(ids) == line


@pytest.mark.parametrize("name", JSON)
def test_ids_and_text_equal_the_wheels(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    content = compare_tokenizers.vocabulary(DATA, JSON[name][0])
    if content is None:
        pytest.skip("the shared data is not beside this clone")
    (tmp_path / "tokenizer.json").write_bytes(content)
    lines = list(compare_tokenizers.texts(DATA))[::20]
    encode, decode = compare_tokenizers.reference(tmp_path / "tokenizer.json")
    assert len(lines) > 1000
    for line, (ids, text) in zip(lines, compare_tokenizers.ours(tmp_path, lines, None), strict=True):
        assert ids == encode(line), line
        assert text == decode(ids), line
