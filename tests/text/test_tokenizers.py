"""Token ids and decoded text against the `tokenizers` wheel, for every `tokenizer.json` of the shared data.

`compare_tokenizers.py` is the whole comparison (20,000 texts, SentencePiece too); this is a part that takes seconds.
"""

from __future__ import annotations

from pathlib import Path

import compare_tokenizers
import pytest

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
JSON = {name: pair for name, pair in compare_tokenizers.VOCABULARIES.items() if pair[1] == "tokenizer.json"}


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
