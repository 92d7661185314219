"""From the forms in which users write prompts, conversations and parameters to one list of `Prompt`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from infer._core import InferError, SamplingParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Messages", "Prompt", "PromptInput", "TokenIds", "conversations", "pair", "prompts", "template_options"]

TokenIds: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]]"
PromptInput: TypeAlias = "str | TokenIds | Mapping[str, Any]"
Messages: TypeAlias = "Sequence[Mapping[str, Any]]"

_KEYS = {"prompt", "prompt_token_ids"}
_PROMPT = "a prompt is a string, a list of token ids, or a dictionary with prompt_token_ids (or prompt)"
_BYTES = (bytes, bytearray, memoryview)  # their items would pass for token ids
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its text, its token ids (which win), or both; and, where it is one of several, what it is called."""

    text: str | None
    token_ids: Sequence[int] | None
    add_special_tokens: bool = True
    name: str = ""


def prompts(value: PromptInput | Sequence[PromptInput]) -> list[Prompt]:
    """Read one prompt or a list of them.

    Parameters
    ----------
    value
        A string, a sequence of token ids (a numpy array too), a dictionary with `prompt_token_ids` or `prompt`, or a
        sequence of these.
    """
    if isinstance(value, (str, Mapping)) or _is_token_ids(value):
        return [_prompt(value, "prompts")]
    named = ((f"prompts[{number}]", item) for number, item in enumerate(_sequence(value, "prompts", _PROMPT)))
    return [replace(_prompt(item, name), name=name) for name, item in named]


def conversations(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """Read one conversation (a list of messages) or a list of conversations."""
    items = _sequence(messages, "messages")
    many = bool(items) and not isinstance(items[0], Mapping)
    found: list[Messages] = []
    for number, given in enumerate(items if many else [items]):
        where = f"messages[{number}]" if many else "messages"
        conversation = _sequence(given, where)
        if not conversation:
            raise InferError(f"{where}: a conversation needs at least one message")
        found.append([_message(message, f"{where}[{place}]") for place, message in enumerate(conversation)])
    return found


def pair(items: Sequence[_Item], params: Any, default: Callable[[], SamplingParams]) -> list[tuple[_Item, SamplingParams]]:
    """Give each prompt its parameters: one for all, one for each, or the model's defaults."""
    if params is None:
        params = default()
    if isinstance(params, SamplingParams):
        return [(item, params) for item in items]
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise InferError(f"sampling_params: a SamplingParams or a list of them is needed, got {type(params).__name__}")
    if len(params) != len(items):
        raise InferError(f"sampling_params: {len(params)} given for {len(items)} prompts; give one, or one for each prompt")
    return list(zip(items, params, strict=True))


def template_options(
    tools: Sequence[Mapping[str, Any]] | None,
    chat_template: str | None,
    chat_template_kwargs: Mapping[str, Any] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> dict[str, Any]:
    """Return the keywords of the core's `apply_chat_template`."""
    if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
        raise InferError(f"chat_template_kwargs: a dictionary is needed, got {type(chat_template_kwargs).__name__}")
    return {
        "tools": tools,
        "chat_template": chat_template,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "template_kwargs": chat_template_kwargs,
    }


def _message(message: Any, where: str) -> Mapping[str, Any]:
    """Check one message; content in parts becomes one string, as templates take it."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InferError(f"{where}: a message is a dictionary with 'role' and 'content', got {message!r:.80}")
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return message
    if not isinstance(content, (list, tuple)):
        found = type(content).__name__ if "content" in message else "none"
        raise InferError(f"{where}['content']: a string or a list of text parts is needed, got {found}")
    return {**message, "content": "\n".join(_part(part, f"{where}['content'][{place}]") for place, part in enumerate(content))}


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise InferError(f"{where}: only parts of type 'text' are read, got {kind!r}")
    if not isinstance(part.get("text"), str):
        raise InferError(f"{where}['text']: a string is needed, got {type(part.get('text')).__name__}")
    return str(part["text"])


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        return Prompt(value, None)
    if isinstance(value, Mapping):
        if unknown := sorted(str(key) for key in set(value) - _KEYS):
            raise InferError(f"{where}: unknown key {unknown[0]!r}; a prompt dictionary has 'prompt_token_ids' or 'prompt'")
        token_ids, text = value.get("prompt_token_ids"), value.get("prompt")
        if token_ids is None and text is None:
            raise InferError(f"{where}: a prompt dictionary needs 'prompt_token_ids' or 'prompt'")
        if text is not None and not isinstance(text, str):
            raise InferError(f"{where}['prompt']: a string is needed, got {type(text).__name__}")
        return Prompt(text, None if token_ids is None else _token_ids(token_ids, f"{where}['prompt_token_ids']"))
    return Prompt(None, _token_ids(value, where, _PROMPT))


def _token_ids(value: Any, where: str, wanted: str = "a list is needed") -> list[int]:
    items = _sequence(value, where, wanted)
    if all(type(item) is int for item in items):
        return list(items)  # nearly always, and a long prompt should not wait for the rest
    for place, item in enumerate(items):
        if isinstance(item, bool) or not isinstance(item, Integral):
            raise InferError(f"{where}[{place}]: a token id is an integer, got {item!r:.40}")
    return [int(item) for item in items]


def _is_token_ids(value: Any) -> bool:
    """Tell token ids from a list of prompts by the first element; an empty list is an empty list of prompts."""
    if isinstance(value, _BYTES):
        return False
    if getattr(value, "ndim", None) == 1 and len(value) > 0:  # numpy, torch
        return not isinstance(value[0], str)
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Integral)


def _sequence(value: Any, where: str, wanted: str = "a list is needed") -> Sequence[Any]:
    if hasattr(value, "tolist"):  # numpy, torch: Python integers from here on
        value = value.tolist()
    if isinstance(value, (str, Mapping, *_BYTES)) or not isinstance(value, Sequence):
        raise InferError(f"{where}: {wanted}, got {type(value).__name__}")
    return value
