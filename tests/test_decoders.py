"""Every kind of decoder against transformers, behind a CLIP tower; what its GGUF holds; what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_checkpoints import contents, random_llava, text_config
from gguf import GGUFReader
from llava_checkpoints import edit_json, save
from PIL import Image
from skimage import data
from test_parity import QUESTIONS, compare, reference_inputs, write_processor_files
from test_tokenizer import build_qwen2
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from local_llava import Llava
from local_llava.convert import convert
from local_llava.convert.config import Config
from local_llava.convert.families.decoders import read_decoder
from local_llava.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.astronaut())


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


# The prompts have 20 positions or more, and answers 32 more: all go beyond the original contexts here.
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN = rope("yarn", factor=32.0, original_max_position_embeddings=16)
LONG = rope("longrope", short_factor=[1 + 0.1 * i for i in range(8)], long_factor=[2 + 0.7 * i for i in range(8)])

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, linear": ("llama", rope("linear", factor=3.5)),
    "llama, llama3": ("llama", LLAMA3),
    "llama, yarn": ("llama", YARN),
    "llama, yarn with its own attention factor": (
        "llama",
        rope("yarn", factor=32.0, original_max_position_embeddings=16, attention_factor=0.7),
    ),
    "llama, yarn with scales": (
        "llama",
        rope("yarn", factor=32.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.2),
    ),
    "llama, dynamic": ("llama", rope("dynamic", factor=4.0)),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 128, "head_dim": 32}),
    "phi3": ("phi3", {}),
    "phi3, all heads": ("phi3", {"num_key_value_heads": 4, "sliding_window": 128}),
    "phi3, one kv head": ("phi3", {"num_key_value_heads": 1}),
    "phi3, partly rotated": (
        "phi3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, **rope("default", partial_rotary_factor=0.75)},
    ),
    "phi3, long": ("phi3", {"original_max_position_embeddings": 256, **LONG}),
    "phi3, tied": ("phi3", {"tied": True}),
    "qwen2": ("qwen2", {}),
    "qwen2, all heads": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2, tied": ("qwen2", {"tied": True}),
    "qwen2, yarn": ("qwen2", YARN),
    "qwen2, linear": ("qwen2", rope("linear", factor=2.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_parity(case: str, tmp_path: Path, photo: Image.Image) -> None:
    kind, changes = CASES[case]
    model = random_llava(kind, seed=len(case), **changes)
    checkpoint = save(model, tmp_path / "checkpoint")
    write_processor_files(checkpoint)
    files = convert(checkpoint, tmp_path / "out", quant="F32", mmproj_quant="F32")
    with Llava.load(files.model, files.mmproj, kv_type="F32") as llava:
        for question in QUESTIONS:
            assert len(llava.prompt_tokens(question, 1)) > 16
            compare(model, checkpoint, llava, question, photo)


@pytest.mark.parametrize("changes", [rope("linear", factor=3.5), LLAMA3, YARN], ids=["linear", "llama3", "yarn"])
def test_scaling_matters(changes: dict[str, Any], tmp_path: Path, photo: Image.Image) -> None:
    """Guards the comparison above: without its scaling a model gives other logits."""
    checkpoint = save(random_llava("llama", **changes), tmp_path / "checkpoint")
    logits = []
    for name in ("as it is", "without"):
        files = convert(checkpoint, tmp_path / name, quant="F32", mmproj_quant="F32")
        with Llava.load(files.model, files.mmproj, kv_type="F32") as llava:
            logits.append(llava.logits(QUESTIONS[1], photo))
        edit_json(checkpoint / "config.json", text_config__rope_parameters=None)
    assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_qwen2_with_its_tokenizer(tmp_path: Path, photo: Image.Image) -> None:
    """No BOS, text in NFC, ChatML."""
    build_qwen2(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    image = max(t["id"] for t in tokenizer["added_tokens"]) + 1
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": image, "content": "<image>"})
    model = random_llava("qwen2", image=image)
    checkpoint = save(model, tmp_path / "checkpoint")
    write_processor_files(checkpoint)
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    (checkpoint / "generation_config.json").unlink()
    (checkpoint / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
        "{{ '<image>\n' if p.type == 'image' else p.text }}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    edit_json(checkpoint / "tokenizer_config.json", **names)
    files = convert(checkpoint, tmp_path / "out", quant="F32", mmproj_quant="F32")
    assert "tokenizer.ggml.bos_token_id" not in contents(files.model)[0]
    with Llava.load(files.model, files.mmproj, kv_type="F32") as llava:
        for question in (*QUESTIONS, "cafe\u0301 \u1100\u1161 123456"):
            compare(model, checkpoint, llava, question, photo)


# ---- what a GGUF holds ----

LAYER = {
    "llama": {
        "attn_norm.weight": (64,),
        "attn_q.weight": (64, 64),
        "attn_k.weight": (32, 64),
        "attn_v.weight": (32, 64),
        "attn_output.weight": (64, 64),
        "ffn_norm.weight": (64,),
        "ffn_gate.weight": (96, 64),
        "ffn_up.weight": (96, 64),
        "ffn_down.weight": (64, 96),
    },
    "phi3": {
        "attn_norm.weight": (64,),
        "attn_qkv.weight": (128, 64),
        "attn_output.weight": (64, 64),
        "ffn_norm.weight": (64,),
        "ffn_up.weight": (192, 64),
        "ffn_down.weight": (64, 96),
    },
}
LAYER["mistral"] = LAYER["llama"]
LAYER["qwen2"] = LAYER["llama"] | {"attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,)}

NUMBERS = {
    "vocab_size": 640,
    "context_length": 512,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "rope.dimension_count": 16,
}
OWN: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, tuple[int, ...]]]] = {
    # Case -> architecture; metadata and tensors besides those of all.
    "llama, linear": ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 3.5}, {}),
    "llama, llama3": ("llama", {}, {"rope_freqs.weight": (8,)}),
    "llama, dynamic": ("llama", {}, {}),
    "mistral": ("llama", {}, {}),
    "mistral, window": (
        "llama",
        {
            "context_length": 128,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "rope.dimension_count": 32,
        },
        {},
    ),
    "phi3": ("phi3", {"rope.scaling.original_context_length": 4096, "attention.sliding_window": 0}, {}),
    "phi3, all heads": (
        "phi3",
        {
            "context_length": 128,
            "attention.head_count_kv": 4,
            "rope.scaling.original_context_length": 4096,
            "attention.sliding_window": 128,
        },
        {},
    ),
    "phi3, partly rotated": (
        "phi3",
        {
            "attention.head_count": 2,
            "attention.head_count_kv": 1,
            "attention.key_length": 32,
            "attention.value_length": 32,
            "rope.dimension_count": 24,
            "rope.scaling.original_context_length": 4096,
            "attention.sliding_window": 0,
        },
        {},
    ),
    "phi3, long": (
        "phi3",
        {
            "context_length": 256,
            "rope.scaling.original_context_length": 256,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(2) / math.log(256)),
            "attention.sliding_window": 0,
        },
        {"rope_factors_long.weight": (8,), "rope_factors_short.weight": (8,)},
    ),
    "qwen2": ("qwen2", {}, {}),
    "qwen2, yarn": (
        "qwen2",
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 16,
        },
        {},
    ),
}


@pytest.mark.parametrize("case", OWN)
def test_metadata_and_tensors(case: str, tmp_path: Path) -> None:
    kind, changes = CASES[case]
    architecture, numbers, tensors = OWN[case]
    files = convert(save(random_llava(kind, **changes), tmp_path / "c"), tmp_path / "out", quant="F16")
    fields, shapes = contents(files.model)
    assert fields["general.architecture"] == architecture
    expected = NUMBERS | numbers | {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0}
    found = {key.partition(".")[2]: value for key, value in fields.items() if key.startswith(f"{architecture}.")}
    assert found.pop("rope.scaling.type", None) == expected.pop("rope.scaling.type", None)
    assert found == pytest.approx(expected, rel=1e-6)
    tensors = tensors | {"token_embd.weight": (640, 64), "output_norm.weight": (64,), "output.weight": (640, 64)}
    tensors |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in LAYER[kind].items()}
    if "head_dim" in changes:
        wide = {"attn_q.weight": (128, 64), "attn_k.weight": (64, 64), "attn_v.weight": (64, 64)}
        wide["attn_output.weight"] = (64, 128)
        tensors |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in wide.items()}
    if "all heads" in case:
        tensors |= {f"blk.{i}.attn_qkv.weight": (192, 64) for i in range(2)}
    assert shapes == tensors


@pytest.mark.parametrize("kind", ["phi3", "qwen2"])
def test_tied_embeddings_are_there_once(kind: str, tmp_path: Path) -> None:
    files = convert(save(random_llava(kind, tied=True), tmp_path / "c"), tmp_path / "out", quant="F16")
    assert "output.weight" not in contents(files.model)[1]


def test_rows_of_phi3_and_qwen2_keep_their_places(tmp_path: Path) -> None:
    """llama.cpp rotates them as transformers does."""
    for kind, source, target in (
        ("phi3", "self_attn.qkv_proj.weight", "attn_qkv.weight"),
        ("phi3", "mlp.gate_up_proj.weight", "ffn_up.weight"),
        ("qwen2", "self_attn.q_proj.weight", "attn_q.weight"),
        ("qwen2", "self_attn.k_proj.bias", "attn_k.bias"),
    ):
        model = random_llava(kind)
        directory = tmp_path / f"{kind}-{target}"
        files = convert(save(model, directory / "c"), directory, quant="F32")
        tensor = next(t for t in GGUFReader(files.model).tensors if t.name == f"blk.1.{target}")
        expected = model.model.language_model.layers[1].get_parameter(source).detach().numpy()
        assert np.array_equal(tensor.data.reshape(expected.shape), expected)


def test_factors_of_llama_3_1() -> None:
    """The real model's: what transformers divides by, and some values of llama.cpp's converter."""
    settings = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = text_config("llama", max_position_embeddings=131072, rope_parameters=dict(settings), **sizes)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    values = decode({"max_position_embeddings": 131072, "rope_parameters": settings, **sizes})["rope_freqs.weight"]
    assert values.dtype == np.float32 and values.shape == (64,)
    assert np.abs(values / (plain / scaled).numpy() - 1).max() < 1e-6
    assert values[[0, 28, 29, 30, 34, 35, 63]].tolist() == FACTORS_OF_LLAMA_3_1


FACTORS_OF_LLAMA_3_1 = [1.0, 1.0, 1.2074838876724243, 1.5534145832061768, 5.257327079772949, 8.0, 8.0]


def decode(config: dict[str, Any], kind: str = "llama") -> dict[str, Any]:
    """The computed tensors of a decoder, and its metadata."""
    decoder = read_decoder(Config(Path("config.json"), {"model_type": kind, **config}, "text_config"), False)
    fields = {f.key.partition(".")[2]: f.value for f in decoder.fields}
    return fields | {row.target: row.value for row in decoder.rows if row.source is None}


HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}

OLD_AND_NEW: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("llama", {"rope_theta": 500000.0}, rope("default", rope_theta=500000.0)),
    "type": (
        "llama",
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2}},
        rope("linear", factor=2),
    ),
    "both": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2}, **rope("linear", factor=4, rope_theta=5.0)},
        rope("linear", factor=2),
    ),
    "original context at the top": (
        "llama",
        {
            "original_max_position_embeddings": 16,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 1,
                "high_freq_factor": 4,
                "original_max_position_embeddings": 99,
            },
        },
        LLAMA3,
    ),
    "yarn without a factor": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 0}},
        YARN,
    ),
    "first names of Phi-3's": (
        "phi3",
        {
            "original_max_position_embeddings": 256,
            "rope_scaling": {"type": "su", **{k: v for k, v in LONG["rope_parameters"].items() if "factor" in k}},
        },
        {"original_max_position_embeddings": 256, **LONG},
    ),
    "a part": ("phi3", {"partial_rotary_factor": 0.75}, rope("default", partial_rotary_factor=0.75)),
}


@pytest.mark.parametrize("case", OLD_AND_NEW)
def test_both_styles_of_configuration(case: str) -> None:
    kind, old, new = OLD_AND_NEW[case]
    first, second = (decode({"max_position_embeddings": 512, **HEADS, **config}, kind) for config in (old, new))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


# ---- contexts ----


def test_contexts_that_llama_cpp_would_get_wrong_are_not_offered(tmp_path: Path) -> None:
    for kind, changes, n_ctx in (
        ("phi3", {"original_max_position_embeddings": 300, **LONG}, 256),
        ("phi3", {"sliding_window": 100}, 100),
        ("mistral", {"sliding_window": 100}, 100),
        ("qwen2", {"sliding_window": 100}, 512),
    ):
        directory = tmp_path / f"{kind}{n_ctx}"
        files = convert(save(random_llava(kind, **changes), directory / "c"), directory, quant="F16")
        with Llava.load(files.model, files.mmproj, n_ctx=n_ctx):
            pass
        with pytest.raises(UsageError, match=f"n_ctx must be 1 to {n_ctx},"):
            Llava.load(files.model, files.mmproj, n_ctx=n_ctx + 1)


@pytest.mark.parametrize(
    "changes", [{"original_max_position_embeddings": 256, **LONG}, {"sliding_window": 16}], ids=["long", "window"]
)
def test_llama_cpp_would_get_them_wrong(
    changes: dict[str, Any], tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason for the bounds: with them out of the way it differs. When it no longer does, they may go."""
    model = random_llava("phi3", **changes)
    checkpoint = save(model, tmp_path / "checkpoint")
    write_processor_files(checkpoint)
    files = convert(checkpoint, tmp_path / "out", quant="F32", mmproj_quant="F32")
    with torch.no_grad():
        logits = model(**reference_inputs(checkpoint, QUESTIONS[1], photo)).logits[0, -1].numpy()
    monkeypatch.setattr("local_llava.llm_file._n_ctx", lambda *_: 512)
    with Llava.load(files.model, files.mmproj, kv_type="F32", n_ctx=512) as llava:
        assert np.abs(llava.logits(QUESTIONS[1], photo) - logits).max() > 0.1


