"""Conversion end to end: layouts, defaults, tables, and every kind of bad input, as a user's command."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llava_checkpoints import LAYOUTS, TINY, edit_json, random_model, save
from safetensors.torch import load_file, save_file

from local_llava import Llava
from local_llava.convert import Overrides, convert, prepare
from local_llava.convert.conversion import model_name
from local_llava.convert.mixes import LLM_MIXES, MMPROJ_MIXES
from local_llava.errors import CheckpointError, OutputError, UsageError
from local_llava.gguf_file import TYPES, GGUFFile
from local_llava.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model(), tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def command(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "local_llava.cli", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_layouts_give_the_same_files(checkpoint: Path, tmp_path: Path, layout: str, shards: int) -> None:
    other = save(random_model(), tmp_path / "x" / "checkpoint", layout, shards)
    expected = convert(checkpoint, tmp_path / "expected", quant="Q8_0")
    files = convert(other, tmp_path / "out", quant="Q8_0")
    assert files.model.read_bytes() == expected.model.read_bytes()
    assert files.mmproj.read_bytes() == expected.mmproj.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model = random_model()
    halves = save(model, tmp_path / "half" / "m", dtype=dtype)
    for p in model.parameters():
        p.data = p.data.to(dtype).to(torch.float32)
    full = save(model, tmp_path / "full" / "m")
    pair = [convert(c, tmp_path / f"out{i}", quant="F32", mmproj_quant="F32") for i, c in enumerate((halves, full))]
    assert pair[0].model.read_bytes() == pair[1].model.read_bytes()
    assert pair[0].mmproj.read_bytes() == pair[1].mmproj.read_bytes()


def test_omitted_fields_take_the_defaults(tmp_path: Path) -> None:
    """XTuner's config leaves out the sizes that equal LlamaConfig's and CLIPVisionConfig's defaults."""
    model = random_model(
        text={"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": 32},
        vision={"num_attention_heads": 12},
    )
    source = save(model, tmp_path / "m")
    edit_json(
        source / "config.json",
        text_config__num_attention_heads=None,
        text_config__num_key_value_heads=None,
        text_config__head_dim=None,
        text_config__rope_parameters=None,
        text_config__hidden_act=None,
        text_config__tie_word_embeddings=None,
        vision_config__num_attention_heads=None,
        vision_config__hidden_act=None,
        vision_config__layer_norm_eps=None,
        vision_config__model_type=None,
        projector_hidden_act=None,
        vision_feature_layer=None,
        vision_feature_select_strategy=None,
        multimodal_projector_bias=None,
    )
    files = convert(source, tmp_path / "out", quant="F16")
    llm, mmproj = GGUFFile.open(files.model).metadata, GGUFFile.open(files.mmproj).metadata
    assert (llm["llama.attention.head_count"], llm["llama.attention.head_count_kv"]) == (32, 32)
    assert llm["llama.rope.freq_base"] == 10000.0
    assert mmproj["clip.vision.attention.head_count"] == 12
    assert mmproj["clip.vision.feature_layer"] == [2]  # the last but one of 3 layers and the embeddings
    assert mmproj["clip.use_gelu"] is False


def test_old_and_new_rope_settings(copy: Path, tmp_path: Path) -> None:
    edit_json(copy / "config.json", text_config__rope_parameters=None, text_config__rope_theta=500000.0)
    old = convert(copy, tmp_path / "old", quant="F16")
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    edit_json(copy / "config.json", text_config__rope_theta=None, text_config__rope_parameters=rope)
    new = convert(copy, tmp_path / "new", quant="F16")
    assert GGUFFile.open(old.model).metadata["llama.rope.freq_base"] == 500000.0
    assert old.model.read_bytes() == new.model.read_bytes()


