"""`local-llava chat` and the streams of `ask`, as a user at a terminal and a program at a pipe meet them."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from llava_checkpoints import TINY, random_model, save
from PIL import Image

from local_llava.convert import convert
from local_llava.types import ModelFiles

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")

QUESTION = "What do you see?"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return convert(TINY, tmp_path_factory.mktemp("pair"), quant="Q8_0")


@pytest.fixture(scope="module")
def slow_pair(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    """Large enough that there is time to interrupt an answer."""
    text = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 8, "max_position_embeddings": 8192}
    directory = tmp_path_factory.mktemp("slow")
    return convert(save(random_model(text), directory / "checkpoint"), directory, quant="F32")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    import scenes

    directory = tmp_path_factory.mktemp("my pictures")
    scenes.write(directory, seed=3, count=2)
    return [directory / "0000.png", directory / "0001.png"]


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "local_llava.cli", *map(str, args)]


def run(*args: object, code: int = 0, **kwargs: object) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(command(*args), capture_output=True, timeout=120, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


class Terminal:
    """The other side of a pseudo-terminal."""

    def __init__(self, fd: int, process: subprocess.Popen[bytes]) -> None:
        self._fd, self.process = fd, process
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str, timeout: float = 60) -> str:
        """Read until the pattern is shown after all that was waited for before; returns what was shown up to it."""
        end = time.monotonic() + timeout
        while (match := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < end, f"{pattern!r} is not shown in {self.shown!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self._fd, 65536)
                except OSError:  # the other side is gone
                    data = b""
                assert data, f"{pattern!r} is not shown in {self.shown!r}"
                self.shown += re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", data.decode()).replace("\r", "")
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before


@contextmanager
def terminal(home: Path, *args: object) -> Iterator[Terminal]:
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "HOME": str(home), "XDG_STATE_HOME": str(home / "state")}

    def own_terminal() -> None:
        # A terminal sends Ctrl-C to the processes of its own session.
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        command(*args), stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=own_terminal
    )
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_a_conversation_at_a_terminal(pair: ModelFiles, scenes: list[Path], tmp_path: Path) -> None:
    answers = [run("ask", "-m", pair.model, scene, QUESTION).stdout.decode().strip() for scene in scenes]
    with terminal(tmp_path, "chat", "-m", pair.model, scenes[0]) as t:
        t.wait_for("> ")
        t.type(f"{QUESTION}\n")
        assert answers[0] in t.wait_for(r"\.\n> ")
        t.type("Is there a circle?\n")
        t.wait_for(r"(Yes|No)\.\n> ")
        t.type("/clear\n")
        t.wait_for(r"\(forgotten\)\n> ")
        t.type(f"/image '{scenes[1]}'\n")
        t.wait_for(r"\d+ x \d+ pixels.*\n> ")
        t.type(f"{QUESTION}\n")
        assert answers[1] in t.wait_for(r"\.\n> ")
        t.type("/image nowhere.png\n")
        t.wait_for(r"local-llava: nowhere\.png: .*\n> ")
        t.type("/system Be brief.\n/system\n/nonsense\n/help\n")
        t.wait_for(r"system prompt set")
        t.wait_for(r"no system prompt")
        t.wait_for(r"/nonsense is no command")
        t.wait_for(r"/image PATH .*\n(.*\n)*.*Ctrl-C stops an answer\n> ")
        t.type("\x04")
        assert t.process.wait(20) == 0
    history = tmp_path / "state" / "local-llava" / "chat-history"
    assert QUESTION in history.read_text() and history.stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(slow_pair: ModelFiles, tmp_path: Path) -> None:
    options = ("--temperature", 20, "--max-tokens", 5000, "--top-k", 0, "--min-p", 0, "--top-p", 1)
    with terminal(tmp_path, "chat", "-m", slow_pair.model, *options) as t:
        t.wait_for("> ")
        t.type("Tell me a long story.\n")
        t.wait_for(r"story\.\n.{20}")
        t.type("\x03")
        t.wait_for(r"\(stopped\)\n> ")
        # Python loses a signal that comes between the prompt and the wait for a key.
        time.sleep(1)
        t.type("\x03")
        t.wait_for(r"\(Ctrl-D or /exit leaves\)\n> ")
        t.type("And then?\n")
        t.wait_for(r"then\?\n.{5}")
        t.type("\x03")
        t.wait_for(r"\(stopped\)\n> ")
        t.type("/exit\n")
        assert t.process.wait(30) == 0


def test_ctrl_c_ends_a_question(slow_pair: ModelFiles, tmp_path: Path) -> None:
    options = ("--temperature", 20, "--max-tokens", 5000, "--top-k", 0, "--min-p", 0, "--top-p", 1)
    with terminal(tmp_path, "ask", "-m", slow_pair.model, *options, "Tell me.") as t:
        t.wait_for(".{20}")  # at a terminal an answer is shown as it comes
        t.type("\x03")
        t.wait_for("local-llava: interrupted")
        assert t.process.wait(30) == 130


def test_chat_through_a_pipe(pair: ModelFiles, scenes: list[Path]) -> None:
    answer = run("ask", "-m", pair.model, scenes[0], QUESTION).stdout
    done = run("chat", "-m", pair.model, input=f"/image {scenes[0]}\n\n{QUESTION}\n".encode())
    assert done.stdout == answer
    done = run("chat", "-m", pair.model, input=f"/image nowhere.png\n{QUESTION}\n".encode(), code=1)
    assert b"nowhere.png" in done.stderr and done.stdout.strip()
    done = run("chat", "-m", pair.model, "--n-ctx", 64, input=b"word " * 100 + b"\nhi\n", code=1)
    assert b"the context 64: shorten" in done.stderr and done.stdout.strip(), "the conversation goes on"


def test_ask_streams(pair: ModelFiles, scenes: list[Path]) -> None:
    whole = run("ask", "-m", pair.model, scenes[0], QUESTION).stdout
    assert run("ask", "--stream", "-m", pair.model, scenes[0], QUESTION).stdout == whole
    process = subprocess.Popen(
        command("ask", "--stream", "-m", pair.model, scenes[0], QUESTION), stdout=subprocess.PIPE, bufsize=0
    )
    assert process.stdout is not None
    pieces = list(iter(lambda: process.stdout.read(1000), b""))
    assert b"".join(pieces) == whole and process.wait() == 0


def test_a_picture_through_a_pipe(pair: ModelFiles, scenes: list[Path]) -> None:
    whole = run("ask", "-m", pair.model, scenes[0], QUESTION).stdout
    assert run("ask", "-m", pair.model, "-", QUESTION, input=scenes[0].read_bytes()).stdout == whole
    done = run("ask", "-m", pair.model, "-", QUESTION, input=b"no picture", code=1)
    assert done.stderr.startswith(b"local-llava: ") and done.stderr.count(b"\n") == 1
    assert b"a question must follow" in run("ask", "-m", pair.model, "-", input=b"", code=2).stderr


def test_stop_preprocess_and_logprobs(pair: ModelFiles, scenes: list[Path], tmp_path: Path) -> None:
    whole = run("ask", "-m", pair.model, scenes[0], QUESTION).stdout.decode()
    done = run("ask", "-m", pair.model, "--stop", whole[4:8], "--stop", "xyz", scenes[0], QUESTION)
    assert done.stdout.decode() == whole[:4] + "\n"
    reply = json.loads(run("ask", "-m", pair.model, "--json", "--logprobs", 2, scenes[0], QUESTION).stdout)
    assert len(reply["logprobs"]) == len(reply["tokens"]) and len(reply["logprobs"][0]["top"]) == 2
    wide = tmp_path / "wide.png"
    with Image.open(scenes[0]) as scene:
        picture = Image.new("RGB", (3 * scene.width, scene.height), "white")
        picture.paste(scene)
        picture.save(wide)
    crop, pad = (run("ask", "-m", pair.model, "--preprocess", p, wide, QUESTION).stdout for p in ("crop", "pad"))
    assert crop != pad


def test_a_schema_from_a_file(pair: ModelFiles, scenes: list[Path], tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}))
    done = run("ask", "-m", pair.model, "--schema", schema, scenes[0], QUESTION)
    assert json.loads(done.stdout)["n"] in (1, 2)
    reply = json.loads(run("ask", "-m", pair.model, "--json", "--schema", schema, scenes[0], QUESTION).stdout)
    assert reply["parsed"] == json.loads(reply["text"])
    for text, message in (
        ("{", "schema.json"),
        ('{"type": "colour"}', "schema.json"),
        ('{"not": {"type": "string"}}', "not"),
    ):
        schema.write_text(text)
        done = run("ask", "-m", pair.model, "--schema", schema, scenes[0], QUESTION, code=2)
        assert message in done.stderr.decode() and done.stderr.count(b"\n") == 1
    done = run("ask", "-m", pair.model, "--schema", tmp_path / "none.json", scenes[0], QUESTION, code=2)
    assert b"none.json: cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--json", "--stream", "x"), "--json prints the whole answer at once"),
        (("--logprobs", "3", "x"), "--logprobs are reported with --json only"),
        (("--preprocess", "stretch", "x"), "--preprocess must be one of checkpoint, pad, crop"),
        (("--threads", "0", "x"), "--threads must be 1 to 512, not 0"),
        (("--kv-type", "Q4_0", "x"), "--kv-type must be one of auto, F32, F16, Q8_0"),
        (("--max-tokens", "0", "x"), "--max-tokens must be 1 to"),
        (("--stop", "", "x"), "--stop must be texts that are not empty"),
        (("https://example.org/cat.png",), "a question must follow the pictures"),
    ],
)
def test_usage_errors_name_the_flag(args: tuple[str, ...], message: str) -> None:
    done = run("ask", *args, code=2)
    assert message in done.stderr.decode() and done.stderr.count(b"\n") == 1


def test_shell_completion() -> None:
    program = Path(sys.executable).with_name("local-llava")

    def completions(*words: str) -> list[str]:
        line = " ".join(["local-llava", *words])
        environment = {"_LOCAL_LLAVA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
        done = subprocess.run([program], env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completions("as") == ["ask"]
    assert completions("ask", "--max") == ["--max-tokens"]
    assert completions("chat", "--kv-type", "F") == ["F32", "F16"]
    # A test has no shell around it that could be detected.
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for shell in ("bash", "zsh", "fish", "powershell"):
        shown = subprocess.run(
            [program, "--show-completion", shell], capture_output=True, text=True, check=True, env=environment
        )
        assert "_LOCAL_LLAVA_COMPLETE" in shown.stdout
