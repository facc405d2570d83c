"""Modelfiles for Ollama: their template renders what our own chat format does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from faulty_ggufs import CHATML, CHATML_TOKENS, PHI3_TOKENS, with_tokens
from gguf_bytes import TinyLLM
from go_templates import read_modelfile, render

from local_llava.chat import ChatFormat, Special
from local_llava.default_chats import LLAMA3_CHAT, MISTRAL_CHAT, PHI3_CHAT, QWEN2_CHAT, VICUNA_CHAT
from local_llava.errors import ModelFileError, OutputError
from local_llava.gguf_file import GGUFFile
from local_llava.llm_vocab import check_vocab, special_tokens
from local_llava.ollama import Turns, export, modelfile, read_turns
from local_llava.types import Message, ModelFiles

STOCK_LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL_V2 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token}}{% endif %}"
    "{% endfor %}"
)
BRACES = (
    "{% for message in messages %}{{ '{{\"\"\"' + message['role'] + '}}{' + message['content'] + '{' }}{% endfor %}"
    '{{ \'""""\' }}'
)

FORMATS: dict[str, tuple[str, tuple[str, ...], str]] = {
    # kind of the vocabulary, its own tokens, chat template
    "Llama 3": ("gpt2", (), LLAMA3_CHAT),
    "Llama 3, stock": ("gpt2", (), STOCK_LLAMA3),
    "Phi 3": ("llama", PHI3_TOKENS, PHI3_CHAT),
    "Vicuna": ("llama", (), VICUNA_CHAT),
    "Vicuna of transformers": ("llama", (), LLAVA_HF),
    "Qwen2": ("gpt2", CHATML_TOKENS, QWEN2_CHAT),
    "ChatML": ("gpt2", CHATML_TOKENS, CHATML),
    "Mistral": ("llama", (), MISTRAL_CHAT),
    "Mistral, no system": ("llama", (), MISTRAL_V2),
    "braces and quotes": ("llama", (), BRACES),
}

CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "What is this?")],
    [("system", "Be brief."), ("user", "Two\n\nlines {{ .System }}")],
    [("user", "a"), ("assistant", "b"), ("user", 'c "d"')],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]


def write_model(path: Path, kind: str, tokens: tuple[str, ...], template: str | None) -> Path:
    path.write_bytes(with_tokens(kind, tokens, template).bytes)
    return path


def prompt(path: Path, messages: list[tuple[str, str]]) -> str:
    """Our own, as text, without the BOS that a runtime puts."""
    gguf = GGUFFile.open(path)
    vocab, specials = check_vocab(gguf), special_tokens(gguf)
    assert vocab.chat_template is not None
    chat = ChatFormat(vocab.chat_template, specials, vocab.bos, vocab.eos, vocab.add_bos)
    texts = {i: text for text, i in specials.items()}
    parts = chat.parts([Message(role, text) for role, text in messages])  # type: ignore[arg-type]
    if vocab.add_bos:
        assert parts.pop(0) == Special(vocab.bos)
    return "".join(texts[p.token] if isinstance(p, Special) else str(p) for p in parts)


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_prompt(name: str, tmp_path: Path) -> None:
    kind, tokens, template = FORMATS[name]
    path = write_model(tmp_path / "model.gguf", kind, tokens, template)
    lines = dict(read_modelfile(modelfile(ModelFiles(path, tmp_path / "mmproj.gguf"), tmp_path)))
    for messages in CONVERSATIONS:
        takes_system = name != "Mistral, no system" or messages[0][0] != "system"
        ours = messages if takes_system else [("user", f"{messages[0][1]}\n\n{messages[1][1]}"), *messages[2:]]
        assert render(lines["TEMPLATE"], messages) == prompt(path, ours), messages
    gguf = GGUFFile.open(path)
    turns = read_turns(gguf, check_vocab(gguf))
    assert (turns.system is None) == (name == "Mistral, no system")


