#!/usr/bin/env python3
"""Convert a checkpoint of llava-llama-3-8b-v1_1's shape (random float16 weights, 16 GB), and ask the pair.

    python benchmarks/full_size.py /big/disk [--keep]

Prints seconds, peak resident memory (ru_maxrss of a process of its own, mapped pages included) and the size of what was
written beside the output. The checkpoint is made there unless it is there already, and removed unless --keep is given.
The tokenizer is tiny-llava's, with padding rows up to the real height: no network is needed.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import machine
import numpy as np

TINY = Path(__file__).parent.parent / "models" / "tiny-llava"

CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 480,
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


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, by its name in transformers up to 4.51."""
    e, ff, kv, v = 4096, 14336, 1024, 128320
    t: dict[str, tuple[int, ...]] = {"language_model.model.embed_tokens.weight": (v, e)}
    for i in range(32):
        p = f"language_model.model.layers.{i}"
        t |= {f"{p}.self_attn.{n}_proj.weight": (kv if n in "kv" else e, e) for n in "qkvo"}
        t |= {f"{p}.mlp.{n}_proj.weight": (ff, e) for n in ("gate", "up")} | {f"{p}.mlp.down_proj.weight": (e, ff)}
        t |= {f"{p}.{n}_layernorm.weight": (e,) for n in ("input", "post_attention")}
    t |= {"language_model.model.norm.weight": (e,), "language_model.lm_head.weight": (v, e)}
    c, p = 1024, "vision_tower.vision_model"
    t |= {
        f"{p}.embeddings.class_embedding": (c,),
        f"{p}.embeddings.patch_embedding.weight": (c, 3, 14, 14),
        f"{p}.embeddings.position_embedding.weight": (577, c),
    }
    linears = [(f"{p}.pre_layrnorm", (c,)), (f"{p}.post_layernorm", (c,))]
    for i in range(24):
        b = f"{p}.encoder.layers.{i}"
        linears += [(f"{b}.self_attn.{n}", (c, c)) for n in ("q_proj", "k_proj", "v_proj", "out_proj")]
        linears += [(f"{b}.layer_norm{n}", (c,)) for n in "12"]
        linears += [(f"{b}.mlp.fc1", (4 * c, c)), (f"{b}.mlp.fc2", (c, 4 * c))]
    linears += [("multi_modal_projector.linear_1", (e, c)), ("multi_modal_projector.linear_2", (e, e))]
    for name, shape in linears:
        t |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return t


def make_checkpoint(directory: Path) -> None:
    """Four shards of normal random numbers, written as they are made."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / file, directory / file)
    all_shapes, rng = shapes(), np.random.default_rng(0)
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


def timed(*args: object) -> tuple[float, float, str]:
    """Run local-llava in a process of its own: seconds, peak resident gigabytes, output."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "local_llava.cli", *map(str, args)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode != 0:
        raise SystemExit(f"local-llava {args[0]} failed with {process.returncode}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return time.perf_counter() - started, peak, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where 22 GB may be written")
    parser.add_argument("--keep", action="store_true", help="leave checkpoint and output there")
    args = parser.parse_args()
    print(machine.describe())
    source, out = args.directory / "llava-8b-random", args.directory / "llava-8b-random-gguf"
    if not source.is_dir():
        started = time.perf_counter()
        make_checkpoint(source)
        print(f"checkpoint made in {time.perf_counter() - started:.0f} s")
    read = sum(p.stat().st_size for p in source.iterdir())
    # The children's peak is the largest of any so far, so the conversion comes before the question.
    seconds, peak, output = timed("convert", source, "-o", out, "--force")
    written = [Path(line).stat().st_size for line in output.splitlines()]
    beside = sum(p.stat().st_size for p in out.iterdir()) - sum(written)
    print(f"convert: {read / 1e9:.2f} GB -> {sum(written) / 1e9:.2f} GB in {seconds:.0f} s")
    print(f"         peak RSS {peak:.3f} GB, {beside} bytes beside the output")
    sys.path.insert(0, str(TINY))
    import scenes

    scenes.write(args.directory / "scenes", seed=1, count=1)
    question = ("--max-tokens", 8, "--json", args.directory / "scenes" / "0000.png", "What do you see?")
    seconds, _, output = timed("ask", "--model", out, *question)
    print(f"ask:     {seconds:.0f} s; {output.strip()}")
    if not args.keep:
        for path in (source, out, args.directory / "scenes"):
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