def test_metadata_says_where_it_comes_from(copy: Path, tmp_path: Path) -> None:
    (copy / "README.md").write_text("---\nlibrary_name: x\nlicense: apache-2.0\n---\n# A model\nlicense: other\n")
    snapshot = tmp_path / "models--xtuner--llava-tiny-transformers" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    copy.rename(snapshot)
    files = convert(snapshot, tmp_path / "out")
    assert files.model.name == "llava-tiny-Q4_K_M.gguf"
    assert files.mmproj.name == "llava-tiny-mmproj-F16.gguf"
    for path in (files.model, files.mmproj):
        metadata = GGUFFile.open(path).metadata
        assert metadata["general.name"] == "llava-tiny"
        assert metadata["general.license"] == "apache-2.0"
        assert metadata["general.source.repo_url"] == "https://huggingface.co/xtuner/llava-tiny-transformers"
        assert metadata["general.quantization_version"] == 2
        assert metadata["local_llava.pair_id"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("llava-llama-3-8b-v1_1-transformers", "llava-llama-3-8b-v1_1"),
        ("llava-llama-3-8b-v1_1-hf", "llava-llama-3-8b-v1_1"),
        ("llava-llama-3-8b-v1_1", "llava-llama-3-8b-v1_1"),
        ("llava-v1.5-7b", "llava-v1.5-7b"),
        # Another training of the same kind, so the name is all that tells the files apart.
        ("llava-v1.5-7b-xtuner", "llava-v1.5-7b-xtuner"),
        ("hub/models--xtuner--llava-phi-3-mini-hf/snapshots/0123abc", "llava-phi-3-mini"),
    ],
)
def test_names_of_models(path: str, name: str, tmp_path: Path) -> None:
    assert model_name(tmp_path / path) == name


def test_preprocessing_is_stored(copy: Path, tmp_path: Path) -> None:
    edit_json(copy / "preprocessor_config.json", size={"shortest_edge": 40}, resample=2, image_mean=[0.5, 0.25, 0.125])
    files = convert(copy, tmp_path / "out")
    stored = Preprocessing.from_metadata(GGUFFile.open(files.mmproj).metadata, "mmproj")
    assert (stored.mode, stored.shortest_edge, stored.resample, stored.image_size) == ("crop", 40, 2, 28)
    assert stored.mean == (0.5, 0.25, 0.125)
    assert stored.rescale == 1 / 255
    edit_json(copy / "preprocessor_config.json", image_processor_type="LlavaImageProcessorFast", do_pad=True)
    files = convert(copy, tmp_path / "pad")
    assert Preprocessing.from_metadata(GGUFFile.open(files.mmproj).metadata, "mmproj").mode == "pad"


def test_existing_files_stay_without_force(checkpoint: Path, tmp_path: Path) -> None:
    files = convert(checkpoint, tmp_path)
    before = files.model.stat().st_mtime_ns
    with pytest.raises(OutputError, match="--force"):
        convert(checkpoint, tmp_path)
    assert files.model.stat().st_mtime_ns == before
    convert(checkpoint, tmp_path, overwrite=True)
    assert files.model.stat().st_mtime_ns != before


def test_dry_run_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    done = command("convert", checkpoint, "--dry-run", "-o", tmp_path / "out")
    assert done.returncode == 0
    assert "Q4_K_M.gguf" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_shows_other_types_than_asked_for(checkpoint: Path) -> None:
    done = command(
        "convert",
        checkpoint,
        "--dry-run",
        "--quant",
        "q4_k_m",
        "--mmproj-quant",
        "q4_k",
        "--tensor-type",
        "attn_v=q8_0",
    )
    assert done.returncode == 0, done.stderr
    assert "checkpoint-Q4_K_M.gguf: " in done.stdout and "checkpoint-mmproj-Q4_K.gguf: " in done.stdout
    assert "Q8_0" in done.stdout.splitlines()[0]
    assert "Q5_0, since Q4_K packs 256 values" in done.stdout
    assert "Q4_K changes image features by " in done.stdout


def test_notes_come_before_the_work(checkpoint: Path, tmp_path: Path) -> None:
    done = command("convert", checkpoint, "-o", tmp_path, "--mmproj-quant", "Q6_K", "--tensor-type", "attn_x=Q8_0")
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if line.startswith("Note: ")]
    assert "Note: --tensor-type attn_x meets no tensor that it could decide about" in notes
    assert any(note.startswith("Note: Q6_K changes image features by ") for note in notes)
    assert [Path(line).name for line in done.stdout.splitlines()] == [
        "checkpoint-Q4_K_M.gguf",
        "checkpoint-mmproj-Q6_K.gguf",
    ]


