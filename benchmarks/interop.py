#!/usr/bin/env python3
"""Ask llama.cpp's own programs about a picture with our files.

    python benchmarks/interop.py [--seed N] [--pictures N]

Converts tiny-llava (F32, F16, Q8_0, Q4_K_M; and once more with a chat template that takes only texts, as the stock one
of Llama 3), asks `llama-mtmd-cli` and `llama-server` with default flags about new pictures, and prints how many of the
answers are right, beside ours. They differ where llama.cpp computes image features wrongly (README, "How exact"); what
this checks is that the files load, that both kinds of message content reach the model, and that turns end.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import peers

from local_llava import Llava
from local_llava.convert import convert
from local_llava.types import ModelFiles

TINY = Path(__file__).parent.parent / "models" / "tiny-llava"
sys.path.insert(0, str(TINY))

TEXTS_ONLY = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)

Ask = Callable[[Path, str], str]


def ask_cli(files: ModelFiles) -> Ask:
    """llama-mtmd-cli, a process for each question."""
    program = peers.build("llama-mtmd-cli")

    def ask(picture: Path, question: str) -> str:
        command = [program, "-m", files.model, "--mmproj", files.mmproj, "--image", picture, "-p", question]
        done = subprocess.run(
            [*command, "-n", "64", "--temp", "0"], capture_output=True, text=True, errors="replace", timeout=120
        )
        return done.stdout.strip() if done.returncode == 0 else f"exit code {done.returncode}: {done.stderr[-200:]}"

    return ask


@contextlib.contextmanager
def server(files: ModelFiles) -> Iterator[str]:
    """llama-server; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [peers.build("llama-server"), "-m", files.model, "--mmproj", files.mmproj, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health")
                break
            time.sleep(0.1)
        yield address
    finally:
        process.kill()
        process.wait()


def ask_server(address: str, max_tokens: int = 64) -> Ask:
    """The content of a message as a list of parts, as OpenAI's clients send pictures."""

    def ask(picture: Path, question: str) -> str:
        url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        return _complete(address, content, max_tokens)

    return ask


def _complete(address: str, content: Any, max_tokens: int = 64) -> str:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            choice = json.load(reply)["choices"][0]
    except urllib.error.HTTPError as e:
        return f"{e.code}: {e.read().decode()[:200]}"
    except OSError as e:
        return f"503: the server is gone ({e})"
    text: str = choice["message"]["content"]
    return text if choice["finish_reason"] == "stop" else f"{text} ({choice['finish_reason']})"


def ask_ours(llava: Llava) -> Ask:
    return lambda picture, question: llava.ask(question, picture, max_tokens=64).text


def random_models() -> dict[str, Callable[[Path], Path]]:
    """Checkpoints with random weights, made by what the tests make them with; by kind, what writes one."""
    sys.path.insert(0, str(TINY.parent.parent / "tests"))
    import decoder_checkpoints as decoders
    import tower_checkpoints as towers
    from llava_checkpoints import save

    grid = [[28, 56], [56, 28]]
    kinds: dict[str, Callable[[Path], Path]] = {
        kind: lambda path, kind=kind: save(decoders.random_llava(kind), path) for kind in ("mistral", "phi3", "qwen2")
    }
    kinds["siglip"] = lambda path: towers.save_tower_model(towers.random_tower_model("siglip"), path)
    kinds["next"] = lambda path: towers.save_tower_model(
        towers.random_tower_model("clip", -2, "default", "next", image_grid_pinpoints=grid), path
    )
    return kinds


def score(ask: Ask, asked: list[dict[str, str]], directory: Path) -> str:
    answers = [ask(directory / a["image"], a["question"]) for a in asked]
    right = sum(answer.strip() == a["answer"] for answer, a in zip(answers, asked, strict=True))
    ended = sum("(length)" not in a and not a.startswith(("exit code", "4", "5")) for a in answers)
    return f"{right} of {len(asked)} right, {ended} ended by themselves; the first: {answers[0]!r:.60}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=10)
    args = parser.parse_args()
    print(machine.describe())
    import scenes

    models = random_models()

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        scenes.write(work / "pictures", seed=args.seed, count=args.pictures)
        lines = (work / "pictures" / "questions.jsonl").read_text().splitlines()
        asked = [json.loads(line) for line in lines][: 4 * args.pictures]
        texts_only = work / "texts-only"
        shutil.copytree(TINY, texts_only, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        (texts_only / "chat_template.jinja").write_text(TEXTS_ONLY)
        for source, quant, mmproj_quant in (
            (TINY, "F32", "F32"),
            (TINY, "F16", "F16"),
            (TINY, "Q8_0", "Q8_0"),
            (TINY, "Q4_K_M", "F16"),
            (texts_only, "F32", "F32"),
        ):
            files = convert(source, work / f"{source.name}-{quant}", quant=quant, mmproj_quant=mmproj_quant)
            print(f"\n{source.name}, {quant}, mmproj {mmproj_quant}")
            with Llava.load(files.model, files.mmproj) as llava:
                print(f"  local-llava:    {score(ask_ours(llava), asked, work / 'pictures')}")
            print(f"  llama-mtmd-cli: {score(ask_cli(files), asked, work / 'pictures')}")
            with server(files) as address:
                print(f"  llama-server:   {score(ask_server(address), asked, work / 'pictures')}")
                print(f"  llama-server, content as a text: {_complete(address, 'Hello!')!r:.60}")
        picture = next((work / "pictures").glob("*.png"))
        for kind, save in models.items():
            files = convert(save(work / kind), work / f"{kind}-gguf", quant="F16", mmproj_quant="F16")
            print(f"\n{kind}, random weights")
            print(f"  llama-mtmd-cli: {ask_cli(files)(picture, 'What?')!r:.100}")
            with server(files) as address:
                # Noise does not end by itself.
                print(f"  llama-server:   {ask_server(address, 4)(picture, 'What?')!r:.100}")


if __name__ == "__main__":
    main()
