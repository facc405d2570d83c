"""A pair as an Ollama model: the Modelfile, with the chat template in the syntax of Go's text/template.

Knows what Ollama's Modelfile and its templates take (parser/parser.go and template/template.go of ollama/ollama). The
template is made from what the model's own chat format writes around the texts of a conversation, so that it renders the
same prompt: system, user and assistant turns as Llama 3, Phi 3, Vicuna, ChatML and Mistral have them. Pictures Ollama
puts directly before a turn's text, without the newline that LLaVA was trained with.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from local_llava.chat import ChatFormat, Special
from local_llava.convert import write
from local_llava.corrections import corrected
from local_llava.errors import ModelFileError, OutputError, PromptError
from local_llava.gguf_file import GGUFFile
from local_llava.llm_file import check_llm
from local_llava.llm_vocab import Vocab, special_tokens
from local_llava.types import Message, ModelFiles, Role

FORMATS = "Llama 3, Phi 3, Vicuna, ChatML and Mistral"
"""Known to be of the shape that a `Turns` has."""


@dataclass(frozen=True)
class Turns:
    """What a chat format writes around the texts of a conversation, without the BOS that a runtime puts itself."""

    system: tuple[str, str] | None
    """Before the system prompt, and from there to the text of the first user's turn; None if it takes none."""
    first: str
    """Before the first user's turn where there is no system prompt; it may hold the model's own."""
    assistant: str
    """From a user's text to the assistant's."""
    user: str
    """From an assistant's text to the next user's."""
    end: str
    """After the last user's text: where the answer begins."""

    def go_template(self) -> str:
        """The template for Ollama.

        Its `.System` is the text of all system messages. A conversation that ends with an assistant's turn is one to be
        continued. A format without a place for a system prompt gets it before the first user's text.
        """
        begin = _go(self.first)
        before, after = (begin, "\n\n") if self.system is None else map(_go, self.system)
        system = ("{{ if .System }}", before, "{{ .System }}", after, "{{ else }}", begin, "{{ end }}")
        next_user = ('{{ if eq $last "assistant" }}', _go(self.user), "{{ end }}")
        user = ('{{ if eq .Role "user" }}', *next_user, '{{ .Content }}{{ $last = "user" }}')
        reply = ('{{ else if eq .Role "assistant" }}', _go(self.assistant), '{{ .Content }}{{ $last = "assistant" }}')
        turns = ('{{ $last := "" }}{{ range .Messages }}', *user, *reply, "{{ end }}{{ end }}")
        end = ('{{ if ne $last "assistant" }}', _go(self.end), "{{ end }}")
        return "".join((*system, *turns, *end))


def export(files: ModelFiles, directory: Path, system: str | None = None, overwrite: bool = False) -> Path:
    """Write the Modelfile of a pair.

    Args:
        files: The pair. It stays where it is; if that is `directory`, all of it can be moved.
        directory: Where the Modelfile goes; made if it is missing.
        system: A system prompt of its own.
        overwrite: Replace an existing Modelfile.

    Returns:
        The Modelfile.

    Raises:
        ModelFileError: As of `modelfile`.
        OutputError: It exists, or cannot be written.
    """
    text = modelfile(files, directory, system)
    path = directory / "Modelfile"
    partial = directory / f".Modelfile.{secrets.token_hex(4)}.partial"
    try:
        with write.naming(path):
            directory.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8", newline="\n")
        with write.Pending(overwrite=overwrite) as pending:
            pending.adopt(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def modelfile(files: ModelFiles, directory: Path, system: str | None = None) -> str:
    """The Modelfile of a pair.

    Args:
        files: The pair.
        directory: Where the Modelfile will be; both files are named as seen from there.
        system: A system prompt of its own.

    Raises:
        ModelFileError: The language model cannot be used, or its chat format is of another kind.
        OutputError: A file's name cannot be written in a Modelfile.
    """
    gguf = corrected(GGUFFile.open(files.model)).gguf
    vocab = check_llm(gguf).vocab
    texts = {i: text for text, i in special_tokens(gguf).items()}
    ends = dict.fromkeys(texts[i] for i in (vocab.eot, vocab.eos) if i in texts)
    lines = [
        *(f"FROM {_path(path, directory)}" for path in (files.model, files.mmproj)),
        f"TEMPLATE {_quoted(read_turns(gguf, vocab).go_template())}",
        *(f"PARAMETER stop {_line(end)}" for end in ends),
    ]
    if system is not None:
        lines.append(f"SYSTEM {_quoted(system)}")
    license_name = gguf.metadata.get("general.license")
    if isinstance(license_name, str) and license_name:
        lines.append(f"LICENSE {_quoted(license_name)}")
    return "\n".join(lines) + "\n"


def read_turns(gguf: GGUFFile, vocab: Vocab) -> Turns:
    """Take a chat template apart.

    Args:
        gguf: A language model, corrected.
        vocab: Its vocabulary.

    Raises:
        ModelFileError: There is no chat template, or what it writes around a text depends on more than its turn.
    """
    if vocab.chat_template is None:
        raise ModelFileError(f"{gguf.path}: tokenizer.chat_template is missing; it says how a question is put")
    chat = _Chat(gguf, vocab)
    try:
        *system, _ = chat.around(("system", "user"))
    except PromptError:
        system = []
    try:
        first, end = chat.around(("user",))
        _, assistant, user, _ = chat.around(("user", "assistant", "user"))
        turns = Turns((system[0], system[1]) if system else None, first, assistant, user, end)
        for roles in _CONVERSATIONS:
            if (system or "system" not in roles) and chat.around(roles) != _expected(turns, roles):
                raise chat.unfit("what it writes around a turn depends on the others")
    except PromptError as e:
        raise chat.unfit(str(e)) from e
    return turns


_CONVERSATIONS: tuple[tuple[Role, ...], ...] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)


