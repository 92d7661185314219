"""`LLM`: a loaded model and everything one does with it.

What generates is in `generating.py`, what concerns cached keys and values in `sessions.py`, what calls have in common in
`calls.py`.
Generated tokens come out of the core's own thread; nothing here runs per token unless the caller streams.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from infer import defaults, devices, hub, logs
from infer._core import InferError
from infer.generating import Generating
from infer.serving import speculation
from infer.sessions import Sessions
from infer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from infer._core import ModelInfo
    from infer.events import Dispatcher
    from infer.prompts import TokenIds

__all__ = ["LLM"]


class LLM(Generating, Sessions):
    """A large language model, ready to generate. Any number of threads and tasks may use one at once.

    Parameters
    ----------
    model
        A folder in Hugging Face layout, a `.gguf` file, a hub id such as `org/name` or `org/name:Q8_0`, or None for the
        small model that comes with this package.
    device
        "cpu", "cuda" (the current NVIDIA GPU; needs the extra `infer[cuda13]` or `infer[cuda12]`) or "auto", which is the CPU.
    dtype
        "auto" may round activations: to 8 bits where the weights are integers, to bfloat16 where they are and the machine
        multiplies those; on a GPU it is bfloat16. "float32" computes every model, quantized ones too, with its exact weights and
        float32 activations.
    threads
        How many threads compute; None takes one per physical core that this process may use.
    max_model_len
        Longest prompt and completion together, in tokens; None takes what the model was trained for.
    max_num_seqs
        How many completions run at once; more of them wait. None is 64, and 256 on a GPU.
    max_num_batched_tokens
        How many tokens one step computes at most; fewer let short requests overtake long ones. None is 512, and 8192 on a GPU.
    enable_prefix_caching
        Compute the common beginning of prompts once.
    kv_cache_dtype
        How keys and values are kept: "float32", "float16", "bfloat16", "int8", "fp8" (E4M3), or "auto", which is float16 (on a
        GPU bfloat16), and float32 with `dtype="float32"`. `{"key": "float16", "value": "int8"}` tells them apart (what is not
        given is "auto"); with `"skip_layers": [0, -1]` those layers keep the "auto" type, negative numbers counting from the
        end. 8-bit types hold twice as many tokens as float16, at a cost (README "KV cache types"). A draft model gets the same.
    kv_cache_memory_bytes
        Memory for keys and values; None: what `max_num_seqs` completions need, if free (on a GPU, nine tenths of what is free).
    quantization
        Round the weights of a model stored as floats (a safetensors folder, or a GGUF file in F32, F16 or BF16) while loading,
        one tensor after the other: "int8", "int4" (a scale for each 32 weights) or "int4-g128" (one for each 128, smaller and
        less exact). Embedding and output head get 8 bits, or 6 beside 4; norms, biases and the routers of experts stay as they
        are. None computes with what is stored, as a draft model always does. `infer.quantize` writes the result to disk. A GPU
        rounds alike (the head to 8 bits), and knows "fp8" (E4M3, a scale for each row) for matrices but for experts and the head.
    seed
        For requests that bring no seed of their own, and for random weights.
    mmap
        Map weight files instead of reading them whole. On the CPU their weights are then packed while the model is used, so that
        the first token need not wait for that; they must not change meanwhile (deleting or replacing them by renaming is fine).
    load_format
        "auto", or "dummy": random weights (a draft model's too), on every device those of `seed`, from `config.json` alone.
    packed_cache_dir
        A folder where weights are kept as they were packed for this processor: the next load of the model reads them, and
        `quantization` rounds once. Damaged and outdated files are written again. Not on a GPU.
    max_waiting
        How many requests may wait for their first step; None is any number.
    when_full
        What a call does when as many wait: "error" raises `QueueFullError` at once, "wait" waits (or awaits) its turn.
    priority_patience
        Seconds after which a priority class that nobody was served from gets a turn before all others.
    step_time_target
        Seconds that a step may take which computes prompts while streamed completions run: prompts are cut to fit, so that such a
        completion never waits much longer for its next token. None, and beside others: `max_num_batched_tokens` alone cuts.
    speculative_config
        Guess tokens ahead and verify them together; what is generated stays the same, token for token.
        `{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2, "prompt_lookup_max": 4}` guesses what followed
        the last tokens before; `{"method": "draft_model", "model": ..., "num_speculative_tokens": 2}` asks a smaller model
        of the same vocabulary; the bundled model has one, which is taken unless another is named. With `"num_draft_tokens": 8` a
        step verifies a tree of up to 8 guesses: beside that chain, branches with other continuations of the same last tokens, or
        with what the smaller model holds likely in place of its first guesses. For large models and few completions at once.
    kv_offload_dir, kv_offload_max_bytes
        A folder, and how much it may hold: cached keys and values without room in memory go there and come back, even later.
    kv_events
        Keep a journal of what the prefix cache holds; see `kv_events`.
    trace
        Keep a journal of requests' lives; see `trace_events`.
    enforce_eager
        On a GPU, launch every kernel by itself instead of replaying captured graphs: slower, and the same bits.
    deterministic
        On a GPU, the same bits for a request whatever is computed beside it, as always on the CPU; README "GPU" has the price.
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
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        kv_cache_dtype: str | Mapping[str, object] = "auto",
        kv_cache_memory_bytes: int | None = None,
        quantization: str | None = None,
        seed: int = 0,
        mmap: bool = True,
        load_format: str = "auto",
        packed_cache_dir: str | os.PathLike[str] | None = None,
        max_waiting: int | None = None,
        when_full: str = "error",
        priority_patience: float = 10.0,
        step_time_target: float | None = 0.1,
        speculative_config: Mapping[str, Any] | None = None,
        kv_offload_dir: str | os.PathLike[str] | None = None,
        kv_offload_max_bytes: int = 8 << 30,
        kv_events: bool = False,
        trace: bool = False,
        enforce_eager: bool = False,
        deterministic: bool = False,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        if when_full not in ("error", "wait"):
            raise InferError(f'when_full must be "error" or "wait", got {when_full!r}')
        self._waits = when_full == "wait"
        if kv_offload_dir is None and kv_offload_max_bytes != 8 << 30:
            raise InferError(f"kv_offload_max_bytes is {kv_offload_max_bytes!r}, but there is no kv_offload_dir to bound")
        hub_options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        path = hub.resolve(model, revision=revision, **hub_options)
        advice = defaults.read(path)
        self._engine, self._worker = devices.start(
            device,
            path,
            enforce_eager=enforce_eager,
            deterministic=deterministic,
            dtype=dtype,
            threads=threads,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            quantization=quantization,
            seed=seed,
            mmap=mmap,
            load_format=load_format,
            packed_cache_dir=packed_cache_dir,
            max_waiting=max_waiting,
            priority_patience=priority_patience,
            step_time_target=step_time_target,
            speculation=speculation(speculative_config, path, **hub_options),
            kv_offload=None if kv_offload_dir is None else (kv_offload_dir, kv_offload_max_bytes),
            kv_events=kv_events,
            trace=trace,
        )
        if self._worker is not None:
            self._worker.close_at_exit(self)
        self._defaults = {**self._engine.info.advised_sampling, **advice}
        logs.loaded(self._engine)
        self._names = self._engine.tokenizer
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._dispatcher: Dispatcher | None = None

    def logits(self, token_ids: str | TokenIds) -> NDArray[np.float32]:
        """Return the model's logits after every prefix of `token_ids` (a text is encoded first): (tokens, vocabulary)."""
        if isinstance(token_ids, str):
            token_ids = self.tokenizer.encode(token_ids)
        return self._engine.logits(token_ids)

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

    def metrics(self) -> dict[str, Any]:
        """Return counters since the start and gauges now: requests, tokens, steps, pages, prefix-cache hits, drafts.

        `histograms` maps names to `{"bounds", "counts", "sum", "count"}`: counts per bucket (upper ends in `bounds`, one more
        bucket is open), of `queue_time`, `time_to_first_token`, `inter_token_latency`, `total_time`, `step_time` in seconds
        and of `prompt_tokens`, `generated_tokens`, `step_tokens`; `offload` says what `kv_offload_dir` holds and did.
        """
        return self._engine.metrics()

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Abort what runs and give the memory back. Harmless when repeated; every other call then raises `InferError`.

        In a forked child it does nothing: what would be given back is the parent's.

        Parameters
        ----------
        drain
            Refuse new requests, but let those that were accepted end first.
        timeout
            Seconds to wait for that; what then still runs is aborted. None waits for all.
        """
        if self._process != os.getpid():
            return
        if drain:
            self._engine.drain(timeout)
        if not self._engine.closed:
            logs.closing(self._engine)
        self._engine.close()
        if self._worker is not None:
            self._worker.join()
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
