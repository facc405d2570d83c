"""The list of models: its data, its checks, its look-ups, and the sizes that follow from it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from local_llava import memory, model_list, model_sizes
from local_llava.convert import prepare, write
from local_llava.convert.plan import GGUFPlan
from local_llava.errors import UsageError
from local_llava.gguf_file import GGUFFile
from local_llava.llm_file import check_llm
from local_llava.mmproj import check_mmproj
from local_llava.model_list import ModelEntry

ROOT = Path(__file__).parent.parent
TINY = ROOT / "models" / "tiny-llava"
LIST = ROOT / "models" / "models.json"


def document() -> Any:
    return json.loads(LIST.read_text(encoding="utf-8"))


def test_the_names_that_the_readme_promises_are_there() -> None:
    names = [entry.name for entry in model_list.entries()]
    assert names[0] == "llava-llama-3-8b"
    assert {"llava-llama-3-8b-v1", "llava-1.5-7b", "llava-1.5-13b", "llava-phi-3-mini"} <= set(names)
    assert len(names) == len(set(names)) == len(document()["models"])
    for entry in model_list.entries():
        assert entry.checkpoint.format != "gguf" and len(entry.scores) in (0, 13)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("llava-llama-3-8b", "llava-llama-3-8b"),
        ("LLaVA-Llama-3-8B-v1_1", "llava-llama-3-8b"),
        ("xtuner/llava-llama-3-8b-v1_1", "llava-llama-3-8b"),
        ("XTuner/LLaVA-llama-3-8b", "llava-llama-3-8b-v1"),
        ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b"),
        ("llava-phi3", "llava-phi-3-mini"),
    ],
)
def test_a_model_has_several_names(name: str, entry: str) -> None:
    assert model_list.get(name).name == entry
    assert model_list.find(name) is model_list.get(entry)


@pytest.mark.parametrize(
    ("name", "near"),
    [("llava-phi-3-mni", "llava-phi-3-mini"), ("xtuner/llava-phi-3-min", "xtuner/llava-phi-3-mini"), ("zzz", "")],
)
def test_an_unknown_name_suggests_near_ones(name: str, near: str) -> None:
    assert model_list.find(name) is None
    with pytest.raises(UsageError, match="local-llava models") as e:
        model_list.get(name)
    assert near in str(e.value) and ("did you mean" in str(e.value)) == bool(near)


def test_names_with_types() -> None:
    assert model_list.split_name("llava-1.5-7b:q6_k") == ("llava-1.5-7b", "Q6_K")
    assert model_list.split_name("llava-1.5-7b") == ("llava-1.5-7b", None)
    assert model_list.split_name(":q4_0") == (":q4_0", None)


@pytest.mark.parametrize(
    "name", ["a", "a/b/c", "/a", "a/", "../a", "a/..", "a b/c", "a/b--c", "a/" + "b" * 200, "C:/a"]
)
def test_what_is_no_repository(name: str) -> None:
    assert not model_list.is_repository(name)
    assert model_list.is_repository("xtuner/llava-llama-3-8b-v1_1")


def test_published_pairs() -> None:
    entry = model_list.get("llava-llama-3-8b")
    repository, pair = entry.published("Q4_K_M") or pytest.fail("none")
    assert repository.name == "xtuner/llava-llama-3-8b-v1_1-gguf"
    assert (pair.model, pair.mmproj_quant) == ("llava-llama-3-8b-v1_1-int4.gguf", "F16")
    assert entry.published("Q6_K") is None and entry.published("Q4_K_M", "Q8_0") is None
    assert entry.checkpoint.name == "xtuner/llava-llama-3-8b-v1_1-transformers"


def edited(**changes: Any) -> Any:
    """The document with changes to the first model; None removes."""
    value = copy.deepcopy(document())
    value["models"][0].update(changes)
    for key in [key for key, change in changes.items() if change is None]:
        del value["models"][0][key]
    return value


def repositories(**changes: Any) -> list[Any]:
    first, *others = document()["models"][0]["repositories"]
    return [{**first, **changes}, *others]


BAD: dict[str, tuple[Any, str]] = {
    "no list": ([], "must be an object"),
    "no models": ({"about": "", "vision_config": {}}, "models is missing"),
    "a model that is none": ({"about": "", "vision_config": {}, "models": [1]}, "must be an object"),
    "no title": (edited(title=None), "title is missing"),
    "an unknown field": (edited(size=3), "'size' is unknown"),
    "a number for a text": (edited(license=3), "license must be of type str"),
    "a name with capitals": (edited(name="LLaVA"), "is no name"),
    "an alias with a slash": (edited(aliases=["a/b"]), "is no name"),
    "a negative size": (edited(vocabulary_bytes=-1), "vocabulary_bytes must be"),
    "a score that is a number": (edited(scores={"POPE": 87.2}), "scores must be texts"),
    "no checkpoint": (edited(repositories=repositories()[:1]), "no checkpoint"),
    "an unknown format": (edited(repositories=repositories(format="onnx")), "format must be one of"),
    "no repository": (edited(repositories=repositories(name="../x")), "is not owner/name"),
    "no pairs": (edited(repositories=repositories(pairs=[])), "has pairs"),
    "a file elsewhere": (
        edited(
            repositories=repositories(
                pairs=[{"quant": "F16", "mmproj_quant": "F16", "model": "../a.gguf", "mmproj": "b.gguf"}]
            )
        ),
        "not the name of a GGUF file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_defect_of_the_list_is_named(case: str) -> None:
    value, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        model_list.parse(value)


def tiny_entry() -> ModelEntry:
    """tiny-llava as a model of the list."""
    config = json.loads((TINY / "config.json").read_text())
    return replace(
        model_list.get("llava-1.5-7b"),
        text_config=config["text_config"],
        vision_config=config["vision_config"],
        vocabulary_bytes=0,
    )


@pytest.mark.parametrize("quant", ["Q4_K_M", "F16", "Q3_K_S"])
def test_sizes_are_those_of_the_converter(quant: str, tmp_path: Path) -> None:
    plan = prepare(TINY, tmp_path, quant=quant, mmproj_quant="Q8_0")
    size = model_sizes.size(tiny_entry(), quant, "Q8_0")
    # All but the metadata.
    assert size.model == write.output_size(GGUFPlan((), plan.model.tensors))
    assert size.mmproj == write.output_size(GGUFPlan((), plan.mmproj.tensors))


def test_memory_is_that_which_loading_reckons_with(tmp_path: Path) -> None:
    files = prepare(TINY, tmp_path, quant="Q8_0").write()
    llm, tower = check_llm(GGUFFile.open(files.model)), check_mmproj(GGUFFile.open(files.mmproj))
    need = memory.on_cpu(llm, files.sizes, memory.picture_bytes(tower), llm.n_ctx_train)
    size = model_sizes.size(tiny_entry(), "Q8_0")
    assert size.n_ctx == llm.n_ctx_train
    assert size.memory - size.files == need.total - need.weights


def test_sizes_agree_with_those_published() -> None:
    phi = model_list.get("llava-phi-3-mini")
    pair = phi.published("Q4_K_M")
    assert pair is not None and pair[1].model_bytes is not None
    # "int4" is Q4_K_M: no other type is within 5 % of it.
    assert model_sizes.size(phi, "Q4_K_M").model == pytest.approx(pair[1].model_bytes, rel=1e-3)
    for entry in model_list.entries():
        repository = entry.checkpoint
        if repository.format == "transformers":
            assert repository.bytes == pytest.approx(model_sizes.size(entry, "F16").files, rel=0.02), entry.name


def test_sizes_fall_with_the_types() -> None:
    entry = model_list.get("llava-llama-3-8b")
    sizes = [model_sizes.size(entry, quant) for quant in ("F32", "F16", "Q8_0", "Q6_K", "Q4_K_M", "Q2_K")]
    assert sorted(sizes, key=lambda size: -size.memory) == sizes
    assert all(size.memory > size.files for size in sizes)
    with pytest.raises(UsageError, match="Q9"):
        model_sizes.size(entry, "Q9")


def test_tiles_of_llava_next_take_memory() -> None:
    entry = model_list.get("llava-1.6-vicuna-7b")
    tiled, plain = model_sizes.size(entry), model_sizes.size(replace(entry, grid=()))
    assert tiled.memory - tiled.files > plain.memory - plain.files
    assert tiled.mmproj - plain.mmproj >= 4 * 4096  # the newline


def test_what_is_to_be_downloaded() -> None:
    phi = model_list.get("llava-phi-3-mini")
    assert model_sizes.download_bytes(phi, "Q4_K_M") == 2318919200 + 607648960
    assert model_sizes.download_bytes(phi, "Q6_K") == phi.checkpoint.bytes
    assert model_sizes.download_bytes(phi, "Q4_K_M", repository="xtuner/llava-phi-3-mini") == 8310000000
    assert model_sizes.download_bytes(model_list.get("llava-1.5-7b-xtuner"), "Q4_K_M") is None
