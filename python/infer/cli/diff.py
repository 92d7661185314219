"""`infer diff`: two ways to compute a model, compared on a text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from infer import LLM, InferError, SamplingParams
from infer.cli.common import JsonOption, MaxTokensOption, ParamOption, parameter, print_json

TEXT = """The old lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote down the weather. One night
the wind came from the north, and with it a small boat that nobody had been waiting for."""

FirstOption = Annotated[
    list[str] | None,
    typer.Option("--first", metavar="NAME=VALUE", help="An option of LLM for the first way (device=cpu); may be repeated."),
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
    """Compare two ways to compute a model, such as CPU and GPU: logits of a text, and what each writes after it, greedily."""
    ways = [_options(first, {"device": "cpu"}), _options(second, {"device": "cuda"})]
    found = compare(*(_computed(model, way, prompt, max_tokens) for way in ways))
    report = {"first": ways[0], "second": ways[1], **found}
    if as_json:
        print_json(report)
    else:
        for name, value in report.items():
            typer.echo(f"{name.replace('_', ' '):32} {value}")


def _options(texts: ParamOption, usual: dict[str, Any]) -> dict[str, Any]:
    return dict(parameter(text) for text in texts) if texts else usual


def _computed(model: str | None, options: dict[str, Any], prompt: str, max_tokens: int) -> tuple[Any, list[int]]:
    """Logits of a prompt's tokens, and the greedy continuation."""
    try:
        llm = LLM(model, **options)
    except TypeError as error:
        raise InferError(f"diff: {error}") from error
    with llm:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return llm.logits(prompt), list(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids)


def compare(first: tuple[Any, list[int]], second: tuple[Any, list[int]]) -> dict[str, Any]:
    """Tell how far logits (tokens, vocabulary) and continuations are apart.

    Differences of logits are absolute; the divergence is Kullback and Leibler's, in nats, of the second from the first.
    """
    import numpy as np

    (ours, written), (theirs, other) = first, second
    difference = np.abs(ours - theirs)
    logs = [values - np.logaddexp.reduce(values, axis=-1, keepdims=True) for values in (ours.astype(float), theirs.astype(float))]
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    parted = [place for place, (a, b) in enumerate(zip(written, other, strict=True)) if a != b]
    return {
        "tokens": len(ours),
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "standard_deviation_of_logits": float(ours.std()),
        "mean_kl_divergence": float(divergence.mean()),
        "largest_kl_divergence": float(divergence.max()),
        "same_likeliest_token": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        "generated_tokens": len(written),
        "first_divergent_token": parted[0] if parted else None,
    }
