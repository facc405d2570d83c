"""Writes models in the official LLaVA's layout, and CLIP towers as they lie beside it: an own small writer, by the name
table of the format; and compares what becomes of them with transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava_checkpoints import SMALL_VISION, TINY, write_processor
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tower_checkpoints import write_siglip_processor
from transformers import CLIPImageProcessorPil, LlavaForConditionalGeneration, SiglipImageProcessorPil

from local_llava import Llava

LANGUAGE = {"model.language_model.": "model.", "lm_head.": "lm_head."}
OFFICIAL = {
    **LANGUAGE,
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "model.image_newline": "model.image_newline",
}
"""Prefix of a tensor that transformers 5 has in memory -> prefix in the format."""

UNUSED_ID = 480
"""A row of the embedding that these vocabularies have no token for: in transformers it stands for pictures."""


def tensors_of(model: torch.nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Copies of those tensors of a model that a table has names for."""
    found = {}
    for name, tensor in model.state_dict().items():
        prefix = next((p for p in names if name.startswith(p)), None)
        if prefix is not None:
            found[names[prefix] + name.removeprefix(prefix)] = tensor.detach().clone()
    return found


def write_tensors(
    tensors: dict[str, torch.Tensor], directory: Path, suffix: str = "safetensors", shards: int = 1
) -> None:
    """One file or shards with an index, as safetensors or as PyTorch's."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = list(tensors)
    files = {
        name: f"{stem}.{suffix}"
        if shards == 1
        else f"{stem}-{1 + i * shards // len(names):05d}-of-{shards:05d}.{suffix}"
        for i, name in enumerate(names)
    }
    for file in set(files.values()):
        chosen = {name: tensors[name].contiguous() for name in names if files[name] == file}
        if suffix == "safetensors":
            save_file(chosen, directory / file, metadata={"format": "pt"})
        else:
            torch.save(chosen, directory / file)
    if shards > 1:
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def write_tokenizer(directory: Path) -> None:
    """Of a model without an image token; the template is not there, as in XTuner's and the official repositories."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] < UNUSED_ID]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "model_max_length": 1024}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def text_config(model: LlavaForConditionalGeneration, architecture: str, kind: str) -> dict[str, Any]:
    """config.json of a language model as transformers 4 writes it."""
    text = model.config.text_config
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    return {
        "architectures": [architecture],
        "model_type": kind,
        "bos_token_id": 475,
        "eos_token_id": 476,
        "hidden_act": "silu",
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "float16",
        **{key: getattr(text, key) for key in keys},
    }


def save_official(
    model: LlavaForConditionalGeneration,
    directory: Path,
    *,
    tower: bool = True,
    suffix: str = "safetensors",
    shards: int = 1,
    **config: Any,
) -> Path:
    """Write a checkpoint.

    Args:
        model: What is in it.
        directory: Where to.
        tower: Whether the tower is inside, or only named.
        suffix: Of the weight files.
        shards: How many of them.
        **config: Entries of config.json in place of, or besides, those of xtuner/llava-llama-3-8b-v1_1-hf.
    """
    tensors = tensors_of(model, OFFICIAL)
    if not tower:
        tensors = {n: t for n, t in tensors.items() if not n.startswith("model.vision_tower.")}
    write_tensors(tensors, directory, suffix, shards)
    values = {
        **text_config(model, "LlavaLlamaForCausalLM", "llava_llama"),
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-tiny",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": tower,
        "use_mm_proj": True,
        **config,
    }
    (directory / "config.json").write_text(json.dumps(values))
    write_tokenizer(directory)
    return directory


def vision_config(model: LlavaForConditionalGeneration) -> dict[str, Any]:
    config = model.config.vision_config
    keys = ("model_type", *SMALL_VISION, "hidden_act", "layer_norm_eps")
    return {key: getattr(config, key) for key in keys if hasattr(config, key)}


