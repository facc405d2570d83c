"""The SigLIP tower (https://arxiv.org/abs/2303.15343), with the defaults of transformers' SiglipVisionConfig.

SigLIP 2 with a fixed resolution is the same. What pools its patches (`head.*`) and the LayerNorm after the last block
are not used by LLaVA, which takes hidden states.
"""

from __future__ import annotations

from local_llava.convert.families import Parts, Tower, vit

SIGLIP = vit.Kind("siglip_vision_model", class_token=False, patch_size=16, eps=1e-6, activation="gelu_pytorch_tanh")


def tower(parts: Parts, n_embd: int) -> Tower:
    """What the mmproj holds; as `families.towers.read_tower`."""
    return vit.tower(parts, n_embd, SIGLIP)