def test_types_of_single_tensors(checkpoint: Path, tmp_path: Path) -> None:
    overrides = Overrides({"ffn_down": "Q8_0"}, output_type="F16", embedding_type="BF16")
    files = convert(checkpoint, tmp_path, quant="Q4_0", overrides=overrides)
    types = {t.name: TYPES[t.type].name for t in GGUFFile.open(files.model).tensors.values()}
    assert (types["token_embd.weight"], types["output.weight"]) == ("BF16", "F16")
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("Q8_0", "Q4_0")
    bad = command("convert", checkpoint, "-o", tmp_path / "bad", "--output-type", "Q4_K")
    assert (bad.returncode, (tmp_path / "bad").exists()) == (2, False)
    assert "--output-type Q4_K: the rows of output.weight have 64 columns, no multiple of 256" in bad.stderr


@pytest.mark.parametrize("name", ["convert", "quantize"])
def test_the_help_names_every_type(name: str) -> None:
    words = set(re.split(r"[\s,.]+", command(name, "--help", COLUMNS="1000").stdout))
    assert {*LLM_MIXES, *MMPROJ_MIXES} <= words


def test_sizes_are_known_before(checkpoint: Path, tmp_path: Path) -> None:
    conversion = prepare(checkpoint, tmp_path)
    written: list[int] = []
    files = conversion.write(progress=written.append)
    assert conversion.sizes == (files.model.stat().st_size, files.mmproj.stat().st_size)
    assert sum(written) == sum(conversion.sizes)


