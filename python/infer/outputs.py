"""What a request gives back; names and shapes are vLLM's, so that code written for it reads these results unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple

from infer import logs
from infer._core import InferError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from infer import _core

__all__ = ["CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput", "StreamOutput"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely one token was at one place.

    Attributes
    ----------
    logprob
        Natural logarithm of the model's probability, before temperature, penalties and truncation.
    rank
        1 for the most likely token of the whole vocabulary.
    decoded_token
        The token's own text; None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """What one request cost: times in seconds, counts of tokens. A time is None where it never came to it.

    Attributes
    ----------
    queue_time
        From submission to the first step that computed any of it.
    time_to_first_token
        From submission to the first generated token.
    inter_token_latency
        Mean time between the tokens of one completion after its first.
    total_time
        From submission to the end of the last completion.
    prompt_tokens
        Length of the prompt.
    cached_tokens
        Prompt tokens whose keys and values came from the prefix cache.
    generated_tokens
        Over all `n` completions.
    preemptions
        How often a completion gave up its memory and was computed again.
    restored_tokens
        Prompt tokens among `cached_tokens` that came back from `kv_offload_dir`.
    drafted_tokens, accepted_tokens
        Tokens that were guessed ahead and verified, and those of them that were right.
    branch_tokens
        Accepted tokens that the chain of guesses did not have, but a branch of the tree (`num_draft_tokens`).
    decode_steps
        Steps in which a completion chose tokens: `generated_tokens / decode_steps` is what speculation gains.
    joules
        Energy of its rows on a GPU, by the driver's counter: each step's energy is shared out by rows. None elsewhere, and before
        the first quarter of a second of work.
    """

    queue_time: float | None
    time_to_first_token: float | None
    inter_token_latency: float | None
    total_time: float | None
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    restored_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    branch_tokens: int = 0
    decode_steps: int = 0
    joules: float | None = None

    @classmethod
    def of(cls, request: _core.Request) -> RequestMetrics:
        """Copy the numbers out of the core, so that they can be pickled and outlive the engine."""
        now = request.metrics
        return cls(**{item.name: getattr(now, item.name) for item in fields(cls)})


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes
    ----------
    index
        Which of the request's `n` completions, from 0.
    text
        The generated text; "" without a tokenizer or with `detokenize=False`.
    token_ids
        The generated tokens, the one that ended it included.
    cumulative_logprob
        Sum of the chosen tokens' log-probabilities; None unless `logprobs` was asked for.
    logprobs
        Per generated token: token id -> `Logprob`, the chosen token first. None unless asked for.
    finish_reason
        "stop", "length", "timeout" or "abort".
    stop_reason
        The stop string or stop token id that ended it; None for the end-of-sequence token.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and everything that was generated for it.

    Attributes
    ----------
    request_id
        Unique within one `LLM`.
    prompt
        The prompt's text; None if token ids were given.
    prompt_token_ids
        The prompt as the model saw it.
    prompt_logprobs
        Per prompt token: None for the first, then token id -> `Logprob`, the prompt's own token first. None unless asked for.
    outputs
        The `n` completions, in order.
    finished
        Whether all completions have ended.
    metrics
        Times and counts.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were not computed again."""
        return self.metrics.cached_tokens


class StreamOutput(str):
    """A piece of a stream. It is its own text, so `print(piece, end="")` and `"".join(pieces)` do what one hopes.

    Attributes
    ----------
    token_ids
        The new tokens behind this piece. Text may lag behind them while a character or a stop string is incomplete.
    logprobs
        As in `CompletionOutput`, for `token_ids`.
    completion_index
        Which of the request's `n` completions (`CompletionOutput.index`; strings have another `index`).
    prompt_index
        Which of the prompts given to `stream`.
    prompt_logprobs
        As in `RequestOutput`, with the first piece of a request that asked for them; else None.
    finish_reason, stop_reason
        As in `CompletionOutput`; None until the last piece of a completion.
    metrics
        Of the whole request, with the last piece of its last completion; else None.
    """

    __slots__ = (
        "completion_index",
        "finish_reason",
        "logprobs",
        "metrics",
        "prompt_index",
        "prompt_logprobs",
        "stop_reason",
        "token_ids",
    )

    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    completion_index: int
    prompt_index: int
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    finish_reason: str | None
    stop_reason: int | str | None
    metrics: RequestMetrics | None

    @property
    def text(self) -> str:
        """The new text as a plain string."""
        return str(self)

    @classmethod
    def of(cls, update: _core.Update, collector: Collector, prompt_index: int) -> StreamOutput:
        """Wrap one update of the core."""
        collector.check(update)
        piece = cls(update.text)
        piece.token_ids = update.token_ids
        piece.logprobs = collector.logprobs(update.logprobs)
        piece.completion_index = update.index
        piece.prompt_index = prompt_index
        piece.prompt_logprobs = None if collector.is_begun else collector.prompt_logprobs()
        collector.is_begun = True
        piece.finish_reason = update.finish_reason
        piece.stop_reason = update.stop_reason
        piece.metrics = RequestMetrics.of(collector.request) if collector.request.finished else None
        return piece


