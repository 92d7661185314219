"""`LLM.chat` and the tokenizer: conversations through the model's own template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2
import pytest

from infer import LLM, InferError, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

PARAMS = SamplingParams(temperature=0, max_tokens=16)
MESSAGES = [
    {"role": "user", "content": "Hello! What is your favorite movie?"},
    {"role": "assistant", "content": "I like the old ones."},
    {"role": "user", "content": "Tell me a story."},
]


def test_chat_is_generate_on_the_template(llm: LLM) -> None:
    prompt = llm.tokenizer.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True)
    answered = llm.chat(MESSAGES, PARAMS)[0]
    generated = llm.generate([prompt], PARAMS)[0]
    assert answered.prompt_token_ids == prompt
    assert answered.outputs[0].token_ids == generated.outputs[0].token_ids
    assert "".join(llm.stream_chat(MESSAGES, PARAMS)) == answered.outputs[0].text
    assert answered.prompt == llm.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)


def test_the_template_is_rendered_as_jinja_does(llm: LLM) -> None:
    assert llm.tokenizer.chat_template is not None
    expected = jinja2.Template(llm.tokenizer.chat_template).render(messages=MESSAGES, add_generation_prompt=True)
    assert llm.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True) == expected


def test_special_tokens_of_the_template_are_single_tokens(llm: LLM) -> None:
    token_ids = llm.tokenizer.apply_chat_template(MESSAGES, tokenize=True)
    start, end = llm.tokenizer.token_to_id("<|im_start|>"), llm.tokenizer.token_to_id("<|im_end|>")
    assert (token_ids.count(start or -1), token_ids.count(end or -1)) == (3, 3)
    assert end in llm.tokenizer.eos_token_ids
    assert "<|im_end|>" not in llm.tokenizer.decode(token_ids)
    assert "<|im_end|>" in llm.tokenizer.decode(token_ids, skip_special_tokens=False)


def test_many_conversations_at_once(llm: LLM) -> None:
    alone = [llm.chat(messages, PARAMS)[0].outputs[0].text for messages in (MESSAGES, MESSAGES[2:])]
    assert [output.outputs[0].text for output in llm.chat([MESSAGES, MESSAGES[2:]], PARAMS)] == alone


def test_a_last_message_is_continued(llm: LLM) -> None:
    """As in vLLM and transformers: the prompt ends where the last message's content does, and the answer goes on from there."""
    begun = [*MESSAGES, {"role": "assistant", "content": "Once upon a"}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    asked = llm.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    (output,) = llm.chat(begun, PARAMS, **options)
    assert output.prompt == asked + "Once upon a" == llm.tokenizer.apply_chat_template(begun, **options)
    assert "".join(llm.stream_chat(begun, PARAMS, **options)) == output.outputs[0].text
    assert output.outputs[0].text == llm.generate(output.prompt, PARAMS)[0].outputs[0].text
    parts = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "Once upon a"}]}]
    assert llm.chat(parts, PARAMS, **options)[0].prompt == output.prompt
    with pytest.raises(InferError, match="add_generation_prompt"):
        llm.chat(begun, PARAMS, continue_final_message=True)


def test_of_several_conversations_the_wrong_one_is_named(llm: LLM) -> None:
    good, long = [{"role": "user", "content": "Hi"}], [{"role": "user", "content": "a" * 9000}]
    with pytest.raises(InferError, match=r"^messages\[1\]: the prompt has 90\d\d tokens"):
        llm.chat([good, long], PARAMS)
    with pytest.raises(InferError, match=r"^messages\[1\]: chat template: no"):
        llm.chat([good, long], PARAMS, chat_template="{{ raise_exception('no') if messages[0].content | length > 9 }}")
    with pytest.raises(InferError, match=r"^the prompt has"):
        llm.chat(long, PARAMS)


def test_another_template_and_its_variables(llm: LLM) -> None:
    template = "{{ greeting }}: {{ messages[0]['content'] }}"
    output = llm.chat(MESSAGES, PARAMS, chat_template=template, chat_template_kwargs={"greeting": "Hark"})[0]
    assert output.prompt == "Hark: Hello! What is your favorite movie?"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([[]], "at least one message"),
        ([], "at least one message"),
        ("Hello", "a list is needed"),
        ([{"content": "no role"}], r"messages\[0\]: a message is a dictionary"),
        ([[{"role": "user", "content": "a"}, "b"]], r"messages\[0\]\[1\]"),
    ],
)
def test_conversations_that_are_none(llm: LLM, messages: Any, words: str) -> None:
    with pytest.raises(InferError, match=words):
        llm.chat(messages, PARAMS)