def test_default_directory(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = convert(checkpoint)
    assert files.model == Path("checkpoint-gguf/checkpoint-Q4_K_M.gguf")
    assert files.model.is_file()


def test_unknown_types_are_usage_errors(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="Q4_K_M"):
        prepare(checkpoint, quant="Q9")
    assert command("convert", checkpoint, "--quant", "Q9").returncode == 2
    assert command("convert", checkpoint, "--mmproj-quant", "IQ1").returncode == 2
    assert command("convert", checkpoint, "--threads", "0").returncode == 2


# --- bad input: each as a user meets it ---


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def shorten(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def drop(prefix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(prefix)]:
            del tensors[name]

    return change


def put(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    return lambda d: edit_tensors(d, change)


def replace_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda d: edit_tensors(d, lambda t: t.update({name: make(t[name]).contiguous()}))


def to_shards(directory: Path) -> Path:
    """Split in two, with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {n: f"model-0000{1 + (i >= 9)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, directory / file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def missing_shard(d: Path) -> None:
    to_shards(d)
    (d / "model-00002-of-00002.safetensors").unlink()


def shard_elsewhere(d: Path) -> None:
    index = to_shards(d)
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))


def wrong_index(d: Path) -> None:
    index = to_shards(d)
    index.write_text(index.read_text().replace("model-00002", "model-00001"))


DOWN = "language_model.model.layers.0.mlp.down_proj.weight"
CONFIG, WEIGHTS = "config.json", "model.safetensors"

BAD: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    # what is done to the checkpoint -> what the line must name: the file, and the field or the reason
    "missing shard": (missing_shard, "model-00002-of-00002.safetensors", "missing shard"),
    "index leads elsewhere": (shard_elsewhere, "model.safetensors.index.json", "must be a file name"),
    "index names the wrong shard": (wrong_index, "model-00001-of-00002.safetensors", "is missing"),
    "index is a list": (lambda d: to_shards(d).write_text("[]"), "index.json", "object"),
    "truncated safetensors": (lambda d: shorten(d / WEIGHTS, 5000), WEIGHTS, "not a whole"),
    "safetensors without its end": (
        lambda d: shorten(d / WEIGHTS, (d / WEIGHTS).stat().st_size - 1),
        WEIGHTS,
        "not a whole",
    ),
    "empty safetensors": (lambda d: (d / WEIGHTS).write_bytes(b""), WEIGHTS, "not a whole"),
    "random safetensors": (
        lambda d: (d / WEIGHTS).write_bytes(np.random.default_rng(0).bytes(9999)),
        WEIGHTS,
        "not a whole",
    ),
    "huge header": (
        lambda d: (d / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
        WEIGHTS,
        "not a whole",
    ),
    "header of nested brackets": (
        lambda d: (d / WEIGHTS).write_bytes(struct.pack("<Q", 100000) + b"[" * 100000),
        WEIGHTS,
        "not a whole",
    ),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), "checkpoint", "safetensors"),
    "only pickles": (
        lambda d: (d / WEIGHTS).rename(d / "pytorch_model.bin"),
        "pytorch_model.bin",
        "not a PyTorch file",
    ),
    "wrong dtype": (replace_tensor(DOWN, lambda t: t.to(torch.int64)), DOWN, "I64"),
    "double precision": (replace_tensor(DOWN, lambda t: t.double()), DOWN, "F64"),
    "wrong shape": (replace_tensor(DOWN, lambda t: t[:, :-1]), DOWN, "config.json"),
    "flattened": (replace_tensor(DOWN, lambda t: t.flatten()), DOWN, "shape"),
    "missing tensor": (lambda d: edit_tensors(d, drop(DOWN)), "down_proj", "missing"),
    "unknown tensor": (
        lambda d: edit_tensors(d, lambda t: t.update({"language_model.model.layers.0.x": torch.ones(2)})),
        "layers.0.x",
        "unknown",
    ),
    "NaN": (put(DOWN, float("nan")), DOWN, "NaN"),
    "infinity": (put(DOWN, float("-inf")), DOWN, "infinity"),
    "config contradicts tensors": (
        lambda d: edit_json(d / CONFIG, text_config__hidden_size=128),
        CONFIG,
        "[640, 128]",
    ),
    "more layers than there are": (
        lambda d: edit_json(d / CONFIG, text_config__num_hidden_layers=3),
        "layers.2",
        "missing",
    ),
    "fewer layers than there are": (
        lambda d: edit_json(d / CONFIG, vision_config__num_hidden_layers=2),
        "layers.2",
        "unknown",
    ),
    "hidden size of text": (lambda d: edit_json(d / CONFIG, text_config__hidden_size="big"), CONFIG, "hidden_size"),
    "no heads": (lambda d: edit_json(d / CONFIG, text_config__num_attention_heads=0), CONFIG, "num_attention_heads"),
    "heads that do not divide": (
        lambda d: edit_json(d / CONFIG, text_config__num_attention_heads=5, text_config__head_dim=None),
        CONFIG,
        "divide",
    ),
    "feature layer out of range": (lambda d: edit_json(d / CONFIG, vision_feature_layer=-9), CONFIG, "feature_layer"),
    "several feature layers": (lambda d: edit_json(d / CONFIG, vision_feature_layer=[-2, -5]), CONFIG, "feature_layer"),
    "features of another choice": (
        lambda d: edit_json(d / CONFIG, vision_feature_select_strategy="cls"),
        CONFIG,
        "supported: default, full",
    ),
    "rope scaling": (
        lambda d: edit_json(d / CONFIG, text_config__rope_scaling={"rope_type": "longrope", "factor": 4.0}),
        CONFIG,
        "rope_type",
    ),
    "unknown architecture": (
        lambda d: edit_json(d / CONFIG, architectures=["Qwen2VLForConditionalGeneration"]),
        CONFIG,
        "supported: LlavaForConditionalGeneration",
    ),
    "a text model": (
        lambda d: (
            edit_json(d / CONFIG, architectures=["LlamaForCausalLM"], vision_config=None),
            edit_tensors(d, drop("vision_tower")),
            edit_tensors(d, drop("multi")),
        ),
        CONFIG,
        "without a vision tower",
    ),
    "another decoder": (lambda d: edit_json(d / CONFIG, text_config__model_type="gpt2"), CONFIG, "supported: llama"),
    "another tower": (
        lambda d: edit_json(d / CONFIG, vision_config__model_type="dinov2"),
        CONFIG,
        "clip_vision_model",
    ),
    "no vision tower": (
        lambda d: edit_tensors(d, drop("vision_tower")),
        "checkpoint",
        "no tensors of the vision tower",
    ),
    "no projector": (lambda d: edit_tensors(d, drop("multi_modal")), "checkpoint", "projector"),
    "no config": (lambda d: (d / CONFIG).unlink(), "checkpoint", "config.json"),
    "empty config": (lambda d: (d / CONFIG).write_text(""), CONFIG, "JSON"),
    "config of brackets": (lambda d: (d / CONFIG).write_text("[" * 100000), CONFIG, "JSON"),
    "config in latin-1": (lambda d: (d / CONFIG).write_bytes(b'{"a": "\xe9"}'), CONFIG, "JSON"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json", "missing"),
    "truncated tokenizer": (lambda d: shorten(d / "tokenizer.json", 999), "tokenizer.json", "JSON"),
    "crop size contradicts": (
        lambda d: edit_json(d / "preprocessor_config.json", crop_size={"height": 99, "width": 99}),
        "preprocessor_config.json",
        "crop_size",
    ),
    "unknown processor": (
        lambda d: edit_json(d / "preprocessor_config.json", image_processor_type="ViTImageProcessor"),
        "preprocessor_config.json",
        "CLIPImageProcessor",
    ),
    "no mean": (lambda d: edit_json(d / "preprocessor_config.json", image_mean=[1]), "preprocessor", "image_mean"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(case: str, copy: Path, tmp_path: Path) -> None:
    damage, *named = BAD[case]
    damage(copy)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    done = command("convert", copy, "-o", tmp_path / "deep" / "out")
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("local-llava: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    for name in named:
        assert name in lines[0]
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_float16_overflow_is_refused(copy: Path, tmp_path: Path) -> None:
    put(DOWN, 70000.0)(copy)
    done = command("convert", copy, "-o", tmp_path / "out", "--quant", "F16")
    assert done.returncode == 1 and DOWN in done.stderr and "70000" in done.stderr
    assert not (tmp_path / "out").exists()
    convert(copy, tmp_path / "out", quant="F32")  # which can hold it


@pytest.mark.parametrize("place", ["a file", "/dev/full/x", "/proc/x"])
def test_unwritable_output(checkpoint: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").write_text("x")
    out = Path(place) if place.startswith("/") else tmp_path / place
    done = command("convert", checkpoint, "-o", out)
    assert done.returncode == 1 and str(out) in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "a file").read_text() == "x"


def test_full_disk(checkpoint: Path, tmp_path: Path) -> None:
    """The limit of a file's size stands in for a disk that fills up while the file is written."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000));"
        "from local_llava.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(checkpoint), "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "checkpoint-Q4_K_M.gguf" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_problems_are_reported_together(copy: Path) -> None:
    edit_tensors(copy, drop("language_model.model.norm"))
    edit_tensors(copy, drop("vision_tower.pre_layrnorm"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing; pre_layrnorm\.weight is missing"):
        prepare(copy)


def test_a_name_that_llama_cpp_has_rules_for(tmp_path: Path) -> None:
    """It looks for Phi 3's tokens in the vocabulary of whatever is called so, and does not load it without."""
    shutil.copytree(TINY, tmp_path / "my-Phi-3-and-phi3", ignore=shutil.ignore_patterns("*.py"))
    files = convert(tmp_path / "my-Phi-3-and-phi3", tmp_path / "out", quant="Q8_0")
    assert GGUFFile.open(files.model).metadata["general.name"] == "my-phi_3-and-phi_3"
    assert files.model.name == "my-Phi-3-and-phi3-Q8_0.gguf"
    with Llava.load(files.model, files.mmproj) as llava:
        assert llava.ask("What?", max_tokens=1).tokens is not None
