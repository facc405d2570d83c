"""LLaVA-NeXT against transformers: resolutions, pixels, the order of embeddings, token counts, features and logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from next_checkpoints import Grid, random_next_model, save_next
from numpy.typing import NDArray
from PIL import Image
from skimage import data
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from local_llava import ImageError, Llava, Message, PromptError, UsageError, embeddings
from local_llava.convert import convert
from local_llava.images import preprocess, preprocess_tiles, with_mode
from local_llava.pictures.anyres import Arrangement, arrangement, best_resolution, cut, most_tiles, most_tokens
from local_llava.preprocessing import Preprocessing
from local_llava.request import Picture
from local_llava.types import ModelFiles

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

REAL: Grid = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""Of llava-hf's checkpoints."""

GRIDS: dict[str, tuple[int, int, Grid]] = {
    # image_size, patch_size, resolutions
    "real": (336, 14, REAL),
    "one tile": (28, 14, ((28, 28),)),
    "odd patches": (42, 14, ((42, 84), (126, 42), (84, 84), (126, 126))),
    "left over": (30, 14, ((30, 60), (90, 60))),
    "large": (24, 4, tuple((24 * i, 24 * j) for i in range(1, 7) for j in range(1, 7) if i * j <= 12)),
}

SIZES = [(1, 1), (336, 336), (640, 480), (480, 640), (1000, 1000), (3000, 1000), (337, 335), (5, 900), (900, 5)]
SIZES += [(1, 2000), (2000, 1), (671, 672), (10_000, 9_999), (97, 131), (1008, 336)]
"""Width and height."""


def sizes(n: int, seed: int = 0) -> list[tuple[int, int]]:
    """The above, and some by chance, of all aspects and up to 4,000 pixels."""
    rng = np.random.default_rng(seed)
    logs = np.exp(rng.uniform(0, np.log(4000), (n, 2)))
    return SIZES + [(int(w), int(h)) for w, h in logs] + [(int(w), int(h)) for w, h in rng.integers(200, 1500, (n, 2))]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def processor(image_size: int, grid: Grid, **rest: Any) -> LlavaNextImageProcessorPil:
    settings = {"size": {"shortest_edge": image_size}, **rest}
    crop = {"height": image_size, "width": image_size}
    return LlavaNextImageProcessorPil(crop_size=crop, image_grid_pinpoints=[list(size) for size in grid], **settings)


# --- the parts ---


@pytest.mark.parametrize("name", GRIDS)
def test_resolutions_equal_transformers(name: str) -> None:
    _, _, grid = GRIDS[name]
    for width, height in sizes(2000):
        assert best_resolution(height, width, grid) == select_best_resolution((height, width), list(grid))


@pytest.mark.parametrize("name", GRIDS)
def test_pixels_equal_transformers(name: str) -> None:
    image_size, _, grid = GRIDS[name]
    its, how = processor(image_size, grid), Preprocessing(image_size, MEAN, STD, grid=tuple(grid))
    pictures = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee", "rocket")]
    for picture in [*pictures, *(noise(*size) for size in sizes(6) if size[0] * size[1] < 4_000_000)]:
        same_pixels(its, picture, how)


@pytest.mark.parametrize("resample", [0, 2, 3])
@pytest.mark.parametrize("edge", [28, 40])
def test_filters_and_a_shortest_edge_beyond_the_crop(resample: int, edge: int) -> None:
    grid = ((28, 56), (84, 56))
    its = processor(28, grid, size={"shortest_edge": edge}, resample=resample)
    how = Preprocessing(28, MEAN, STD, shortest_edge=edge, resample=resample, grid=grid)
    for size in ((100, 60), (33, 80), (9, 7)):
        same_pixels(its, noise(*size), how)


