"""`infer chat`: through a pipe, and at a terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from infer import LLM, SamplingParams
from infer.cli.chat import Conversation

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Cli = Callable[..., subprocess.CompletedProcess[str]]

GREEDY = ("--temperature", "0", "-n", "12")


def answer(llm: LLM, *messages: tuple[str, str]) -> str:
    conversation = [{"role": role, "content": content} for role, content in messages]
    return llm.chat(conversation, llm.default_sampling_params(temperature=0, max_tokens=12))[0].outputs[0].text


def test_a_conversation_remembers(infer_cli: Cli, llm: LLM) -> None:
    first = answer(llm, ("user", "Hello!"))
    second = answer(llm, ("user", "Hello!"), ("assistant", first), ("user", "And then?"))
    done = infer_cli("chat", *GREEDY, stdin="Hello!\nAnd then?\n")
    assert done.returncode == 0
    assert done.stdout == f"{first}\n{second}\n"
    assert done.stderr == ""


def test_json_lines(infer_cli: Cli, llm: LLM) -> None:
    done = infer_cli("chat", *GREEDY, "--json", stdin="Hello!\nAnd then?\n")
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["content"] == answer(llm, ("user", "Hello!"))
    assert second["metrics"]["cached_tokens"] > 0, "the conversation so far is not computed again"


def test_commands(infer_cli: Cli, llm: LLM, tmp_path: Path) -> None:
    lines = [
        "/system Speak plainly.",
        "Hello!",
        "/save talk.json",
        "/regenerate",
        "/history",
        "/undo",
        "/history",
        "/load talk.json",
        "/clear",
        "/history",
        "/params max_tokens=3",
        "Hello!",
        '"""Two',
        'lines."""',
        "/nonsense",
        "/help",
        "/exit",
        "not read",
    ]
    done = infer_cli("chat", *GREEDY, stdin="\n".join(lines) + "\n")
    assert done.returncode == 1, "one line was no command"
    first = answer(llm, ("system", "Speak plainly."), ("user", "Hello!"))
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert saved[2]["content"] == first
    history = f"system: Speak plainly.\nuser: Hello!\nassistant: {first}\nsystem: Speak plainly.\nsystem: Speak plainly.\n"
    assert done.stdout.startswith(f"{first}\n{first}\n{history}")
    assert "max_tokens=3" in done.stdout
    assert "/regenerate" in done.stdout
    assert done.stderr.startswith("error: /nonsense is no command")
    assert "not read" not in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        "/save",
        "/load",
        "/load absent.json",
        "/load ~nobody/x",
        "/save ~nobody/x",
        "/regenerate",
        "/params x",
        "/params top_p=9",
        "/params no=1",
        "/params n=2",
    ],
)
def test_commands_that_cannot_be_obeyed(infer_cli: Cli, command: str) -> None:
    done = infer_cli("chat", *GREEDY, stdin=f"{command}\nHello!\n")
    assert done.stderr.startswith("error: ")
    assert done.stdout.strip(), "the conversation goes on"


@pytest.mark.parametrize("content", ["{", "{}", '[{"role": "user"}]', "[" * 100_000])
def test_files_that_hold_no_conversation(infer_cli: Cli, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content, encoding="utf-8")
    assert infer_cli("chat", *GREEDY, stdin="/load bad.json\n").stderr.startswith("error: /load")


