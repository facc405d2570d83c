"""Small GGUF files with the faults of published ones, and right ones to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
from gguf_bytes import TinyLLM, tiny_sentencepiece

from local_llava.default_chats import LLAMA3_CHAT

PHI3_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
VICUNA = "{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] + ' ' }}{% endfor %}"

Entries = dict[str, tuple[str, Any]]
TEMPLATE = "tokenizer.chat_template"
TYPES = "tokenizer.ggml.token_type"


def good() -> TinyLLM:
    """A Llama 3 with nothing wrong."""
    model = TinyLLM()
    model.entries |= {"general.file_type": ("u32", 0), TEMPLATE: ("str", LLAMA3_CHAT)}
    return model


def with_tokens(kind: str, tokens: tuple[str, ...], template: str | None) -> TinyLLM:
    """A vocabulary, "gpt2" or "llama", with control tokens in the place of its last ones; gpt2's is then a Qwen2's."""
    model = TinyLLM() if kind == "gpt2" else tiny_sentencepiece()
    texts, types = (model.entries[f"tokenizer.ggml.{name}"][1] for name in ("tokens", "token_type"))
    for i, text in enumerate(tokens):
        texts[-2 - i], types[-2 - i] = text, 3
    if kind == "gpt2" and tokens:
        model.entries["tokenizer.ggml.eos_token_id"] = ("u32", texts.index(tokens[0]))
        del model.entries["tokenizer.ggml.eot_token_id"]
        model.entries |= {"tokenizer.ggml.pre": ("str", "qwen2"), "tokenizer.ggml.add_bos_token": ("bool", False)}
    if template is not None:
        model.entries[TEMPLATE] = ("str", template)
    return model


def put(key: str, kind: str, value: Any) -> Callable[[Entries], None]:
    return lambda entries: entries.__setitem__(key, (kind, value))


def drop(*keys: str) -> Callable[[Entries], None]:
    def change(entries: Entries) -> None:
        for key in keys:
            del entries[key]

    return change


def retyped(types: dict[str, str]) -> Callable[[Entries], None]:
    return lambda entries: entries.update({key: (kind, entries[key][1]) for key, kind in types.items()})


def prefixed(old: str, new: str, architecture: str | None) -> Callable[[Entries], None]:
    """Keys under another name."""

    def change(entries: Entries) -> None:
        moved = {key.replace(old, new, 1) if key.startswith(old) else key: e for key, e in entries.items()}
        entries.clear()
        entries.update(moved)
        if architecture is None:
            del entries["general.architecture"]
        else:
            entries["general.architecture"] = ("str", architecture)

    return change


FAULTS: dict[str, tuple[Callable[[Entries], None], dict[str, str]]] = {
    # What is done to a good file -> what is corrected, each with a part of the line that says so.
    "no pre-tokenizer": (drop("tokenizer.ggml.pre"), {"tokenizer.ggml.pre": "is missing, taken as 'llama-bpe'"}),
    "default pre-tokenizer": (put("tokenizer.ggml.pre", "str", "default"), {"tokenizer.ggml.pre": "is 'default'"}),
    "Smaug's pre-tokenizer": (put("tokenizer.ggml.pre", "str", "smaug-bpe"), {"tokenizer.ggml.pre": "is 'smaug-bpe'"}),
    "no end of turn": (
        drop("tokenizer.ggml.eot_token_id"),
        {"tokenizer.ggml.eot_token_id": "is missing, taken as 263: turns end with '<|eot_id|>', and EOS is '<|end_of_"},
    ),
    "wrong end of turn": (
        put("tokenizer.ggml.eot_token_id", "u32", 260),
        {"tokenizer.ggml.eot_token_id": "is 260, taken as 263"},
    ),
    "EOS is a letter": (
        put("tokenizer.ggml.eos_token_id", "u32", 2),
        {"tokenizer.ggml.eos_token_id": "is 2, taken as 260: '\\u0102' is an ordinary token"},
    ),
    "no BOS and no EOS": (
        drop("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"),
        {"tokenizer.ggml.bos_token_id": "is missing", "tokenizer.ggml.eos_token_id": "is missing, taken as 260"},
    ),
    "no template": (
        drop(TEMPLATE),
        {TEMPLATE: "is missing: models with this vocabulary were trained with one"},
    ),
    "ChatML": (
        put(TEMPLATE, "str", CHATML),
        {TEMPLATE: "is wrong: it writes <|im_end|>, <|im_start|>, which"},
    ),
    "Llama 2's chat": (
        put(TEMPLATE, "str", LLAMA2),
        {TEMPLATE: "writes none of the vocabulary's marks, such as"},
    ),
    "Vicuna's chat": (put(TEMPLATE, "str", VICUNA), {TEMPLATE: "it writes none of the vocabulary's marks"}),
    "a template that ends early": (put(TEMPLATE, "str", LLAMA3_CHAT[:-20]), {TEMPLATE: "cannot be rendered"}),
    "a template that refuses": (put(TEMPLATE, "str", "{{ raise_exception('no') }}"), {TEMPLATE: "refuses"}),
    "marks are text": (
        put(TYPES, "arr[i32]", [1] * 264 + [5]),
        {TYPES: "<|begin_of_text|>, <|end_of_text|>, "},
    ),
    "marks are user-defined": (
        put(TYPES, "arr[i32]", [1] * 259 + [3, 3, 3, 4, 4, 5]),
        {TYPES: "is wrong: only a chat template may write <|end_header_id|>, <|eot_id|>: they are control tokens"},
    ),
    "wrong types": (
        retyped(
            {
                "llama.block_count": "i32",
                "llama.embedding_length": "u64",
                "llama.attention.head_count": "u16",
                "llama.attention.layer_norm_rms_epsilon": "f64",
                "tokenizer.ggml.bos_token_id": "i32",
                "tokenizer.ggml.eot_token_id": "i64",
                "tokenizer.ggml.add_bos_token": "u8",
                "general.file_type": "i32",
            }
        ),
        {
            "llama.block_count": "is stored as i32; llama.cpp takes only u32",
            "llama.embedding_length": "is stored as u64",
            "llama.attention.head_count": "is stored as u16",
            "llama.attention.layer_norm_rms_epsilon": "is stored as f64; llama.cpp takes only f32",
            "tokenizer.ggml.bos_token_id": "is stored as i32",
            "tokenizer.ggml.eot_token_id": "is stored as i64",
            "tokenizer.ggml.add_bos_token": "is stored as u8; llama.cpp takes only bool",
            "general.file_type": "is stored as i32",
        },
    ),
    "no architecture": (
        drop("general.architecture"),
        {"general.architecture": "is missing, taken as 'llama': its keys and tensors are those of llama"},
    ),
    "called a tower": (put("general.architecture", "str", "clip"), {"general.architecture": "is 'clip', taken as"}),
    "called llava": (put("general.architecture", "str", "llava"), {"general.architecture": "is 'llava', taken as"}),
    "keys of llava": (
        prefixed("llama.", "llava.", "llava"),
        {"general.architecture": "is 'llava'", "llava.*": "is 'llava.*', taken as 'llama.*': 9 keys of llama"},
    ),
    "keys of mistral": (prefixed("llama.", "mistral.", "llama"), {"mistral.*": "taken as 'llama.*'"}),
    "no file type": (drop("general.file_type"), {"general.file_type": "is missing, taken as 0: all matrices are F32"}),
}


def faulty(name: str) -> TinyLLM:
    """A file with one of `FAULTS`."""
    model = good()
    FAULTS[name][0](model.entries)
    return model


def spoil(source: Path, target: Path, change: Callable[[Entries], None]) -> Path:
    """A copy of a language model or mmproj with other metadata and none of our own keys; tensor data as they are."""
    reader = gguf.GGUFReader(source)
    names = {v: k for k, v in _VALUE_TYPES.items()}
    entries: Entries = {}
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "local_llava.")):
            item = f"arr[{names[field.types[-1]]}]" if field.types[0] == gguf.GGUFValueType.ARRAY else ""
            entries[key] = (item or names[field.types[0]], field.contents())
    change(entries)
    writer = gguf.GGUFWriter(target, "")
    writer.kv_data[0].clear()
    for key, (kind, value) in entries.items():
        if kind.startswith("arr["):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, _VALUE_TYPES[kind[4:-1]])
        else:
            writer.add_key_value(key, value, _VALUE_TYPES[kind])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


_VALUE_TYPES = {
    "u8": gguf.GGUFValueType.UINT8,
    "i8": gguf.GGUFValueType.INT8,
    "u16": gguf.GGUFValueType.UINT16,
    "i16": gguf.GGUFValueType.INT16,
    "u32": gguf.GGUFValueType.UINT32,
    "i32": gguf.GGUFValueType.INT32,
    "f32": gguf.GGUFValueType.FLOAT32,
    "bool": gguf.GGUFValueType.BOOL,
    "str": gguf.GGUFValueType.STRING,
    "u64": gguf.GGUFValueType.UINT64,
    "i64": gguf.GGUFValueType.INT64,
    "f64": gguf.GGUFValueType.FLOAT64,
}
