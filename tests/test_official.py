"""The official LLaVA's layouts: each against transformers with the same weights, and every missing piece as a user
meets it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import many_commands
import numpy as np
import pytest
import torch
from llava_checkpoints import edit_json, random_model, save, write_processor
from next_checkpoints import random_next_model, save_next
from official_checkpoints import (
    LANGUAGE,
    OFFICIAL,
    compare,
    into_cache,
    save_clip,
    save_official,
    tensors_of,
    vision_config,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from skimage import data
from transformers import LlavaForConditionalGeneration
from xtuner_checkpoints import save_adapter, save_encoder, save_llm, save_projector

from local_llava.convert import Companions, convert, prepare
from local_llava.convert.families import official, open_checkpoint
from local_llava.errors import CheckpointError
from local_llava.gguf_file import GGUFFile
from local_llava.preprocessing import Preprocessing

TOWER = "openai/clip-vit-tiny"
"""What the writer's configurations call the tower."""


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.coffee())


pytestmark = pytest.mark.usefixtures("cache")


def inside(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    """llava-llama-3-8b-v1_1-hf: the tuned tower is in the checkpoint, and its configuration in the Hub's cache. The
    stock tower there does not count."""
    into_cache(save_clip(random_model(seed=99), directory / "clip"), cache, TOWER)
    save_official(model, directory, shards=2)
    write_processor(directory, 28)
    return Companions()


def inside_with_named_config(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    """The configuration of the tower is where the user says, without weights. PyTorch's files."""
    save_official(model, directory, suffix="bin", mm_vision_tower="./iter_39620_xtuner/visual_encoder")
    tower = save_clip(model, directory / "t", kind="clip_vision_model")
    (tower / "pytorch_model.bin").unlink()
    return Companions(vision_tower=str(tower))


def beside(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    """llava-v1.5-7b: the tower is only named, and lies beside the checkpoint under its last name."""
    save_official(model, directory, tower=False, suffix="bin", shards=2)
    save_clip(model, directory.parent / "clip-vit-tiny")
    # Its repository has the projector once more.
    torch.save({"model.mm_projector.0.weight": torch.zeros(1)}, directory / "mm_projector.bin")
    return Companions()


def cached(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    save_official(model, directory, tower=False, unfreeze_mm_vision_tower=None)
    into_cache(save_clip(model, directory / "clip", suffix="safetensors"), cache, TOWER)
    return Companions()


def under_its_path(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    save_official(model, directory, tower=False, mm_vision_tower="./towers/tuned")
    save_clip(model, directory.parent / "towers" / "tuned", kind="clip_vision_model", suffix="safetensors")
    return Companions()


def named(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    """The user's word counts before what lies there, and says that the tower is the tuned one."""
    save_clip(random_model(seed=99), directory.parent / "clip-vit-tiny")
    save_official(model, directory, tower=False, unfreeze_mm_vision_tower=True)
    return Companions(vision_tower=str(save_clip(model, directory.parent / "mine")))


def mistral(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    architecture = {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"}
    save_official(model, directory, **architecture, sliding_window=None)
    save_encoder(model, directory.parent / "x")
    edit_json(directory / "config.json", mm_vision_tower="x/visual_encoder")
    return Companions()


def lora(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    """llava-v1.5-7b-lora: an adapter of the language model, and what else was trained."""
    save_official(model, directory, tower=False)
    (directory / "model.safetensors").unlink()
    save_llm(model, directory.parent / "vicuna-7b-v1.5", "bin")
    adapter = directory.parent / "adapter"
    save_adapter(model, LANGUAGE, adapter, "lmsys/vicuna-7b-v1.5", 16, 32)
    for path in adapter.iterdir():
        shutil.move(path, directory)
    projector = {n: t for n, t in tensors_of(model, OFFICIAL).items() if "mm_projector" in n}
    torch.save({f"base_model.model.{n}": t for n, t in projector.items()}, directory / "non_lora_trainables.bin")
    save_clip(model, directory.parent / "clip-vit-tiny")
    return Companions()


def projector_alone(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    """llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5."""
    save_official(model, directory, tower=False, _name_or_path="./checkpoints/vicuna-7b-v1.5")
    (directory / "model.safetensors").unlink()
    (directory / "tokenizer.json").unlink()
    projector = {n: t for n, t in tensors_of(model, OFFICIAL).items() if "mm_projector" in n}
    torch.save(projector, directory / "mm_projector.bin")
    into_cache(save_llm(model, directory / "llm"), cache, "lmsys/vicuna-7b-v1.5")
    return Companions(vision_tower=str(save_clip(model, directory / "clip")), llm="lmsys/vicuna-7b-v1.5")


LAYOUTS = (inside, inside_with_named_config, beside, cached, under_its_path, named, mistral, lora, projector_alone)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(layout: Any, tmp_path: Path, cache: Path, photo: Image.Image) -> None:
    model = random_model(seed=len(layout.__name__))
    directory = tmp_path / "checkpoint"
    companions = layout(model, directory, cache)
    files = convert(directory, tmp_path / "out", quant="F32", mmproj_quant="F32", companions=companions)
    compare(model, files, next(tmp_path.rglob("tokenizer.json")), photo)


@pytest.mark.parametrize(
    ("architecture", "model_type", "decoder"),
    [
        (["LlavaLlamaForCausalLM"], "llava", "llama"),  # before LLaVA 1.6
        (None, "llava_llama", "llama"),
        (None, "llava_mistral", "mistral"),
        (["LlavaQwenForCausalLM"], "llava_qwen", "qwen2"),
    ],
)
def test_decoders_are_told_by_the_architecture(
    architecture: Any, model_type: str, decoder: str, tmp_path: Path
) -> None:
    save_clip(random_model(), tmp_path / "clip-vit-tiny")
    directory = save_official(random_model(), tmp_path / "c", architectures=architecture, model_type=model_type)
    parts = open_checkpoint(directory)
    assert parts.text.values["model_type"] == decoder
    assert parts.text_tensors.keys() >= {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("aspect", [None, "square"])
def test_pictures_are_cropped_without_pad(aspect: str | None, tmp_path: Path, photo: Image.Image) -> None:
    model = random_model()
    directory = save_official(model, tmp_path / "c", tower=False, image_aspect_ratio=aspect)
    save_clip(model, tmp_path / "clip-vit-tiny")
    files = convert(directory, tmp_path / "out", quant="F32", mmproj_quant="F32")
    compare(model, files, directory / "tokenizer.json", photo, pad=False)


def test_a_stock_tower_is_known_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """v1_1-hf says of its tower no more than openai/clip-vit-large-patch14-336."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16}
    model = random_model(vision={**sizes, "image_size": 336})
    directory = save_official(model, tmp_path / "c", mm_vision_tower="/models/clip-vit-large-patch14-336")
    with pytest.raises(CheckpointError, match=r"encoder.layers.2.layer_norm1.weight is missing.* and \d+ more"):
        prepare(directory, tmp_path / "out")  # of 24 layers there are 2; everything else is right
    assert caplog.records == []


def test_a_stock_towers_preprocessing_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, photo: Image.Image
) -> None:
    """liuhaotian/llava-v1.6-vicuna-7b has a tower inside, and neither its configuration nor an image processor's."""
    model = random_model()
    monkeypatch.setitem(official.STOCK, "clip-vit-tiny", vision_config(model))
    directory = save_official(model, tmp_path / "c")
    files = convert(directory, tmp_path / "out", quant="F32", mmproj_quant="F32")
    compare(model, files, directory / "tokenizer.json", photo)
    assert not any("preprocessor" in record.message for record in caplog.records)


@pytest.mark.parametrize("as_text", [False, True])
def test_1_6_becomes_what_the_same_model_of_transformers_does(as_text: bool, tmp_path: Path) -> None:
    """Which test_anyres compares with transformers. The official code writes widths first."""
    grid = [(28, 56), (84, 28), (56, 56)]
    model = random_next_model(grid)
    pinpoints: Any = [(width, height) for height, width in grid]
    save_official(
        model,
        tmp_path / "official" / "llava",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=str(pinpoints) if as_text else pinpoints,
        mm_patch_merge_type="spatial_unpad",
    )
    save_clip(model, tmp_path / "official" / "clip-vit-tiny")
    save_next(model, tmp_path / "transformers" / "llava")
    first, second = (
        convert(tmp_path / kind / "llava", tmp_path / f"{kind}-gguf", quant="F32", mmproj_quant="F32")
        for kind in ("official", "transformers")
    )
    assert first.mmproj.read_bytes() == second.mmproj.read_bytes()
    assert Preprocessing.from_metadata(GGUFFile.open(first.mmproj).metadata, "").grid == tuple(grid)
    ours, theirs = (gguf.GGUFReader(files.model).tensors for files in (first, second))
    assert [t.name for t in ours] == [t.name for t in theirs]
    assert all(np.array_equal(a.data, b.data) for a, b in zip(ours, theirs, strict=True))


def test_a_separator_without_tiles_is_not_used(tmp_path: Path, photo: Image.Image) -> None:
    model = random_next_model([(56, 56)])
    save_clip(model, tmp_path / "clip-vit-tiny")
    directory = save_official(model, tmp_path / "c", mm_patch_merge_type="spatial_unpad")
    assert "model.image_newline" in load_file(directory / "model.safetensors")
    files = convert(directory, tmp_path / "out", quant="F32", mmproj_quant="F32")
    metadata = GGUFFile.open(files.mmproj)
    assert "model.image_newline" not in metadata.tensors
    assert Preprocessing.from_metadata(metadata.metadata, "").mode == "pad"


def test_notes_say_where_the_tower_comes_from(tmp_path: Path, cache: Path) -> None:
    beside(random_model(), tmp_path / "a", cache)
    note = f"the vision tower is not in the checkpoint; taken from {tmp_path / 'clip-vit-tiny'}"
    assert prepare(tmp_path / "a", tmp_path / "out").notes[0] == note
    companions = named(random_model(), tmp_path / "b", cache)
    notes = prepare(tmp_path / "b", tmp_path / "out", companions=companions).notes
    assert "was tuned: only that very one gives right answers" in notes[1]


def test_a_tower_inside_cannot_be_replaced(tmp_path: Path, cache: Path) -> None:
    inside(random_model(), tmp_path / "a", cache)
    other = str(save_clip(random_model(), tmp_path / "other"))
    for companions, option in ((Companions(vision_tower=other), "--vision-tower"), (Companions(llm=other), "--llm")):
        with pytest.raises(CheckpointError, match=rf"{option} '{other}': the checkpoint has its own"):
            prepare(tmp_path / "a", tmp_path / "out", companions=companions)
    save(random_model(), tmp_path / "transformers")
    with pytest.raises(CheckpointError, match=r"--vision-tower .*: the checkpoint has its own vision tower"):
        prepare(tmp_path / "transformers", tmp_path / "out", companions=Companions(vision_tower=other))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda d: edit_json(d / "config.json", **changes)


def without_tensors(prefix: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / WEIGHTS
        save_file({n: t for n, t in load_file(path).items() if not n.startswith(prefix)}, path)

    return change


def alone(write: Callable[[LlavaForConditionalGeneration, Path], Any]) -> Callable[[Path], None]:
    """Put something else in the checkpoint's place."""

    def change(directory: Path) -> None:
        shutil.rmtree(directory)
        write(random_model(), directory)

    return change


def adapter(model: LlavaForConditionalGeneration, directory: Path) -> None:
    save_adapter(model, LANGUAGE, directory, "x/y")


CONFIG, WEIGHTS = "config.json: ", "model.safetensors"
BAD: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    # what is done to a checkpoint with its tower inside, and what the line must name
    "the tuned tower is missing": (
        without_tensors("model.vision_tower."),
        (CONFIG + "unfreeze_mm_vision_tower is true", "a stock one would not fit", "--vision-tower"),
    ),
    "no tower anywhere": (
        lambda d: (
            without_tensors("model.vision_tower.")(d),
            config(unfreeze_mm_vision_tower=False, mm_vision_tower="openai/clip-vit-large-patch14-336")(d),
        ),
        (
            CONFIG + "mm_vision_tower: the vision tower 'openai/clip-vit-large-patch14-336' is neither beside",
            "Hub's cache (",
            "--vision-tower",
        ),
    ),
    "no name of a tower": (
        lambda d: (
            without_tensors("model.vision_tower.")(d),
            config(unfreeze_mm_vision_tower=None, mm_vision_tower=None)(d),
        ),
        ("does not say which one", "--vision-tower DIR|NAME"),
    ),
    "a tower inside of an unknown kind": (
        config(mm_vision_tower="./visual_encoder"),
        (CONFIG + "mm_vision_tower is './visual_encoder', whose config.json is neither", "the tower itself is inside"),
    ),
    "a name that is a number": (config(mm_vision_tower=5), (CONFIG + "mm_vision_tower must be a name or a path",)),
    "a name that leads to the network": (
        config(mm_vision_tower="//server/share/x"),
        (CONFIG + "mm_vision_tower is '//server/share/x', whose config.json is neither",),
    ),
    "a long name": (config(mm_vision_tower="x/" * 3000), (CONFIG + "mm_vision_tower is 'x/x/",)),
    "half of a tower": (
        without_tensors("model.vision_tower.vision_tower.vision_model.encoder.layers.1"),
        ("encoder.layers.1.layer_norm1.weight is missing",),
    ),
    "no projector": (without_tensors("model.mm_projector."), ("no tensors of the projector (model.mm_projector.*)",)),
    "no language model": (
        lambda d: (without_tensors("model.layers.")(d), without_tensors("model.embed_tokens.")(d)),
        ("model.embed_tokens.weight is missing",),
    ),
    "linear projector": (
        config(mm_projector_type="linear"),
        ("mm_projector_type is 'linear'; supported: mlp2x_gelu",),
    ),
    "no type of projector": (
        config(mm_projector_type=None),
        ("mm_projector_type is 'linear'; supported: mlp2x_gelu",),
    ),
    "another projector": (config(mm_projector_type="ldpnet"), ("mm_projector_type is 'ldpnet'",)),
    "tokens around pictures": (config(mm_use_im_start_end=True), (CONFIG + "mm_use_im_start_end is true",)),
    "several scales": (config(s2=True), (CONFIG + "s2 is true",)),
    "a resampler": (config(mm_resampler_type="perceiver"), (CONFIG + "mm_resampler_type is 'perceiver'",)),
    "another aspect": (
        config(image_aspect_ratio="anyres_max_9"),
        (CONFIG + "image_aspect_ratio is 'anyres_max_9'; supported: square, pad, anyres",),
    ),
    "tiles that are not merged": (
        config(image_aspect_ratio="anyres", image_grid_pinpoints=[[28, 56]]),
        (CONFIG + "mm_patch_merge_type is 'flat'; supported: spatial_unpad",),
    ),
    "tiles without a grid": (
        config(image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad"),
        (CONFIG + "image_grid_pinpoints must be a list of 1 to 64 widths and heights, not None",),
    ),
    "a grid that is a program": (
        config(image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad", image_grid_pinpoints="(" * 100000),
        ("image_grid_pinpoints must be a list of 1 to 64",),
    ),
    "tiles without a separator": (
        config(image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=[[28, 56]]),
        ("image_newline is missing",),
    ),
    "tiles of another size": (
        lambda d: (
            config(image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=[[30, 56]])(
                d
            ),
            save_file({**load_file(d / WEIGHTS), "model.image_newline": torch.ones(64)}, d / WEIGHTS),
        ),
        ("image_grid_pinpoints has 56 x 30",),
    ),
    "no layer": (config(mm_vision_select_layer=None), (CONFIG + "mm_vision_select_layer is missing",)),
    "a layer that is not there": (config(mm_vision_select_layer=-9), ("vision_feature_layer -9 is not one",)),
    "another feature": (
        config(mm_vision_select_feature="cls"),
        (CONFIG + "mm_vision_select_feature is 'cls'; supported: patch, cls_patch",),
    ),
    "another architecture": (
        config(architectures=["LlavaMptForCausalLM"]),
        (CONFIG + "architectures: 'LlavaMptForCausalLM' is not supported; supported: Llava", "LlavaLlamaForCausalLM"),
    ),
    # what is no LLaVA at all
    "a language model": (alone(save_llm), ("'LlamaForCausalLM' (a language model without a vision tower and a proj",)),
    "a tower": (alone(save_clip), ("'CLIPModel' (a vision tower alone, without", "it is what --vision-tower takes")),
    "XTuner's tower": (
        alone(lambda m, d: save_clip(m, d, kind="clip_vision_model")),
        ("'CLIPVisionModel' (a vision tower alone, without",),
    ),
    "XTuner's projector": (
        alone(lambda m, d: shutil.move(save_projector(m, d.parent / "p") / "projector", d)),
        ("'ProjectorModel' (XTuner's projector alone; the directory around it is accepted)",),
    ),
    "an adapter": (alone(adapter), ("no config.json", "it holds an adapter alone", "llm_adapter/")),
    "GGUF files": (
        alone(lambda m, d: (d.mkdir(), (d / "a.gguf").touch())),
        ("no config.json", "it holds GGUF files, which need no conversion"),
    ),
    "a directory of checkpoints": (
        alone(lambda m, d: save_official(m, d / "a")),
        ("no config.json", "a directory inside it may be one"),
    ),
    "a text encoder cut out": (
        lambda d: (without_tensors("model.vision_tower.")(d), without_tensors("model.mm_projector.")(d)),
        ("no tensors of the projector",),
    ),
    "a text encoder by its name": (
        config(architectures=["LlamaModel"]),
        ("'LlamaModel' (a language model without a vision tower and a projector) is not supported",),
    ),
    "an empty config": (lambda d: (d / "config.json").write_bytes(b""), ("config.json", "JSON")),
    "an adapter without its configuration": (
        lambda d: torch.save({"a": torch.ones(1)}, d / "non_lora_trainables.bin"),
        ("adapter_config.json: cannot be read",),
    ),
    "a projector without a language model": (
        lambda d: ((d / "model.safetensors").unlink(), torch.save({"a": torch.ones(1)}, d / "mm_projector.bin")),
        ("the language model is not in this checkpoint", "--llm DIR|NAME"),
    ),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """What the command says of each bad checkpoint."""
    root = tmp_path_factory.mktemp("bad")
    model = random_model()
    commands: dict[str, tuple[object, ...]] = {}
    for i, (case, (damage, _)) in enumerate(BAD.items()):
        directory = save_official(model, root / str(i) / "checkpoint")
        save_clip(model, root / str(i) / "clip-vit-tiny")
        damage(directory)
        commands[case] = ("convert", directory, "-o", directory.parent / "out")
    outcomes = many_commands.run(commands, HF_HOME=str(root))
    assert not list(root.glob("*/out"))
    return outcomes


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints(case: str, outcomes: dict[str, tuple[int, str]]) -> None:
    line = many_commands.error_line(outcomes[case])
    assert len(line) < 900
    for name in BAD[case][1]:
        assert name in line
