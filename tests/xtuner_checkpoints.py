"""Writes models in XTuner's layout, adapters included: an own small writer, by the name table of the format.

An adapter is made of random matrices, and the model that is compared with gets their product added to its weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from official_checkpoints import LANGUAGE, save_clip, tensors_of, text_config, write_tensors, write_tokenizer
from transformers import LlavaForConditionalGeneration

PROJECTOR = {
    "model.multi_modal_projector.linear_1.": "model.0.",
    "model.multi_modal_projector.linear_2.": "model.2.",
}
SETTINGS = """# Copyright (c) OpenMMLab. All rights reserved.
from xtuner.model import LLaVAModel

raise SystemExit("settings are not to be run")
# visual_select_layer = -1
llm_name_or_path = 'x/llm'
visual_encoder_name_or_path = 'someone/the-tower'
model = dict(
    type=LLaVAModel,
    visual_select_layer={layer},
    freeze_llm={llm_frozen},
    freeze_visual_encoder={tower_frozen},
)
# freeze_visual_encoder=True
{more}
"""


def save_projector(model: LlavaForConditionalGeneration, directory: Path, suffix: str = "safetensors") -> Path:
    """`projector/` of a checkpoint."""
    write_tensors(tensors_of(model, PROJECTOR), directory / "projector", suffix)
    config = {
        "architectures": ["ProjectorModel"],
        "auto_map": {"AutoConfig": "configuration_projector.ProjectorConfig"},
        "bias": True,
        "depth": 2,
        "hidden_act": "gelu",
        "llm_hidden_size": model.config.text_config.hidden_size,
        "model_type": "projector",
        "torch_dtype": "float32",
        "visual_hidden_size": model.config.vision_config.hidden_size,
    }
    (directory / "projector" / "config.json").write_text(json.dumps(config))
    return directory


def save_llm(
    model: LlavaForConditionalGeneration, directory: Path, suffix: str = "safetensors", shards: int = 1
) -> Path:
    """The language model alone, with its tokenizer: the root of a checkpoint, or a base for an adapter."""
    write_tensors(tensors_of(model, LANGUAGE), directory, suffix, shards)
    (directory / "config.json").write_text(json.dumps(text_config(model, "LlamaForCausalLM", "llama")))
    write_tokenizer(directory)
    return directory


def save_encoder(model: LlavaForConditionalGeneration, directory: Path, suffix: str = "safetensors") -> Path:
    """`visual_encoder/` of a checkpoint."""
    return save_clip(model, directory / "visual_encoder", kind="clip_vision_model", suffix=suffix).parent


def save_settings(
    directory: Path, llm_frozen: bool = False, tower_frozen: bool = False, layer: object = -2, more: str = ""
) -> None:
    """The training's settings, as `pth_to_hf` leaves them beside the rest."""
    settings = SETTINGS.format(llm_frozen=llm_frozen, tower_frozen=tower_frozen, layer=layer, more=more)
    (directory / "xtuner_config.py").write_text(settings)


def save_adapter(
    model: LlavaForConditionalGeneration,
    prefixes: dict[str, str],
    directory: Path,
    base: str | None,
    rank: int = 8,
    alpha: int = 4,
    suffix: str = "safetensors",
) -> None:
    """Write an adapter of all linear layers in blocks, and add it to the model.

    Args:
        model: Its weights are changed.
        prefixes: Of the part in memory -> in the part's own checkpoint.
        directory: Of the adapter.
        base: What it calls the model that it belongs to.
        rank: Of the matrices.
        alpha: They count `alpha / rank`.
        suffix: Of the weight file.
    """
    generator = torch.Generator().manual_seed(rank)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None or not isinstance(module, torch.nn.Linear) or ".layers." not in name:
            continue
        a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
        b = torch.randn(module.out_features, rank, generator=generator) / rank**0.5
        own = "base_model.model." + prefixes[prefix] + name.removeprefix(prefix)
        tensors |= {f"{own}.lora_A.weight": a, f"{own}.lora_B.weight": b}
        with torch.no_grad():
            module.weight += alpha / rank * (b @ a)
    assert tensors
    directory.mkdir(parents=True)
    if suffix == "bin":
        torch.save(tensors, directory / "adapter_model.bin")
    else:
        write_tensors(tensors, directory)
        (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    config: dict[str, Any] = {
        "auto_mapping": {"base_model_class": "CLIPVisionModel"},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "task_type": None,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


TOWER = {"model.vision_tower.": "vision_model."}
