"""XTuner's layouts: each against transformers with the same weights, and every missing piece as a user meets it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import many_commands
import pytest
from llava_checkpoints import edit_json, random_model
from official_checkpoints import LANGUAGE, compare, into_cache, save_clip, save_official
from PIL import Image
from skimage import data
from tower_checkpoints import random_tower_model
from transformers import LlavaForConditionalGeneration
from xtuner_checkpoints import TOWER, save_adapter, save_encoder, save_llm, save_projector, save_settings

from local_llava.convert import Companions, convert, prepare
from local_llava.errors import CheckpointError
from local_llava.gguf_file import GGUFFile
from local_llava.preprocessing import Preprocessing

STOCK = "openai/clip-vit-large-patch14-336"


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(data.coffee())


pytestmark = pytest.mark.usefixtures("cache")


def whole(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    """llava-llama-3-8b-v1_1: everything was trained."""
    save_llm(model, directory, shards=3)
    save_encoder(model, directory)
    save_projector(model, directory)
    save_settings(directory)
    return Companions()


def tuned_tower(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    """llava-llama-3-8b: a LoRA of the tower, on the stock CLIP in the Hub's cache."""
    save_llm(model, directory)
    into_cache(save_clip(model, directory / "clip"), cache, STOCK)
    save_adapter(model, TOWER, directory / "visual_encoder_adapter", STOCK, 64, 16)
    save_projector(model, directory)
    return Companions()


