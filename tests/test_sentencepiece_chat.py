"""From a checkpoint with a SentencePiece-type vocabulary to prompts and answers, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece_tokenizers as forms
import torch
from llava_checkpoints import TOKENIZER_FILES, random_model, save
from PIL import Image
from sentencepiece_tokenizers import Content
from test_parity import write_processor_files
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
)

from local_llava import Llava, prompt
from local_llava.convert import convert
from local_llava.convert.tokenizer import read_tokenizer
from local_llava.default_chats import PHI3_CHAT
from local_llava.gguf_file import GGUFFile
from local_llava.types import Message

VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

QUESTIONS = (
    "What do you see?",
    "  Two\n\nlines, 12345 and trailing space ",
    "Что это? 这是什么? 🦙",
    "\n",
    "▁x ▁",
    "\t    def f():\u00a0\u3000\n        return 1\r\n",
)


CHATS: dict[str, tuple[Callable[[], Content], str, dict[str, Any]]] = {
    "Vicuna": (forms.vicuna, VICUNA, {}),
    "Vicuna, first": (lambda: forms.metaspace(forms.vicuna(), "first"), VICUNA, {}),
    "Mistral": (lambda: forms.with_image(forms.mistral()), MISTRAL, {}),
    "Mistral, first": (lambda: forms.with_image(forms.metaspace(forms.mistral(), "first")), MISTRAL, {}),
    "Phi 3": (forms.phi3, PHI3, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
    "trained, always": (lambda: forms.with_image(forms.metaspace(forms.small(), "always")), VICUNA, {}),
    "trained, never": (lambda: forms.with_image(forms.metaspace(forms.small(), "never")), MISTRAL, {}),
}


def checkpoint(directory: Path, content: Content, template: str | None, config: dict[str, Any]) -> Path:
    """A LLaVA with random weights and a tokenizer."""
    image = next(t["id"] for t in content["added_tokens"] if t["content"] == "<image>")
    model = random_model(text={"vocab_size": 32064 if image > 1000 else 800})
    model.config.image_token_id = image
    save(model, directory)
    for name in TOKENIZER_FILES:
        (directory / name).unlink(missing_ok=True)
    forms.write(content, directory, **config)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    write_processor_files(directory)
    return directory


def reference_ids(processor: Any, messages: list[Message], typed: bool) -> list[int]:
    """What transformers makes of a conversation."""
    turns = []
    for m in messages:
        parts = [{"type": "image"}] * len(m.images) + [{"type": "text", "text": m.text}]
        turns.append({"role": m.role, "content": parts if typed else "<image>\n" * len(m.images) + m.text})
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    pictures = [Image.new("RGB", (40, 30)) for m in messages for _ in m.images]
    adds_bos = not text.startswith(processor.tokenizer.bos_token)
    ids = processor(images=pictures or None, text=text, add_special_tokens=adds_bos, return_tensors="pt")["input_ids"]
    found: list[int] = ids[0].tolist()
    return found


def conversations(question: str, with_system: bool) -> list[list[Message]]:
    shown = Message("user", question, images=(1,))
    asked = [[shown], [Message("user", question)], [shown, Message("assistant", " So.\n"), Message("user", question)]]
    return asked + [[Message("system", " Be brief. "), *turns] for turns in asked if with_system]


@pytest.mark.parametrize("chat", CHATS)
def test_prompts_and_answers_are_those_of_transformers(chat: str, tmp_path: Path) -> None:
    form, template, config = CHATS[chat]
    source = checkpoint(tmp_path / "checkpoint", form(), template, config)
    files = convert(source, tmp_path / "out", quant="Q8_0")
    processor = AutoProcessor.from_pretrained(source)
    slot = processor.image_token_id
    with Llava.load(files.model, files.mmproj, n_threads=1) as llava:
        for question in QUESTIONS:
            for turns in conversations(question, with_system=template != MISTRAL):
                parts = prompt.build(turns, llava._format, llava._llm.tokenize)
                ours = [i for p in parts for i in (p if isinstance(p, list) else [slot] * llava._tower.n_tokens)]
                assert ours == reference_ids(processor, turns, typed=template == VICUNA), turns
        pieces = list(llava.stream("Hello", max_tokens=150, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=2))
        reply = pieces[-1].reply
        assert reply is not None
        assert "".join(p.text for p in pieces) == reply.text
        expected = processor.tokenizer.decode(reply.tokens, skip_special_tokens=True)
        assert forms.is_same_text(reply.text, expected), (reply.text, expected)


def test_checkpoints_without_a_template(tmp_path: Path) -> None:
    """LLaVA 1.5's prompt, and Phi 3's for its vocabulary."""
    source = checkpoint(tmp_path / "checkpoint", forms.with_image(forms.small()), None, {})
    files = convert(source, tmp_path / "out", quant="Q8_0")
    with Llava.load(files.model, files.mmproj, n_threads=1) as llava:
        parts = llava._format.parts([Message("system", "S"), Message("user", "Q", images=(1,))])
        assert [p if isinstance(p, str) else type(p).__name__ for p in parts] == [
            *("Special", "S USER: ", "Slot", "\nQ ASSISTANT:")
        ]
        turns = [Message("user", "Q"), Message("assistant", "A"), Message("user", "R")]
        text = [p if isinstance(p, str) else "</s>" for p in llava._format.parts(turns)[1:]]
        assert text == ["USER: Q ASSISTANT: A", "</s>", "USER: R ASSISTANT:"]
    forms.write(forms.phi3(), tmp_path / "phi")
    assert read_tokenizer(tmp_path / "phi", 32064, {}).chat_template == PHI3_CHAT


def test_what_is_typed_stays_text(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "checkpoint", forms.phi3(), PHI3, {"eos_token": "<|endoftext|>"})
    files = convert(source, tmp_path / "out", quant="Q8_0")
    with Llava.load(files.model, files.mmproj, n_threads=1) as llava:
        plain = llava.prompt_tokens("", 1)
        for typed in ("</s>", "<s>", "<image>", "a<|end|>\n<|system|> b", "<0x0A>", "<unk>", "<|user|>", "[PAD32050]"):
            tokens = llava.prompt_tokens(f"x{typed}y", 1)
            assert [i for i in tokens if is_special(i)] == [i for i in plain if is_special(i)], typed
            assert f"x{typed}y" in b"".join(llava._llm.piece(i) for i in tokens if i is not None).decode()


def is_special(token: int | None) -> bool:
    """Of Llama 2's vocabulary and Phi 3's tokens; the template writes newlines, which are byte tokens."""
    return token is None or (token < 259 and token != 3 + ord("\n")) or token >= 32000


def test_mistral_decoders(tmp_path: Path) -> None:
    """text_config of model_type mistral: defaults of its own, and a window that bounds the context."""
    text = {"vocab_size": 800, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 8, "sliding_window": 300}
    vision = random_model().config.vision_config.to_dict()
    config = LlavaConfig(
        text_config=MistralConfig(**text), vision_config=CLIPVisionConfig(**vision), image_token_index=700
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    source = save(model, tmp_path / "checkpoint")
    for name in TOKENIZER_FILES:
        (source / name).unlink(missing_ok=True)
    forms.write(forms.with_image(forms.small()), source)
    (source / "chat_template.jinja").write_text(MISTRAL)
    write_processor_files(source)
    settings = json.loads((source / "config.json").read_text())
    del settings["text_config"]["num_key_value_heads"]  # 8 by default, where LlamaConfig takes num_attention_heads
    (source / "config.json").write_text(json.dumps(settings))
    files = convert(source, tmp_path / "out", quant="F32", mmproj_quant="F32")
    assert GGUFFile.open(files.model).metadata["llama.context_length"] == 300
    picture = Image.linear_gradient("L").convert("RGB")
    processor = AutoProcessor.from_pretrained(source)
    inputs = processor(
        images=picture, text="<s>[INST] <image>\nWhat? [/INST]", add_special_tokens=False, return_tensors="pt"
    )
    with Llava.load(files.model, files.mmproj, kv_type="F32", n_threads=1) as llava, torch.no_grad():
        assert np.abs(llava.logits("What?", picture) - model(**inputs).logits[0, -1].numpy()).max() <= 1e-3
