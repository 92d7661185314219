"""The prefix cache as users see it: sessions in files, and news of what it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infer._core import InferError
from infer.calls import Calls
from infer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import os

    from infer.prompts import TokenIds

__all__ = ["Sessions"]


class Sessions(Calls):
    """What `LLM` can do with its cached keys and values."""

    def kv_events(self) -> list[dict[str, Any]]:
        """Return what became findable in the prefix cache, and what is not any more, since the last call, oldest first.

        The shapes are vLLM's: `{"type": "BlockStored", "block_hashes", "parent_block_hash", "token_ids", "block_size"}` and
        `{"type": "BlockRemoved", "block_hashes"}`. Needs `LLM(kv_events=True)`; `InferError` without it, and if events were
        lost because nobody asked for too long.
        """
        events, dropped = self._engine.take_kv_events()
        if dropped:
            raise InferError(f"kv_events: {dropped} events were lost; call it more often")
        return [_kv_event(*event) for event in events]

    def trace_events(self) -> list[dict[str, Any]]:
        """Return moments of requests' lives since the last call, oldest first, for timelines and tracing systems.

        Each is `{"request_id", "time", "event"}` with `time` in seconds since 1970 and `event` one of "queued", "scheduled"
        (given cache and a place in the steps; has `cached_tokens`), "restoring" (waits for `pages` of `kv_offload_dir`),
        "preempted", "first_token" and "ended" (has `finish_reason`). Needs `LLM(trace=True)`; `InferError` without it, and if
        events were lost because nobody asked for too long.
        """
        events, dropped = self._engine.take_trace()
        if dropped:
            raise InferError(f"trace_events: {dropped} events were lost; call it more often")
        return [_trace_event(*event) for event in events]

    def save_session(self, path: str | os.PathLike[str], prompt: str | TokenIds, *, cache_salt: str | None = None) -> int:
        """Write the cached keys and values of a prompt's beginning to a file, whole or not at all.

        Parameters
        ----------
        path
            The file; an existing one is replaced only when the new one is complete.
        prompt
            Text or token ids of what was generated from, and may go on: `output.prompt_token_ids + output.outputs[0].token_ids`.
        cache_salt
            As the requests had it.

        Returns
        -------
        int
            How many tokens the session holds: the last generated one is never computed, so it is not among them.

        Raises
        ------
        InferError
            If the model's file was changed before all of its weights were read: what was computed may be another model's; if
            `path` is there already and not a regular file, or cannot be written.
        """
        token_ids = Tokenizer(self._tokenizer()).encode(prompt) if isinstance(prompt, str) else prompt
        return self._engine.save_session(path, token_ids, cache_salt)

    def load_session(self, path: str | os.PathLike[str], *, cache_salt: str | None = None) -> list[int]:
        """Put a saved session's keys and values into the prefix cache and return its token ids.

        A request that begins with these tokens then computes only what follows. `InferError` if the file is damaged or
        another model's.
        """
        return self._engine.load_session(path, cache_salt)[0]


def _kv_event(kind: str, digest: list[int], parent: list[int] | None, token_ids: list[int] | None) -> dict[str, Any]:
    hashes = [bytes(digest)]
    if kind == "removed":
        return {"type": "BlockRemoved", "block_hashes": hashes}
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": None if parent is None else bytes(parent),
        "token_ids": token_ids,
        "block_size": len(token_ids or ()),
    }


def _trace_event(request_id: int, time: float, event: str, count: int | None, reason: str | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"request_id": request_id, "time": time, "event": event}
    if count is not None:
        fields["pages" if event == "restoring" else "cached_tokens"] = count
    if reason is not None:
        fields["finish_reason"] = reason
    return fields