def save_clip(
    model: LlavaForConditionalGeneration,
    directory: Path,
    *,
    kind: str = "clip",
    suffix: str = "bin",
    processor: bool = True,
    prefix: str = "vision_model.",
) -> Path:
    """Write the tower alone: as OpenAI's repositories, with a text model beside it, or as a CLIPVisionModel."""
    tensors = tensors_of(model, {"model.vision_tower.": prefix})
    config = vision_config(model)
    if kind == "clip":
        tensors |= {
            "logit_scale": torch.tensor(4.6),
            "text_model.embeddings.token_embedding.weight": torch.ones(7, 4),
            "text_model.embeddings.position_ids": torch.arange(5)[None],
            "text_projection.weight": torch.ones(4, 4),
            "visual_projection.weight": torch.ones(4, 4),
            f"{prefix}embeddings.position_ids": torch.arange(5)[None],
        }
        kind = config["model_type"].removesuffix("_vision_model")
        config = {"architectures": ["CLIPModel"], "model_type": kind, "vision_config": config, "text_config": {}}
    else:
        config["architectures"] = ["CLIPVisionModel"]
    write_tensors(tensors, directory, suffix)
    (directory / "config.json").write_text(json.dumps(config))
    size = model.config.vision_config.image_size
    if processor and "siglip" in config["model_type"]:
        write_siglip_processor(directory, size)
    elif processor:
        write_processor(directory, size)
    return directory


def into_cache(checkpoint: Path, home: Path, repository: str) -> Path:
    """Move a directory to where huggingface_hub would keep the repository of that name, under HF_HOME."""
    root = home / "hub" / ("models--" + repository.replace("/", "--"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots").mkdir()
    return Path(shutil.move(checkpoint, root / "snapshots" / commit))


def expand2square(image: Image.Image, mean: list[float]) -> Image.Image:
    """The picture in the middle of a square of the mean colour, as XTuner and the official code make it."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(v * 255) for v in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def reference_inputs(
    model: LlavaForConditionalGeneration, tokenizer: Path, question: str, image: Image.Image, pad: bool = True
) -> dict[str, torch.Tensor]:
    """What the official code and XTuner give the model for `llama3_chat`, with slots as transformers has them."""
    size = model.config.vision_config.image_size
    square = {"height": size, "width": size}
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square)
    if model.config.vision_config.model_type == "siglip_vision_model":
        processor = SiglipImageProcessorPil(size=square)
    shown = expand2square(image, processor.image_mean) if pad else image
    pixels = processor(shown, return_tensors="pt")["pixel_values"]
    before, after = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        f"\n{question}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    )
    encode = Tokenizer.from_file(str(tokenizer)).encode
    n_patches = (size // model.config.vision_config.patch_size) ** 2
    head, tail = (encode(text, add_special_tokens=False).ids for text in (before, after))
    ids = torch.tensor([[*head, *[UNUSED_ID] * n_patches, *tail]])
    return {"input_ids": ids, "pixel_values": pixels}


QUESTIONS = ("What do you see?", "  Two\n\nlines, 12345 and trailing space ")


def compare(
    model: LlavaForConditionalGeneration, files: Any, tokenizer: Path, image: Image.Image, pad: bool = True
) -> None:
    """Prompt tokens, image features and logits of a pair in F32 against transformers with the same weights."""
    with Llava.load(files.model, files.mmproj, kv_type="F32", n_threads=2) as llava, torch.no_grad():
        for question in QUESTIONS:
            inputs = reference_inputs(model, tokenizer, question, image, pad)
            ids = inputs["input_ids"][0].tolist()
            assert llava.prompt_tokens(question, 1) == [None if i == UNUSED_ID else i for i in ids]
            features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0].numpy()
            ours = llava.embed_images(image)[0]
            assert np.linalg.norm(ours - features) <= 1e-5 * np.linalg.norm(features)
            logits = model(**inputs).logits[0, -1].numpy()
            assert np.abs(llava.logits(question, image) - logits).max() <= 1e-3
