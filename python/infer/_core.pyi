"""Types of the compiled core (``rust/bindings``).

Every class here may be used from any thread. Whatever a caller can get wrong raises `InferError`; use after ``close()`` and use in
a forked child do too. Methods that wait release the GIL; on Python's main thread they look for signals every 50 ms.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "DeviceModel",
    "Engine",
    "InferError",
    "ModelInfo",
    "QueueFullError",
    "ReadyQueue",
    "Request",
    "RequestMetrics",
    "SamplingParams",
    "StepLauncher",
    "Tokenizer",
    "Update",
    "Work",
    "WorkLink",
    "__version__",
    "inspect",
    "kernel_sources",
    "quantize",
    "system_info",
]

__version__: str

_TokenIds = Sequence[int] | NDArray[np.integer[Any]]

class InferError(Exception):
    """A request, a model file or an engine state that cannot be served; the message says what would be right."""

class QueueFullError(InferError):
    """As many requests wait as `max_waiting` allows; one may be submitted again when another has started."""

@final
class SamplingParams:
    """How to choose tokens and when to stop; names, defaults and meanings are vLLM's. Immutable, comparable, picklable."""

    def __new__(
        cls,
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int | None = None,
        max_tokens: int | None = 16,
        min_tokens: int = 0,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        include_stop_str_in_output: bool = False,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        skip_special_tokens: bool = True,
        detokenize: bool = True,
        logit_bias: Mapping[int, float] | None = None,
        allowed_token_ids: Sequence[int] | None = None,
    ) -> SamplingParams: ...
    @property
    def n(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def max_tokens(self) -> int | None: ...
    @property
    def min_tokens(self) -> int: ...
    @property
    def stop(self) -> list[str]: ...
    @property
    def stop_token_ids(self) -> list[int]: ...
    @property
    def include_stop_str_in_output(self) -> bool: ...
    @property
    def ignore_eos(self) -> bool: ...
    @property
    def logprobs(self) -> int | None: ...
    @property
    def prompt_logprobs(self) -> int | None: ...
    @property
    def skip_special_tokens(self) -> bool: ...
    @property
    def detokenize(self) -> bool: ...
    @property
    def logit_bias(self) -> dict[int, float]: ...
    @property
    def allowed_token_ids(self) -> list[int] | None: ...
    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed; the result is validated like a new one."""

    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]: ...

@final
class Update:
    """What one completion of a request gained since the last look: a delta, never empty unless it ends the completion."""

    @property
    def index(self) -> int:
        """Which of the request's ``n`` completions, from 0."""

    @property
    def text(self) -> str:
        """New text, whole characters only; "" without a tokenizer or with ``detokenize=False``."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[list[tuple[int, float, int]]] | None:
        """Per new token: (token id, log-probability, rank from 1), the chosen token first, then the most likely others in order."""

    @property
    def finish_reason(self) -> Literal["stop", "length", "abort", "timeout", "error"] | None:
        """None while the completion goes on."""

    @property
    def stop_reason(self) -> int | str | None:
        """The stop token id or stop string that ended it; None for the end-of-sequence token, as in vLLM."""

@final
class RequestMetrics:
    """Times in seconds and counts of tokens; a time is None until it has happened."""

    @property
    def queue_time(self) -> float | None:
        """From submission to the first step that computed any of it."""

    @property
    def time_to_first_token(self) -> float | None: ...
    @property
    def inter_token_latency(self) -> float | None:
        """Mean time between tokens of one completion after its first."""

    @property
    def total_time(self) -> float | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose keys and values came from the prefix cache."""

    @property
    def generated_tokens(self) -> int: ...
    @property
    def restored_tokens(self) -> int: ...
    @property
    def drafted_tokens(self) -> int: ...
    @property
    def accepted_tokens(self) -> int: ...
    @property
    def branch_tokens(self) -> int: ...
    @property
    def decode_steps(self) -> int: ...
    @property
    def joules(self) -> float | None: ...
    @property
    def preemptions(self) -> int: ...

@final
class ReadyQueue:
    """Where many requests report that they have news, for one thread that serves them all."""

    def __new__(cls) -> ReadyQueue: ...
    def wait(self, timeout: float | None = None) -> list[int]:
        """Keys (``ready_key`` of `Engine.submit`) of requests with news, each once; [] after ``timeout`` seconds or `wake`.

        A key is reported when its request has something to `Request.poll`, and again only after news that came later.
        """

    def wake(self) -> None:
        """Make the waiting thread return, possibly with []."""

@final
class Request:
    """One submitted prompt and its ``n`` completions. Dropping the last reference cancels it."""

    @property
    def request_id(self) -> int: ...
    @property
    def prompt_token_ids(self) -> list[int]: ...
    @property
    def finished(self) -> bool:
        """Whether all completions have ended and their updates were taken."""

    @property
    def error(self) -> str | None:
        """Why the request ended with finish_reason "error"."""

    @property
    def prompt_logprobs(self) -> list[list[tuple[int, float, int]] | None] | None:
        """As `Update.logprobs`, per prompt token, the first None. None when not asked for, or while the prompt is being computed."""

    @property
    def metrics(self) -> RequestMetrics:
        """A snapshot; final once the request has finished."""

    def poll(self) -> list[Update]:
        """Take what is there without waiting: at most one update per completion."""

    def wait(self, timeout: float | None = None) -> list[Update]:
        """Wait for news, then `poll`; [] when the request has finished and everything was taken, or after ``timeout`` seconds.

        A signal handler that raises (Ctrl-C) cancels the request and raises from here.
        """

    def cancel(self) -> None:
        """End it with finish_reason "abort" (its last updates can still be taken); harmless when it has ended."""

@final
class Tokenizer:
    """A model's own tokenizer and chat template."""

    @staticmethod
    def from_path(path: str | PathLike[str]) -> Tokenizer | None:
        """Of a model folder or GGUF file, without loading weights; None when it has none."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: _TokenIds, *, skip_special_tokens: bool = True) -> str: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the prompt text; encode it with ``add_special_tokens=False``."""

    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    @property
    def vocabulary_size(self) -> int: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def chat_template(self) -> str | None: ...

@final
class ModelInfo:
    """What a model is, read from its headers alone; its KV cache in the types of `kv_cache_dtype`, scales included."""

    @property
    def path(self) -> str: ...
    @property
    def container(self) -> Literal["safetensors", "gguf"]: ...
    @property
    def architecture(self) -> str: ...
    @property
    def quantization(self) -> str:
        """The storage type of most weight bytes, such as "BF16" or "Q4_0"."""

    @property
    def parameters(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocabulary_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def has_tokenizer(self) -> bool: ...
    @property
    def kv_bytes_per_token(self) -> int: ...
    @property
    def kv_cache_tokens(self) -> int: ...
    @property
    def advised_sampling(self) -> dict[str, float]: ...
    @property
    def chat_template(self) -> str | None: ...
    def as_dict(self) -> dict[str, Any]: ...

def inspect(path: str | PathLike[str], *, kv_cache_dtype: str | Mapping[str, Any] = "auto") -> ModelInfo:
    """Describe a model folder or GGUF file without loading its weights; the KV cache's sizes in the types of `kv_cache_dtype`."""

def quantize(
    path: str | PathLike[str],
    output: str | PathLike[str],
    quantization: str,
    *,
    threads: int | None = None,
    mmap: bool = True,
) -> int:
    """Write a model in quantized form, as a GGUF file or a safetensors folder; the bytes of its weights file."""

def system_info() -> dict[str, Any]:
    """This machine as the core sees it: ``isa`` in use, ``available_isas``, ``threads`` (default count)."""

def kernel_sources() -> dict[str, str]:
    """The sources of the GPU kernels, by file name."""

@final
class Engine:
    """A loaded model and the thread that runs requests on it. Takes a folder or a ``.gguf``; hub ids are resolved in Python."""

    def __new__(
        cls,
        path: str | PathLike[str],
        *,
        dtype: str = "auto",
        threads: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        kv_cache_dtype: str | Mapping[str, Any] = "auto",
        kv_cache_memory_bytes: int | None = None,
        quantization: str | None = None,
        seed: int = 0,
        mmap: bool = True,
        packed_cache_dir: str | PathLike[str] | None = None,
        max_waiting: int | None = None,
        priority_patience: float = 10.0,
        step_time_target: float | None = 0.1,
        speculation: tuple[str, int, int, int, str | PathLike[str] | None, int | None] | None = None,
        kv_offload: tuple[str | PathLike[str], int] | None = None,
        kv_events: bool = False,
        trace: bool = False,
        load_format: str = "auto",
        outside: tuple[DeviceModel, DeviceModel | None, int] | None = None,
    ) -> Engine:
        """With ``outside``, an executor outside computes: its model, its draft model, and the bytes it has for keys and values."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def packed_cache(self) -> tuple[str, str | None]:
        """What came of ``packed_cache_dir`` ("off", "read", "written" or "failed"), and what its user should be told."""

    @property
    def threads(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def kv_cache_tokens(self) -> int:
        """How many tokens' keys and values fit in the cache at once."""

    @property
    def closed(self) -> bool: ...
    def work_link(self) -> WorkLink | None:
        """Where an executor outside takes its work; None where this process's CPU computes."""

    def submit(
        self,
        prompt: str | _TokenIds,
        params: SamplingParams,
        *,
        add_special_tokens: bool = True,
        final_only: bool = False,
        ready: ReadyQueue | None = None,
        ready_key: int = 0,
        priority: int = 0,
        user: str | None = None,
        timeout: float | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        """Queue a prompt (text, or token ids of any integer sequence); returns at once.

        With ``final_only`` updates are withheld until a completion ends, so that nothing wakes in between. With ``ready``, news
        is reported there under ``ready_key``. Everything wrong with prompt or parameters raises here.
        """

    def logits(self, token_ids: _TokenIds) -> NDArray[np.float32]:
        """Next-token logits after every prefix of ``token_ids``: (tokens, vocabulary)."""

    def wait_for_room(self, timeout: float | None = None) -> bool:
        """Wait until a request may be submitted, or the engine is closed; False after ``timeout`` seconds."""

    def save_session(self, path: str | PathLike[str], token_ids: _TokenIds, cache_salt: str | None = None) -> int:
        """Write the cached keys and values of a prompt's beginning to one file; how many tokens it holds."""

    def load_session(self, path: str | PathLike[str], cache_salt: str | None = None) -> tuple[list[int], int]:
        """Put a session's keys and values into the cache; its token ids, and how many of them are cached now."""

    def take_kv_events(self) -> tuple[list[tuple[str, list[int], list[int] | None, list[int] | None]], int]:
        """Changes of the prefix cache since the last call, and how many were dropped because nobody took them."""

    def take_trace(self) -> tuple[list[tuple[int, float, str, int | None, str | None]], int]:
        """Moments of requests since the last call (request id, seconds since 1970, what, count, reason), and how many were dropped."""

    def metrics(self) -> dict[str, Any]:
        """Counters since the start, gauges now and distributions."""

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait for those that live; False after ``timeout`` seconds."""

    def close(self) -> None:
        """Abort what runs, join the thread, free weights and cache; harmless when repeated."""

@final
class DeviceModel:
    """A checked model as a backend in Python gets it: its program, and its weights in plain numbers, one at a time."""

    def __new__(
        cls,
        path: str | PathLike[str],
        *,
        backend: str,
        dtype: str = "auto",
        kv_cache_dtype: str | Mapping[str, Any] = "auto",
        quantization: str | None = None,
        mmap: bool = True,
        load_format: str = "auto",
        seed: int = 0,
    ) -> DeviceModel: ...
    @property
    def element(self) -> Literal["f32", "bf16"]:
        """The type of weights and activations."""

    @property
    def buffers(self) -> list[tuple[str, int, bool]]:
        """Name and width of every buffer, and whether it has the rows only whose logits are wanted."""

    @property
    def steps(self) -> list[tuple[str, dict[str, Any]]]:
        """Kind and fields of every step (rust/model/src/step.rs); columns of a buffer are (buffer, first column, width)."""

    @property
    def narrow_steps(self) -> list[tuple[str, dict[str, Any]]]:
        """The same for steps with prompts: rows are selected before the last layer's end, not behind it."""

    @property
    def logits(self) -> tuple[int, int, int]: ...
    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of every matrix; no outputs where it was merged into another."""

    @property
    def tied_head(self) -> int | None:
        """The matrix that is the head and the embedding, if they are one."""

    @property
    def kv_layers(self) -> list[tuple[str, str]]:
        """Types of each layer's keys and values."""

    @property
    def page_bytes(self) -> int: ...
    @property
    def constants(self) -> dict[str, Any]: ...
    def max_logit_rows(self, max_num_seqs: int, max_num_batched_tokens: int) -> int:
        """The most rows whose logits one step gives."""

    def matrix_formats(self, matrix: int) -> list[tuple[int, str, str]]:
        """For each part of a matrix: rows, the format in which they are stored, and that to compute with."""

    def matrix_group(self, matrix: int) -> int | None:
        """Columns that share a scale, if all of a matrix is stored as 8-bit floats ("F8_E4M3") with scales of one kind."""

    def matrix_scales(self, matrix: int) -> NDArray[np.float32]:
        """The scales of such a matrix: (outputs * groups of columns)."""

    def random_matrix(self, matrix: int) -> list[tuple[int, int]] | None:
        """Rows and seed of each part of a matrix whose weights are random; None where they are read."""

    def random_table(self, table: str) -> int | None:
        """The seed of a table whose weights are random."""

    def table_formats(self, table: str) -> tuple[int, str, str]:
        """Rows, stored format and that to compute with of the table "embedding" or "position"."""

    def read_matrix(
        self, matrix: int, first: int, out: NDArray[np.uint8], form: Literal["f32", "bf16", "stored"] | None = None
    ) -> None:
        """Fill ``out`` with rows from ``first`` on: as floats, as they are stored, or (None) in the type of weights."""

    def matrix_bias(self, matrix: int) -> NDArray[np.float32] | None: ...
    def table_shape(self, table: str) -> tuple[int, int] | None:
        """(rows, columns) of the table "embedding" or "position", if the model has it."""

    def read_table(
        self, table: str, first: int, out: NDArray[np.uint8], form: Literal["f32", "bf16", "stored"] | None = None
    ) -> None: ...
    def vector(self, vector: int) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """A norm's weight and bias."""

    def rotations(self, rope: int, positions: int, *, long_context: bool = False) -> NDArray[np.float32]:
        """Cosines and sines: (positions, rotary_dim / 2, 2)."""

@final
class Work:
    """One step's work for an executor outside."""

    @property
    def kind(self) -> Literal["forward", "finish", "draft", "export", "import"]:
        """What is to be done, in the order in which it comes.

        "forward" begins a step, and is not answered; "finish" wants the outcome of the first step that was begun and not finished,
        of which there are two at most.
        """
    @property
    def rounds(self) -> int:
        """How many tokens "draft" may draw for each row by itself."""

    def advanced(self, positions: int) -> Work:
        """A "draft" so many positions later, of what the rows before chose."""

    @property
    def rows(self) -> int: ...
    @property
    def sequences(self) -> int: ...
    @property
    def logit_rows(self) -> int: ...
    @property
    def drawn(self) -> list[bool]:
        """Which of the wanted rows are drawn; none for "draft"."""

    @property
    def draw_kind(self) -> int:
        """What draws need: 0 the largest logits, 1 draws, 2 changes of logits before or log-probabilities after them."""

    def write_draws(self, rows: int, out: NDArray[np.uint8], words: NDArray[np.uint32]) -> int:
        """Write how the wanted rows are drawn, 72 bytes each and padded to ``rows``, and the words that they refer to; return how many.

        See rust/engine/src/draw_layout.rs and cuda/draw.cuh.
        """

    @property
    def most_pages(self) -> int:
        """Pages of the sequence that has the most."""

    @property
    def copies(self) -> list[tuple[int, int]]:
        """Pages to copy before anything is computed, one after the other: (from, to)."""

    @property
    def page(self) -> int: ...
    @property
    def contents(self) -> bytes: ...
    def not_drafted(self) -> Work:
        """The rows that a draft model has not computed yet."""

    def write_rows(self, rows: int, sequences: int, long_context_row: int, out: NDArray[np.int32]) -> None:
        """Write the arrays of a step's rows, padded to so many rows and sequences.

        One after the other: tokens, positions, slots, rope rows, the rows' sequences and the rows whose logits are wanted, (rows)
        each, then the sequences' first rows, (sequences + 1), and copies of pages, (32, 2), -1 where there are none. A token of -1 - i is the one chosen for the i-th wanted row of the step
        begun before. See rust/engine/src/layout.rs.
        """

    def write_pages(self, table: NDArray[np.int32]) -> None:
        """Write each sequence's pages at the beginning of its row of ``table``, (sequences, most pages)."""

@final
class StepLauncher:
    """Steps of one model, padded to sizes, and the graphs that some sizes have: these are begun and ended without Python.

    Parameters
    ----------
    functions
        Addresses of the CUDA driver's functions by name.
    stream
        The stream's handle.
    limits
        Most rows, sequences and rows with logits of a step; most pieces of decode attention (None: there is always room) and their
        pages; most rows of a decoding sequence; whether graphs are captured.
    places
        Where the device has a step's rows, draws, their words, page tables, choices and log-probabilities.
    halves
        Twice: the pinned arrays of the same, with an event's handle, and the event. Steps have the one and the other by turns.
    long_context_row
        First row of the tables of cosines and sines that long contexts use.
    small_tables
        Bytes of page tables that are sooner copied whole than by columns.
    copies
        Whether graphs copy the pages that a step begins with, up to 32.
    """

    def __new__(
        cls,
        functions: dict[str, int],
        stream: int,
        *,
        limits: tuple[int, int, int, int | None, int, int, bool],
        places: tuple[int, int, int, int, int, int],
        halves: tuple[tuple[Any, ...], tuple[Any, ...]],
        long_context_row: int,
        small_tables: int,
        copies: bool,
    ) -> StepLauncher: ...
    @staticmethod
    def padded(count: int) -> int:
        """Return the size that a count of sequences is padded to in decoding."""

    def size(self, work: Work) -> tuple[int, int, int, bool, bool, bool]:
        """Return what a step is padded to: rows, sequences, rows with logits; whether it only decodes, is plain, is captured."""

    def turn(self) -> int:
        """Return which half the step that begins now has."""

    def add(self, size: tuple[int, int, int, bool, bool, bool], kind: int | None, graph: int, owner: Any) -> None:
        """Launch this graph for steps of a size that draw so (None: not at all) from now on; ``owner`` keeps it alive."""

    def leave(self, work: Work) -> bool:
        """Have the core end the step that was enqueued last, without Python; False where there are logits for the host.

        Also False where `WorkLink.next_work` does not know this launcher.
        """

@final
class WorkLink:
    """Where an executor outside takes its work, and answers. It does not keep the engine alive."""

    def next_work(self, timeout: float | None = None, launcher: StepLauncher | None = None) -> Work | None:
        """Wait for work that ``launcher`` does not do; None when there will be no more.

        What it can, the launcher does meanwhile on this thread, without Python's lock. All calls must name the same one.
        """

    def wait_for_rows(self) -> bool:
        """Wait until a step was done since the last call; False when there will be no more."""

    def finish_rows(
        self,
        work: Work,
        step: Work,
        logits: NDArray[np.float32],
        choices: NDArray[np.int32] | None = None,
        logprobs: NDArray[np.int32] | None = None,
    ) -> None:
        """Answer "finish" (of ``step``) and "draft" (itself): the logits of the wanted rows; or, with ``choices``, of those not drawn.

        Choices and log-probabilities, (values of a row) each, have an entry for every wanted row. A choice is -1 where a logit is NaN
        or infinite, and -2 where no token is left. See rust/engine/src/draw_layout.rs.
        """

    def finish_rounds(self, work: Work, choices: NDArray[np.int32]) -> None:
        """Answer "draft" with what was chosen in several rounds: (rounds, rows)."""

    def finish_page(self, work: Work, page: NDArray[np.uint8]) -> None: ...
    def finish(self, work: Work) -> None: ...
    def fail(self, work: Work, message: str) -> None: ...
    def report_power(self, watts: float) -> None:
        """Tell what the device takes while it computes."""

    def stop(self, message: str) -> None:
        """Take no more work: what is at hand and whatever comes fails with this sentence."""
