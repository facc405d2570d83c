"""The CLIP tower (https://arxiv.org/abs/2103.00020), with the defaults of transformers' CLIPVisionConfig."""

from __future__ import annotations

from collections.abc import Sequence

from local_llava.convert.config import Config
from local_llava.convert.families import Parts, Tower, vit

CLIP = vit.Kind("clip_vision_model", class_token=True, patch_size=32, eps=1e-5, activation="quick_gelu")


def tower(parts: Parts, n_embd: int) -> Tower:
    """What the mmproj holds; as `families.towers.read_tower`."""
    return vit.tower(parts, n_embd, CLIP)


def read_config(config: Config, feature_layers: Sequence[int]) -> vit.TowerShape:
    """Read vision_config; as `vit.read_config`."""
    return vit.read_config(config, feature_layers, CLIP)
