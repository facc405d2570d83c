"""The cases of fuzz.py: good files of every kind, made once, and a damaged one for each number.

Knows where a loader finds what in a case's directory, and what the file was that is damaged now. Damage itself is done
by the modules of each format and, for pictures and bytes of any kind, by fuzz_images.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fuzz_checkpoint
import fuzz_gguf
import fuzz_gguf_fields
import fuzz_protobuf
import sentencepiece
import sentencepiece_tokenizers as forms
import torch
from fuzz_images import damaged
from gguf_bytes import TinyLLM, tiny_sentencepiece
from llava_checkpoints import edit_json, random_model, save
from mmproj_files import Reference, write_gguf
from picture_files import every_kind
from vocabularies import SENTENCES

from local_llava.convert import convert

KINDS = {"gguf": 30, "mmproj": 15, "safetensors": 17, "tokenizer": 15, "config": 13, "image": 10}
"""Kind -> its share of all cases, in hundredths."""

SMALL_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "IQ4_NL")
"""Of which a block divides rows of 32."""
LLM_TYPES = (*SMALL_TYPES, "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ3_S")
MMPROJ_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q4_K")

CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_WEIGHTS = {"gguf": "model.gguf", "mmproj": "mmproj.gguf"}


@dataclass(frozen=True)
class Case:
    """One damaged file among good ones, in a directory that `fuzz_child.load` understands."""

    kind: str
    number: int
    directory: Path
    how: tuple[str, ...]
    """What was done to which file."""
    options: dict[str, Any]
    """What the loader is called with."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number}"


class Corpus:
    """The good files."""

    def __init__(self, directory: Path) -> None:
        self.checkpoints = make_checkpoints(directory / "checkpoints")
        self.pairs = make_pairs(self.checkpoints, directory / "pairs")
        self.pictures = every_kind()
        self._bytes = [*self.pictures.values(), *((c / "config.json").read_bytes() for c in self.checkpoints)]
        self._ggufs = [path for pair in self.pairs for path in sorted(pair.iterdir())]

    def case(self, kind: str, number: int, seed: int, directory: Path) -> Case:
        """Write a case. It depends on its kind, number and seed alone."""
        rng = random.Random(f"{seed}/{kind}/{number}")
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        make = {"gguf": self._pair, "mmproj": self._pair, "image": self._picture}.get(kind, self._checkpoint)
        how, options = make(kind, rng, directory)
        return Case(kind, number, directory, tuple(how), options)

    def _pair(self, kind: str, rng: random.Random, directory: Path) -> tuple[list[str], dict[str, Any]]:
        pair, name = rng.choice(self.pairs), _WEIGHTS[kind]
        target = linked(pair, directory / "pair") / name
        how = [f"{pair.name}/{name}"]
        if rng.random() < 0.02:
            how.append(fuzz_checkpoint.odd_file(target, rng))
        else:
            data, done = self._damaged_gguf(pair / name, rng)
            replace(target, data)
            how += done
        quants = LLM_TYPES if kind == "gguf" else MMPROJ_TYPES
        return how, {
            "damaged": name,
            "quant": rng.choice(quants) if rng.random() < 0.3 else None,
            "by_directory": rng.random() < 0.2,
            **question(rng),
        }

    def _damaged_gguf(self, path: Path, rng: random.Random) -> tuple[bytes, list[str]]:
        data, chance = path.read_bytes(), rng.random()
        if chance < 0.12:
            new, how = fuzz_gguf_fields.odd_field(data, rng)
            return new, [how]
        if chance < 0.17:
            new, how = fuzz_gguf_fields.cut(data, rng)
            return new, [how]
        if chance < 0.27:
            others = [*self._bytes, rng.choice(self._ggufs).read_bytes()]
            return damaged(data, others, rng), ["bytes"]
        doc = fuzz_gguf.Doc.read(path)
        done = list(fuzz_gguf.edits(doc, rng))
        if rng.random() < 0.03:
            doc.entries = fuzz_gguf.Doc.read(rng.choice(self._ggufs)).entries
            done.append("metadata of another file")
        return doc.bytes, done

    def _checkpoint(self, kind: str, rng: random.Random, directory: Path) -> tuple[list[str], dict[str, Any]]:
        source = rng.choice(self.checkpoints)
        checkpoint = linked(source, directory / "checkpoint")
        names, how = present(checkpoint, kind), []
        for name in rng.sample(names, min(len(names), rng.choice((1, 1, 1, 1, 2)))):
            path = checkpoint / name
            how.append(f"{source.name}/{name}")
            how.append(fuzz_checkpoint.odd_file(path, rng) if rng.random() < 0.03 else self._damage_file(path, rng))
        options = {"quant": rng.choice(LLM_TYPES), "mmproj_quant": rng.choice(MMPROJ_TYPES), **question(rng)}
        return how, options

    def _damage_file(self, path: Path, rng: random.Random) -> str:
        data = path.read_bytes()
        odd: dict[str, Callable[[bytes, random.Random], tuple[bytes, str]]] = {
            ".safetensors": fuzz_checkpoint.odd_safetensors,
            ".jinja": fuzz_checkpoint.odd_jinja,
            ".model": partial(fuzz_protobuf.odd_protobuf, others=self._bytes),
        }
        if rng.random() < 0.12:
            new, how = damaged(data, self._bytes, rng), "bytes"
        else:
            new, how = odd.get(path.suffix, fuzz_checkpoint.odd_json)(data, rng)
        replace(path, new)
        return how

    def _picture(self, kind: str, rng: random.Random, directory: Path) -> tuple[list[str], dict[str, Any]]:
        name, data = rng.choice(list(self.pictures.items()))
        (directory / "picture").write_bytes(damaged(data, self._bytes, rng))
        return [name], {"pair": str(self.pairs[0]), "preprocess": rng.choice(("checkpoint", "pad", "crop"))}


