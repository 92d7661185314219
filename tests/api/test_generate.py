"""`LLM.generate`: every form of prompt and parameters, and what comes back."""

from __future__ import annotations

import math
import pickle
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest

from infer import LLM, InferError, Logprob, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, max_tokens=24, seed=7)


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_it_writes_text(llm: LLM) -> None:
    (output,) = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=16))
    (completion,) = output.outputs
    assert output.prompt == "Once upon a time"
    assert output.finished
    assert len(completion.token_ids) == 16
    assert completion.finish_reason == "length"
    assert completion.text == llm.tokenizer.decode(completion.token_ids)
    assert sum(letter.isalpha() or letter.isspace() for letter in completion.text) > 0.8 * len(completion.text)


def test_every_form_of_prompt_is_the_same_prompt(llm: LLM) -> None:
    text = "The old king said"
    token_ids = llm.tokenizer.encode(text)
    forms: list[Any] = [
        text,
        token_ids,
        tuple(token_ids),
        np.array(token_ids),
        {"prompt": text},
        {"prompt_token_ids": token_ids},
        {"prompt": text, "prompt_token_ids": np.array(token_ids, dtype=np.uint32)},
    ]
    alone = [llm.generate(form, GREEDY)[0] for form in forms]
    together = llm.generate(forms, GREEDY)
    assert all(output.outputs[0].token_ids == alone[0].outputs[0].token_ids for output in alone + together)
    assert all(output.prompt_token_ids == token_ids for output in alone + together)