def same_pixels(its: LlavaNextImageProcessorPil, picture: Image.Image, how: Preprocessing) -> None:
    expected = its(picture, return_tensors="np")["pixel_values"][0]
    ours = preprocess_tiles(picture, how)
    assert ours.dtype == np.float32 and ours.shape == expected.shape, picture.size
    assert np.abs(ours - expected).max() <= 1e-6, picture.size
    back = [np.rint((p.transpose(0, 2, 3, 1) * how.std + how.mean) * 255) for p in (ours, expected)]
    assert np.array_equal(*back), picture.size


def pack(
    features: NDArray[np.float32], width: int, height: int, name: str, newline: NDArray[np.float32]
) -> NDArray[np.float32]:
    """transformers' order."""
    image_size, patch_size, grid = GRIDS[name]
    vision = SimpleNamespace(image_size=image_size, patch_size=patch_size)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=[list(g) for g in grid]))
    tensors = [torch.from_numpy(features)], torch.tensor([[height, width]]), "default", torch.from_numpy(newline)
    packed: NDArray[np.float32] = LlavaNextModel.pack_image_features(model, *tensors)[0][0].numpy()
    return packed


@pytest.mark.parametrize("name", GRIDS)
def test_embeddings_are_ordered_as_in_transformers(name: str) -> None:
    image_size, patch_size, grid = GRIDS[name]
    tile = (image_size // patch_size) ** 2
    how, rng = Preprocessing(image_size, MEAN, STD, grid=tuple(grid)), np.random.default_rng(3)
    newline = rng.normal(size=2).astype(np.float32)
    for width, height in sizes(100, seed=1):
        n_tiles = image_size_to_num_patches((height, width), [list(g) for g in grid], image_size)
        features = rng.normal(size=(n_tiles, tile, 2)).astype(np.float32)
        ours = arrangement(height, width, how, tile, True)
        expected = pack(features, width, height, name, newline)
        assert ours.n_tokens == len(expected), (width, height)
        assert np.array_equal(ours.apply(features, newline), expected), (width, height)


def test_a_single_tile_is_ordered_as_in_transformers() -> None:
    features, newline = np.random.default_rng(0).normal(size=(1, 4, 3)).astype(np.float32), np.ones(3, np.float32)
    plain = Preprocessing(28, MEAN, STD)
    ours = arrangement(50, 80, plain, 4, True)
    expected = pack(features, 80, 50, "one tile", newline)
    assert ours.n_tokens == 5 and np.array_equal(ours.apply(features, newline), expected)
    without = arrangement(50, 80, plain, 4, False)
    assert without.n_tokens == 4 and np.array_equal(without.apply(features, None), features[0])


@pytest.mark.parametrize("name", GRIDS)
def test_token_counts_equal_transformers(name: str) -> None:
    image_size, patch_size, grid = GRIDS[name]
    how = Preprocessing(image_size, MEAN, STD, grid=tuple(grid))
    tile = (image_size // patch_size) ** 2
    its = SimpleNamespace(image_processor=processor(image_size, grid), patch_size=patch_size)
    its.num_additional_image_tokens = 0
    its._get_unpadded_features = partial(LlavaNextProcessor._get_unpadded_features, None)
    for width, height in sizes(2000, seed=2):
        expected = LlavaNextProcessor._get_number_of_features(its, height, width, image_size, image_size)
        n = arrangement(height, width, how, tile, True).n_tokens
        assert n == expected <= most_tokens(how, tile), (width, height)


def test_the_largest_picture() -> None:
    real = Preprocessing(336, MEAN, STD, grid=tuple(REAL))
    assert most_tiles(real) == 5 and most_tokens(real, 576) == 2928
    assert arrangement(672, 672, real, 576, True).n_tokens == 2928
    assert most_tiles(Preprocessing(336, MEAN, STD)) == 1 and most_tokens(Preprocessing(336, MEAN, STD), 577) == 577


def test_features_of_another_shape_are_refused() -> None:
    ours = Arrangement(4, rows=1, columns=2, newline=True)
    newline = np.zeros(5, np.float32)
    for shape, line in (((3, 5, 5), newline), ((2, 4, 5), newline), ((3, 4, 5), None)):
        with pytest.raises(ValueError, match=r"features must be \[3, 4, 'n_embd'\]"):
            ours.apply(np.zeros(shape, np.float32), line)


def test_chosen_preprocessing_shows_one_tile() -> None:
    how = Preprocessing(28, MEAN, STD, grid=((28, 56),))
    wide = noise(90, 40)
    for choice in ("pad", "crop"):
        chosen = with_mode(how, choice)  # type: ignore[arg-type]
        plain = Preprocessing(28, MEAN, STD, mode=choice)  # type: ignore[arg-type]
        assert chosen == plain
        assert np.array_equal(preprocess_tiles(wide, chosen), preprocess([wide], plain))
    assert with_mode(how, "checkpoint") is how and len(preprocess_tiles(wide, how)) == 3


def test_pictures_too_narrow_are_named() -> None:
    """Stretched to a square, the rows alone would take gigabytes; the tiles keep the aspect."""
    narrow = Image.new("RGB", (1, 600_000))
    how = Preprocessing(336, MEAN, STD, grid=tuple(REAL))
    assert [tile.size for tile in cut(narrow, how)] == [(336, 336)] * 2
    for grid, mode in ((how.grid, "crop"), ((), "resize")):
        with pytest.raises(ImageError, match="1 x 600000 is too narrow"):
            preprocess_tiles(narrow, Preprocessing(336, MEAN, STD, mode=mode, grid=grid))  # type: ignore[arg-type]


# --- the whole path ---

PICTURES = {"wide": (160, 40), "tall": (31, 97), "square": (64, 64), "tiny": (3, 2), "huge": (700, 500)}
PICTURES["sliver"] = (500, 4)

CASES: dict[str, dict[str, Any]] = {
    "as llava-hf": {"grid": ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))},
    "one tile": {"grid": ((28, 28),)},
    "many tiles": {"grid": ((56, 56), (84, 112)), "vision": {"num_hidden_layers": 2}},
    "odd patches": {
        "grid": ((42, 84), (126, 42)),
        "vision": {"image_size": 42, "num_hidden_layers": 4, "hidden_act": "gelu"},
        "vision_feature_layer": -3,
    },
    "several layers": {"grid": ((28, 84), (56, 28)), "vision_feature_layer": [-1, 1]},
    "patches left over": {"grid": ((30, 60), (60, 60)), "vision": {"image_size": 30}},
}


