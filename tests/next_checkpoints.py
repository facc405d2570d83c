"""Makes LLaVA-NeXT checkpoints with random weights through transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llava_checkpoints
import torch
from llava_checkpoints import SMALL_TEXT, SMALL_VISION
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

Grid = Sequence[tuple[int, int]]

LONG_TEXT = {**SMALL_TEXT, "max_position_embeddings": 4096}


def random_next_model(
    grid: Grid, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, seed: int = 0, **top: Any
) -> LlavaNextForConditionalGeneration:
    """A float32 model with random weights and biases, as of `llava_checkpoints.random_model`."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**{**SMALL_VISION, **(vision or {})}),
        text_config=LlamaConfig(**{**LONG_TEXT, **(text or {})}),
        image_token_index=480,
        image_grid_pinpoints=[list(size) for size in grid],
        **{"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **top},
    )
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2 and not name.endswith(("class_embedding", "image_newline")):
                centre = 1.0 if name.endswith("weight") else 0.0
                p.copy_(centre + 0.2 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) / max(1, p[0].numel() if p.ndim > 1 else 1) ** 0.5)
    return model


def save_next(
    model: LlavaNextForConditionalGeneration, directory: Path, processor: dict[str, Any] | None = None, **how: Any
) -> Path:
    """Write a checkpoint with tiny-llava's tokenizer.

    Args:
        model: As of `random_next_model`.
        directory: Where to; must not be there.
        processor: Entries of preprocessor_config.json besides those of llava-hf's repositories.
        **how: As of `llava_checkpoints.save`.
    """
    llava_checkpoints.save(model, directory, **how)
    vision = model.config.vision_config
    path = directory / "preprocessor_config.json"
    config = json.loads(path.read_text())
    config |= {
        "aspect_ratio_setting": "anyres",
        "do_pad": True,
        "image_grid_pinpoints": model.config.image_grid_pinpoints,
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
        **(processor or {}),
    }
    path.write_text(json.dumps(config))
    config = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": vision.patch_size,
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
    }
    (directory / "processor_config.json").write_text(json.dumps(config))
    return directory