class Asked(NamedTuple):
    """What was asked for: a prompt's text, how many completions, and what the prompt is called among several."""

    text: str | None
    completions: int
    name: str


class Collector:
    """Puts a request's updates together."""

    def __init__(self, request: _core.Request, prompt: Asked, names: _core.Tokenizer | None) -> None:
        self.request = request
        self.is_begun = False
        """Whether a piece of it was streamed."""
        self._prompt = prompt.text
        self._name = prompt.name
        self._names = names
        self._outputs = [CompletionOutput(index) for index in range(prompt.completions)]
        self._texts: dict[int, str | None] = {}  # the likely tokens of a text are often the same

    def add(self, update: _core.Update) -> None:
        """Take one update, which may be the last of its completion."""
        self.check(update)
        output = self._outputs[update.index]
        output.text += update.text
        output.token_ids += update.token_ids
        output.finish_reason = update.finish_reason
        output.stop_reason = update.stop_reason
        if update.logprobs is not None:
            if output.logprobs is None:
                output.logprobs = []
            output.logprobs += map(self._named, update.logprobs)
            chosen = sum(entries[0][1] for entries in update.logprobs)
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + chosen

    def check(self, update: _core.Update) -> None:
        """Raise what made the engine give up on the request."""
        if update.finish_reason == "error":
            name = f"{self._name}, request" if self._name else "request"
            raise InferError(f"{name} {self.request.request_id}: {self.request.error or 'the engine failed'}")

    def result(self) -> RequestOutput:
        """Return everything collected so far."""
        return RequestOutput(
            request_id=str(self.request.request_id),
            prompt=self._prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs(),
            outputs=self._outputs,
            finished=self.request.finished,
            metrics=RequestMetrics.of(self.request),
        )

    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """Return those of the prompt's tokens; None unless asked for."""
        rows = self.request.prompt_logprobs
        return None if rows is None else [None if row is None else self._named(row) for row in rows]

    def logprobs(self, rows: list[list[tuple[int, float, int]]] | None) -> list[dict[int, Logprob]] | None:
        """Give the core's (token id, log-probability, rank) rows their names."""
        return None if rows is None else [self._named(row) for row in rows]

    def _named(self, row: list[tuple[int, float, int]]) -> dict[int, Logprob]:
        texts = self._texts
        for token, _, _ in row:
            if token not in texts:
                texts[token] = None if self._names is None else self._names.decode([token], skip_special_tokens=False)
        return {token: Logprob(logprob, rank, texts[token]) for token, logprob, rank in row}


class Gather:
    """Puts the results of many requests together, in the order in which they were submitted."""

    def __init__(self, prompts: Sequence[Asked], names: _core.Tokenizer | None) -> None:
        self._prompts = prompts
        self._names = names
        self._collectors: dict[int, Collector] = {}
        self._results: dict[int, RequestOutput] = {}

    def add(self, news: tuple[int, _core.Request, list[_core.Update]]) -> RequestOutput | None:
        """Take news of one request; its result is returned once, when it has finished."""
        place, request, updates = news
        collector = self._collector(place, request)
        for update in updates:
            collector.add(update)
        _note_end(request, updates)
        if request.finished:
            self._results[place] = collector.result()
        return self._results.get(place)

    def pieces(self, news: tuple[int, _core.Request, list[_core.Update]]) -> list[StreamOutput]:
        """Return news of one request as pieces of a stream."""
        place, request, updates = news
        collector = self._collector(place, request)
        pieces = [StreamOutput.of(update, collector, place) for update in updates]
        _note_end(request, updates)
        return pieces

    def results(self) -> list[RequestOutput]:
        """Return all results, once every request has finished."""
        return [self._results[place] for place in range(len(self._prompts))]

    def _collector(self, place: int, request: _core.Request) -> Collector:
        if place not in self._collectors:
            self._collectors[place] = Collector(request, self._prompts[place], self._names)
        return self._collectors[place]


def _note_end(request: _core.Request, updates: list[_core.Update]) -> None:
    if updates and request.finished:
        logs.ended(request, updates[-1].finish_reason)
