"""`infer generate`: complete a prompt."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infer import LLM, InferError
from infer.cli.common import (
    ContextOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxTokensOption,
    ModelOption,
    ParamOption,
    QuantizationOption,
    SeedOption,
    StopOption,
    TemperatureOption,
    ThreadsOption,
    metrics_json,
    need_tokenizer,
    no_logprobs,
    print_json,
    sampling,
    say,
    speed,
)

if TYPE_CHECKING:
    from infer import CompletionOutput, Logprob, RequestOutput, SamplingParams, StreamOutput


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on with; - reads it from standard input.")],
    model: ModelOption = None,
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    param: ParamOption = None,
    echo: Annotated[bool, typer.Option("--echo/--no-echo", help="Print the prompt before its continuation.")] = True,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    max_model_len: ContextOption = None,
    as_json: JsonOption = False,
) -> None:
    """Complete a prompt and print the text as it comes."""
    text = _standard_input() if prompt == "-" else prompt
    with LLM(model, device=device, threads=threads, dtype=dtype, quantization=quantization, max_model_len=max_model_len) as llm:
        need_tokenizer(llm)
        params = sampling(llm, max_tokens, temperature, seed, stop, param)
        if not as_json:
            no_logprobs(params, "--json shows them")
        if as_json:
            print_json(_document(llm, text, llm.generate(text, params)[0]))
        elif params.n == 1:
            _stream(llm, text, params, echo)
        else:
            for number, output in enumerate(llm.generate(text, params)[0].outputs, 1):
                print(f"--- {number}\n{text if echo else ''}{output.text}")


def _stream(llm: LLM, prompt: str, params: SamplingParams, echo: bool) -> None:
    pieces = llm.stream(prompt, params)
    last: StreamOutput | None = next(pieces, None)  # what is wrong shows here, on a line of its own
    sys.stdout.write(prompt if echo else "")
    try:
        if last is not None:
            _show(last)
        for last in pieces:
            _show(last)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        sys.stdout.flush()
        raise
    sys.stdout.write("\n")
    sys.stdout.flush()  # a reader that has gone is noticed here, not at the interpreter's end
    if last is not None and last.metrics is not None:
        say(speed(last.metrics))


def _show(piece: StreamOutput) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _standard_input() -> str:
    """Read all of it; the newline that ends a file is no part of the prompt."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InferError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _document(llm: LLM, prompt: str, output: RequestOutput) -> dict[str, Any]:
    document: dict[str, Any] = {"model": llm.info.path, "prompt": prompt}
    document["outputs"] = [_completion(one) for one in output.outputs]
    if output.prompt_logprobs is not None:
        document["prompt_logprobs"] = [None if row is None else _logprobs(row) for row in output.prompt_logprobs]
    return {**document, "metrics": metrics_json(output.metrics)}


def _completion(output: CompletionOutput) -> dict[str, Any]:
    found: dict[str, Any] = {"text": output.text, "token_ids": output.token_ids}
    found |= {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
    if output.logprobs is not None:
        found |= {"cumulative_logprob": output.cumulative_logprob, "logprobs": [_logprobs(row) for row in output.logprobs]}
    return found


def _logprobs(row: dict[int, Logprob]) -> list[dict[str, Any]]:
    """Return one token's log-probabilities as JSON takes them, which has no numbers for keys."""
    return [{"token_id": token, **asdict(one)} for token, one in row.items()]