# ---- what is refused ----

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "kind": ("gemma", {}, "model_type is 'gemma'; supported: llama, mistral, phi3, qwen2"),
    "scaling": (
        "llama",
        rope("longrope"),
        "rope_parameters.rope_type is 'longrope'; supported: default, linear, llama3",
    ),
    "old scaling": (
        "qwen2",
        {"rope_scaling": {"type": "mrope"}},
        "rope_scaling.type is 'mrope'; supported: default, linear, llama3, yarn, dynamic",
    ),
    "scaling of phi3": ("phi3", rope("linear", factor=2), "rope_parameters.rope_type is 'linear'; supported: default,"),
    "layers": (
        "qwen2",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
        "rope_parameters.full_attention is an object; only the same settings for all layers",
    ),
    "no object": ("llama", {"rope_scaling": "linear"}, "rope_scaling must be an object, not 'linear'"),
    "no factor": ("llama", rope("linear"), "rope_parameters.factor is missing"),
    "factor": ("llama", rope("linear", factor="2"), "rope_parameters.factor must be a number from 1 to 1e+06, not '2'"),
    "NaN": ("llama", rope("linear", factor=float("nan")), "rope_parameters.factor must be a number from 1"),
    "theta": ("llama", {"rope_theta": 0}, "rope_theta must be a number from 1 to 1e+12, not 0"),
    "llama3 without frequencies": ("llama", rope("llama3", factor=8), "rope_parameters.low_freq_factor is missing"),
    "llama3 between nothing": (
        "llama",
        rope("llama3", factor=8, low_freq_factor=4, high_freq_factor=4),
        "rope_parameters.high_freq_factor must be more than low_freq_factor, 4",
    ),
    "ramp": ("llama", rope("yarn", factor=4, beta_fast=16), "rope_parameters.beta_fast is 16; supported: 32"),
    "no truncation": ("llama", rope("yarn", factor=4, truncate=False), "rope_parameters.truncate is false; supported"),
    "short list": (
        "phi3",
        rope("longrope", short_factor=[1.0], long_factor=[1.0]),
        "rope_parameters.long_factor must be a list of 8 numbers, not [1.0]",
    ),
    "no list": ("phi3", rope("longrope"), "rope_parameters.long_factor must be a list of 8 numbers, not []"),
    "zero in a list": (
        "phi3",
        rope("longrope", short_factor=[1.0] * 8, long_factor=[0.0] * 8),
        "rope_parameters.long_factor must be a list of 8 positive numbers",
    ),
    "short context": (
        "phi3",
        {"original_max_position_embeddings": 255, **LONG},
        "original_max_position_embeddings is 255; with longrope at least 256 are needed",
    ),
    "odd part": ("phi3", {"partial_rotary_factor": 0.2}, "head_dim must be even, and a part of 0.2 of it, not 16"),
    "wide heads of phi3": ("phi3", {"head_dim": 32}, "head_dim: 4 heads of 32 must make hidden_size 64 here"),
    "wide heads of qwen2": ("qwen2", {"head_dim": 32}, "head_dim: 4 heads of 32 must make hidden_size 64 here"),
    "window of phi3": ("phi3", {"sliding_window": -1}, "sliding_window must be a whole number from 1"),
    "window of qwen2": ("qwen2", {"use_sliding_window": True}, "use_sliding_window is true; supported: false"),
    "windows": (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layer_types is ['full_attention', 'sliding_attention']; supported: full_attention",
    ),
    "activation": ("phi3", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    kind, config, problem = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        decode({**HEADS, **config}, kind)
    message = str(caught.value)
    assert message.startswith(f"config.json: text_config.{problem}")
    assert message.isprintable()
