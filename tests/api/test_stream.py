"""`LLM.stream`: the same text as `generate`, in pieces, and nothing left behind when the reader leaves."""

from __future__ import annotations

import pickle
import threading
import time
from typing import TYPE_CHECKING

from infer import SamplingParams, StreamOutput

if TYPE_CHECKING:
    from infer import LLM

PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=40)


def test_pieces_make_the_text(llm: LLM) -> None:
    whole = llm.generate("Once upon a time", PARAMS)[0].outputs[0]
    pieces = list(llm.stream("Once upon a time", PARAMS))
    assert "".join(pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].metrics is not None
    assert pieces[-1].metrics.generated_tokens == 40
    assert len(pieces) > 5, "tokens come as they are made, not in one piece"


def test_a_piece_is_its_text() -> None:
    piece = StreamOutput("word")
    piece.token_ids = [5]
    assert (piece, piece.text, f"{piece}!") == ("word", "word", "word!")
    copy = pickle.loads(pickle.dumps(piece))
    assert (copy, copy.token_ids) == ("word", [5])


def test_several_prompts_and_completions(llm: LLM) -> None:
    params = PARAMS.replace(n=2, logprobs=1)
    found: dict[tuple[int, int], str] = {}
    for piece in llm.stream(["The fox", "The hen"], params):
        key = (piece.prompt_index, piece.completion_index)
        found[key] = found.get(key, "") + piece
        assert len(piece.logprobs or []) == len(piece.token_ids)
    outputs = llm.generate(["The fox", "The hen"], params)
    expected = {(p, c.index): c.text for p, output in enumerate(outputs) for c in output.outputs}
    assert found == expected


def test_log_probabilities_of_prompts_come_with_the_first_piece(llm: LLM) -> None:
    params = PARAMS.replace(n=2, prompt_logprobs=1, max_tokens=4)
    outputs = llm.generate(["The fox", "The hen"], params)
    for place, output in enumerate(outputs):
        pieces = [piece for piece in llm.stream(["The fox", "The hen"], params) if piece.prompt_index == place]
        assert pieces[0].prompt_logprobs == output.prompt_logprobs is not None
        assert [piece.prompt_logprobs for piece in pieces[1:]] == [None] * (len(pieces) - 1)
    assert all(piece.prompt_logprobs is None for piece in llm.stream("The fox", PARAMS))


def test_leaving_the_loop_cancels(llm: LLM) -> None:
    endless = SamplingParams(max_tokens=1500, ignore_eos=True, temperature=0)
    for _ in llm.stream(["Once"] * 16, endless):
        break
    start = time.monotonic()
    (output,) = llm.generate("Once", PARAMS)
    assert output.metrics.queue_time is not None
    assert output.metrics.queue_time < 1.0, "all 16 places were free again"
    assert time.monotonic() - start < 30


def test_every_character_arrives_whole(llm: LLM) -> None:
    text = "naïve façade — “žluťoučký kůň” 東京 🦊"
    token_ids = llm.tokenizer.encode(text, add_special_tokens=False)
    assert llm.tokenizer.decode(token_ids) == text
    biased = PARAMS.replace(allowed_token_ids=sorted(set(token_ids)), max_tokens=200, ignore_eos=True, temperature=2.0)
    pieces = list(llm.stream("x", biased))
    tokens = [token for piece in pieces for token in piece.token_ids]
    assert "".join(pieces) == llm.tokenizer.decode(tokens)


def test_threads_share_one_engine(llm: LLM) -> None:
    expected = {n: llm.generate(f"Tale {n}:", PARAMS.replace(seed=n))[0].outputs[0].text for n in range(12)}
    found: dict[int, str] = {}

    def work(number: int) -> None:
        params = PARAMS.replace(seed=number)
        if number % 2:
            found[number] = "".join(llm.stream(f"Tale {number}:", params))
        else:
            found[number] = llm.generate(f"Tale {number}:", params)[0].outputs[0].text

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == expected
