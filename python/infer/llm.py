"""`LLM`: a loaded model and everything one does with it.

Every call is a thin shell around the same three steps: read the prompts, submit them to the core, put the updates together.
The blocking calls and their async twins differ only in how they wait (`events.py`), so they cannot drift apart in meaning.
Generated tokens come out of the core's own thread; nothing here runs per token unless the caller streams.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from infer import defaults, hub
from infer._core import Engine, InferError, SamplingParams
from infer.events import Dispatcher, wait_all
from infer.outputs import Gather
from infer.progress import progress
from infer.prompts import Prompt, conversations, pair, prompts, template_options
from infer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from infer import _core
    from infer._core import ModelInfo, ReadyQueue, Request
    from infer.events import Submit
    from infer.outputs import RequestOutput, StreamOutput
    from infer.progress import Progress
    from infer.prompts import Messages, PromptInput, TokenIds

    Work: TypeAlias = list[tuple[Prompt, SamplingParams]]

__all__ = ["LLM"]


class LLM:
    """A large language model, ready to generate. Any number of threads and tasks may use one at once.

    Parameters
    ----------
    model
        A folder in Hugging Face layout, a `.gguf` file, a hub id such as `org/name` or `org/name:Q8_0`, or None for the
        small model that comes with this package.
    device
        "auto" or "cpu". There is no GPU in this release; "cuda" is refused.
    dtype
        "auto" may round activations to 8 bits where the weights are integers. "float32" computes every model, quantized ones
        too, with its exact weights and float32 activations.
    threads
        How many threads compute; None takes one per physical core that this process may use.
    max_model_len
        Longest prompt and completion together, in tokens; None takes what the model was trained for.
    max_num_seqs
        How many completions run at once; more of them wait.
    max_num_batched_tokens
        How many tokens one step computes at most: smaller steps let short requests overtake long prompts sooner.
    enable_prefix_caching
        Compute the common beginning of prompts once.
    kv_cache_dtype
        "auto", "float32", "float16" or "bfloat16": how keys and values are kept.
    kv_cache_memory_bytes
        Memory for keys and values; None takes what `max_num_seqs` completions need, within what the machine has free.
    seed
        For requests that bring no seed of their own.
    mmap
        Map weight files instead of reading them.
    revision, token, cache_dir, local_files_only
        For hub ids only: branch, tag or commit; access token; where downloads are kept; never use the network.

    Raises
    ------
    InferError
        If the model cannot be found, read or held in memory, or an argument is out of range.

    Examples
    --------
    >>> from infer import LLM, SamplingParams
    >>> with LLM() as llm:
    ...     outputs = llm.generate("Once upon a time", SamplingParams(max_tokens=8, seed=1))
    >>> len(outputs[0].outputs[0].token_ids)
    8
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        enable_prefix_caching: bool = True,
        kv_cache_dtype: str = "auto",
        kv_cache_memory_bytes: int | None = None,
        seed: int = 0,
        mmap: bool = True,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        _check_device(device)
        path = hub.resolve(model, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        self._defaults = defaults.read(path)
        self._engine = Engine(
            path,
            dtype=dtype,
            threads=threads,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            seed=seed,
            mmap=mmap,
        )
        self._names = self._engine.tokenizer
        self._lock = threading.Lock()
        self._dispatcher: Dispatcher | None = None

    # ---- generating

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Progress = None,
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

        Returns
        -------
        list of RequestOutput
            One for each prompt, in their order.
        """
        return self._run(self._prompts(prompts, sampling_params), use_tqdm)

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
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, through the model's chat template.

        Parameters
        ----------
        messages
            `[{"role": "user", "content": "Hi"}, ...]`, or a list of such lists.
        sampling_params, use_tqdm
            As for `generate`.
        tools, chat_template, chat_template_kwargs, add_generation_prompt
            As for `Tokenizer.apply_chat_template`.
        """
        template = template_options(tools, chat_template, chat_template_kwargs, add_generation_prompt)
        return self._run(self._conversations(messages, sampling_params, template), use_tqdm)

    def stream(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Generator[StreamOutput, None, None]:
        """Yield pieces of text as they are generated; arguments as for `generate`.

        Leaving the loop, or closing the iterator, cancels the request.
        """
        return self._stream(self._prompts(prompts, sampling_params))

    def stream_chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> Generator[StreamOutput, None, None]:
        """Yield pieces of an answer as they are generated; arguments as for `chat`."""
        template = template_options(tools, chat_template, chat_template_kwargs, add_generation_prompt)
        return self._stream(self._conversations(messages, sampling_params, template))

    # ---- the same, awaited

    async def agenerate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Do as `generate` does, without blocking the event loop. Cancelling the task cancels the requests."""
        return await self._arun(self._prompts(prompts, sampling_params))

    async def achat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Do as `chat` does, without blocking the event loop."""
        template = template_options(tools, chat_template, chat_template_kwargs, add_generation_prompt)
        return await self._arun(self._conversations(messages, sampling_params, template))

    def astream(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> AsyncGenerator[StreamOutput, None]:
        """Do as `stream` does, for `async for`."""
        return self._astream(self._prompts(prompts, sampling_params))

    def astream_chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> AsyncGenerator[StreamOutput, None]:
        """Do as `stream_chat` does, for `async for`."""
        template = template_options(tools, chat_template, chat_template_kwargs, add_generation_prompt)
        return self._astream(self._conversations(messages, sampling_params, template))

    # ---- everything else

    def logits(self, token_ids: str | TokenIds) -> NDArray[np.float32]:
        """Return the model's logits after every prefix of `token_ids` (a text is encoded first): (tokens, vocabulary)."""
        if isinstance(token_ids, str):
            token_ids = self.tokenizer.encode(token_ids)
        return self._engine.logits(token_ids)

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """Return what the model's authors advise (its `generation_config.json`), with some fields changed."""
        return SamplingParams(**{**self._defaults, **changes})

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; `InferError` if it has none (then `info.has_tokenizer` is False)."""
        return Tokenizer(self._tokenizer())

    @property
    def info(self) -> ModelInfo:
        """What the model is: architecture, sizes, quantization, template."""
        return self._engine.info

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return self._engine.threads

    @property
    def max_model_len(self) -> int:
        """Longest prompt and completion together, in tokens."""
        return self._engine.max_model_len

    def metrics(self) -> dict[str, float]:
        """Return counters since the start and gauges now: requests, tokens, steps, pages, prefix-cache hits."""
        return self._engine.metrics()

    def close(self) -> None:
        """Abort what runs and give the memory back. Harmless when repeated; every other call then raises `InferError`."""
        self._engine.close()
        with self._lock:
            dispatcher = self._dispatcher
        if dispatcher is not None:
            dispatcher.stop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        info = self.info
        state = ", closed" if self._engine.closed else ""
        return f"LLM({info.path!r}, {info.architecture}, {info.quantization}, {self.threads} threads{state})"

    # ---- the shell

    def _tokenizer(self) -> _core.Tokenizer:
        if self._names is None:
            raise InferError(f"tokenizer: {self.info.path} has none; give token ids instead of text")
        return self._names

    def _prompts(self, value: Any, params: Any) -> Work:
        return pair(prompts(value), params, self.default_sampling_params)

    def _conversations(self, messages: Any, params: Any, template: dict[str, Any]) -> Work:
        found = pair(conversations(messages), params, self.default_sampling_params)
        names = self._tokenizer()
        # The template writes the special tokens itself.
        return [
            (Prompt(names.apply_chat_template(conversation, **template), None, add_special_tokens=False), one)
            for conversation, one in found
        ]

    def _submits(self, work: Work, *, final_only: bool) -> list[Submit]:
        def submit(prompt: Prompt, params: SamplingParams, queue: ReadyQueue, key: int) -> Request:
            return self._engine.submit(
                prompt.text or "" if prompt.token_ids is None else prompt.token_ids,
                params,
                add_special_tokens=prompt.add_special_tokens,
                final_only=final_only,
                ready=queue,
                ready_key=key,
            )

        return [partial(submit, prompt, params) for prompt, params in work]

    def _gather(self, work: Work) -> Gather:
        return Gather([(prompt.text, params.n) for prompt, params in work], self._names)

    def _run(self, work: Work, use_tqdm: Progress) -> list[RequestOutput]:
        gather = self._gather(work)
        with progress(use_tqdm, len(work)) as advance:
            for news in wait_all(self._submits(work, final_only=True)):
                if (done := gather.add(news)) is not None:
                    advance(done)
        return gather.results()

    async def _arun(self, work: Work) -> list[RequestOutput]:
        gather = self._gather(work)
        async with aclosing(self._events().wait_all(self._submits(work, final_only=True))) as arriving:
            async for news in arriving:
                gather.add(news)
        return gather.results()

    def _stream(self, work: Work) -> Generator[StreamOutput, None, None]:
        gather = self._gather(work)
        for news in wait_all(self._submits(work, final_only=False)):
            yield from gather.pieces(news)

    async def _astream(self, work: Work) -> AsyncGenerator[StreamOutput, None]:
        gather = self._gather(work)
        async with aclosing(self._events().wait_all(self._submits(work, final_only=False))) as arriving:
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


def _check_device(device: str) -> None:
    if device == "cuda":
        raise InferError("device: 'cuda' was asked for, but this release computes on CPUs only; use 'cpu' or 'auto'")
    if device not in ("auto", "cpu"):
        raise InferError(f"device: {device!r} is unknown; use 'auto' or 'cpu'")