def adapters(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    """llava-v1.5-7b-xtuner: LoRAs of both, PyTorch's files, an empty config.json; the bases lie beside it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_bytes(b"")
    save_llm(model, directory.parent / "vicuna-7b-v1.5", "bin", shards=2)
    save_clip(model, directory.parent / "clip-vit-large-patch14-336")
    save_adapter(model, LANGUAGE, directory / "llm_adapter", "lmsys/vicuna-7b-v1.5", 32, 256, "bin")
    save_adapter(model, TOWER, directory / "visual_encoder_adapter", "/share/clip-vit-large-patch14-336", 4, 1, "bin")
    save_projector(model, directory, "bin")
    more = "model.update(llm_lora=dict(r=32), visual_encoder_lora=dict(r=4))"
    save_settings(directory, llm_frozen=True, tower_frozen=True, more=more)
    return Companions()


def frozen_tower(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    """The tower was not trained: the one that the settings name; the language model is in a directory of its own."""
    save_llm(model, directory / "llm")
    save_clip(model, directory.parent / "the-tower", kind="clip_vision_model")
    save_projector(model, directory)
    save_settings(directory, tower_frozen=True, layer=-3)
    return Companions()


def projector_alone(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    """As a pretraining leaves it; the user names the rest. transformers 5 saves towers without a prefix."""
    save_projector(model, directory)
    tower = save_clip(model, directory.parent / "a", kind="clip_vision_model", suffix="safetensors", prefix="")
    into_cache(save_llm(model, directory.parent / "b"), cache, "me/llm")
    return Companions(vision_tower=str(tower), llm="me/llm")


def adapter_of_a_bare_tower(model: LlavaForConditionalGeneration, directory: Path, cache: Path) -> Companions:
    """The adapter's names have a prefix that the base's have not."""
    save_llm(model, directory)
    tower = save_clip(model, directory / "t", kind="clip_vision_model", suffix="safetensors", prefix="")
    save_adapter(model, TOWER, directory / "visual_encoder_adapter", None)
    save_projector(model, directory)
    return Companions(vision_tower=str(tower))


Layout = Callable[[LlavaForConditionalGeneration, Path, Path], Companions]
LAYOUTS: dict[Layout, int] = {
    whole: -2,
    tuned_tower: -2,
    adapters: -2,
    frozen_tower: -3,
    projector_alone: -2,
    adapter_of_a_bare_tower: -2,
}
"""Each with the layer that it takes features of."""


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(layout: Layout, tmp_path: Path, cache: Path, photo: Image.Image) -> None:
    model = random_model(layer=LAYOUTS[layout], seed=len(layout.__name__))
    directory = tmp_path / "checkpoint"
    companions = layout(model, directory, cache)
    files = convert(directory, tmp_path / "out", quant="F32", mmproj_quant="F32", companions=companions)
    tokenizer = next(p for p in tmp_path.rglob("tokenizer.json"))
    compare(model, files, tokenizer, photo)


def test_siglip_has_no_class_token_to_leave_out(tmp_path: Path, photo: Image.Image) -> None:
    """XTuner and the official code take all of its patches, where transformers has to be told so."""
    model = random_tower_model("siglip", -2, "full")
    save_encoder(model, tmp_path / "a")
    save_projector(model, save_llm(model, tmp_path / "a"))
    save_clip(model, tmp_path / "siglip-tiny")
    save_official(model, tmp_path / "b", tower=False, mm_vision_tower="google/siglip-tiny")
    for name in "ab":
        files = convert(tmp_path / name, tmp_path / f"{name}-gguf", quant="F32", mmproj_quant="F32")
        compare(model, files, tmp_path / name / "tokenizer.json", photo)


def test_notes_say_where_parts_come_from(tmp_path: Path, cache: Path) -> None:
    adapters(random_model(), tmp_path / "c", cache)
    notes = prepare(tmp_path / "c", tmp_path / "out").notes
    assert notes[:2] == (
        f"the language model is not in the checkpoint; taken from {tmp_path / 'vicuna-7b-v1.5'}",
        f"the vision tower is not in the checkpoint; taken from {tmp_path / 'clip-vit-large-patch14-336'}",
    )
    code, text = many_commands.run({"": ("convert", tmp_path / "c", "-o", tmp_path / "out")})[""]
    assert code == 0, text
    assert all(f"Note: {note}\n" in text for note in notes)
    whole(random_model(), tmp_path / "w", cache)
    assert not any("taken from" in note for note in prepare(tmp_path / "w", tmp_path / "out").notes)


# --- bad input: each as a user meets it; what is done to `adapters` or `whole`, and what the line must name ---


def forget(path: str) -> Callable[[Path], None]:
    return lambda d: shutil.rmtree(d / path)


def settings(**values: Any) -> Callable[[Path], None]:
    return lambda d: save_settings(d, **values)


Damage = Callable[[Path], Any]
BAD_ADAPTERS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no base of the language model": (
        forget("../vicuna-7b-v1.5"),
        ("adapter_config.json: base_model_name_or_path", "language model 'lmsys/vicuna-7b-v1.5' is neither", "--llm"),
    ),
    "no tower": (
        forget("../clip-vit-large-patch14-336"),
        ("vision tower '/share/clip-vit-large-patch14-336' is neither", "--vision-tower"),
    ),
    "nothing says which language model": (
        lambda d: (
            edit_json(d / "llm_adapter" / "adapter_config.json", base_model_name_or_path=None),
            (d / "xtuner_config.py").unlink(),
        ),
        ("language model", "--llm DIR|NAME"),
    ),
    "base without weights": (
        lambda d: [p.unlink() for p in (d.parent / "vicuna-7b-v1.5").glob("*.bin*")],
        ("vicuna-7b-v1.5: no weights",),
    ),
    "base of other sizes": (
        lambda d: save_llm(random_model(text={"hidden_size": 32}), d.parent / "vicuna-7b-v1.5"),
        ("lora_A.weight", "(64, 64)", "(32, 32)"),
    ),
    "base that is a LLaVA": (
        lambda d: edit_json(d.parent / "vicuna-7b-v1.5" / "config.json", model_type="llava"),
        ("vicuna-7b-v1.5/config.json: model_type is 'llava'; supported: llama",),
    ),
    "tower that is none": (
        lambda d: edit_json(d.parent / "clip-vit-large-patch14-336" / "config.json", model_type="bert"),
        ("config.json: model_type is 'bert', which is no vision tower; supported: clip, siglip",),
    ),
    "tower of no kind": (
        lambda d: edit_json(d.parent / "clip-vit-large-patch14-336" / "config.json", model_type=["clip"]),
        ("config.json: model_type is ['clip'], which is no vision tower",),
    ),
    "adapter cut off": (
        lambda d: (d / "llm_adapter" / "adapter_model.bin").write_bytes(b"PK\3\4"),
        ("llm_adapter/adapter_model.bin",),
    ),
    "adapter without weights": (
        lambda d: (d / "visual_encoder_adapter" / "adapter_model.bin").unlink(),
        ("visual_encoder_adapter: no weights",),
    ),
    "adapter of another kind": (
        lambda d: edit_json(d / "llm_adapter" / "adapter_config.json", peft_type="IA3"),
        ("llm_adapter/adapter_config.json: peft_type is 'IA3'; supported: LORA",),
    ),
    "no tokenizer": (
        lambda d: (d.parent / "vicuna-7b-v1.5" / "tokenizer.json").unlink(),
        ("tokenizer.json", "is missing"),
    ),
}
BAD_WHOLE: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "empty projector": (lambda d: (forget("projector")(d), (d / "projector").mkdir()), ("projector: no config.json",)),
    "deep projector": (
        lambda d: edit_json(d / "projector" / "config.json", depth=3),
        ("projector/config.json: depth is 3; projectors of 2 linear layers are supported",),
    ),
    "another activation": (
        lambda d: edit_json(d / "projector" / "config.json", hidden_act="silu"),
        ("projector/config.json: hidden_act is 'silu'; supported: gelu",),
    ),
    "projector of another model": (
        lambda d: save_projector(random_model(text={"hidden_size": 32}), d),
        ("model.0.weight has shape [32, 48]", "[64, 48]"),
    ),
    "language model without its configuration": (
        lambda d: (d / "config.json").write_bytes(b""),
        ("config.json: is empty",),
    ),
    "another language model": (
        lambda d: edit_json(d / "config.json", model_type="internlm2"),
        ("config.json: model_type is 'internlm2'; supported: llama",),
    ),
    "no shards": (
        lambda d: [p.unlink() for p in d.glob("*.safetensors*")],
        ("checkpoint: no weights",),
    ),
    "one shard is missing": (lambda d: (d / "model-00002-of-00003.safetensors").unlink(), ("model-00002-of-00003",)),
    "tower without its configuration": (
        lambda d: (d / "visual_encoder" / "config.json").unlink(),
        ("visual_encoder: no config.json",),
    ),
    "tower without weights": (
        lambda d: (d / "visual_encoder" / "model.safetensors").unlink(),
        ("_encoder: no weights",),
    ),
    "the trained tower is missing": (
        forget("visual_encoder"),
        ("xtuner_config.py: the vision tower was trained, but neither visual_encoder/ nor", "--vision-tower"),
    ),
    "the tower's adapter is missing": (
        lambda d: (forget("visual_encoder")(d), settings(tower_frozen=True, more="x.visual_encoder_lora = dict()")(d)),
        ("xtuner_config.py: the vision tower was trained, but neither visual_encoder/ nor",),
    ),
    "the trained language model is missing": (
        lambda d: [p.unlink() for p in (*d.glob("*.safetensors*"), d / "config.json")],
        ("xtuner_config.py: the language model was trained, but neither llm/ nor llm_adapter/ is there", "--llm"),
    ),
    "the frozen tower is not there": (
        lambda d: (forget("visual_encoder")(d), settings(tower_frozen=True)(d)),
        ("xtuner_config.py: visual_encoder_name_or_path: the vision tower 'someone/the-tower' is neither",),
    ),
    "the frozen language model is not there": (
        lambda d: (
            [p.unlink() for p in (*d.glob("*.safetensors*"), d / "config.json")],
            settings(llm_frozen=True)(d),
        ),
        ("xtuner_config.py: llm_name_or_path: the language model 'x/llm' is neither beside the checkpoint",),
    ),
    "no tower and no settings": (
        lambda d: (forget("visual_encoder")(d), (d / "xtuner_config.py").unlink()),
        ("vision tower 'openai/clip-vit-large-patch14-336' is neither beside the checkpoint nor in the Hub's cache",),
    ),
    "both a tower and its adapter": (
        lambda d: save_adapter(random_model(), TOWER, d / "visual_encoder_adapter", None),
        ("visual_encoder_adapter: the checkpoint has the vision tower as a whole, too", "remove"),
    ),
    "both a language model and its adapter": (
        lambda d: save_adapter(random_model(), LANGUAGE, d / "llm_adapter", None),
        ("llm_adapter: the checkpoint has the language model as a whole, too", "remove"),
    ),
    "a layer that is computed": (settings(layer="1 - 3"), ("xtuner_config.py: visual_select_layer must be one whole",)),
    "a layer that is not there": (settings(layer=-7), ("vision_feature_layer -7 is not one of the 4 hidden states",)),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """What the command says of each bad checkpoint."""
    root = tmp_path_factory.mktemp("bad")
    commands: dict[str, tuple[object, ...]] = {}
    for layout, table in ((adapters, BAD_ADAPTERS), (whole, BAD_WHOLE)):
        for i, (case, (damage, _)) in enumerate(table.items()):
            directory = root / f"{layout.__name__}{i}" / "checkpoint"
            layout(random_model(), directory, root)
            damage(directory)
            commands[case] = ("convert", directory, "-o", directory.parent / "out")
    outcomes = many_commands.run(commands, HF_HOME=str(root))
    assert not list(root.glob("*/out"))
    return outcomes


@pytest.mark.parametrize("case", [*BAD_ADAPTERS, *BAD_WHOLE])
def test_bad_checkpoints(case: str, outcomes: dict[str, tuple[int, str]]) -> None:
    line = many_commands.error_line(outcomes[case])
    for name in {**BAD_ADAPTERS, **BAD_WHOLE}[case][1]:
        assert name in line


def test_the_files_say_what_the_checkpoint_is(tmp_path: Path, cache: Path) -> None:
    """Not what lies outside of it."""
    tuned_tower(random_model(), tmp_path / "c", cache)
    (tmp_path / "c" / "README.md").write_text("---\nlicense: llama3\n---\n")
    next((cache / "hub").glob("*/snapshots/*")).joinpath("README.md").write_text("---\nlicense: mit\n---\n")
    snapshot = into_cache(tmp_path / "c", cache, "xtuner/llava-tiny")
    files = convert(snapshot, tmp_path / "out")
    assert (files.model.name, files.mmproj.name) == ("llava-tiny-Q4_K_M.gguf", "llava-tiny-mmproj-F16.gguf")
    for path in (files.model, files.mmproj):
        metadata = GGUFFile.open(path).metadata
        assert metadata["general.license"] == "llama3"
        assert metadata["general.source.repo_url"] == "https://huggingface.co/xtuner/llava-tiny"
    stored = Preprocessing.from_metadata(GGUFFile.open(files.mmproj).metadata, "")
    assert (stored.mode, stored.shortest_edge) == ("pad", 28)


def test_parts_of_the_checkpoint_cannot_be_replaced(tmp_path: Path, cache: Path) -> None:
    whole(random_model(), tmp_path / "c", cache)
    for companions, option in ((Companions(llm="x/y"), "--llm"), (Companions(vision_tower="x/y"), "--vision-tower")):
        with pytest.raises(CheckpointError, match=rf"{option} 'x/y': the checkpoint has its own"):
            prepare(tmp_path / "c", tmp_path / "out", companions=companions)


def test_settings_are_not_run(tmp_path: Path, cache: Path) -> None:
    """They end the process, were they run; and what they say is read from no more than their beginning."""
    frozen_tower(random_model(), tmp_path / "c", cache)
    path = tmp_path / "c" / "xtuner_config.py"
    path.write_text(path.read_text() + "#" * (1 << 21) + "\nvisual_select_layer = 99\n")
    assert prepare(tmp_path / "c", tmp_path / "out").notes
    path.write_bytes(b"\xff\xfe\0" + path.read_bytes())
    assert json.loads((tmp_path / "c" / "projector" / "config.json").read_text())["depth"] == 2
    assert prepare(tmp_path / "c", tmp_path / "out").notes
