"""Writes mmproj files from transformers' own modules, apart from the converter, and computes what they should give."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    VipLlavaConfig,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


@dataclass
class Reference:
    """A random tower and projector in transformers, float32."""

    image_size: int = 28
    patch_size: int = 14
    n_embd: int = 64
    n_ff: int = 128
    n_head: int = 4
    n_blocks: int = 4
    n_out: int = 96
    act: str = "quick_gelu"
    """As transformers calls it."""
    eps: float = 1e-5
    feature_layer: int | list[int] = -2
    seed: int = 0
    siglip: bool = False
    strategy: str = "default"
    norm_eps: float | None = None
    """Of ViP-LLaVA's norm before the projector."""
    own_keys: bool = False
    """Whether the metadata have what llama.cpp has no keys for, as our converter writes them."""
    model: CLIPVisionModel | SiglipVisionModel = field(init=False)
    projector: LlavaMultiModalProjector | VipLlavaMultiModalProjector = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        sizes: dict[str, Any] = {
            "hidden_size": self.n_embd,
            "intermediate_size": self.n_ff,
            "num_hidden_layers": self.n_blocks,
            "num_attention_heads": self.n_head,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_act": self.act,
            "layer_norm_eps": self.eps,
        }
        config = SiglipVisionConfig(**sizes, vision_use_head=False) if self.siglip else CLIPVisionConfig(**sizes)
        config._attn_implementation = "eager"
        self.model = (SiglipVisionModel if self.siglip else CLIPVisionModel)(config).eval()
        common = {
            "vision_config": config,
            "text_config": {"model_type": "llama", "hidden_size": self.n_out},
            "vision_feature_layer": self.feature_layer,
        }
        if self.norm_eps is None:
            self.projector = LlavaMultiModalProjector(LlavaConfig(**common)).eval()
        else:
            vip = VipLlavaConfig(**common, projector_layernorm_eps=self.norm_eps)
            self.projector = VipLlavaMultiModalProjector(vip).eval()
        with torch.no_grad():
            for module in (self.model, self.projector):
                for name, p in module.named_parameters():
                    if p.ndim == 1 or "position" in name:  # norms and biases too, so that a mix-up shows
                        p.copy_(torch.randn_like(p) * 0.3 + ("norm" in name or "layrnorm" in name) * ("weight" in name))
                    else:
                        p.copy_(torch.randn_like(p) * (1.5 / p[0].numel() ** 0.5))

    def pixels(self, n: int = 2, seed: int = 1) -> NDArray[np.float32]:
        shape = (n, 3, self.image_size, self.image_size)
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    def features(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """As LlavaModel.get_image_features does."""
        layers = [self.feature_layer] if isinstance(self.feature_layer, int) else self.feature_layer
        with torch.no_grad():
            hidden = self.model(torch.from_numpy(pixels), output_hidden_states=True).hidden_states
            first = int(self.strategy == "default")
            chosen = torch.cat([hidden[layer][:, first:] for layer in layers], dim=-1)
            out: NDArray[np.float32] = self.projector(chosen).numpy()
        return out

    def round_weights(self, dtype: torch.dtype) -> None:
        """Round all matrices to a type, as a file of that type holds them."""
        with torch.no_grad():
            for module in (self.model, self.projector):
                for p in module.parameters():
                    if p.ndim > 1:
                        p.copy_(p.to(dtype).float())

    def non_negative_layers(self) -> list[int]:
        layers = [self.feature_layer] if isinstance(self.feature_layer, int) else self.feature_layer
        return [layer if layer >= 0 else self.n_blocks + 1 + layer for layer in layers]

    def metadata(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            "local_llava.vision.activation": {"gelu_pytorch_tanh": "gelu_tanh"}.get(self.act, self.act),
            "local_llava.vision.feature_select": self.strategy,
        }
        if self.norm_eps is not None:
            own["local_llava.projector.layer_norm_epsilon"] = self.norm_eps
        return {
            **(own if self.own_keys else {}),
            "general.architecture": "clip",
            "clip.has_vision_encoder": True,
            "clip.has_llava_projector": True,
            "clip.projector_type": "mlp",
            "clip.use_gelu": self.act != "quick_gelu",
            "clip.vision.image_size": self.image_size,
            "clip.vision.patch_size": self.patch_size,
            "clip.vision.embedding_length": self.n_embd,
            "clip.vision.feed_forward_length": self.n_ff,
            "clip.vision.projection_dim": self.n_out,
            "clip.vision.block_count": self.n_blocks,
            "clip.vision.feature_layer": self.non_negative_layers(),
            "clip.vision.attention.head_count": self.n_head,
            "clip.vision.attention.layer_norm_epsilon": self.eps,
            "clip.vision.image_mean": [0.5, 0.5, 0.5],
            "clip.vision.image_std": [0.25, 0.25, 0.25],
        }

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        tensors = {}
        for module in (self.model, self.projector):
            for name, p in module.named_parameters():
                tensors[gguf_name(name)] = p.detach().numpy().copy()
        return tensors


def gguf_name(name: str) -> str:
    name = name.removeprefix("vision_model.")
    module, _, kind = name.rpartition(".")
    if name == "embeddings.class_embedding":
        return "v.class_embd"
    if module.startswith("encoder.layers."):
        _, _, index, rest = module.split(".", 3)
        return f"v.blk.{index}.{BLOCK[rest]}.{kind}"
    short = {
        "embeddings.patch_embedding": "v.patch_embd",
        "embeddings.position_embedding": "v.position_embd",
        "pre_layrnorm": "v.pre_ln",
        "post_layernorm": "v.post_ln",
        "projector_layernorm": "mm.input_norm",
        "linear_1": "mm.0",
        "linear_2": "mm.2",
    }[module]
    return f"{short}.{kind}"


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, NDArray[np.float32]],
    matrix_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Linear layers get `matrix_type`, other matrices F16 where that is smaller than F32, vectors stay F32."""
    writer = gguf.GGUFWriter(path, metadata.get("general.architecture", "clip"))
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, data in tensors.items():
        small = data.ndim == 1 or data.dtype != np.float32
        if small or matrix_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, data)
        elif data.ndim == 4:
            writer.add_tensor(name, data.astype(np.float16))
        else:
            packed = gguf.quants.quantize(data, matrix_type)
            writer.add_tensor(name, packed, raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Relative L2."""
    difference = actual.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))
