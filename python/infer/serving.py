"""How requests are served: options that change when an answer comes, never what it says; and how tokens are guessed ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypedDict

from infer import hub
from infer._core import InferError

if TYPE_CHECKING:
    import os
    from pathlib import Path

    Speculation = tuple[str, int, int, int, str | os.PathLike[str] | None, int | None]

__all__ = ["RequestOptions", "serving", "speculation"]


class RequestOptions(TypedDict, total=False):
    """Keywords of every call that generates; each one value for all prompts, or a list with one for each.

    Attributes
    ----------
    priority
        Lower is served first, as in vLLM; 0 is usual. A class that waits longer than `LLM(priority_patience=)` gets a turn.
    user
        Whom a request is for: users of equal priority are served evenly, by tokens.
    timeout
        Seconds after which a request ends with `finish_reason` "timeout" and what it has.
    cache_salt
        Only requests with the same salt share cached keys and values.
    """

    priority: int | Sequence[int]
    user: str | Sequence[str | None] | None
    timeout: float | Sequence[float | None] | None
    cache_salt: str | Sequence[str | None] | None


_OPTIONS = ("priority", "user", "timeout", "cache_salt")


def serving(options: RequestOptions, count: int) -> list[dict[str, Any]]:
    """Return each prompt's options as keywords of the core's `submit`."""
    if unknown := sorted(set(options) - set(_OPTIONS)):
        raise InferError(f"{unknown[0]}: no such option of a request; there are {', '.join(_OPTIONS)}")
    each: list[dict[str, Any]] = [{} for _ in range(count)]
    for name in _OPTIONS:
        given: Any = options.get(name)
        many = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
        if many and len(given) != count:
            raise InferError(f"{name}: {len(given)} given for {count} prompts; give one, or one for each prompt")
        for place, keywords in enumerate(each):
            value = given[place] if many else given
            if value is not None:
                keywords[name] = value
    return each


_FIELDS = {"method", "model", "num_speculative_tokens", "num_draft_tokens", "prompt_lookup_min", "prompt_lookup_max"}


def speculation(config: Mapping[str, Any] | None, target: Path, **hub_options: Any) -> Speculation | None:
    """Read vLLM's `speculative_config` for the model at `target`; the core checks the numbers."""
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise InferError(f"speculative_config: a dictionary is needed, got {type(config).__name__}")
    if unknown := sorted(str(key) for key in set(config) - _FIELDS):
        raise InferError(f"speculative_config: unknown key {unknown[0]!r}; there are {', '.join(sorted(_FIELDS))}")
    method = config.get("method", "draft_model" if "model" in config else None)
    if method is None:
        raise InferError('speculative_config: \'method\' is needed, "ngram" or "draft_model"')
    if method == "draft_model" and (lookup := sorted(key for key in config if key.startswith("prompt_lookup"))):
        raise InferError(f'speculative_config: {lookup[0]!r} is for the method "ngram", not for "draft_model"')
    draft = config.get("model")
    if draft is None and method == "draft_model":
        draft = hub.DRAFTS.get(target)
    if draft is not None and method == "ngram":
        raise InferError('speculative_config: \'model\' is for the method "draft_model", not for "ngram"')
    lookup_max = config.get("prompt_lookup_max", 4)
    return (
        method,
        config.get("num_speculative_tokens", 2 if method == "draft_model" else 4),
        config.get("prompt_lookup_min", max(1, min(2, int(lookup_max))) if isinstance(lookup_max, Integral) else 2),
        lookup_max,
        None if draft is None else hub.resolve(draft, **hub_options),
        config.get("num_draft_tokens"),
    )