def picture(name: str) -> Image.Image:
    """A photograph of that size."""
    return Image.fromarray(data.astronaut() if name in ("wide", "huge") else data.coffee()).resize(PICTURES[name])


def inputs(checkpoint: Path, question: str, pictures: list[Image.Image]) -> dict[str, Any]:
    its = AutoProcessor.from_pretrained(checkpoint)
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    text = its.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(its(images=pictures, text=text, add_special_tokens=False, return_tensors="pt"))


def compare(
    model: LlavaNextForConditionalGeneration,
    checkpoint: Path,
    llava: Llava,
    pictures: list[Image.Image],
    question: str = "What do you see?",
) -> None:
    theirs = inputs(checkpoint, question, pictures)
    ids = theirs["input_ids"][0].tolist()
    slot = model.config.image_token_id
    assert llava.prompt_tokens(question, pictures) == [None if i == slot else i for i in ids]
    with torch.no_grad():
        features = model.get_image_features(theirs["pixel_values"], theirs["image_sizes"], return_dict=True)
        logits = model(**theirs).logits[0, -1].numpy()
    for ours, expected in zip(llava.embed_images(pictures), features.pooler_output, strict=True):
        assert ours.shape == expected.shape and ours.dtype == np.float32
        assert np.linalg.norm(ours - expected.numpy()) <= 1e-5 * np.linalg.norm(expected.numpy())
    assert np.abs(llava.logits(question, pictures) - logits).max() <= 1e-3


