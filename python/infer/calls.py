"""From prompts to results: what every call of `LLM` does, blocking or awaited.

Each reads the prompts, submits them to the core, and puts the updates together. The blocking calls and their async twins
differ only in how they wait (`events.py`), so they cannot drift apart in meaning.
"""

from __future__ import annotations

import weakref
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from infer._core import InferError, QueueFullError, SamplingParams
from infer.events import Dispatcher, wait_all
from infer.outputs import Asked, Gather
from infer.progress import progress
from infer.prompts import Prompt, conversations, pair, prompts
from infer.serving import serving

if TYPE_CHECKING:
    import threading
    from collections.abc import AsyncGenerator, Callable, Generator

    from infer import _core
    from infer._core import Engine, ReadyQueue, Request
    from infer.events import Submit
    from infer.outputs import RequestOutput, StreamOutput
    from infer.progress import Progress
    from infer.prompts import Messages
    from infer.serving import RequestOptions

    Work: TypeAlias = list[tuple[Prompt, SamplingParams, dict[str, Any]]]

__all__ = ["Calls"]


class Calls:
    """The shell around the core that all calls share."""

    _engine: Engine
    _names: _core.Tokenizer | None
    _defaults: dict[str, Any]
    _lock: threading.Lock
    _dispatcher: Dispatcher | None
    _waits: bool

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """Return what the model's authors advise, with some fields changed.

        That is its `generation_config.json`, or what a `.gguf` file says under `general.sampling`.
        """
        try:
            return SamplingParams(**{**self._defaults, **changes})
        except InferError as error:
            if changes:
                raise
            raise InferError(
                f"generation_config.json beside {self._engine.info.path}, or general.sampling in it: {error}"
            ) from error

    def _tokenizer(self) -> _core.Tokenizer:
        if self._names is None:
            raise InferError(f"tokenizer: {self._engine.info.path} has none; give token ids instead of text")
        return self._names

    def _prompts(self, value: Any, params: Any, options: RequestOptions) -> Work:
        found = pair(prompts(value), params, self.default_sampling_params)
        return [(prompt, one, how) for (prompt, one), how in zip(found, serving(options, len(found)), strict=True)]

    def _conversations(self, messages: Any, params: Any, template: dict[str, Any], options: RequestOptions) -> Work:
        found = pair(conversations(messages), params, self.default_sampling_params)
        return [
            (self._rendered(conversation, template, f"messages[{place}]" if len(found) > 1 else ""), one, how)
            for place, ((conversation, one), how) in enumerate(zip(found, serving(options, len(found)), strict=True))
        ]

    def _rendered(self, conversation: Messages, template: dict[str, Any], name: str) -> Prompt:
        """Return a conversation as a prompt; the template writes the special tokens itself."""
        try:
            text = self._tokenizer().apply_chat_template(conversation, **template)
        except InferError as error:
            if not name:
                raise
            raise InferError(f"{name}: {error}") from error
        return Prompt(text, None, add_special_tokens=False, name=name)

    @property
    def _room(self) -> Callable[[], bool] | None:
        return self._engine.wait_for_room if self._waits else None

    def _submits(self, work: Work, *, final_only: bool) -> list[Submit]:
        def submit(prompt: Prompt, params: SamplingParams, options: dict[str, Any], queue: ReadyQueue, key: int) -> Request:
            return self._engine.submit(
                prompt.text or "" if prompt.token_ids is None else prompt.token_ids,
                params,
                add_special_tokens=prompt.add_special_tokens,
                final_only=final_only,
                ready=queue,
                ready_key=key,
                **options,
            )

        def submit_named(prompt: Prompt, *request: Any) -> Request:
            try:
                return submit(prompt, *request)
            except QueueFullError:
                raise
            except InferError as error:
                if not prompt.name or self._engine.closed:
                    raise
                raise InferError(f"{prompt.name}: {error}") from error

        return [partial(submit_named, *request) for request in work]

    def _gather(self, work: Work) -> Gather:
        return Gather([Asked(prompt.text, params.n, prompt.name) for prompt, params, _ in work], self._names)

    def _run(self, work: Work, use_tqdm: Progress) -> list[RequestOutput]:
        gather = self._gather(work)
        with progress(use_tqdm, len(work)) as advance:
            for news in wait_all(self._submits(work, final_only=True), self._room):
                if (done := gather.add(news)) is not None:
                    advance(done)
        return gather.results()

    async def _arun(self, work: Work) -> list[RequestOutput]:
        gather = self._gather(work)
        async with aclosing(self._events().wait_all(self._submits(work, final_only=True), self._room)) as arriving:
            async for news in arriving:
                gather.add(news)
        return gather.results()

    def _stream(self, work: Work) -> Generator[StreamOutput, None, None]:
        gather = self._gather(work)
        for news in wait_all(self._submits(work, final_only=False), self._room):
            yield from gather.pieces(news)

    async def _astream(self, work: Work) -> AsyncGenerator[StreamOutput, None]:
        gather = self._gather(work)
        async with aclosing(self._events().wait_all(self._submits(work, final_only=False), self._room)) as arriving:
            async for news in arriving:
                for piece in gather.pieces(news):
                    yield piece

    def _events(self) -> Dispatcher:
        with self._lock:
            if self._dispatcher is None:
                if self._engine.closed:
                    raise InferError("this LLM is closed")
                self._dispatcher = Dispatcher()
                weakref.finalize(self, self._dispatcher.stop)  # also before the interpreter ends
            return self._dispatcher
