"""Makes LLaVA checkpoints with random weights through transformers, in every layout that its releases have written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

TINY = Path(__file__).parent.parent / "models" / "tiny-llava"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

LAYOUTS = {
    # prefix in the names of transformers 5 -> prefix in the layout; the longest match counts
    "5": {},
    "4.51": {"vision_tower.": "vision_tower.vision_model."},
    "4.52": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}

SMALL_TEXT: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
SMALL_VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 48,
}


def random_model(
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    layer: int = -2,
    seed: int = 0,
    **top: Any,
) -> LlavaForConditionalGeneration:
    """A float32 model with random weights and biases; norms too, so that a mistake in any of them shows."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**SMALL_VISION, **(vision or {})}),
        text_config=LlamaConfig(**{**SMALL_TEXT, **(text or {})}),
        image_token_index=480,
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",
        **top,
    )
    config.image_seq_length = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2 and "class_embedding" not in name:
                centre = 1.0 if name.endswith("weight") else 0.0
                p.copy_(centre + 0.2 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) / max(1, p[0].numel() if p.ndim > 1 else 1) ** 0.5)
    return model


def rename(name: str, layout: str) -> str:
    prefixes = LAYOUTS[layout]
    prefix = max((p for p in prefixes if name.startswith(p)), key=len, default="")
    return prefixes.get(prefix, "") + name[len(prefix) :]


def save(
    model: LlavaForConditionalGeneration,
    directory: Path,
    layout: str = "5",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a checkpoint with tiny-llava's tokenizer."""
    directory.mkdir(parents=True)
    plain = directory / "plain"
    model.save_pretrained(plain)
    from safetensors.torch import load_file

    saved = load_file(plain / "model.safetensors")
    tensors = {rename(name, layout): t.to(dtype).contiguous() for name, t in saved.items()}
    names = list(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        weight_map = {name: files[i * shards // len(names)] for i, name in enumerate(names)}
        for file in files:
            save_file({n: tensors[n] for n in names if weight_map[n] == file}, directory / file)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.move(plain / "config.json", directory / "config.json")
    shutil.rmtree(plain)
    for file in TOKENIZER_FILES:
        shutil.copy(TINY / file, directory / file)
    write_processor(directory, model.config.vision_config.image_size)
    return directory


def write_processor(directory: Path, size: int) -> None:
    """preprocessor_config.json as XTuner's exports have it."""
    config = {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": size},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(config))


def edit_json(path: Path, **changes: Any) -> None:
    """Set entries of a JSON file; a dotted key reaches inside, and None removes."""
    config = json.loads(path.read_text())
    for key, value in changes.items():
        *outer, last = key.split("__")
        inner = config
        for name in outer:
            inner = inner[name]
        if value is None:
            inner.pop(last, None)
        else:
            inner[last] = value
    path.write_text(json.dumps(config))
