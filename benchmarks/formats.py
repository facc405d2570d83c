#!/usr/bin/env python3
"""Convert full-size checkpoints that are not in transformers format, beside the way that existed before.

    python benchmarks/formats.py /big/disk [--only bin|lora] [--keep] [--layers N]

Two checkpoints of the 8B model's shape, random float16, Llama 3's tokenizer (npm):

- bin: the official LLaVA layout in PyTorch shards, with CLIP beside it. The peer: `llava_surgery.py`,
  `convert_image_encoder_to_gguf.py`, `convert_hf_to_gguf.py` to F16 and `llama-quantize`.
- lora: XTuner's layout with a LoRA of the language model (r 512) and one of the tower (r 64), on a base of each. The
  peer: `peft`'s merge of both, saved, and the same scripts.

Both end with Q4_K_M and an F16 mmproj. Prints seconds, CPU seconds, peak resident memory, temporary bytes, the ratio.
The scripts are those of the llama.cpp that the pinned llama-cpp-python carries. About 60 GB of disk are needed; the
peer of `lora` also needs the memory for a whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import full_size
import machine
import numpy as np
import peers
from full_size import Run, local_llava, run

if TYPE_CHECKING:
    import torch

CLIP = "openai/clip-vit-large-patch14-336"

CLIP_CONFIG: dict[str, Any] = {
    **full_size.CONFIG["vision_config"],
    "architectures": ["CLIPVisionModel"],
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LLAMA_CONFIG: dict[str, Any] = {
    **full_size.CONFIG["text_config"],
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "torch_dtype": "float16",
    "vocab_size": 128256,
}
LORA_TEXT = {
    "r": 512,
    "lora_alpha": 256,
    "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
LORA_TOWER = {"r": 64, "lora_alpha": 16, "targets": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")}


def own_shapes(n_layer: int, part: str) -> dict[str, tuple[int, ...]]:
    """Tensors of a part by the names of its own checkpoint: LlamaForCausalLM, CLIPVisionModel, or the projector."""
    prefix = {"text": "language_model.", "vision": "vision_tower.", "projector": "multi_modal_projector."}[part]
    found = {k.removeprefix(prefix): v for k, v in full_size.shapes(n_layer).items() if k.startswith(prefix)}
    vocab = LLAMA_CONFIG["vocab_size"]
    return {k: (vocab, *v[1:]) if part == "text" and v[0] == 128320 else v for k, v in found.items()}


class Noise:
    """Random float16 tensors, made from one block of random numbers."""

    def __init__(self) -> None:
        import torch

        self._rng = np.random.default_rng(0)
        self._block = torch.from_numpy((self._rng.standard_normal(1 << 24, np.float32) * 0.02).astype(np.float16))

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        if "norm" in name and name.endswith("weight"):
            return torch.ones(shape, dtype=torch.float16)
        n = int(np.prod(shape))
        start = int(self._rng.integers(0, 1 << 23))
        return self._block[start:].repeat(-(-n // (1 << 23)))[:n].reshape(shape).clone()


def save_shards(directory: Path, shapes: dict[str, tuple[int, ...]], noise: Noise, suffix: str, n: int = 4) -> None:
    """Shards with an index, one in memory at a time; `.bin` through torch.save, which is what made the real ones."""
    import torch
    from safetensors.torch import save_file

    names = list(shapes)
    stem, index = ("model", "model.safetensors.index.json")
    if suffix == "bin":
        stem, index = "pytorch_model", "pytorch_model.bin.index.json"
    weight_map = {}
    for i in range(n):
        own = names[i * len(names) // n : (i + 1) * len(names) // n]
        file = f"{stem}-{i + 1:05d}-of-{n:05d}.{suffix}"
        tensors = {name: noise.tensor(name, shapes[name]) for name in own}
        if suffix == "bin":
            torch.save(tensors, directory / file)
        else:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_config(directory: Path, **values: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))


def make_clip(directory: Path, noise: Noise) -> Path:
    """A CLIP tower as OpenAI's repository has it: one pytorch_model.bin."""
    import torch

    write_config(directory, **CLIP_CONFIG)
    tensors = {name: noise.tensor(name, shape) for name, shape in own_shapes(0, "vision").items()}
    torch.save(tensors, directory / "pytorch_model.bin")
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "crop_size": 336}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