def question(rng: random.Random) -> dict[str, Any]:
    """How a pair is loaded and asked."""
    loading = {"kv_type": rng.choice(("F16", "F32", "Q8_0")), "flash_attention": rng.random() < 0.3}
    ask: dict[str, Any] = {"max_tokens": 2, "temperature": rng.choice((0.0, 1.0)), "seed": rng.randrange(100)}
    if rng.random() < 0.3:
        ask |= {"logprobs": 3, "repeat_penalty": 1.1, "stop": ["x"], "system": "Be brief."}
    if rng.random() < 0.2:
        ask |= {"json_schema": {"enum": ["yes", 7]}, "max_tokens": 24}
    return {"load": loading, "ask": ask}


def linked(source: Path, target: Path) -> Path:
    """A copy of a directory by hard links: `replace` a file in it, never write to it."""
    target.mkdir()
    for path in source.iterdir():
        os.link(path, target / path.name)
    return target


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def present(checkpoint: Path, kind: str) -> list[str]:
    """Names of the files of a kind that a checkpoint has."""
    if kind == "safetensors":
        return sorted(p.name for p in checkpoint.glob("*.safetensors"))
    names = CONFIG_FILES if kind == "config" else TOKENIZER_FILES
    return [name for name in names if (checkpoint / name).exists()]


TEXT: dict[str, Any] = {
    "vocab_size": 520,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    # Heads of 32, which a KV cache of Q8_0 asks for.
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def make_checkpoints(directory: Path) -> list[Path]:
    """Small checkpoints with random weights, as releases of transformers and other tools have written them."""
    new = save(random_model(TEXT, VISION), directory / "new", "5", dtype=torch.float32)
    edit_json(new / "preprocessor_config.json", image_processor_type="LlavaImageProcessor", do_pad=True)
    old = save(random_model(TEXT, VISION), directory / "old", "4.51", shards=2, dtype=torch.float16)
    edit_json(old / "config.json", text_config__rope_parameters=None, text_config__rope_theta=500000.0)
    template = {"chat_template": (old / "chat_template.jinja").read_text()}
    (old / "chat_template.jinja").unlink()
    (old / "chat_template.json").write_text(json.dumps(template))
    (old / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "x"}')
    middle = save(random_model(TEXT, VISION), directory / "middle", "4.52", shards=2, dtype=torch.bfloat16)
    (middle / "model.safetensors.index.json").unlink()
    processor = json.loads((middle / "preprocessor_config.json").read_text())
    (middle / "preprocessor_config.json").unlink()
    (middle / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    # Wide enough for the types with blocks of 256.
    wide_text = {**TEXT, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    wide_vision = {**VISION, "hidden_size": 256, "intermediate_size": 256}
    wide = save(random_model(wide_text, wide_vision), directory / "wide", dtype=torch.float16)
    vicuna, unigrams = (sentencepiece_checkpoint(directory / name, name == "model") for name in ("vicuna", "model"))
    return [new, old, middle, wide, vicuna, unigrams]


def sentencepiece_checkpoint(directory: Path, own_file: bool) -> Path:
    """One with a vocabulary as LLaVA 1.5's, in tokenizer.json or SentencePiece's own file."""
    save(random_model({**TEXT, "vocab_size": 920}, VISION), directory, dtype=torch.float16)
    content = forms.with_image(forms.small())
    image = 900 if own_file else content["added_tokens"][-1]["id"]
    edit_json(directory / "config.json", image_token_index=None, image_token_id=image)
    for name in TOKENIZER_FILES:
        (directory / name).unlink(missing_ok=True)
    if own_file:
        (directory / "text").write_text("\n".join(SENTENCES * 20))
        settings: dict[str, Any] = {
            "model_type": "bpe",
            "byte_fallback": True,
            "vocab_size": 900,
            "character_coverage": 0.98,
        }
        settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(
            input=str(directory / "text"), model_prefix=str(directory / "tokenizer"), **settings
        )
        (directory / "text").unlink()
        (directory / "tokenizer.vocab").unlink()
        (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        (directory / "added_tokens.json").write_text('{"<image>": 900}')
    else:
        forms.write(content, directory)
    return directory


def make_pairs(checkpoints: list[Path], directory: Path) -> list[Path]:
    """Pairs of every quantization, with model.gguf and mmproj.gguf; one of another tool."""
    directory.mkdir()
    pairs = []
    for i, quant in enumerate(LLM_TYPES):
        pair = directory / quant
        source = checkpoints[(0, 4, 1, 5, 2)[i % 5] if quant in SMALL_TYPES else 3]
        made = convert(source, pair, quant=quant, mmproj_quant=MMPROJ_TYPES[i % len(MMPROJ_TYPES)], threads=1)
        made.model.rename(pair / "model.gguf")
        made.mmproj.rename(pair / "mmproj.gguf")
        pairs.append(pair)
    tower = Reference(n_out=64, n_blocks=3)
    for name, model in (("foreign", TinyLLM()), ("foreign-sentencepiece", tiny_sentencepiece())):
        pair = directory / name
        pair.mkdir()
        (pair / "model.gguf").write_bytes(model.bytes)
        legacy = {k: v for k, v in tower.metadata().items() if k != "clip.vision.feature_layer"}
        write_gguf(pair / "mmproj.gguf", legacy, tower.tensors())
        pairs.append(pair)
    return pairs
