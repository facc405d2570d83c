#!/usr/bin/env python3
"""What each mmproj type costs: size, and relative error (L2) of the image features against F32.

    python benchmarks/mmproj_types.py [--skip-large] [--threads N]

Two towers look at photographs that come with scikit-image: tiny-llava's, which is trained, and one of the shape of
LLaVA's CLIP ViT-L/14 at 336 pixels with the random weights that transformers gives a CLIP before it is trained, and a
projector to 4096. Trained weights of that size are not at hand without a network: between the two rows lies what they
can be expected to do. The large tower takes 4 GB of disk and of memory, and some minutes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import machine
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from local_llava.convert import convert, quantize_gguf
from local_llava.convert.mixes import MMPROJ_MIXES
from local_llava.gguf_file import TYPES, GGUFFile
from local_llava.images import preprocess
from local_llava.vision import VisionTower

TINY = Path(__file__).parent.parent / "models" / "tiny-llava"
PHOTOGRAPHS = (data.astronaut, data.chelsea, data.coffee, data.rocket)


def large_checkpoint(directory: Path) -> Path:
    """CLIP-L/14-336 and a projector to 4096, and a language model as small as that allows."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=640, hidden_size=4096, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=1
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=480)
    LlavaForConditionalGeneration(config).to(torch.float16).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / file, directory / file)
    return directory


def features(mmproj: Path, threads: int | None) -> tuple[NDArray[np.float32], float]:
    """float32 [n_photographs, n_tokens, n_embd], and seconds a picture."""
    with VisionTower.load(mmproj, n_threads=threads, use_gpu=False) as tower:
        pixels = preprocess([Image.fromarray(photograph()) for photograph in PHOTOGRAPHS], tower.preprocessing)
        started = time.perf_counter()
        encoded = tower.encode(pixels)
    return encoded, (time.perf_counter() - started) / len(PHOTOGRAPHS)


def report(name: str, checkpoint: Path, directory: Path, threads: int | None) -> None:
    pair = convert(checkpoint, directory, quant="Q8_0", mmproj_quant="F32")
    print(f"\n{name}\n{'':6} {'MB':>7} {'s/picture':>10}  error of the features, mean and worst of the pictures")
    exact, _ = features(pair.mmproj, threads)
    for quant in MMPROJ_MIXES:
        mmproj = pair.mmproj if quant == "F32" else quantize_gguf(pair.mmproj, directory / f"{quant}.gguf", quant)
        encoded, seconds = features(mmproj, threads)
        errors = [relative_error(a, b) for a, b in zip(encoded, exact, strict=True)]
        size = mmproj.stat().st_size / 1e6
        print(f"{quant:6} {size:7.1f} {seconds:10.3f}  {np.mean(errors):.1e} {max(errors):.1e}  {other_types(mmproj)}")
        if quant != "F32":
            mmproj.unlink()


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(actual.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64)))


def other_types(mmproj: Path) -> str:
    """How many matrices have which type: where the blocks do not divide the rows, it is another than asked for."""
    types = [TYPES[t.type].name for t in GGUFFile.open(mmproj).tensors.values() if len(t.shape) == 2]
    return ", ".join(f"{types.count(name)} {name}" for name in dict.fromkeys(types))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-large", action="store_true", help="tiny-llava's tower only")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    args = parser.parse_args(arguments)
    print(machine.describe())
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        report("tiny-llava, trained", TINY, directory / "tiny", args.threads)
        if not args.skip_large:
            checkpoint = large_checkpoint(directory / "large")
            report("CLIP-L/14-336, random weights", checkpoint, directory / "large-gguf", args.threads)


if __name__ == "__main__":
    main()
