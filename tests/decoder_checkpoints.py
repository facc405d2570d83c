"""Makes LLaVA checkpoints with random weights around every kind of decoder, and tells what a GGUF of them holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from llava_checkpoints import SMALL_TEXT, SMALL_VISION
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
)

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
}


def text_config(kind: str, **changes: Any) -> PretrainedConfig:
    """A small decoder's configuration."""
    # Phi3Config and its default padding, 32000, are not of this vocabulary.
    own = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} if kind == "phi3" else {}
    return CONFIGS[kind](**{**SMALL_TEXT, **own, **changes})


def random_llava(
    kind: str, seed: int = 0, tied: bool = False, image: int = 480, **changes: Any
) -> LlavaForConditionalGeneration:
    """A float32 model with random weights, norms and biases included, behind the smallest CLIP tower."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL_VISION),
        text_config=text_config(kind, tie_word_embeddings=tied, **changes),
        image_token_index=image,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
    )
    config.image_seq_length = (SMALL_VISION["image_size"] // SMALL_VISION["patch_size"]) ** 2
    torch.manual_seed(seed)
    model = randomize(LlavaForConditionalGeneration(config).eval())
    with torch.no_grad():
        model.lm_head.weight[image] = 0  # its logit is never the highest: transformers would look for one more picture
    return model


def randomize(model: Any) -> Any:
    """Give every parameter of a model random values of a size at which activations stay near 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2 and "class_embedding" not in name:
                p.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) / max(1, p[0].numel() if p.ndim > 1 else 1) ** 0.5)
    return model


def contents(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The metadata of a GGUF, and the shapes of its tensors in numpy's order."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