@pytest.mark.parametrize("case", CASES)
def test_random_weights(case: str, tmp_path: Path) -> None:
    model = random_next_model(seed=len(case), **CASES[case])
    checkpoint = save_next(model, tmp_path / "checkpoint")
    files = convert(checkpoint, tmp_path / "out", quant="F32", mmproj_quant="F32")
    with Llava.load(files.model, files.mmproj, kv_type="F32", n_threads=1) as llava:
        for name in PICTURES:
            compare(model, checkpoint, llava, [picture(name)])


class Pair:
    """A model in both libraries."""

    def __init__(self, directory: Path) -> None:
        self.model = random_next_model(CASES["as llava-hf"]["grid"], seed=7)
        self.checkpoint = save_next(self.model, directory / "checkpoint")
        self.files: ModelFiles = convert(self.checkpoint, directory / "out", quant="F32", mmproj_quant="F32")

    def load(self, **options: Any) -> Llava:
        return Llava.load(self.files.model, self.files.mmproj, **{"kv_type": "F32", "n_threads": 1, **options})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def llava(pair: Pair) -> Iterator[Llava]:
    with pair.load() as llava:
        yield llava


def test_pictures_of_different_sizes(pair: Pair, llava: Llava) -> None:
    """In one question, in either order; each keeps its own number of tokens."""
    wide, tall = picture("wide"), picture("tall")
    compare(pair.model, pair.checkpoint, llava, [wide, tall])
    compare(pair.model, pair.checkpoint, llava, [tall, wide])
    embeddings = llava.embed_images([wide, tall])
    assert isinstance(embeddings, list)
    n_tokens = [len(e) for e in embeddings]
    assert n_tokens[0] != n_tokens[1]
    embeddings[0][:] = 0
    assert np.any(llava.embed_images([wide, tall])[0]), "what is kept is not the caller's"
    assert llava.ask("?", [wide, tall], max_tokens=1).timings.image_tokens == sum(n_tokens)
    same = llava.embed_images([tall, tall])
    assert isinstance(same, np.ndarray) and same.shape == (2, n_tokens[1], pair.model.config.text_config.hidden_size)
    assert np.shape(llava.embed_images([]))[0] == 0


def test_tiles_are_computed_in_several_graphs(pair: Pair) -> None:
    with pair.load() as llava:
        llava._tower.images_per_graph = 2
        compare(pair.model, pair.checkpoint, llava, [picture("huge"), picture("wide")])


def test_a_conversation_reuses_pictures_of_different_sizes(pair: Pair, llava: Llava) -> None:
    """What the context keeps and computes anew for each follow-up, and that a fresh one answers alike."""
    first, other = picture("huge"), picture("tall")
    turns = [Message("user", "What do you see?", (first,))]
    n_first, n_other = (len(e) for e in llava.embed_images([first, other]))
    llava.ask("Something else.", picture("square"), max_tokens=1)
    reply = llava.chat(turns, max_tokens=8)
    assert reply.timings.image_tokens == n_first
    turns += [Message("assistant", reply.text), Message("user", "And here?", (other,))]
    seen: list[tuple[int, int]] = []
    second = llava.chat(turns, max_tokens=8, on_prefill=lambda done, total: seen.append((done, total)))
    assert second.timings.reused_tokens >= n_first and second.timings.image_tokens == n_first + n_other
    assert seen[-1] == (second.timings.prompt_tokens,) * 2 and seen[0][0] > second.timings.reused_tokens
    turns += [Message("assistant", second.text), Message("user", "Once more?")]
    third = llava.chat(turns, max_tokens=8)
    assert third.timings.images_encoded == 0 and third.timings.reused_tokens > n_first + n_other
    with pair.load() as fresh:
        alone = fresh.chat(turns, max_tokens=8)
    assert alone.timings.reused_tokens == 0 and alone.timings.images_encoded == 2
    assert alone.tokens == third.tokens


