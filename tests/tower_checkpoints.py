"""Makes checkpoints with towers and projectors other than LLaVA 1.5's, with random weights, through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from llava_checkpoints import SMALL_TEXT, SMALL_VISION, save
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

KINDS: dict[str, Any] = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "vip": (VipLlavaConfig, VipLlavaForConditionalGeneration),
}


def random_tower_model(
    kind: str = "siglip",
    layers: int | list[int] = -1,
    strategy: str = "full",
    family: str = "llava",
    seed: int = 0,
    vision: dict[str, Any] | None = None,
    **top: Any,
) -> Any:
    """A float32 model whose weights, biases and norms are all random, so that a mistake in any of them shows.

    Args:
        kind: Of the tower: "clip" or "siglip".
        layers: `vision_feature_layer`.
        strategy: `vision_feature_select_strategy`; ViP-LLaVA has none.
        family: "llava", "next" or "vip".
        seed: Of the weights.
        vision: Entries of vision_config.
        top: Entries of the top level.
    """
    small = {key: value for key, value in SMALL_VISION.items() if kind == "clip" or key != "projection_dim"}
    if kind == "siglip":
        small["vision_use_head"] = False
    if family != "vip":
        top["vision_feature_select_strategy"] = strategy
    make_config, make_model = FAMILIES[family]
    config = make_config(
        vision_config=KINDS[kind](**{**small, **(vision or {})}),
        text_config=LlamaConfig(**{**SMALL_TEXT, "max_position_embeddings": 2048}),
        image_token_index=480,
        vision_feature_layer=layers,
        **top,
    )
    torch.manual_seed(seed)
    model = make_model(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2 and not name.endswith(("class_embedding", "image_newline")):
                p.copy_(float(name.endswith("weight")) + 0.2 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) / max(1, p[0].numel() if p.ndim > 1 else 1) ** 0.5)
    return model


def save_tower_model(model: Any, directory: Path, layout: str = "5") -> Path:
    """Write a checkpoint with tiny-llava's tokenizer, and the image processor that belongs to the tower."""
    save(model, directory, layout)
    vision = model.config.vision_config
    grid = getattr(model.config, "image_grid_pinpoints", None)
    tiles: dict[str, Any] = {}
    if grid:
        crop = {"height": vision.image_size, "width": vision.image_size}
        tiles = {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": grid, "crop_size": crop}
    if vision.model_type == "siglip_vision_model":
        write_siglip_processor(directory, vision.image_size, **tiles)
    class_token = vision.model_type == "clip_vision_model"
    # AutoProcessor wants to know of what sort the processor is, and how many tokens a picture takes.
    processor = {
        "processor_class": "LlavaNextProcessor" if grid else "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(class_token),
        "vision_feature_select_strategy": getattr(model.config, "vision_feature_select_strategy", "default"),
    }
    (directory / "processor_config.json").write_text(json.dumps(processor))
    return directory


def write_siglip_processor(directory: Path, image_size: int, **changes: Any) -> None:
    """preprocessor_config.json as that of llava-hf/llava-interleave-qwen-0.5b-hf."""
    config = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": image_size, "width": image_size},
        **changes,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(config))