def test_questions_that_are_no_text(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "infer", "chat", *GREEDY]
    done = subprocess.run(command, input=b"\xff\n", cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr == b"error: standard input is not UTF-8: invalid start byte at byte 0\n"


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *command: str, cwd: Path) -> None:
        import pty

        self.child, self.screen = pty.fork()
        if self.child == 0:
            os.chdir(cwd)
            os.environ.update(TERM="dumb", XDG_STATE_HOME=str(cwd))
            os.execv(sys.executable, [sys.executable, *command])
        self.text = ""

    def until(self, pattern: str, seconds: float = 30) -> str:
        """Read the screen until `pattern` shows up, and return all of it so far."""
        import select

        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            ready, _, _ = select.select([self.screen], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {self.text!r}"
            self.text += os.read(self.screen, 65536).decode(errors="replace")
        found, self.text = self.text, ""
        return found

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def end(self) -> int:
        for _ in range(200):
            child, status = os.waitpid(self.child, os.WNOHANG)
            if child:
                os.close(self.screen)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        raise AssertionError(f"still running: {self.text!r}")


@pytest.mark.skipif(os.name != "posix", reason="needs pseudo-terminals")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    terminal = Terminal("-m", "infer", "chat", "-n", "1500", "-p", "ignore_eos=true", cwd=tmp_path)
    terminal.until(r"/help lists the commands(.|\n)*> $")
    terminal.type("Tell me a story.\n")
    terminal.until(r"story\.\r\n(.|\n)+\w")
    terminal.type("\x03")
    terminal.until(r"\(stopped\)(.|\n)*> $", seconds=5)
    terminal.type("/params max_tokens=4\n")
    terminal.until(r"max_tokens=4(.|\n)*> $")
    terminal.type("And then?\n")
    terminal.until(r"4 generated(.|\n)*> $")
    terminal.type("half a line")
    terminal.until("half a line")
    time.sleep(0.2)  # Python's readline loses a signal that comes between its output and its wait for the next key
    terminal.type("\x03")
    terminal.until(r"\n> $")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "Tell me a story." in (tmp_path / "infer" / "chat_history").read_text(encoding="utf-8")


def test_an_answer_can_be_sampled(infer_cli: Cli) -> None:
    one, two = (infer_cli("chat", "--seed", "4", "-n", "12", stdin="Hello!\n").stdout for _ in range(2))
    assert one == two
    assert one.strip()
    assert SamplingParams().max_tokens == 16, "the default that -n replaces"


def test_a_model_without_a_tokenizer_is_refused_at_once(infer_cli: Cli, bare_folder: Path) -> None:
    done = infer_cli("chat", "--model", str(bare_folder), stdin="Hello!\nAnd then?\n")
    assert done.returncode == 1
    assert done.stderr.count("no tokenizer") == 1


def test_a_script_learns_of_a_failed_line(infer_cli: Cli) -> None:
    done = infer_cli("chat", *GREEDY, "--json", stdin="/no-such-command\n/params topp=1\n/help\nHello!\n")
    assert done.returncode == 1
    assert "did you mean 'top_p'?" in done.stderr
    assert "/regenerate" in done.stderr
    assert json.loads(done.stdout)["role"] == "assistant"


def test_the_end_of_input_ends_a_question_of_several_lines(infer_cli: Cli) -> None:
    whole = infer_cli("chat", *GREEDY, "--json", stdin='"""Two\nlines."""\n')
    cut = infer_cli("chat", *GREEDY, "--json", stdin='"""Two\nlines.\n')
    content = json.loads(whole.stdout)["content"]
    assert cut.returncode == 0
    assert json.loads(cut.stdout)["content"] == content


def test_input_that_is_no_text(tmp_path: Path) -> None:
    # In the C locale Python lets such bytes through.
    environment = {**os.environ, "LC_ALL": "C", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "infer", "chat", "-n", "3"]
    done = subprocess.run(command, input=b"caf\xe9\n", cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"standard input is not UTF-8: unexpected end of data at byte 3\n" in done.stderr


def test_a_failed_answer_leaves_the_conversation_as_it_was(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Conversation(llm, SamplingParams(temperature=0, max_tokens=4), None, as_json=False)
    talk.take("Hello!")
    before = list(talk.messages)
    assert len(before) == 2
    talk.take("a b " * 3000)
    assert "/clear or /undo" in capsys.readouterr().err
    talk.messages[0]["content"] = "a b " * 3000
    talk.take("/regenerate")
    assert talk.messages == before
    assert talk.failed