def test_equal_tiles_of_different_sizes_are_different_pictures(llava: Llava) -> None:
    """Black amid black padding: the tiles are equal, but not what is left out of them."""
    low, high = Image.new("RGB", (56, 40)), Image.new("RGB", (56, 50))
    how = llava._tower.preprocessing
    one, other = (Picture.of(preprocess_tiles(i, how), llava._tower.arrangement(i.size, how)) for i in (low, high))
    assert np.array_equal(one.pixels, other.pixels) and one.digest != other.digest
    a, b = llava.embed_images([low, high])
    assert len(a) == one.arrangement.n_tokens != len(b) == other.arrangement.n_tokens


def test_one_tile_by_choice(pair: Pair, llava: Llava) -> None:
    """A tower's tile and one newline, as `pack_image_features` has a single tile."""
    wide = picture("wide")
    n_patches = llava._tower.n_tokens
    replies = {
        choice: llava.ask("?", wide, preprocess=choice, max_tokens=1) for choice in ("checkpoint", "pad", "crop")
    }
    assert replies["checkpoint"].timings.image_tokens > n_patches + 1
    for choice in ("pad", "crop"):
        assert replies[choice].timings.image_tokens == n_patches + 1
    with pair.load(preprocess="pad") as padded:
        assert padded.prompt_tokens("?", 1) == padded.prompt_tokens("?", wide)
        ours = padded.embed_images(wide)[0]
    pixels = preprocess([wide], Preprocessing(28, MEAN, STD, mode="pad"))
    with torch.no_grad():
        hidden = pair.model.model.vision_tower(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[-2]
        tile = pair.model.model.multi_modal_projector(hidden[:, 1:])[0]
        expected = torch.cat([tile, pair.model.model.image_newline[None]]).numpy()
    assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_number_of_pictures_is_not_enough_for_their_tokens(llava: Llava) -> None:
    with pytest.raises(UsageError, match="images must be the pictures, not their number"):
        llava.prompt_tokens("?", 1)
    assert None not in llava.prompt_tokens("?", 0) == llava.prompt_tokens("?")


def test_a_context_too_short_for_a_picture(pair: Pair) -> None:
    square = picture("square")
    n_image, n_pad = 4 + 4 * (4 + 1), 4 + 1
    with pair.load() as llava:
        n_prompt = len(llava.prompt_tokens("?", square))
    with pair.load(n_ctx=n_prompt) as llava:
        message = rf"{n_prompt} tokens, {n_image} of them for pictures, the context {n_prompt}: .*--preprocess pad"
        with pytest.raises(PromptError, match=message):
            llava.ask("?", square)
        assert llava.ask("?", square, preprocess="pad", max_tokens=1).timings.image_tokens == n_pad


def test_known_pictures_are_bounded_in_bytes(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [noise(60 + i, 50) for i in range(6)]
    with pair.load() as llava:
        one = np.asarray(llava.embed_images(pictures[0])[0])
        monkeypatch.setattr(embeddings, "KNOWN_BYTES", 3 * one.nbytes + 1)
        llava.embed_images(pictures)
        known = llava._scheduler._encoder._known
        assert len(known) == 3 and sum(e.nbytes for e in known.values()) <= embeddings.KNOWN_BYTES
        assert all(e.base is None for e in known.values()), "a view would keep all of a batch"
        assert np.array_equal(llava.embed_images(pictures[0])[0], one)
        monkeypatch.setattr(embeddings, "KNOWN_BYTES", 0)
        assert llava.ask("?", pictures, max_tokens=1, preprocess="pad").timings.images_encoded == 6
        assert not known


def test_the_class_token_has_no_place_in_a_grid() -> None:
    """Why the feature selection "full" is not offered: transformers fails, too."""
    model = random_next_model(((28, 56),), vision_feature_select_strategy="full")
    with pytest.raises(RuntimeError), torch.no_grad():
        model.get_image_features(torch.zeros(1, 3, 3, 28, 28), torch.tensor([[28, 56]]))