def make_llama(directory: Path, noise: Noise, n_layer: int, extra: dict[str, tuple[int, ...]], suffix: str) -> Path:
    """A language model's checkpoint, with other tensors beside its own."""
    write_config(directory, **LLAMA_CONFIG, num_hidden_layers=n_layer)
    full_size.write_tokenizer(directory, image=False)
    save_shards(directory, own_shapes(n_layer, "text") | extra, noise, suffix)
    return directory


def make_bin(directory: Path, n_layer: int) -> Path:
    """The official layout: the projector among the decoder's tensors, CLIP in a directory beside it."""
    noise, source = Noise(), directory / "llava"
    make_clip(directory / CLIP.rpartition("/")[2], noise)
    projector = {
        name.replace("linear_1", "model.mm_projector.0").replace("linear_2", "model.mm_projector.2"): shape
        for name, shape in own_shapes(0, "projector").items()
    }
    make_llama(source, noise, n_layer, projector, "bin")
    write_config(
        source,
        **LLAMA_CONFIG
        | {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            "num_hidden_layers": n_layer,
            "image_aspect_ratio": "pad",
            "mm_hidden_size": 1024,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_vision_tower": CLIP,
        },
    )
    return source


def save_adapter(
    directory: Path, base: Path, shapes: dict[str, tuple[int, ...]], lora: dict[str, Any], noise: Noise
) -> None:
    """A LoRA in PEFT's format for all linear layers of the named kinds."""
    from safetensors.torch import save_file

    tensors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in lora["targets"] and name.endswith(".weight"):
            path = f"base_model.model.{module}"
            tensors[f"{path}.lora_A.weight"] = noise.tensor(name, (lora["r"], shape[1]))
            tensors[f"{path}.lora_B.weight"] = noise.tensor(name, (shape[0], lora["r"]))
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": lora["lora_alpha"],
        "lora_dropout": 0.05,
        "peft_type": "LORA",
        "r": lora["r"],
        "target_modules": list(lora["targets"]),
        "task_type": None,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def make_lora(directory: Path, n_layer: int) -> Path:
    """XTuner's layout with two adapters, and the two models that they belong to."""
    from safetensors.torch import save_file

    noise, source = Noise(), directory / "llava"
    clip, llama = directory / CLIP.rpartition("/")[2], directory / "Meta-Llama-3-8B-Instruct"
    make_clip(clip, noise)
    make_llama(llama, noise, n_layer, {}, "safetensors")
    save_adapter(source / "llm_adapter", llama, own_shapes(n_layer, "text"), LORA_TEXT, noise)
    save_adapter(source / "visual_encoder_adapter", clip, own_shapes(0, "vision"), LORA_TOWER, noise)
    config = {"model_type": "projector", "visual_hidden_size": 1024, "llm_hidden_size": 4096, "depth": 2}
    write_config(source / "projector", **config, hidden_act="gelu", bias=True)
    projector = {
        name.replace("linear_1", "model.0").replace("linear_2", "model.2"): noise.tensor(name, shape)
        for name, shape in own_shapes(0, "projector").items()
    }
    save_file(projector, source / "projector" / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").touch()  # 0 bytes, as in XTuner's first repositories
    return source


MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, CLIPVisionModel
kind, base, adapter, out = sys.argv[1:]
cls = AutoModelForCausalLM if kind == "llm" else CLIPVisionModel
model = cls.from_pretrained(base, dtype=torch.float16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


PROJECTOR = """
import sys, torch
from safetensors.torch import load_file
tensors = load_file(sys.argv[1])
torch.save({k.replace("model.", "model.mm_projector."): v for k, v in tensors.items()}, sys.argv[2])
"""


def legacy(llm: Path, clip: Path, projector: Path, work: Path) -> Iterator[list[object]]:
    """The commands that make the pair of a decoder, a tower and a projector in llava_surgery's format."""
    encoder = peers.legacy_script("convert_image_encoder_to_gguf.py")
    yield [*encoder, "-m", clip, "--llava-projector", projector, "--output-dir", work, "--clip-model-is-vision"]
    f16 = work / "f16.gguf"
    yield [*peers.converter(), llm, "--outtype", "f16", "--outfile", f16]
    yield [peers.build("llama-quantize"), f16, work / "q4_k_m.gguf", "Q4_K_M", os.cpu_count() or 1]


def peer_bin(source: Path, work: Path) -> Iterator[list[object]]:
    """`llava_surgery.py` takes the projector out of the last shard, which it writes anew."""
    yield [*peers.legacy_script("llava_surgery.py"), "-m", source]
    write_config(
        source, **LLAMA_CONFIG, num_hidden_layers=json.loads((source / "config.json").read_text())["num_hidden_layers"]
    )
    yield from legacy(source, source.parent / CLIP.rpartition("/")[2], source / "llava.projector", work)


def peer_lora(source: Path, work: Path) -> Iterator[list[object]]:
    clip, llm = source.parent / CLIP.rpartition("/")[2], source.parent / "Meta-Llama-3-8B-Instruct"
    merged = work / "llm", work / "clip"
    yield [sys.executable, "-c", MERGE, "llm", llm, source / "llm_adapter", merged[0]]
    yield [sys.executable, "-c", MERGE, "clip", clip, source / "visual_encoder_adapter", merged[1]]
    full_size.write_tokenizer(merged[0], image=False)
    shutil.copy(clip / "preprocessor_config.json", merged[1])
    yield [sys.executable, "-c", PROJECTOR, source / "projector" / "model.safetensors", work / "llava.projector"]
    yield from legacy(merged[0], merged[1], work / "llava.projector", work)


def measure(name: str, commands: Iterable[list[object]]) -> list[Run]:
    done = []
    for command in commands:
        part = run(*command)
        shown = ["(script)" if "import" in str(word) else str(word) for word in command]
        print(f"{name}: {' '.join(shown)}")
        print(f"    {part.seconds:.0f} s ({part.cpu_s:.0f} s of CPU), peak RSS {part.peak:.3f} GB", flush=True)
        done.append(part)
    return done


def compare(kind: str, directory: Path, n_layer: int, keep: bool) -> None:
    """One row of the table."""
    root = directory / f"{kind}-{n_layer}"
    if not root.is_dir():
        # By itself: what a process had in memory counts as that of the commands that it starts.
        subprocess.run([sys.executable, __file__, directory, "--make", kind, "--layers", str(n_layer)], check=True)
    source = root / "llava"
    read = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    print(f"\n{kind}: {read / 1e9:.2f} GB to read")
    out, work = directory / f"{kind}-out", directory / f"{kind}-peer"
    own = full_size.ours(source, out)
    answer = local_llava("ask", "--model", out, "--max-tokens", 4, "Hello?")
    print(f"    it answers: {answer.output.strip()!r:.60}")
    shutil.rmtree(out)
    work.mkdir()
    parts = measure("peer", (peer_bin if kind == "bin" else peer_lora)(source, work))
    temporary = sum(p.stat().st_size for p in work.rglob("*") if p.is_file() and p.name != "q4_k_m.gguf")
    temporary -= sum(p.stat().st_size for p in work.glob("mmproj*.gguf"))
    seconds, cpu = sum(p.seconds for p in parts), sum(p.cpu_s for p in parts)
    print(f"    {seconds:.0f} s in all, peak {max(p.peak for p in parts):.2f} GB, {temporary / 1e9:.2f} GB temporary")
    print(f"{kind}: ratio {own.seconds / seconds:.2f} of the peer's time, {own.cpu_s / cpu:.2f} of its CPU time")
    shutil.rmtree(work)
    if not keep:
        shutil.rmtree(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where 60 GB may be written")
    parser.add_argument("--only", choices=("bin", "lora"))
    parser.add_argument("--make", choices=("bin", "lora"), help="make a checkpoint and end")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints there")
    parser.add_argument("--layers", type=int, default=32, help="of the language model; fewer for a trial")
    args = parser.parse_args()
    if args.make:
        {"bin": make_bin, "lora": make_lora}[args.make](args.directory / f"{args.make}-{args.layers}", args.layers)
        return
    print(machine.describe())
    if args.only != "bin":
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "peft"], check=True)
    peers.build("llama-quantize")
    for kind in ("bin", "lora"):
        if args.only in (None, kind):
            compare(kind, args.directory, args.layers, args.keep)


if __name__ == "__main__":
    main()
