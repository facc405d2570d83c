"""Directories that are often taken for a LLaVA: what each is, and what would be accepted in its place.

Knows them by their files and by config.json. Reads no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TOWER = re.compile(r"(CLIP|Siglip2?)(Vision)?Model(WithProjection)?")
_LANGUAGE = re.compile(r"(?!Llava|VipLlava)\w+(ForCausalLM|Model)")


def without_config(directory: Path) -> str:
    """What a directory without config.json is; empty where that is all one can say."""
    if (directory / "adapter_config.json").is_file():
        return (
            "it holds an adapter alone; accepted is the directory of an XTuner checkpoint, in which adapters lie in "
            "llm_adapter/ and visual_encoder_adapter/ beside projector/"
        )
    if any(directory.glob("*.gguf")):
        return "it holds GGUF files, which need no conversion"
    if (directory / "mm_projector.bin").is_file():
        return "it holds a projector alone; beside its config.json, which names the language model, it is accepted"
    if any(directory.glob("*/config.json")):
        return "a directory inside it may be one"
    return ""


def with_config(architecture: str, config: Mapping[str, Any]) -> str:
    """What a checkpoint of an unsupported architecture is; empty for an unknown one."""
    kind = config.get("model_type")
    if kind == "projector":
        return "XTuner's projector alone; the directory around it is accepted"
    if kind in ("clip", "siglip", "clip_vision_model", "siglip_vision_model") or _TOWER.fullmatch(architecture):
        return "a vision tower alone, without a projector and a language model; it is what --vision-tower takes"
    if "vision_config" not in config and _LANGUAGE.fullmatch(architecture):
        return "a language model without a vision tower and a projector"
    return ""
