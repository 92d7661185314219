"""Compare our tokenizers with the `tokenizers` and `sentencepiece` wheels on a large mixed-language text.

    python tests/text/compare_tokenizers.py [--program target/debug/examples/tokenize] [--data ../shared/data]

Without `--program` (built by `cargo test -p infer-text`) the installed `infer` package does the work. Prints one line
per vocabulary: texts, tokens, how many texts differ in ids or in the text decoded from them. Exit status 1 if any do.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import random
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

#: Vocabulary name -> (file in data/tokenizers, name that the file has in a model folder).
VOCABULARIES = {
    "gpt2": ("gpt2/tokenizer.json", "tokenizer.json"),
    "gpt-neox": ("gpt-neox/tokenizer.json", "tokenizer.json"),
    "phi3": ("phi3/tokenizer.json", "tokenizer.json"),
    "smollm2": ("smollm2/tokenizer.json", "tokenizer.json"),
    "llama2": ("llama2/tokenizer.model", "tokenizer.model"),
    "mistral v1": ("mistral/tokenizer.model.v1", "tokenizer.model"),
    "mistral v3": ("mistral/mistral_instruct_tokenizer_240323.model.v3", "tokenizer.model"),
    "mistral v7": ("mistral/mistral_instruct_tokenizer_241114.model.v7", "tokenizer.model"),
}

#: One sentence each, for scripts that the English corpora lack.
SENTENCES = [
    "Der schnelle braune Fuchs springt über den faulen Hund; Straße, Öl, ½ €.",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "いろはにほへと ちりぬるを わかよたれそ つねならむ。カタカナ、ｶﾅ。",
    "我能吞下玻璃而不伤身体。繁體中文測試、臺灣。",
    "다람쥐 헌 쳇바퀴에 타고파. ㄱㄴㄷ",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ١٢٣",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश। १२३",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓",
    "Tiếng Việt có dấu: ắ ằ ẳ ẵ ặ ề ể ễ ệ.",
    "🦙👩🏽‍🚀🏳️‍🌈 e\u0301 ﬁ Ⅷ ² ① \u200b\u00a0\u3000\ufeff\t\r\n",
    "def f(x):\n\treturn {'a': [1, 22, 333, 4444], \"b\": x ** 2}  # TODO\r\n\n\n        pass",
    "I'm you're he'll WE'VE it'S   can't\n \n  \n   x     y\t\tz",
]


def texts(data: Path) -> Iterator[str]:
    """Yield the mixed text in pieces of very different length and content."""
    for path in sorted((data / "text").glob("*")):
        content = read(path)
        if content is not None:
            yield from pieces(content)
    for name in ("HumanEval.jsonl.gz", "spec_bench_half.jsonl.xz", "sonnets.txt"):
        content = read(data / "prompts" / name)
        if content is not None:
            yield from pieces(content)
    yield from SENTENCES
    generator = random.Random(0)
    letters = [chr(code) for code in range(0x30000) if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
    for _ in range(20_000):
        start = generator.randrange(len(letters))
        run = letters[start : start + generator.randrange(1, 30)]
        wild = generator.choices(letters, k=generator.randrange(1, 20))
        mixed = [generator.choice([*run, *wild, " ", "  ", "\n", "a", "The", "9"]) for _ in range(40)]
        yield "".join(mixed) if generator.random() < 0.7 else generator.choice(SENTENCES) + "".join(mixed)


def pieces(content: str) -> Iterator[str]:
    """Cut a corpus every few thousand characters, at any place."""
    generator = random.Random(1)
    start = 0
    while start < len(content):
        end = start + generator.randrange(1, 8000)
        yield content[start:end]
        start = end


def read(path: Path) -> str | None:
    """Return the contents of a text file, decompressed, or None where it is not text or not there."""
    if not path.is_file():
        return None
    opener: Callable[[Path], bytes] = {
        ".gz": lambda p: gzip.decompress(p.read_bytes()),
        ".xz": lambda p: lzma.decompress(p.read_bytes()),
    }.get(path.suffix, Path.read_bytes)
    try:
        return opener(path).decode("utf-8")
    except UnicodeDecodeError:
        return None


def vocabulary(data: Path, name: str) -> bytes | None:
    """Return a file of data/tokenizers, decompressed."""
    for suffix, unpack in ((".xz", lzma.decompress), (".gz", gzip.decompress), ("", bytes)):
        path = data / "tokenizers" / (name + suffix)
        if path.is_file():
            return unpack(path.read_bytes())
    return None


def ours(folder: Path, lines: list[str], program: Path | None) -> Iterator[tuple[list[int], str]]:
    """Yield ids without special tokens, and the text decoded from them."""
    if program is None:
        from infer._core import Tokenizer

        tokenizer = Tokenizer.from_path(folder)
        assert tokenizer is not None
        for line in lines:
            ids = tokenizer.encode(line, add_special_tokens=False)
            yield ids, tokenizer.decode(ids, skip_special_tokens=False)
        return
    file = folder / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    output = subprocess.run([program, folder, file], check=True, capture_output=True)
    print("   ", output.stderr.decode().strip())
    for line in output.stdout.decode().split("\n")[:-1]:
        result = json.loads(line)
        yield result["ids"], result["text"]


def reference(path: Path) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Return encode and decode of the wheel that made the file format."""
    if path.suffix == ".json":
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return (
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
            lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        )
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return processor.encode, processor.decode


def main() -> int:
    """Compare every vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve()
    parser.add_argument("--data", type=Path, default=here.parents[3] / "shared" / "data")
    parser.add_argument("--program", type=Path)
    parser.add_argument("--show", type=int, default=3, help="how many differences to print per vocabulary")
    arguments = parser.parse_args()
    lines = list(texts(arguments.data))
    failed = False
    for name, (source, target) in VOCABULARIES.items():
        content = vocabulary(arguments.data, source)
        if content is None:
            print(f"{name}: not here")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / target).write_bytes(content)
            encode, decode = reference(folder / target)
            if target.endswith(".model"):  # SentencePiece does not look for its special tokens in text
                own_lines = [line.replace("<unk>", "unk").replace("<s>", "s") for line in lines]
            else:
                own_lines = lines
            tokens = wrong_ids = wrong_text = 0
            for line, (ids, text) in zip(own_lines, ours(folder, own_lines, arguments.program), strict=True):
                expected = encode(line)
                tokens += len(expected)
                wrong_ids += ids != expected
                wrong_text += text != decode(ids)
                if ids != expected and wrong_ids <= arguments.show:
                    print(f"    {line[:80]!r}\n      expected {expected[:20]}\n      got      {ids[:20]}")
                if text != decode(ids) and wrong_text <= arguments.show:
                    print(f"    {line[:80]!r}\n      expected {decode(ids)[:80]!r}\n      got      {text[:80]!r}")
        print(f"{name}: {len(lines)} texts, {tokens} tokens, {wrong_ids} differ in ids, {wrong_text} in decoded text")
        failed |= wrong_ids + wrong_text > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