def test_results_keep_the_order_of_prompts(llm: LLM) -> None:
    prompts = [f"Chapter {number}" for number in range(20)]
    params = [SamplingParams(temperature=0, max_tokens=1 + (7 * number) % 11, ignore_eos=True) for number in range(20)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [one.max_tokens for one in params]
    assert llm.generate([]) == []


def test_a_seeded_request_is_the_same_alone_and_in_a_crowd(llm: LLM) -> None:
    alone = ids(llm.generate("It was a dark night", SEEDED))[0]
    crowd = [f"Noise {number} about the sea" for number in range(9)]
    mixed = llm.generate([*crowd[:4], "It was a dark night", *crowd[4:]], [*([GREEDY] * 4), SEEDED, *([SEEDED] * 5)])
    assert ids(mixed)[4] == alone
    assert ids(llm.generate("It was a dark night", SEEDED.replace(seed=8)))[0] != alone


def test_n_completions(llm: LLM) -> None:
    (output,) = llm.generate("She opened the door and", SEEDED.replace(n=3))
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    assert output.metrics.generated_tokens == sum(len(completion.token_ids) for completion in output.outputs)


def test_stop_strings_and_tokens(llm: LLM) -> None:
    free = llm.generate("Once upon a time", GREEDY.replace(max_tokens=24))[0].outputs[0]
    word = free.text.split()[3]
    stopped = llm.generate("Once upon a time", GREEDY.replace(max_tokens=24, stop=word))[0].outputs[0]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", word)
    assert stopped.text == free.text[: free.text.index(word)]
    kept = GREEDY.replace(max_tokens=24, stop=[word], include_stop_str_in_output=True)
    assert llm.generate("Once upon a time", kept)[0].outputs[0].text == free.text[: free.text.index(word) + len(word)]
    token = free.token_ids[5]
    ended = llm.generate("Once upon a time", GREEDY.replace(max_tokens=24, stop_token_ids=[token]))[0].outputs[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(token) + 1]


def test_a_stop_string_may_begin_before_min_tokens_but_not_end(llm: LLM) -> None:
    free = llm.generate("Once upon a time", GREEDY.replace(max_tokens=8))[0].outputs[0]
    assert free.text.startswith(" there was a ")  # a token a word
    for least, reason in ((3, "stop"), (4, "length")):
        params = GREEDY.replace(max_tokens=8, stop=["was a"], min_tokens=least)
        stopped = llm.generate("Once upon a time", params)[0].outputs[0]
        assert (stopped.finish_reason, stopped.text) == (reason, " there " if reason == "stop" else free.text)


def test_any_temperature_leaves_forbidden_tokens_out(llm: LLM) -> None:
    params = SamplingParams(temperature=1e300, allowed_token_ids=[5, 6, 7], n=40, max_tokens=1, seed=1)
    drawn = {output.token_ids[0] for output in llm.generate("Once upon a time", params)[0].outputs}
    assert drawn == {5, 6, 7}


def test_the_end_of_text_ends_an_answer_unless_ignored(llm: LLM) -> None:
    force_end = {"temperature": 0, "max_tokens": 6, "logit_bias": {0: 100.0}}
    ended = llm.generate("The end.", SamplingParams(**force_end))[0].outputs[0]
    assert (ended.finish_reason, ended.stop_reason, ended.text) == ("stop", None, "")
    held = llm.generate("The end.", SamplingParams(**force_end, min_tokens=3))[0].outputs[0]
    assert len(held.token_ids) == 4
    ignored = llm.generate("The end.", SamplingParams(**force_end, ignore_eos=True))[0].outputs[0]
    assert (ignored.finish_reason, ignored.token_ids) == ("length", [0] * 6)


def test_logprobs(llm: LLM) -> None:
    (output,) = llm.generate("Once upon a time", GREEDY.replace(logprobs=3, prompt_logprobs=2))
    (completion,) = output.outputs
    assert completion.logprobs is not None
    assert output.prompt_logprobs is not None
    for token, row in zip(completion.token_ids, completion.logprobs, strict=True):
        first, entry = next(iter(row.items()))
        assert (first, entry.rank) == (token, 1), "greedy decoding takes the likeliest"
        assert len(row) == 3
        assert isinstance(entry, Logprob)
        assert entry.decoded_token == llm.tokenizer.decode([token], skip_special_tokens=False)
        assert [one.logprob for one in row.values()] == sorted((one.logprob for one in row.values()), reverse=True)
    assert completion.cumulative_logprob == pytest.approx(sum(next(iter(row.values())).logprob for row in completion.logprobs))
    assert output.prompt_logprobs[0] is None
    rows = output.prompt_logprobs[1:]
    logits = llm.logits(output.prompt_token_ids).astype(np.float64)
    for place, (token, row) in enumerate(zip(output.prompt_token_ids[1:], rows, strict=True)):
        assert row is not None
        expected = logits[place, token] - np.log(np.exp(logits[place] - logits[place].max()).sum()) - logits[place].max()
        assert row[token].logprob == pytest.approx(expected, abs=1e-3)
        assert row[token].rank == 1 + int((logits[place] > logits[place, token]).sum())
        assert 2 <= len(row) <= 3


def test_log_probabilities_of_all_tokens(llm: LLM) -> None:
    """-1 is all of them, as in vLLM."""
    params = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, prompt_logprobs=-1)
    assert (params.logprobs, params.prompt_logprobs, params.replace(seed=1).logprobs) == (-1, -1, -1)
    assert "logprobs=-1" in repr(params) and pickle.loads(pickle.dumps(params)) == params
    every = params.replace(logprobs=len(llm.tokenizer), prompt_logprobs=len(llm.tokenizer))
    (output,), (expected,) = (llm.generate("The king", one) for one in (params, every))
    assert output.outputs == expected.outputs
    assert output.prompt_logprobs == expected.prompt_logprobs is not None
    assert len((output.outputs[0].logprobs or [{}])[0]) == len(llm.tokenizer)


def test_a_prompt_that_fails_while_it_runs_is_named(llm: LLM) -> None:
    end = llm.tokenizer.eos_token_ids[0]
    fails = SamplingParams(allowed_token_ids=[end], min_tokens=2)
    for submit in (llm.generate, lambda *given: list(llm.stream(*given))):
        with pytest.raises(InferError, match=r"^prompts\[1\], request \d+: no token is left"):
            submit(["One", "Two"], [GREEDY, fails])
        with pytest.raises(InferError, match=r"^request \d+: no token is left"):
            submit("Two", fails)


def test_without_detokenizing_there_are_only_ids(llm: LLM) -> None:
    completion = llm.generate("Once upon a time", GREEDY.replace(detokenize=False))[0].outputs[0]
    assert (completion.text, len(completion.token_ids)) == ("", 8)


def test_metrics(llm: LLM) -> None:
    (output,) = llm.generate("A very particular prompt about turnips and", GREEDY)
    metrics = output.metrics
    assert metrics.prompt_tokens == len(output.prompt_token_ids)
    assert metrics.generated_tokens == 8
    assert metrics.queue_time is not None
    assert metrics.time_to_first_token is not None
    assert metrics.total_time is not None
    assert metrics.inter_token_latency is not None
    assert 0 <= metrics.queue_time <= metrics.time_to_first_token <= metrics.total_time < 60
    assert math.isclose(metrics.inter_token_latency, (metrics.total_time - metrics.time_to_first_token) / 7, rel_tol=0.5)


