#!/usr/bin/env python3
"""Pairs of full size with random weights, in a minute: what benchmarks of the engine run on.

    python benchmarks/shapes.py 8b|1b|tiny DIRECTORY

8b has the shape of llava-llama-3-8b-v1_1 (Q4_K_M, 5.6 GB), 1b that of Llama 3.2 1B with the same tower, CLIP-L/14-336
in F16, in front of it (1.4 GB). tiny has two layers of each: to try a benchmark, not to measure. Metadata, vocabulary
and the type of every tensor are those that `local_llava.convert` gives such a checkpoint; the weights are one block of
normal noise a type, quantized by ggml and repeated. The output has zeros for every special token, so that a greedy
answer never ends before it is as long as was asked for.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import full_size
import machine
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from local_llava.convert.chunks import padded_size
from local_llava.convert.conversion import prepare
from local_llava.convert.plan import GGUFPlan, TensorPlan
from local_llava.convert.quantize import encode_rows
from local_llava.convert.write import header
from local_llava.types import ModelFiles

N_BLOCKS = 131071
"""Blocks of 256 noisy values. More than there are tokens, and a prime, so that no two tokens get the same row."""

FIRST_SPECIAL = 128000
"""Of Llama 3's vocabulary."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a language model."""

    name: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_kv: int
    """Width of the keys: heads of them times their size."""
    tied: bool
    """Whether the embeddings are also the output."""
    n_tower: int = 24
    """Layers of the tower."""


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("8b", n_layer=32, n_embd=4096, n_ff=14336, n_kv=1024, tied=False),
        Shape("1b", n_layer=16, n_embd=2048, n_ff=8192, n_kv=512, tied=True),
        Shape("tiny", n_layer=2, n_embd=512, n_ff=1024, n_kv=256, tied=True, n_tower=2),
    )
}


@dataclass(frozen=True)
class Unread:
    """A tensor of a checkpoint that has a header and no weights. A `SourceTensor`."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "F16"

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """What the digest that both files carry is made of."""
        return np.full((stop - start, self.shape[-1]), 0.5, np.float32)


class Noise:
    """Normal random numbers in the bytes of any type, one block of them a type."""

    def __init__(self, scale: float = 0.02) -> None:
        self._values = np.random.default_rng(0).standard_normal((N_BLOCKS, 256), np.float32) * np.float32(scale)
        self._blocks: dict[GGMLQuantizationType, bytes] = {}

    def chunks(self, type: GGMLQuantizationType, start: int, size: int) -> Iterator[memoryview]:
        """Bytes `start` to `start + size` of the noise, which repeats for ever."""
        if type not in self._blocks:
            self._blocks[type] = encode_rows(type, self._values).tobytes()
        block = memoryview(self._blocks[type])
        while size:
            start %= len(block)
            part = block[start : start + size]
            yield part
            start, size = start + len(part), size - len(part)


def pair(name: str, directory: Path) -> ModelFiles:
    """The pair of a shape; written to the directory unless it is there."""
    shape = SHAPES[name]
    source = directory / f"llava-{name}-random"
    if not (source / "config.json").is_file():
        source.mkdir(parents=True, exist_ok=True)
        full_size.write_tokenizer(source)
        processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "crop_size": 336}
        (source / "preprocessor_config.json").write_text(json.dumps(processor))
        (source / "config.json").write_text(json.dumps(_config(shape)))
    tensors = full_size.shapes(shape.n_layer, shape.n_embd, shape.n_ff, shape.n_kv, shape.tied, shape.n_tower)
    unread = {name: Unread(name, dims) for name, dims in tensors.items()}
    plan = prepare(source, directory, read_weights=lambda _: unread)
    sizes = [path.stat().st_size for path in (plan.files.model, plan.files.mmproj) if path.is_file()]
    if sizes != list(plan.sizes):
        noise = Noise()
        _write(plan.model, plan.files.model, noise, "token_embd.weight" if shape.tied else "output.weight")
        _write(plan.mmproj, plan.files.mmproj, noise, None)
    return plan.files


def _config(shape: Shape) -> dict[str, Any]:
    text: Mapping[str, Any] = full_size.CONFIG["text_config"] | {
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff,
        "num_attention_heads": 32 if shape.n_embd > 1024 else 16,
        "num_hidden_layers": shape.n_layer,
    }
    vision: Mapping[str, Any] = full_size.CONFIG["vision_config"] | {"num_hidden_layers": shape.n_tower}
    return full_size.CONFIG | {"text_config": text, "vision_config": vision, "tie_word_embeddings": shape.tied}


def _write(plan: GGUFPlan, path: Path, noise: Noise, output: str | None) -> None:
    with path.open("wb") as file:
        file.write(header(plan))
        for index, tensor in enumerate(plan.tensors):
            block_length, block_size = GGML_QUANT_SIZES[tensor.type]
            row_size = tensor.row_length // block_length * block_size
            size = tensor.n_rows * row_size
            if _is_norm(tensor):
                file.write(np.ones(tensor.row_length, np.float32).tobytes())
            else:
                noisy = FIRST_SPECIAL * row_size if tensor.name == output else size
                # Each begins elsewhere, at a block's beginning, and at a multiple of what any type packs.
                start = 256 * (index * 7919 % N_BLOCKS) // block_length * block_size
                for chunk in noise.chunks(tensor.type, start, noisy):
                    file.write(chunk)
                file.write(bytes(size - noisy))
            file.write(bytes(padded_size(tensor) - size))


def _is_norm(tensor: TensorPlan) -> bool:
    stem = tensor.name.removesuffix(".weight")
    return stem != tensor.name and stem.endswith(("norm", "ln", "ln1", "ln2", "layernorm"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path, help="where the pair may be written")
    args = parser.parse_args()
    print(machine.describe())
    started = time.perf_counter()
    files = pair(args.shape, args.directory)
    print(f"{files.model}\n{files.mmproj}")
    print(f"{sum(files.sizes) / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
