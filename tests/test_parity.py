"""The whole path against transformers: image features, prompt tokens, logits, greedy answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from llava_checkpoints import TINY, random_model, save
from PIL import Image
from skimage import data
from transformers import AutoProcessor, LlavaForConditionalGeneration

from local_llava import Llava
from local_llava.convert import convert

QUESTIONS = ("What do you see?", "  Two\n\nlines, 12345 and trailing space ", "Что это? 这是什么? 🦙")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.astronaut())


def reference_inputs(directory: Path, question: str, image: Image.Image) -> dict[str, Any]:
    processor = AutoProcessor.from_pretrained(directory)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(images=image, text=text, add_special_tokens=False, return_tensors="pt"))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "last layer": {"layer": -1},
    "third from the end": {"layer": -3},
    "counted from the start": {"layer": 2},
    "gelu": {"vision": {"hidden_act": "gelu"}},
    "multi-head": {"text": {"num_key_value_heads": 4}},
    "one kv head": {"text": {"num_key_value_heads": 1}},
    "wide heads": {"text": {"head_dim": 32}},
    "biases": {"text": {"attention_bias": True, "mlp_bias": True}},
    "tied": {"text": {"tie_word_embeddings": True}, "tie_word_embeddings": True},
    "no projector bias": {"multimodal_projector_bias": False},
    "square feed-forward": {"vision": {"intermediate_size": 48}},
    "deep": {"text": {"num_hidden_layers": 6}, "vision": {"num_hidden_layers": 5, "num_attention_heads": 2}},
    "theta": {"text": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}},
    "large picture": {"vision": {"image_size": 112, "patch_size": 16}},
}


@pytest.mark.parametrize("case", CASES)
def test_random_weights(case: str, tmp_path: Path, photo: Image.Image) -> None:
    model = random_model(seed=len(case), **CASES[case])
    checkpoint = save(model, tmp_path / "checkpoint")
    write_processor_files(checkpoint)
    files = convert(checkpoint, tmp_path / "out", quant="F32", mmproj_quant="F32")
    with Llava.load(files.model, files.mmproj, kv_type="F32") as llava:
        for question in QUESTIONS:
            compare(model, checkpoint, llava, question, photo)


def write_processor_files(checkpoint: Path) -> None:
    """AutoProcessor wants a processor_config.json, which says of what sort the processor is."""
    import json

    config = {"processor_class": "LlavaProcessor", "patch_size": None, "image_token": "<image>"}
    vision = json.loads((checkpoint / "config.json").read_text())["vision_config"]
    config |= {
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    (checkpoint / "processor_config.json").write_text(json.dumps(config))


def compare(
    model: LlavaForConditionalGeneration, checkpoint: Path, llava: Llava, question: str, image: Image.Image
) -> None:
    inputs = reference_inputs(checkpoint, question, image)
    ids = inputs["input_ids"][0].tolist()
    slot = model.config.image_token_id
    assert llava.prompt_tokens(question, 1) == [None if i == slot else i for i in ids]
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0].numpy()
        out = model(**inputs)
        ours = llava.embed_images(image)[0]
        assert np.linalg.norm(ours - features) <= 1e-5 * np.linalg.norm(features)
        logits = out.logits[0, -1].numpy()
        assert np.abs(llava.logits(question, image) - logits).max() <= 1e-3
        compare_greedy(model, inputs, llava, question, image)


def compare_greedy(
    model: LlavaForConditionalGeneration, inputs: dict[str, Any], llava: Llava, question: str, image: Image.Image
) -> None:
    """32 greedy steps; where transformers' two best tokens are closer than 1e-2, either may be taken."""
    tokens = llava.ask(question, image, max_tokens=32).tokens
    ids = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], dim=1)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    logits = model(input_ids=ids, **rest).logits[0]
    first = inputs["input_ids"].shape[1] - 1
    for step, token in enumerate(tokens):
        best = logits[first + step].max()
        assert best - logits[first + step, token] <= 1e-2, f"step {step}"


@pytest.fixture(scope="module")
def tiny() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()


def test_tiny_llava(tiny: LlavaForConditionalGeneration, tmp_path: Path, photo: Image.Image) -> None:
    import random

    import scenes

    files = convert(TINY, tmp_path, quant="F32", mmproj_quant="F32")
    with Llava.load(files.model, files.mmproj, kv_type="F32") as llava:
        scene, rng = next(scenes.sample_scenes(random.randrange(1 << 30), held_out=True))
        for asked in scenes.sample_questions(scene, rng, 9):
            compare(tiny, TINY, llava, asked.question, scenes.draw(scene))
        compare(tiny, TINY, llava, "Describe the picture.", photo)


def test_float16_and_flash_attention(tiny: LlavaForConditionalGeneration, tmp_path: Path, photo: Image.Image) -> None:
    files = convert(TINY, tmp_path, quant="F16", mmproj_quant="F16")
    pixels = reference_inputs(TINY, "?", photo)["pixel_values"]
    with torch.no_grad():
        features = tiny.get_image_features(pixels, return_dict=True).pooler_output[0].numpy()
    for flash in (False, True):
        with Llava.load(files.model, files.mmproj, flash_attention=flash) as llava:
            ours = llava.embed_images(photo)[0]
        assert np.linalg.norm(ours - features) <= 1e-3 * np.linalg.norm(features)


def test_several_pictures_keep_their_order(
    tiny: LlavaForConditionalGeneration, tmp_path: Path, photo: Image.Image
) -> None:
    """Two pictures in one question, as transformers reads them; swapped, the logits differ."""
    other = Image.fromarray(data.coffee())
    processor = AutoProcessor.from_pretrained(TINY)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What do you see?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[photo, other], text=text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = tiny(**inputs).logits[0, -1].numpy()
    files = convert(TINY, tmp_path, quant="F32", mmproj_quant="F32")
    with Llava.load(files.model, files.mmproj, kv_type="F32") as llava:
        assert np.abs(llava.logits("What do you see?", [photo, other]) - logits).max() <= 1e-2
        assert np.abs(llava.logits("What do you see?", [other, photo]) - logits).max() > 1e-2


LEGACY = {
    "block count without the last layer": (True, False),
    "ffn names swapped": (False, True),
    "both": (True, True),
}


@pytest.mark.parametrize("case", LEGACY)
def test_legacy_mmproj(case: str, tmp_path: Path, photo: Image.Image) -> None:
    """Files as llama.cpp's old script made them; such towers have an even number of layers."""
    model = random_model(vision={"num_hidden_layers": 4})
    checkpoint = save(model, tmp_path / "checkpoint")
    write_processor_files(checkpoint)
    files = convert(checkpoint, tmp_path / "out", quant="F32", mmproj_quant="F32")
    legacy = tmp_path / "legacy.gguf"
    write_legacy(files.mmproj, legacy, *LEGACY[case])
    with Llava.load(files.model, legacy, kv_type="F32") as llava:
        compare(model, checkpoint, llava, QUESTIONS[0], photo)


def write_legacy(source: Path, target: Path, drop_last: bool, swap_ffn: bool) -> None:
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "clip")
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "local_llava.")) or name in ("general.architecture", "clip.vision.feature_layer"):
            continue
        value = field.contents()
        if name == "clip.vision.block_count" and drop_last:
            value -= 1
        item_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], item_type)
    n_blocks = reader.fields["clip.vision.block_count"].contents()
    swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if drop_last and parts[:3] == ["v", "blk", str(n_blocks - 1)]:
            continue
        if swap_ffn:
            parts = [swapped.get(p, p) for p in parts]
        writer.add_tensor(".".join(parts), tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
