"""Generating: the calls that take prompts or conversations, blocking or streaming, and their async twins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infer.calls import Calls
from infer.prompts import template_options

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
    from typing import Unpack

    from infer._core import SamplingParams
    from infer.outputs import RequestOutput, StreamOutput
    from infer.progress import Progress
    from infer.prompts import Messages, PromptInput
    from infer.serving import RequestOptions

__all__ = ["Generating"]


class Generating(Calls):
    """What `LLM` makes of prompts and conversations."""

    # ---- blocking

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Progress = None,
        **options: Unpack[RequestOptions],
    ) -> list[RequestOutput]:
        """Complete prompts, all of them at once.

        Parameters
        ----------
        prompts
            One prompt or a list; each a string, a list of token ids, `{"prompt_token_ids": [...]}` or `{"prompt": "..."}`.
        sampling_params
            One for all prompts, or one for each; None takes `default_sampling_params()`.
        use_tqdm
            Whether to show a progress bar; None shows one on a terminal when the work takes longer than a second. A callable
            is used in the place of `tqdm.tqdm`.
        **options
            `priority`, `user`, `timeout`, `cache_salt`: see `RequestOptions`; every call that generates takes them.

        Returns
        -------
        list of RequestOutput
            One for each prompt, in their order.
        """
        return self._run(self._prompts(prompts, sampling_params, options), use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Progress = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **options: Unpack[RequestOptions],
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, through the model's chat template.

        Parameters
        ----------
        messages
            `[{"role": "user", "content": "Hi"}, ...]`, or a list of such lists.
        sampling_params, use_tqdm
            As for `generate`.
        tools, chat_template, chat_template_kwargs
            As for `Tokenizer.apply_chat_template`.
        add_generation_prompt, continue_final_message
            Whether an answer is begun, or the last message goes on: as in vLLM, the second needs `add_generation_prompt=False`.
        """
        ending = add_generation_prompt, continue_final_message
        template = template_options(tools, chat_template, chat_template_kwargs, *ending)
        return self._run(self._conversations(messages, sampling_params, template, options), use_tqdm)

    def stream(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generator[StreamOutput, None, None]:
        """Yield pieces of text as they are generated; arguments as for `generate`.

        Leaving the loop, or closing the iterator, cancels the request.
        """
        return self._stream(self._prompts(prompts, sampling_params, options))

    def stream_chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **options: Unpack[RequestOptions],
    ) -> Generator[StreamOutput, None, None]:
        """Yield pieces of an answer as they are generated; arguments as for `chat`."""
        ending = add_generation_prompt, continue_final_message
        template = template_options(tools, chat_template, chat_template_kwargs, *ending)
        return self._stream(self._conversations(messages, sampling_params, template, options))

    # ---- the same, awaited

    async def agenerate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[RequestOutput]:
        """Do as `generate` does, without blocking the event loop. Cancelling the task cancels the requests."""
        return await self._arun(self._prompts(prompts, sampling_params, options))

    async def achat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **options: Unpack[RequestOptions],
    ) -> list[RequestOutput]:
        """Do as `chat` does, without blocking the event loop."""
        ending = add_generation_prompt, continue_final_message
        template = template_options(tools, chat_template, chat_template_kwargs, *ending)
        return await self._arun(self._conversations(messages, sampling_params, template, options))

    def astream(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[StreamOutput, None]:
        """Do as `stream` does, for `async for`."""
        return self._astream(self._prompts(prompts, sampling_params, options))

    def astream_chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[StreamOutput, None]:
        """Do as `stream_chat` does, for `async for`."""
        ending = add_generation_prompt, continue_final_message
        template = template_options(tools, chat_template, chat_template_kwargs, *ending)
        return self._astream(self._conversations(messages, sampling_params, template, options))
