"""A model's own tokenizer, with the calls and keywords that Hugging Face users know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from infer import _core
    from infer.prompts import TokenIds

__all__ = ["Tokenizer"]


class Tokenizer:
    """Text to token ids and back, and conversations to prompts. Get it from `LLM.tokenizer`."""

    def __init__(self, core: _core.Tokenizer) -> None:
        self._core = core

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, with those that the model wants around a prompt unless told otherwise."""
        return self._core.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: TokenIds, *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; incomplete characters become U+FFFD."""
        return self._core.decode(token_ids, skip_special_tokens=skip_special_tokens)

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: Literal[False] = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> str: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: Literal[True],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> list[int]: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> str | list[int]:
        """Write a conversation as the prompt that the model was trained on.

        Parameters
        ----------
        messages
            Dictionaries with `role` and `content`.
        tokenize
            Return token ids instead of text. Templates write their special tokens themselves, so none are added.
        add_generation_prompt
            End where the assistant's answer begins.
        continue_final_message
            End where the last message's content ends, so that it is continued and not answered; `InferError` if the template
            rewrites it.
        tools
            Function descriptions, for templates that show them to the model.
        chat_template
            Jinja source to use instead of the model's own.
        template_kwargs
            Further variables of the template, such as `enable_thinking`.
        """
        text = self._core.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            template_kwargs=template_kwargs or None,
        )
        return self._core.encode(text, add_special_tokens=False) if tokenize else text

    def token_to_id(self, token: str) -> int | None:
        """Return a token's id; None if the vocabulary lacks it."""
        return self._core.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it; None if there is no such id."""
        return self._core.id_to_token(token_id)

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._core.vocabulary_size

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, if the model has one."""
        return self._core.bos_token_id

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return self._core.eos_token_ids

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja template."""
        return self._core.chat_template

    def __repr__(self) -> str:
        template = "a" if self.chat_template else "no"
        return f"Tokenizer({self.vocabulary_size} tokens, {template} chat template)"

    def __len__(self) -> int:
        return self._core.vocabulary_size
