"""What the commands share: options, the way from options to `SamplingParams`, and how numbers and mistakes are shown."""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from infer import InferError

if TYPE_CHECKING:
    from infer import LLM, RequestMetrics, SamplingParams

ModelOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="A folder, a .gguf file, or a hub id such as org/name or org/name:Q8_0."),
]
ThreadsOption: TypeAlias = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="Threads that compute; one per core unless said.")
]
DeviceOption: TypeAlias = Annotated[str, typer.Option("--device", help="'cpu', 'cuda' for an NVIDIA GPU, or 'auto': the CPU.")]
DtypeOption: TypeAlias = Annotated[
    str, typer.Option("--dtype", help="'auto', or 'float32' for exact weights and float32 activations.")
]
ContextOption: TypeAlias = Annotated[
    int | None, typer.Option("--max-model-len", min=1, help="Longest prompt and answer together, in tokens.")
]
KvCacheDtypeOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--kv-cache-dtype",
        help="'auto', 'float32', 'float16', 'bfloat16', 'int8' or 'fp8', or a JSON object with 'key', 'value' and 'skip_layers'.",
    ),
]
QuantizationOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--quantization", "-q", help="Round a model of floats while loading: 'int8', 'int4' or 'int4-g128'; on a GPU 'fp8'."
    ),
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
MaxTokensOption: TypeAlias = Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Longest answer, in tokens.")]
TemperatureOption: TypeAlias = Annotated[
    float | None, typer.Option("--temperature", help="0 always takes the likeliest token; the model's own advice unless said.")
]
SeedOption: TypeAlias = Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")]
StopOption: TypeAlias = Annotated[list[str] | None, typer.Option("--stop", help="End at this text; may be repeated.")]
ParamOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", metavar="NAME=VALUE", help="Any other field of SamplingParams, such as top_p=0.9."),
]

# Used where neither the user nor the model's authors say anything: a little narrower than the raw distribution.
ADVICE = {"temperature": 0.8, "top_p": 0.95}


def sampling(
    llm: LLM,
    max_tokens: int,
    temperature: float | None,
    seed: int | None,
    stop: list[str] | None,
    params: list[str] | None,
) -> SamplingParams:
    """Put the options over the model's own advice, and that over ours."""
    options = {"temperature": temperature, "seed": seed, "stop": stop or None}
    given = {name: value for name, value in options.items() if value is not None}
    more = dict(parameter(text) for text in params or [])
    if twice := sorted(given.keys() & more.keys()):
        raise InferError(f"--{twice[0]} and --param {twice[0]}={more[twice[0]]} are two values for one field; give one of them")
    changes = {"max_tokens": max_tokens, **given, **more}
    advised = llm.default_sampling_params()
    plain = type(advised)()
    ours = {name: value for name, value in ADVICE.items() if getattr(advised, name) == getattr(plain, name)}
    return changed(advised, {**ours, **changes})


def changed(params: SamplingParams, changes: dict[str, Any]) -> SamplingParams:
    """Change some fields by their names, as users write them."""
    known = _fields(params)
    for name in changes:
        check_known(name, known, "--param", "sampling parameter")
    bias = changes.get("logit_bias")
    if isinstance(bias, dict):  # JSON has no keys but strings
        changes = {**changes, "logit_bias": {int(key) if key.isdecimal() else key: value for key, value in bias.items()}}
    try:
        return params.replace(**changes)
    except TypeError as error:  # a value of another type
        raise InferError(f"sampling parameters: {error}") from error


def check_known(name: str, known: list[str], option: str, what: str) -> None:
    """Refuse a name that an option's value cannot have, and say which one may be meant."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ";"
        raise InferError(f"{option}: {name!r} is no {what}{meant} known: {', '.join(known)}")


def _fields(params: SamplingParams) -> list[str]:
    kind = type(params)
    return sorted(name for name in dir(kind) if not name.startswith("_") and not callable(getattr(kind, name)))


def no_logprobs(params: SamplingParams, where: str) -> None:
    """Refuse log-probabilities where nothing shows them."""
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            raise InferError(f"--param: {name} is shown nowhere here; {where}")


def need_tokenizer(llm: LLM) -> None:
    """Refuse a model whose input and output are token ids only."""
    if not llm.info.has_tokenizer:
        raise InferError("this model has no tokenizer: the command line needs one; in Python, LLM.generate takes token ids")


def parameter(text: str, option: str = "--param", example: str = "top_p=0.9") -> tuple[str, Any]:
    """Read an option's `name=value`; the value is JSON, or else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise InferError(f"{option}: {text!r} is no NAME=VALUE, such as {example}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def kv_types(text: str) -> str | dict[str, Any]:
    """Read `--kv-cache-dtype`: a type, or a JSON object for different types of keys and values."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        found: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InferError(f'--kv-cache-dtype: {text!r} is no JSON object, such as {{"value": "int8"}}: {error}') from error
    return found


def speed(metrics: RequestMetrics) -> str:
    """Say in a few words how fast a request was."""
    words = [f"{metrics.prompt_tokens} prompt tokens"]
    if metrics.cached_tokens:
        words[0] += f" ({metrics.cached_tokens} cached)"
    words.append(f"{metrics.generated_tokens} generated")
    if metrics.time_to_first_token is not None:
        words.append(f"first after {metrics.time_to_first_token:.2f} s")
    if metrics.inter_token_latency:
        words.append(f"then {1 / metrics.inter_token_latency:.1f} tokens/s")
    return ", ".join(words)


def metrics_json(metrics: RequestMetrics) -> dict[str, Any]:
    """Return the numbers as JSON takes them."""
    return asdict(metrics)


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print one JSON document on stdout: with characters as they are in UTF-8, and escaped in any other encoding."""
    unicode = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(value, ensure_ascii=not unicode, indent=indent) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Print a line for people on stderr, dimmed, if somebody looks."""
    if sys.stderr.isatty():
        from rich.console import Console

        Console(stderr=True, highlight=False, soft_wrap=True).print(text, style="dim", markup=False)


def complain(text: str) -> None:
    """Print a mistake on stderr."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), text))