@pytest.mark.parametrize("template", ["{% for %}", "{{ raise_exception('not so') }}", "{{ messages[99].content.x }}"])
def test_templates_that_fail(llm: LLM, template: str) -> None:
    with pytest.raises(InferError):
        llm.chat(MESSAGES, PARAMS, chat_template=template)


def test_tokenizer_facade(llm: LLM) -> None:
    text = "The quick brown fox, 42 times."
    token_ids = llm.tokenizer.encode(text)
    assert llm.tokenizer.decode(token_ids) == text
    assert len(llm.tokenizer) == llm.tokenizer.vocabulary_size == llm.info.vocabulary_size == 8192
    assert llm.tokenizer.id_to_token(0) == "<|endoftext|>"
    assert llm.tokenizer.token_to_id("no such token") is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda tokenizer: tokenizer.encode("a", add_special_tokens="no"), "add_special_tokens must be True or False, got 'no'"),
        (
            lambda tokenizer: tokenizer.decode([1], skip_special_tokens=None),
            "skip_special_tokens must be True or False, got None",
        ),
        (lambda tokenizer: tokenizer.id_to_token("a"), "token_id must be an integer, got 'a'"),
        (lambda tokenizer: tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=1), "add_generation_prompt must be"),
        (lambda tokenizer: tokenizer.apply_chat_template([*MESSAGES, 5]), r"messages\[\d\]: expected an object .*, got 5"),
        (lambda tokenizer: tokenizer.apply_chat_template(MESSAGES, tools=5), "tools: expected a list"),
        (lambda tokenizer: tokenizer.apply_chat_template(MESSAGES, continue_final_message=1), "continue_final_message must be"),
        (
            lambda tokenizer: tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, continue_final_message=True),
            "continue_final_message must be False where add_generation_prompt is True",
        ),
        (lambda tokenizer: tokenizer.apply_chat_template(MESSAGES, return_tensors="pt"), "return_tensors is no variable"),
    ],
)
def test_tokenizer_arguments_that_are_wrong(llm: LLM, call: Callable[[Any], object], words: str) -> None:
    with pytest.raises(InferError, match=words):
        call(llm.tokenizer)


@pytest.mark.parametrize("given", [5, [("a", 1)], "a"])
def test_template_variables_that_are_none(llm: LLM, given: Any) -> None:
    with pytest.raises(InferError, match="chat_template_kwargs: a dictionary is needed, got"):
        llm.chat(MESSAGES, PARAMS, chat_template_kwargs=given)


def test_template_variables_are_no_arguments(llm: LLM) -> None:
    plain = llm.tokenizer.apply_chat_template(MESSAGES)
    assert llm.tokenizer.apply_chat_template(MESSAGES, continue_final_message=False, return_tensors=None) == plain
    with pytest.raises(InferError, match="messages is no variable of a chat template"):
        llm.chat(MESSAGES, PARAMS, chat_template_kwargs={"messages": []})


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user"}, r"messages\[0\]\['content'\].*got none"),
        ({"role": "user", "content": None}, "got NoneType"),
        ({"role": "user", "content": 3}, "got int"),
        ({"role": "user", "content": ["a"]}, r"\['content'\]\[0\]: only parts of type 'text' are read, got 'str'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "got 'image_url'"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, r"\['text'\]: a string is needed, got int"),
    ],
)
def test_content_that_is_no_text(llm: LLM, message: Any, words: str) -> None:
    with pytest.raises(InferError, match=words):
        llm.chat([message], PARAMS)


def test_content_in_text_parts_is_joined(llm: LLM) -> None:
    parts = [{"type": "text", "text": "Hello!"}, {"type": "text", "text": "And then?"}]
    (output,) = llm.chat([{"role": "user", "content": parts}], PARAMS)
    assert output.prompt == llm.chat([{"role": "user", "content": "Hello!\nAnd then?"}], PARAMS)[0].prompt


def test_a_message_of_tool_calls_needs_no_content(llm: LLM) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    output = llm.chat([MESSAGES[0], call], PARAMS, chat_template="{{ messages[1].tool_calls[0].function.name }}")[0]
    assert output.prompt == "f"