def _expected(turns: Turns, roles: tuple[Role, ...]) -> list[str]:
    """The pieces between the texts of a conversation."""
    pieces = list(turns.system or ()) if roles[0] == "system" else [turns.first]
    n_questions = roles.count("user")
    return [*pieces, *(turns.assistant, turns.user) * (n_questions - 1), turns.end]


class _Chat:
    """What a model's chat format writes, as text."""

    def __init__(self, gguf: GGUFFile, vocab: Vocab) -> None:
        specials = special_tokens(gguf)
        self._path = gguf.path
        self._format = ChatFormat(vocab.chat_template or "", specials, vocab.bos, vocab.eos, vocab.add_bos)
        self._texts = {i: text for text, i in specials.items()}
        self._bos = vocab.bos if vocab.add_bos else None

    def around(self, roles: tuple[Role, ...]) -> list[str]:
        """The pieces before, between and after the texts of a conversation.

        Raises:
            PromptError: The format does not take such a conversation.
            ModelFileError: It does not write its texts in their order.
        """
        texts = [f"Q{role}{i}" for i, role in enumerate(roles)]  # which no template writes itself
        parts = self._format.parts([Message(role, text) for role, text in zip(roles, texts, strict=True)])
        if self._bos is not None and parts[0] == Special(self._bos):
            parts = parts[1:]  # Ollama puts it
        rest = "".join(self._texts[p.token] if isinstance(p, Special) else str(p) for p in parts)
        pieces = []
        for text in texts:
            piece, found, rest = rest.partition(text)
            if not found:
                raise self.unfit("it does not write all texts in their order")
            pieces.append(piece)
        return [*pieces, rest]

    def unfit(self, problem: str) -> ModelFileError:
        return ModelFileError(
            f"{self._path}: tokenizer.chat_template cannot be written for Ollama: {problem}; those of {FORMATS} can"
        )


def _go(text: str) -> str:
    """Text as it stands in a Go template, and in a Modelfile between triple quotes."""
    return text.replace("{", '{{ "{" }}').replace('"""', '{{ "\\"\\"\\"" }}')


def _quoted(text: str) -> str:
    """Text of several lines in a Modelfile, whose parser knows no escapes."""
    if '"""' in text or not all(c.isprintable() or c in "\n\t" for c in text):
        raise OutputError(f"a Modelfile cannot hold the text {text[:60]!a}: triple quotes or control characters")
    return f'"""{text}"""'


def _path(path: Path, directory: Path) -> str:
    try:
        name = Path(os.path.relpath(path, directory)).as_posix()
    except ValueError:  # on another drive of Windows
        return _line(path.absolute().as_posix())
    return _line(f"./{name}")


def _line(text: str) -> str:
    """Text of one line in a Modelfile: in quotes, which need not be escaped inside."""
    if not text.isprintable():
        raise OutputError(f"a Modelfile cannot hold {text[:60]!a}: it has characters that cannot be printed")
    return f'"{text}"'