def test_a_conversation_to_be_continued(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", "gpt2", (), LLAMA3_CHAT)
    gguf = GGUFFile.open(path)
    template = read_turns(gguf, check_vocab(gguf)).go_template()
    begun = [("user", "a"), ("assistant", "The answer")]
    assert render(template, begun) == prompt(path, begun[:1]) + "The answer"


def test_the_whole_file(tmp_path: Path) -> None:
    model = TinyLLM()
    model.entries |= {"general.license": ("str", "llama3"), "tokenizer.chat_template": ("str", LLAMA3_CHAT)}
    (tmp_path / "my model").mkdir()
    path = tmp_path / "my model" / 'a "b" # c.gguf'
    path.write_bytes(model.bytes)
    files = ModelFiles(path, path.with_name("mmproj.gguf"))
    assert export(files, path.parent, system='Say "no".\nAlways.') == path.parent / "Modelfile"
    lines = read_modelfile((path.parent / "Modelfile").read_text())
    assert [line for line in lines if line[0] != "TEMPLATE"] == [
        ("FROM", './a "b" # c.gguf'),
        ("FROM", "./mmproj.gguf"),
        ("PARAMETER stop", "<|eot_id|>"),
        ("PARAMETER stop", "<|end_of_text|>"),
        ("SYSTEM", 'Say "no".\nAlways.'),
        ("LICENSE", "llama3"),
    ]
    with pytest.raises(OutputError, match="already exists"):
        export(files, path.parent)
    export(files, path.parent, overwrite=True)
    assert "SYSTEM" not in dict(read_modelfile((path.parent / "Modelfile").read_text()))
    elsewhere = export(files, tmp_path / "other" / "new")
    assert dict(read_modelfile(elsewhere.read_text()))["FROM"] == "./../../my model/mmproj.gguf"
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "Modelfile"])


def test_published_files_are_corrected(tmp_path: Path) -> None:
    """No template: that of the vocabulary."""
    path = write_model(tmp_path / "model.gguf", "llama", PHI3_TOKENS, None)
    lines = read_modelfile(modelfile(ModelFiles(path, path), tmp_path))
    assert "<|user|>\n" in dict(lines)["TEMPLATE"]
    assert [value for name, value in lines if name == "PARAMETER stop"] == ["<|end|>", "</s>"]


REFUSED = {
    "numbered turns": (
        "{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}",
        "what it writes around a turn depends on the others; those of Llama 3, Phi 3, Vicuna, ChatML and Mistral can",
    ),
    "the last turn only": ("{{ messages[-1]['content'] }}", "no place for a user message"),
    "another order": (
        "{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}",
        "it does not write all texts in their order",
    ),
    "unprintable": ("{% for m in messages %}{{ '\x01' + m['content'] }}{% endfor %}", "control characters"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_templates_of_another_kind(case: str, tmp_path: Path) -> None:
    template, problem = REFUSED[case]
    path = write_model(tmp_path / "model.gguf", "llama", (), template)
    with pytest.raises((ModelFileError, OutputError), match=re.escape(problem)):
        export(ModelFiles(path, path), tmp_path)
    assert not (tmp_path / "Modelfile").exists()


def test_names_that_cannot_be_written(tmp_path: Path) -> None:
    path = write_model(tmp_path / "a\nb.gguf", "gpt2", (), LLAMA3_CHAT)
    with pytest.raises(OutputError, match="cannot be printed"):
        modelfile(ModelFiles(path, path), tmp_path)
    with pytest.raises(OutputError, match="triple quotes"):
        write_model(tmp_path / "m.gguf", "gpt2", (), LLAMA3_CHAT)
        modelfile(ModelFiles(tmp_path / "m.gguf", path.with_name("p.gguf")), tmp_path, system='a """ b')


def test_a_template_as_it_is_written() -> None:
    turns = Turns(("<s>", "</s><u>"), "<u>", "</u><a>", "</a><u>", "</u><a>:")
    assert turns.go_template() == (
        '{{ if .System }}<s>{{ .System }}</s><u>{{ else }}<u>{{ end }}{{ $last := "" }}{{ range .Messages }}'
        '{{ if eq .Role "user" }}{{ if eq $last "assistant" }}</a><u>{{ end }}{{ .Content }}{{ $last = "user" }}'
        '{{ else if eq .Role "assistant" }}</u><a>{{ .Content }}{{ $last = "assistant" }}{{ end }}{{ end }}'
        '{{ if ne $last "assistant" }}</u><a>:{{ end }}'
    )
