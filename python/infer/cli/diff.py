"""`infer diff`: two ways to compute a model, or two models of one vocabulary, compared on a text."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infer import LLM, InferError, SamplingParams
from infer.cli.common import JsonOption, MaxTokensOption, ParamOption, check_known, parameter, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

TEXT = """The old lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote down the weather. One night
the wind came from the north, and with it a small boat that nobody had been waiting for."""

FirstOption = Annotated[
    list[str] | None,
    typer.Option(
        "--first", metavar="NAME=VALUE", help="An option of LLM for the first way (device=cpu), model= too; may be repeated."
    ),
]
SecondOption = Annotated[
    list[str] | None,
    typer.Option("--second", metavar="NAME=VALUE", help="The same for the second way; device=cuda unless said."),
]


def diff(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A folder, a .gguf file or a hub id; none: the bundled one.")
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="The text whose logits are compared, and continued.")] = TEXT,
    first: FirstOption = None,
    second: SecondOption = None,
    max_tokens: MaxTokensOption = 64,
    as_json: JsonOption = False,
) -> None:
    """Compare two ways to compute a model, such as CPU and GPU: logits of a text, and what each writes after it, greedily.

    `--second model=OTHER` compares two models of one vocabulary, such as one and its quantization, on the tokens of the first.
    """
    ways = {
        "first": _options("--first", first, {"device": "cpu"}),
        "second": _options("--second", second, {"device": "cuda"}),
    }
    token_ids, logits, written = _computed("--first", {"model": model, **ways["first"]}, prompt, max_tokens)
    _, *theirs = _computed("--second", {"model": model, **ways["second"]}, token_ids, max_tokens, logits.shape[1])
    report = {**ways, **compare((logits, written), theirs)}
    if as_json:
        print_json(report)
    else:
        for name, value in report.items():
            typer.echo(f"{name.replace('_', ' '):32} {value}")


def _options(side: str, texts: ParamOption, usual: dict[str, Any]) -> dict[str, Any]:
    options = dict(parameter(text, side, "dtype=float32") for text in texts) if texts else usual
    known = sorted(inspect.signature(LLM).parameters)
    for name in options:
        check_known(name, known, side, "option of LLM")
    return options


def _computed(
    side: str, options: dict[str, Any], prompt: str | list[int], max_tokens: int, vocabulary: int | None = None
) -> tuple[list[int], NDArray[np.float32], list[int]]:
    """Return a prompt's tokens, their logits (tokens, vocabulary), and the greedy continuation.

    With `vocabulary` a model that has another is refused before it computes: the tokens may be none of its own.
    """
    try:
        llm = LLM(**options)
    except (TypeError, InferError) as error:
        raise InferError(f"{side}: {error}") from error
    with llm:
        if vocabulary is not None:
            _same_vocabulary(vocabulary, llm.info.vocabulary_size)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        return output.prompt_token_ids, llm.logits(output.prompt_token_ids), output.outputs[0].token_ids


def _same_vocabulary(first: int, second: int) -> None:
    if first != second:
        sizes = f"{first} tokens, --second one of {second}"
        raise InferError(f"--first has a vocabulary of {sizes}; only models of one vocabulary can be compared")


def compare(first: Sequence[Any], second: Sequence[Any]) -> dict[str, Any]:
    """Tell how far apart two ways are, of which each has logits (tokens, vocabulary) and a continuation.

    Differences of logits are absolute; the divergence is Kullback and Leibler's, in nats, of the second from the first.
    """
    import numpy as np

    (ours, written), (theirs, other) = first, second
    _same_vocabulary(ours.shape[1], theirs.shape[1])
    difference = np.abs(ours - theirs)
    logs = [values - np.logaddexp.reduce(values, axis=-1, keepdims=True) for values in (ours.astype(float), theirs.astype(float))]
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    # As far as both wrote: max_model_len may end one before the other.
    parted = [place for place, (a, b) in enumerate(zip(written, other, strict=False)) if a != b]
    return {
        "tokens": len(ours),
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "standard_deviation_of_logits": float(ours.std()),
        "mean_kl_divergence": float(divergence.mean()),
        "largest_kl_divergence": float(divergence.max()),
        "same_likeliest_token": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        "generated_tokens": min(len(written), len(other)),
        "first_divergent_token": parted[0] if parted else None,
    }