def test_a_common_beginning_is_computed_once(llm: LLM) -> None:
    start = "There was once a miller who had three sons, and when he died he left them his mill, his ass and his cat. " * 3
    first = llm.generate(start + "The eldest", GREEDY)[0]
    second = llm.generate(start + "The youngest", GREEDY)[0]
    assert second.num_cached_tokens >= 48
    assert first.metrics.cached_tokens == 0
    with LLM(threads=2, enable_prefix_caching=False) as plain:
        again = [plain.generate(start + "The youngest", GREEDY)[0] for _ in range(2)]
    assert [output.metrics.cached_tokens for output in again] == [0, 0]
    assert again[0].outputs[0].token_ids == second.outputs[0].token_ids


def test_results_survive_pickling(llm: LLM) -> None:
    outputs = llm.generate(["a", "b"], GREEDY.replace(logprobs=1))
    assert pickle.loads(pickle.dumps(outputs)) == outputs


def test_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    class Bar:
        made: ClassVar[list[Bar]] = []

        def __init__(self, *, total: int, **_: Any) -> None:
            self.total, self.count, self.closed = total, 0, False
            self.made.append(self)

        def update(self, count: int) -> None:
            self.count += count

        def set_postfix_str(self, text: str, **_: Any) -> None:
            assert "tokens/s" in text

        def close(self) -> None:
            self.closed = True

    llm.generate(["a", "b", "c"], GREEDY, use_tqdm=Bar)
    (bar,) = Bar.made
    assert (bar.total, bar.count, bar.closed) == (3, 3, True)
    llm.generate(["a"], GREEDY)
    llm.generate(["a"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(["a"], GREEDY, use_tqdm=True)
    assert "1/1" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_takes_token_ids(bare_folder: Path) -> None:
    with LLM(bare_folder, threads=2) as llm:
        (output,) = llm.generate([[1, 2, 3]], GREEDY)
        assert len(output.outputs[0].token_ids) == 8
        assert output.outputs[0].text == ""
        assert not llm.info.has_tokenizer
        for call in (
            lambda: llm.generate("text", GREEDY),
            lambda: llm.tokenizer,
            lambda: llm.chat([{"role": "user", "content": "x"}]),
        ):
            with pytest.raises(InferError, match="tokenizer"):
                call()


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ("", "no tokens"),
        ([[]], "no tokens"),
        ([1, "a"], r"prompts\[1\]: a token id is an integer"),
        ([1, True], r"prompts\[1\]"),
        ([1, 2.5], r"prompts\[1\]"),
        ([1, -1], "-1"),
        ([1, 10**9], "1000000000"),
        ([1, 2**70], "integer|range|token"),
        ({"text": "a"}, "unknown key 'text'"),
        ({}, "prompt_token_ids"),
        ({"prompt": 3}, r"\['prompt'\]: a string is needed"),
        (3, "a prompt is a string, a list of token ids"),
        (b"bytes", "a prompt is a string, a list of token ids"),
        ([None], r"prompts\[0\]"),
        ([1] * 100_000, "100000|max_model_len"),
    ],
)
def test_prompts_that_are_none(llm: LLM, prompts: Any, words: str) -> None:
    with pytest.raises(InferError, match=words):
        llm.generate(prompts, GREEDY)


def test_parameters_must_fit_the_prompts(llm: LLM) -> None:
    with pytest.raises(InferError, match="2 given for 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])
    with pytest.raises(InferError, match="sampling_params: a SamplingParams or a list of them is needed, got dict"):
        llm.generate("a", {"temperature": 0})  # type: ignore[arg-type]


def test_one_bad_prompt_leaves_nothing_running(llm: LLM) -> None:
    for bad, words in (([10**9], "prompt token 1000000000"), ("x" * 9000, "the prompt has 9000 tokens")):
        with pytest.raises(InferError, match=rf"prompts\[1\]: {words}"):
            llm.generate(["good", bad], SamplingParams(max_tokens=1000, ignore_eos=True))
    (output,) = llm.generate("still here", GREEDY)
    assert output.metrics.queue_time is not None
    assert output.metrics.queue_time < 0.5
