"""`infer chat`: a conversation in the terminal.

Lines that begin with `/` are commands (see `COMMANDS`). Ctrl-C stops the answer, not the program; what was said until then
stays in the conversation. Prompts and notes go to the terminal only, so a script may feed questions through standard input
and read nothing but answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
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
    changed,
    complain,
    metrics_json,
    need_tokenizer,
    no_logprobs,
    parameter,
    print_json,
    sampling,
    say,
    speed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from infer import SamplingParams, StreamOutput


def chat(
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="What the model is told before you speak.")] = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    param: ParamOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    max_model_len: ContextOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk with a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves."""
    with LLM(model, device=device, threads=threads, dtype=dtype, quantization=quantization, max_model_len=max_model_len) as llm:
        need_tokenizer(llm)
        params = sampling(llm, max_tokens, temperature, seed, stop, param)
        conversation = Conversation(llm, params, system, as_json=as_json)
        say(f"{llm.info.path} ({llm.info.architecture}, {llm.info.quantization}). /help lists the commands.")
        with _line_editing():
            while (line := _read("> ")) is not None:
                if not conversation.take(line):
                    break
        if conversation.failed and not sys.stdin.isatty():
            raise typer.Exit(1)


class Conversation:
    """The messages so far and what can be done with them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, *, as_json: bool) -> None:
        self.llm = llm
        self.params = _single(params)
        self.as_json = as_json
        self.failed = False
        self.messages: list[dict[str, str]] = []
        if system:
            self.system(system)

    def take(self, line: str) -> bool:
        """Obey a command or answer a question; False ends the program."""
        if not line.strip():
            return True
        try:
            if not line.startswith("/"):
                self.ask(line)
                return True
            name, _, rest = line[1:].strip().partition(" ")
            if name in ("exit", "quit", "bye"):
                return False
            command = COMMANDS.get(name)
            if command is None:
                raise InferError(f"/{name} is no command; /help lists them")
            command(self, rest.strip())
        except InferError as error:
            self.failed = True
            complain(str(error))
        return True

    def ask(self, question: str) -> None:
        """Add a question and answer it; a question that cannot be answered is taken back."""
        self._answer([*self.messages, {"role": "user", "content": question}])

    def regenerate(self, _: str) -> None:
        """answer the last question once more"""
        messages = self.messages
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages or messages[-1]["role"] != "user":
            raise InferError("/regenerate: there is no question yet")
        self._answer(messages)

    def undo(self, _: str) -> None:
        """forget the last question and its answer"""
        while self.messages and self.messages[-1]["role"] != "system":
            if self.messages.pop()["role"] == "user":
                break

    def clear(self, _: str) -> None:
        """forget everything but the system message"""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]

    def system(self, text: str) -> None:
        """TEXT: tell the model this before everything else; without TEXT, tell it nothing"""
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def history(self, _: str) -> None:
        """show the conversation"""
        for message in self.messages:
            self._tell(f"{message['role']}: {message['content']}")

    def save(self, name: str) -> None:
        """FILE: write the conversation as JSON"""
        if not name:
            raise InferError("/save: name a file")
        try:
            Path(name).expanduser().write_text(json.dumps(self.messages, ensure_ascii=False, indent=2), encoding="utf-8")
        except (OSError, ValueError, RuntimeError) as error:  # also of a name that is none, and of `~nobody`
            raise InferError(f"/save: {error}") from error
        say(f"{len(self.messages)} messages in {name}")

    def load(self, name: str) -> None:
        """FILE: go on with a conversation that /save wrote"""
        if not name:
            raise InferError("/load: name a file")
        try:
            found = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError, RuntimeError) as error:  # also of JSON that is nested too deep
            raise InferError(f"/load: {error}") from error
        if not isinstance(found, list) or not all(_is_message(message) for message in found):
            raise InferError(f"/load: {name} holds no list of messages with 'role' and 'content'")
        self.messages = found
        say(f"{len(found)} messages")

    def set_params(self, text: str) -> None:
        """[NAME=VALUE ...]: show or change how answers are sampled, such as /params temperature=0.2 top_p=0.9"""
        if text:
            self.params = _single(changed(self.params, dict(parameter(word) for word in text.split())))
        self._tell(str(self.params))

    def help(self, _: str) -> None:
        """show this list"""
        for name, command in COMMANDS.items():
            self._tell(f"  /{name:<11} {command.__doc__}")
        self._tell("  /exit        leave (so does Ctrl-D)")
        self._tell('  """          begin and end a question of several lines')

    def _tell(self, text: str) -> None:
        """Print what a command shows; a program that reads JSON finds nothing but answers on stdout."""
        print(text, file=sys.stderr if self.as_json else sys.stdout)

    def _answer(self, messages: list[dict[str, str]]) -> None:
        """Print the answer to `messages` as it comes and keep both, also what Ctrl-C left of the answer."""
        pieces: list[StreamOutput] = []
        stream = self.llm.stream_chat(messages, self.params)
        try:
            for piece in stream:
                pieces.append(piece)
                if not self.as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            say("\n(stopped)")
        except InferError as error:
            if len(messages) > 1 and "max_model_len" in str(error):
                raise InferError(f"{error}; /clear or /undo makes the conversation shorter") from error
            raise
        finally:
            stream.close()
        if not pieces:  # stopped before the first word: as if it had not been asked
            return
        self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        self._conclude(pieces[-1])

    def _conclude(self, last: StreamOutput) -> None:
        metrics = last.metrics
        if self.as_json:
            answer: dict[str, Any] = {**self.messages[-1], "finish_reason": last.finish_reason or "abort"}
            answer["metrics"] = None if metrics is None else metrics_json(metrics)
            print_json(answer, indent=None)  # one line each, as answers come
            return
        sys.stdout.write("\n")
        if metrics is not None:
            say(speed(metrics))


# Each command's docstring is its line in /help.
COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "help": Conversation.help,
    "clear": Conversation.clear,
    "system": Conversation.system,
    "history": Conversation.history,
    "save": Conversation.save,
    "load": Conversation.load,
    "regenerate": Conversation.regenerate,
    "undo": Conversation.undo,
    "params": Conversation.set_params,
}


def _single(params: SamplingParams) -> SamplingParams:
    if params.n != 1:
        raise InferError(f"n: {params.n} answers to one question make no conversation; use 1")
    no_logprobs(params, "`infer generate --json` shows them")
    return params


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ("role", "content"))


def _read(prompt: str) -> str | None:
    """Read a question, or several lines between triple quotes; None at the end of input, which also ends an open question.

    Ctrl-C drops what was typed.
    """
    try:
        line = _line(prompt)
        if line is None or not line.startswith('"""'):
            return line
        lines = [line[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            more = _line("... ")
            if more is None:
                return "\n".join(lines).strip("\n")
            lines.append(more)
        return "\n".join(lines).rstrip()[:-3].strip("\n")
    except KeyboardInterrupt:
        print()
        return ""


def _line(prompt: str) -> str | None:
    try:
        line = input(prompt if sys.stdin.isatty() else "")
        # In some locales Python lets bytes that are no UTF-8 through, as halves of surrogate pairs.
        return line if line.isascii() else line.encode("utf-8", "surrogateescape").decode("utf-8")
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise InferError(f"standard input is not {error.encoding.upper()}: {error.reason} at byte {error.start}") from error


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Edit lines and keep them from one session to the next, where readline is there and somebody types."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "infer"
    file = state / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            state.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(file)
