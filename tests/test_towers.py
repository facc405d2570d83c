"""SigLIP, several feature layers, ViP-LLaVA and the strategy "full", from the checkpoint on, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from llava_checkpoints import edit_json
from mmproj_files import relative_error
from PIL import Image
from skimage import data
from tower_checkpoints import random_tower_model, save_tower_model, write_siglip_processor
from transformers import AutoProcessor, SiglipImageProcessorPil

from local_llava import Llava
from local_llava.convert import convert
from local_llava.convert.preprocessing import read_preprocessing
from local_llava.errors import CheckpointError
from local_llava.images import preprocess
from local_llava.vision import VisionTower

FIVE = [-2, -5, -8, -11, 6]
DEEP = {"num_hidden_layers": 11, "hidden_size": 32, "intermediate_size": 48}

CASES: dict[str, dict[str, Any]] = {
    "siglip": {},
    "siglip, last but one": {"layers": -2},
    "siglip, two layers": {"layers": [-1, 1]},
    "siglip without its first patch": {"strategy": "default"},
    "siglip, edge left over": {"vision": {"image_size": 45}},
    "siglip, 16 px": {"vision": {"image_size": 64, "patch_size": 16, "num_attention_heads": 8}},
    "siglip, erf": {"vision": {"hidden_act": "gelu"}},
    "siglip, large epsilon": {"vision": {"layer_norm_eps": 0.01}},
    "siglip, square feed-forward": {"vision": {"intermediate_size": 48}},
    "siglip, no projector bias": {"multimodal_projector_bias": False},
    "clip, full": {"kind": "clip", "layers": -2},
    "clip, full, three layers": {"kind": "clip", "layers": [0, -1, 2]},
    "clip, layers not in order, one twice": {"kind": "clip", "layers": [2, -1, 1, 2], "strategy": "default"},
    "clip, tanh": {"kind": "clip", "strategy": "default", "vision": {"hidden_act": "gelu_pytorch_tanh"}},
    "clip, tanh by its other name": {"kind": "clip", "strategy": "default", "vision": {"hidden_act": "gelu_new"}},
    "clip, erf": {"kind": "clip", "vision": {"hidden_act": "gelu"}},
    "vip": {"kind": "clip", "family": "vip", "layers": FIVE, "vision": DEEP},
    "vip, large epsilon": {"kind": "clip", "family": "vip", "layers": [-2, 1], "projector_layernorm_eps": 0.05},
    "vip, one layer": {"kind": "clip", "family": "vip", "layers": -2},
}


def features(model: Any, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found = model.get_image_features(torch.from_numpy(pixels), return_dict=True).pooler_output
    return np.stack([f.numpy() for f in found])


def random_pixels(model: Any, n: int) -> np.ndarray:
    size = model.config.vision_config.image_size
    return np.random.default_rng(7).standard_normal((n, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_features_equal_transformers(case: str, tmp_path: Path) -> None:
    model = random_tower_model(seed=len(case), **CASES[case])
    files = convert(save_tower_model(model, tmp_path / "in"), tmp_path / "out", quant="F32", mmproj_quant="F32")
    pixels = random_pixels(model, 3)
    expected = features(model, pixels)
    for flash_attention in (False, True):
        with VisionTower.load(files.mmproj, n_threads=1, flash_attention=flash_attention) as tower:
            assert tower.n_tokens == expected.shape[1]
            assert relative_error(tower.encode(pixels), expected) <= 1e-5


# Files


def test_a_siglip_file_is_one_that_llama_cpp_reads(tmp_path: Path) -> None:
    """Its names in tools/mtmd/clip.cpp. It would apply a `v.post_ln`, which LLaVA does not."""
    model = random_tower_model()
    files = convert(save_tower_model(model, tmp_path / "in"), tmp_path / "out", quant="F32", mmproj_quant="F32")
    reader = GGUFReader(files.mmproj)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    shapes = {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in reader.tensors}
    assert shapes["v.patch_embd.bias"] == (48,) and shapes["v.position_embd.weight"] == (4, 48)
    assert not {"v.class_embd", "v.pre_ln.weight", "v.post_ln.weight"} & shapes.keys()
    assert fields["clip.use_gelu"] is True and fields["clip.vision.feature_layer"] == [3]
    assert fields["local_llava.vision.activation"] == "gelu_tanh"
    assert fields["local_llava.vision.feature_select"] == "full"
    assert fields["clip.vision.attention.layer_norm_epsilon"] == pytest.approx(1e-6)
    assert fields["local_llava.preprocess.mode"] == "resize" and fields["clip.vision.image_mean"] == [0.5] * 3


def test_the_pooling_head_is_left_out(tmp_path: Path) -> None:
    model = random_tower_model(layers=-2, vision={"vision_use_head": True})
    assert any(".head." in name for name, _ in model.named_parameters())
    for layout in ("5", "4.51", "4.52"):
        checkpoint = save_tower_model(model, tmp_path / layout, layout)
        files = convert(checkpoint, tmp_path / f"{layout}-out", quant="F32", mmproj_quant="F32")
        pixels = random_pixels(model, 1)
        with VisionTower.load(files.mmproj, n_threads=1) as tower:
            assert relative_error(tower.encode(pixels), features(model, pixels)) <= 1e-5


SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("quant", "narrow", "wide", "worst"),
    [
        ("F16", "F16", "F16", 1e-3),
        ("Q8_0", "Q8_0", "F16", 0.02),
        ("Q6_K", "Q8_0", "F16", 0.02),
        ("Q5_K", "Q5_1", "F16", 0.1),
        ("Q4_K", "Q5_0", "F16", 0.1),
    ],
)
def test_quantized_siglip_so400m(
    quant: str, narrow: str, wide: str, worst: float, so400m: tuple[Any, Path], tmp_path: Path
) -> None:
    """Rows of 1152 columns hold no whole blocks of 256, those of 4304 none of 32."""
    model, checkpoint = so400m
    files = convert(checkpoint, tmp_path / "out", quant="F16", mmproj_quant=quant)
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(files.mmproj).tensors}
    assert types["v.blk.0.attn_q.weight"] == types["v.blk.0.ffn_up.weight"] == narrow
    assert types["v.blk.0.ffn_down.weight"] == wide and types["v.patch_embd.weight"] == "F16"
    assert types["v.position_embd.weight"] == types["v.patch_embd.bias"] == "F32"
    pixels = random_pixels(model, 2)
    with VisionTower.load(files.mmproj, n_threads=1) as tower:
        error = relative_error(tower.encode(pixels), features(model, pixels))
    assert worst / 20 < error <= worst


@pytest.fixture(scope="module")
def so400m(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = random_tower_model(vision=SO400M)
    return model, save_tower_model(model, tmp_path_factory.mktemp("so400m") / "in")


# Pictures


PICTURES = {
    "photo": Image.fromarray(data.astronaut()),
    "wide": Image.fromarray(data.coffee()),
    "narrow": Image.fromarray(data.astronaut()[:, 100:137]),
    "small": Image.fromarray(data.astronaut()[:9, :11]),
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("resample", [1, 2, 3])
def test_siglip_pixels_are_those_of_transformers(resample: int, picture: str, tmp_path: Path) -> None:
    write_siglip_processor(tmp_path, 45, resample=resample)
    how = read_preprocessing(tmp_path, 45)
    expected = SiglipImageProcessorPil.from_pretrained(tmp_path)(PICTURES[picture], return_tensors="np").pixel_values
    ours = preprocess([PICTURES[picture]], how)
    assert np.abs(ours - expected).max() <= 1e-6
    assert np.array_equal(np.rint((ours + 1) * 127.5), np.rint((expected + 1) * 127.5)), "other 8-bit values"


def test_a_siglip_processor_that_says_little(tmp_path: Path) -> None:
    """transformers' defaults; and without any file, those of the tower."""
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "SiglipImageProcessorFast"}')
    named = read_preprocessing(tmp_path, 384)
    assert (named.mode, named.mean, named.std, named.resample) == ("resize", (0.5,) * 3, (0.5,) * 3, 3)
    (tmp_path / "preprocessor_config.json").unlink()
    assert read_preprocessing(tmp_path, 384).mode == "crop"
    (tmp_path / "config.json").write_text('{"vision_config": {"model_type": "siglip_vision_model"}}')
    assert read_preprocessing(tmp_path, 384) == named
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"resample": 2}}')
    assert read_preprocessing(tmp_path, 384).resample == 2 and read_preprocessing(tmp_path, 384).mode == "resize"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": 30, "width": 28}}, "size is {'height': 30, 'width': 28}, but the tower takes 28 x 28"),
        ({"size": {"shortest_edge": 28}}, "do_center_crop is false, so pictures would not be square"),
        ({"do_resize": False}, "do_resize is false"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "image_processor_type is 'Siglip2ImageProcessor'; support"),
    ],
)
def test_siglip_processors_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_siglip_processor(tmp_path, 28, **changes)
    with pytest.raises(CheckpointError) as caught:
        read_preprocessing(tmp_path, 28)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Configurations


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another tower": ({"vision_config__model_type": "siglip2_vision_model"}, "clip_vision_model, siglip_vision_model"),
    "activation": (
        {"vision_config__hidden_act": "relu"},
        "hidden_act is 'relu'; supported: quick_gelu, gelu, gelu_pyt",
    ),
    "layer": ({"vision_feature_layer": [-1, -5]}, "vision_feature_layer -5 is not one of the 4 hidden states"),
    "nothing left": (
        {"vision_config__image_size": 14, "vision_feature_select_strategy": "default"},
        "vision_feature_select_strategy is default, which leaves nothing of a picture that is a single patch",
    ),
    "tiles": (
        {"model_type": "llava_next", "vision_feature_select_strategy": "default"},
        "vision_feature_select_strategy is default; LLaVA-NeXT's tiles need full with this tower",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configurations_that_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    checkpoint = save_tower_model(random_tower_model(), tmp_path / "in")
    edit_json(checkpoint / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        convert(checkpoint, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_vip_llava_as_transformers_4_saved_it(tmp_path: Path) -> None:
    """The layers by their old name, and prefixes of every release; what the configuration leaves out is the default."""
    model = random_tower_model("clip", FIVE, family="vip", vision=DEEP)
    pixels = random_pixels(model, 1)
    for layout, changes in (
        ("4.51", {"vision_feature_layer": None, "vision_feature_layers": FIVE}),
        ("4.52", {"vision_feature_layer": None, "projector_layernorm_eps": None}),
    ):
        checkpoint = save_tower_model(model, tmp_path / layout, layout)
        edit_json(checkpoint / "config.json", **changes)
        files = convert(checkpoint, tmp_path / f"{layout}-out", quant="F32", mmproj_quant="F32")
        with VisionTower.load(files.mmproj, n_threads=1) as tower:
            assert relative_error(tower.encode(pixels), features(model, pixels)) <= 1e-5


# Answers


def inputs(checkpoint: Path, picture: Image.Image) -> dict[str, Any]:
    processor = AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": "What do you see?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(images=picture, text=text, add_special_tokens=False, return_tensors="pt"))


LOGITS: dict[str, dict[str, Any]] = {
    **{name: CASES[name] for name in ("siglip", "siglip, two layers", "siglip without its first patch", "clip, full")},
    "vip": CASES["vip"],
    "siglip, tiles": {"family": "next", "layers": [-1, 1], "image_grid_pinpoints": [[28, 56], [56, 56], [84, 28]]},
}


@pytest.mark.parametrize("case", LOGITS)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    model = random_tower_model(seed=3, **LOGITS[case])
    checkpoint = save_tower_model(model, tmp_path / "in")
    files = convert(checkpoint, tmp_path / "out", quant="F32", mmproj_quant="F32")
    with Llava.load(files.model, files.mmproj, kv_type="F32", n_threads=1) as llava:
        for picture in (PICTURES["photo"], PICTURES["narrow"]):
            theirs = inputs(checkpoint, picture)
            with torch.no_grad():
                logits = model(**theirs).logits[0, -1].numpy()
                size = {"image_sizes": theirs["image_sizes"]} if "image_sizes" in theirs else {}
                expected = model.get_image_features(theirs["pixel_values"], **size, return_dict=True).pooler_output[0]
            slot = model.config.image_token_id
            tokens = [None if i == slot else i for i in theirs["input_ids"][0].tolist()]
            assert llava.prompt_tokens("What do you see?", picture) == tokens
            assert relative_error(llava.embed_images(picture)[0], expected.numpy()) <= 1e-5
            assert np.abs(llava.logits("What do you see?", picture) - logits).max() <= 1e-3
