"""The tower computes what transformers computes, and files that are not such a tower are refused by name."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from mmproj_files import Reference, relative_error, write_gguf

from local_llava import ggml, vision, vision_weights
from local_llava.errors import EngineError, ModelFileError
from local_llava.gguf_file import GGUFFile
from local_llava.mmproj import NEWLINE, assumed_feature_layer
from local_llava.preprocessing import Preprocessing
from local_llava.store.digest import file_digest
from local_llava.vision import VisionTower, check_mmproj

F32_BAR, F16_BAR, Q8_BAR = 1e-5, 1e-3, 5e-2

SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "gelu": {"act": "gelu"},
    "large epsilon": {"eps": 0.01},
    "last": {"feature_layer": -1},
    "third last": {"feature_layer": -3},
    "embeddings": {"feature_layer": 0},
    "two, in this order": {"feature_layer": [3, -4]},
    "one head, seven blocks": {"n_head": 1, "n_blocks": 7, "seed": 3},
    "larger": {"image_size": 112, "n_embd": 96, "n_ff": 224, "n_head": 6, "n_blocks": 6, "n_out": 64},
    "16 px": {"image_size": 96, "patch_size": 16, "n_head": 8, "act": "gelu"},
    "edge left over": {"image_size": 45, "patch_size": 14},
    "one patch": {"image_size": 32, "patch_size": 32, "n_blocks": 2},
    "tanh": {"act": "gelu_pytorch_tanh", "own_keys": True},
    "full": {"strategy": "full", "own_keys": True},
    "five layers, a norm before the projector": {
        "feature_layer": [-2, 0, -4, 1, 1],
        "norm_eps": 0.01,
        "own_keys": True,
    },
    "a norm with the tower's epsilon": {"norm_eps": 1e-3, "eps": 1e-3},
    "siglip": {"siglip": True, "act": "gelu_pytorch_tanh", "strategy": "full", "eps": 1e-6, "feature_layer": -1},
    "siglip, erf": {"siglip": True, "act": "gelu", "strategy": "full", "own_keys": True},
    "siglip, quick": {"siglip": True, "act": "quick_gelu", "strategy": "full", "own_keys": True},
    "siglip, two layers": {"siglip": True, "act": "gelu_pytorch_tanh", "strategy": "full", "feature_layer": [-1, 2]},
    "siglip without its first patch": {"siglip": True, "strategy": "default", "own_keys": True, "image_size": 42},
}
SIGLIP = SHAPES["siglip"]


def load(path: Path, **options: Any) -> VisionTower:
    """On one CPU thread: threads that wait for each other are slow where the tests share their cores."""
    return VisionTower.load(path, **{"n_threads": 1, **options})


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture
def tower(reference: Reference, tmp_path: Path) -> Iterator[VisionTower]:
    with load(write_gguf(tmp_path / "m.gguf", reference.metadata(), reference.tensors())) as tower:
        yield tower


def error_of(reference: Reference, path: Path, kind: Q = Q.F32, **options: Any) -> float:
    write_gguf(path, reference.metadata(), reference.tensors(), kind)
    pixels = reference.pixels()
    with load(path, **options) as tower:
        first, dropped = not reference.siglip, reference.strategy == "default"
        assert tower.n_tokens == (reference.image_size // reference.patch_size) ** 2 + first - dropped
        assert tower.n_embd == reference.n_out
        assert tower.preprocessing.mean == (0.5, 0.5, 0.5) and tower.preprocessing.std == (0.25, 0.25, 0.25)
        return relative_error(tower.encode(pixels), reference.features(pixels))


@pytest.mark.parametrize("name", SHAPES)
def test_f32_equals_transformers(name: str, tmp_path: Path) -> None:
    assert error_of(Reference(**SHAPES[name]), tmp_path / "m.gguf") <= F32_BAR


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize(("kind", "dtype"), [(Q.F16, torch.float16), (Q.BF16, torch.bfloat16)])
@pytest.mark.parametrize("name", ["default", "larger", "siglip"])
def test_half_precision_equals_transformers_on_the_same_weights(
    name: str, kind: Q, dtype: torch.dtype, flash_attention: bool, tmp_path: Path
) -> None:
    reference = Reference(**SHAPES[name])
    reference.round_weights(dtype)
    bar = F16_BAR if kind == Q.F16 else 1e-2  # ggml rounds activations to the type of the weights
    assert error_of(reference, tmp_path / "m.gguf", kind, flash_attention=flash_attention) <= bar


@pytest.mark.parametrize("name", ["default", "larger", "siglip"])
def test_q8_0_is_near(name: str, tmp_path: Path) -> None:
    error = error_of(Reference(**SHAPES[name]), tmp_path / "m.gguf", Q.Q8_0)
    assert F32_BAR < error <= Q8_BAR, "not quantized, or wrong"


@pytest.mark.parametrize("n_head", [1, 4, 16])
def test_flash_attention_is_exact_for_siglip(n_head: int, tmp_path: Path) -> None:
    reference = Reference(**{**SIGLIP, "n_head": n_head, "image_size": 70})
    assert error_of(reference, tmp_path / "m.gguf", flash_attention=True, use_gpu=False) <= F32_BAR


@pytest.mark.parametrize(("kind", "worst"), [(Q.F16, 1e-3), (Q.BF16, 1e-2), (Q.Q8_0, 0.03), (Q.Q5_1, 0.1)])
def test_rows_of_siglip_so400m(kind: Q, worst: float, tmp_path: Path) -> None:
    """1152 columns are no multiple of 256, 4304 none of 32, and heads have 72: other kernels than CLIP's run."""
    reference = Reference(**{**SIGLIP, "n_embd": 1152, "n_ff": 4304, "n_head": 16, "n_blocks": 1})
    tensors = reference.tensors()
    writable: dict[str, Any] = {}
    for name, data in tensors.items():
        fits = kind not in (Q.Q8_0, Q.Q5_1) or data.shape[-1] % 32 == 0
        writable[name] = data if fits else data.astype(np.float16)
    path = write_gguf(tmp_path / "m.gguf", reference.metadata(), writable, kind)
    pixels = reference.pixels()
    with load(path) as tower:
        assert relative_error(tower.encode(pixels), reference.features(pixels)) <= worst


def test_what_a_file_without_our_keys_means(tmp_path: Path) -> None:
    """`clip.use_gelu` is true of two functions; a class token tells which, and the other one would show."""
    for siglip, right, wrong in ((False, "gelu", "gelu_tanh"), (True, "gelu_tanh", "gelu")):
        reference = Reference(**SIGLIP if siglip else {"act": "gelu"})
        metadata, pixels = reference.metadata(), reference.pixels()
        cases: list[tuple[dict[str, Any], bool]] = [
            ({}, True),
            ({"local_llava.vision.activation": right}, True),
            ({"local_llava.vision.activation": wrong}, False),
            ({"clip.use_gelu": False}, siglip),  # as the legacy converter writes of every function but "gelu"
        ]
        for changes, fits in cases:
            with load(write_gguf(tmp_path / "m.gguf", {**metadata, **changes}, reference.tensors())) as tower:
                assert (relative_error(tower.encode(pixels), reference.features(pixels)) <= F32_BAR) is fits, changes


@pytest.mark.parametrize("flash_attention", [False, True])
def test_attention_is_exact_on_a_cpu(flash_attention: bool, reference: Reference, tmp_path: Path) -> None:
    assert error_of(reference, tmp_path / "m.gguf", flash_attention=flash_attention, use_gpu=False) <= F32_BAR


def test_flash_attention_is_chosen_where_it_is_exact(tmp_path: Path) -> None:
    """In tiles, from 64 rows on, too: the two kinds sum in another order, and a CPU's default is the faster one."""
    reference = Reference(image_size=140)
    path, pixels = write_gguf(tmp_path / "m.gguf", reference.metadata(), reference.tensors()), reference.pixels()
    outputs = []
    for choice in (None, True, False):
        with load(path, use_gpu=False, flash_attention=choice) as tower:
            outputs.append(tower.encode(pixels))
        assert relative_error(outputs[-1], reference.features(pixels)) <= F32_BAR
    assert np.array_equal(outputs[0], outputs[1]) and not np.array_equal(outputs[0], outputs[2])


def test_flash_attention_with_the_keys_and_values_of_a_gpu(
    tower: VisionTower, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower, "_kv_type", ggml.F16)
    pixels = reference.pixels()
    assert F32_BAR < relative_error(tower.encode(pixels), reference.features(pixels)) <= F16_BAR


def test_pictures_of_a_batch_do_not_touch_each_other(tower: VisionTower, reference: Reference) -> None:
    pixels = reference.pixels(7)
    together = tower.encode(pixels)
    alone = np.concatenate([tower.encode(pixels[i : i + 1]) for i in range(7)])
    tower.images_per_graph = 3
    in_steps = tower.encode(pixels)
    for out in (together, alone, in_steps):
        assert out.shape == (7, 4, 96) and out.dtype == np.float32
        assert max(relative_error(a, b) for a, b in zip(out, reference.features(pixels), strict=True)) <= F32_BAR


def test_memory_bounds_the_pictures_of_a_graph(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf", reference.metadata(), reference.tensors())
    one = check_mmproj(GGUFFile.open(path)).activation_bytes
    for limit, expected in ((0, 1), (3 * one, 3), (1 << 40, 64)):
        monkeypatch.setattr(vision, "MAX_ACTIVATIONS", limit)
        with load(path, use_gpu=False) as tower:
            assert tower.images_per_graph == expected


def test_a_real_towers_pictures_fit_a_graph_of_bounded_size() -> None:
    large = vision.TowerConfig(
        preprocessing=Preprocessing(336, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        patch_size=14,
        n_embd=1024,
        n_ff=4096,
        n_head=16,
        eps=1e-5,
        activation="quick_gelu",
        feature_layers=(23,),
        ffn_swapped=False,
        n_hidden=4096,
        n_out=4096,
    )
    assert 40e6 < large.activation_bytes < 80e6


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_threads_do_not_change_the_result(n_threads: int, reference: Reference, tmp_path: Path) -> None:
    assert error_of(reference, tmp_path / "m.gguf", n_threads=n_threads, use_gpu=False) <= F32_BAR


def test_no_pictures(tower: VisionTower) -> None:
    assert tower.encode(np.empty((0, 3, 28, 28), np.float32)).shape == (0, 4, 96)


def test_pixels_may_lie_anyhow_in_memory(tower: VisionTower, reference: Reference) -> None:
    pixels = reference.pixels()
    turned = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert np.array_equal(tower.encode(turned), tower.encode(pixels))


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((1, 3, 28, 28)), np.zeros((3, 28, 28), np.float32), np.zeros((1, 3, 28, 27), np.float32)],
)
def test_other_pixels_are_refused(tower: VisionTower, pixels: Any) -> None:
    with pytest.raises(ValueError, match=r"pixels must be float32 \[n, 3, 28, 28\]"):
        tower.encode(pixels)


def test_a_closed_tower_says_so_and_closes_twice(tower: VisionTower, reference: Reference) -> None:
    tower.close()
    tower.close()
    with pytest.raises(ValueError, match="closed"):
        tower.encode(reference.pixels())


# In pieces


PIECES = ("default", "embeddings", "last", "two, in this order", "full", "siglip", "siglip, two layers", "one patch")
SEVERAL_LAYERS = "five layers, a norm before the projector"


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("kind", [Q.F32, Q.F16])
@pytest.mark.parametrize("name", [*PIECES, SEVERAL_LAYERS])
def test_pieces_give_what_one_graph_gives(name: str, kind: Q, flash_attention: bool, tmp_path: Path) -> None:
    reference = Reference(**SHAPES[name])
    path = write_gguf(tmp_path / "m.gguf", reference.metadata(), reference.tensors(), kind)
    pixels = reference.pixels(5)
    with load(path, use_gpu=False, flash_attention=flash_attention) as tower:
        whole = tower.encode(pixels)
        assert relative_error(whole, reference.features(pixels)) <= (F32_BAR if kind == Q.F32 else F16_BAR)
        for per_graph, seconds in ((64, 0.0), (2, 0.0), (2, None), (2, 1e-3), (2, float("inf"))):
            tower.images_per_graph = per_graph
            encoding, pieces = tower.begin(pixels), 1
            while not encoding.advance(seconds):
                pieces += 1
            assert np.array_equal(encoding.result, whole), (per_graph, seconds)
            if seconds == 0:
                assert pieces == 5 * (tower.config.n_blocks + 1), "a block of a picture each, and the projector"
            elif seconds != 1e-3:
                assert pieces == 1


def test_tiles_of_llava_next_in_pieces(reference: Reference, tmp_path: Path) -> None:
    metadata = {**reference.metadata(), "clip.vision.image_grid_pinpoints": [28, 56, 56, 28, 56, 56]}
    newline = np.arange(96, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", metadata, {**reference.tensors(), NEWLINE: newline})
    pixels = reference.pixels(5)
    with load(path) as tower:
        tower.images_per_graph = 3
        encoding = tower.begin(pixels)
        while not encoding.advance(0):
            pass
        assert tower.newline is not None and np.array_equal(tower.newline, newline)
        assert relative_error(encoding.result, reference.features(pixels)) <= F32_BAR


def test_encodings_take_turns(tower: VisionTower, reference: Reference) -> None:
    pictures = [reference.pixels(n, seed=n) for n in (2, 3, 1)]
    expected = [tower.encode(pixels) for pixels in pictures]
    encodings = [tower.begin(pixels) for pixels in pictures]
    turns = 0
    while not all(encoding.done for encoding in encodings):
        for encoding in encodings:
            encoding.advance(0)
        turns += 1
        assert np.array_equal(tower.encode(pictures[1]), expected[1]), "a whole graph in between"
    assert turns > 5
    for encoding, values in zip(encodings, expected, strict=True):
        assert encoding.advance(0) and np.array_equal(encoding.result, values)


def test_what_is_dropped_half_way_is_gone(
    tower: VisionTower, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, contexts = ggml.functions(), [0, 0]

    def counted(name: str, i: int) -> Any:
        function = getattr(g, name)

        def call(*arguments: Any) -> Any:
            contexts[i] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(g, "init", counted("init", 0))
    monkeypatch.setattr(g, "free", counted("free", 1))
    pixels = reference.pixels(3)
    expected = tower.encode(pixels)
    for steps in range(1, 8):
        encoding = tower.begin(pixels)
        for _ in range(steps):
            assert not encoding.advance(0)
        with pytest.raises(ValueError, match="not encoded yet"):
            _ = encoding.result
        ref = weakref.ref(encoding)
        del encoding
        assert ref() is None, "something holds it"
    assert contexts == [1 + 28, 1 + 28]
    assert np.array_equal(tower.encode(pixels), expected)


@pytest.mark.parametrize(
    ("function", "failure", "message"),
    [
        ("backend_sched_graph_compute", -1, r"ggml failed to encode pictures on .* \(status -1\)"),
        ("backend_sched_alloc_graph", False, "no memory on .* to encode 1 pictures"),
        ("init", None, "ggml has no memory for a graph"),
    ],
)
def test_a_failure_half_way_leaves_the_tower_as_it_was(
    function: str, failure: Any, message: str, tower: VisionTower, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = reference.pixels()
    expected = tower.encode(pixels)
    encoding = tower.begin(pixels)
    assert not encoding.advance(0)
    with monkeypatch.context() as broken:
        broken.setattr(ggml.functions(), function, lambda *_: failure)
        with pytest.raises(EngineError, match=message):
            encoding.advance(0)
    assert np.array_equal(tower.encode(pixels), expected)
    assert encoding.advance() and np.array_equal(encoding.result, expected), "the same piece, again"


class Clock:
    """Time that passes only where something is computed."""

    def __init__(self, tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.seconds_per_block, self.pieces = 0.0, 1.0, list[tuple[int, int, int]]()
        self.tower, block = tower, tower._places.cost(1, 2)

        def compute(start: int, stop: int, inputs: vision.Arrays, outputs: vision.Arrays) -> None:
            n, cost = len(inputs[start]), tower._places.cost(start, stop)
            self.pieces.append((start, stop, n))
            self.now += n * cost / block * self.seconds_per_block
            tower._seconds_per_cost = self.seconds_per_block / block

        monkeypatch.setattr(tower, "_compute", compute)
        monkeypatch.setattr("local_llava.vision.time.perf_counter", lambda: self.now)


def test_pieces_take_the_time_that_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Reference(n_blocks=20)
    path = write_gguf(tmp_path / "m.gguf", deep.metadata(), deep.tensors())
    with load(path) as tower:
        clock = Clock(tower, monkeypatch)
        encoding = tower.begin(deep.pixels(8))
        assert not encoding.advance(5)
        # In a tower this small the patches take as long as a block.
        assert clock.pieces == [(-1, 1, 1), (1, 3, 1)], "the first tells how long the others take"
        clock.seconds_per_block = 0.1
        began = clock.now
        assert not encoding.advance(0.05)
        assert clock.pieces[2:] == [(3, 4, 1)], "one block at least"
        assert not encoding.advance(0.55) and clock.now - began <= 0.61
        assert clock.pieces[3:] == [(4, 9, 1)]
        while encoding._n_done == 0:
            encoding.advance(0.5)
        pieces = len(clock.pieces)
        encoding.advance(0.5)
        assert clock.pieces[pieces][2] > 1, "several pictures, where there is time"
        while not encoding.done:
            began = clock.now
            encoding.advance(0.5)
            assert clock.now - began <= 0.51
        assert sum(n for _, stop, n in clock.pieces if stop == tower._places.end) == 8


def test_a_tower_that_is_closed_half_way_says_so(tower: VisionTower, reference: Reference) -> None:
    encoding = tower.begin(reference.pixels())
    assert not encoding.advance(0)
    tower.close()
    with pytest.raises(ValueError, match="closed"):
        encoding.advance()


def test_no_pictures_are_done_at_once(tower: VisionTower) -> None:
    encoding = tower.begin(np.empty((0, 3, 28, 28), np.float32))
    assert encoding.done and encoding.advance(0) and encoding.result.shape == (0, 4, 96)


# Weights in the file


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.Q8_0])
def test_weights_stay_in_the_file_on_a_cpu(
    kind: Q, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where they cannot, they are copied, and the result is the same."""
    path, pixels = write_gguf(tmp_path / "m.gguf", reference.metadata(), reference.tensors(), kind), reference.pixels()
    g, placed = ggml.functions(), list[int]()
    alloc = g.backend_tensor_alloc
    monkeypatch.setattr(g, "backend_tensor_alloc", lambda *arguments: placed.append(1) or alloc(*arguments))
    with load(path, use_gpu=False) as tower:
        in_place = tower.encode(pixels)
        # All but the positions and, where it has another type, the patch embedding.
        assert len(placed) == len(tower._weights) - 1 - (kind != Q.F32)
    with monkeypatch.context() as patched:
        patched.setattr(g, "backend_dev_buffer_from_host_ptr", lambda *_: None)
        with load(path, use_gpu=False) as tower:
            assert np.array_equal(tower.encode(pixels), in_place)
    monkeypatch.setattr(vision_weights, "_ALIGNMENT", 1 << 40)
    before = len(placed)
    with load(path, use_gpu=False) as tower:
        assert np.array_equal(tower.encode(pixels), in_place) and len(placed) == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_a_closed_tower_maps_no_file(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "mapped.gguf", reference.metadata(), reference.tensors())

    def mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    pixels = reference.pixels()
    with load(path, use_gpu=False) as tower:
        assert mapped()
        expected = tower.encode(pixels)
        path.unlink()
        assert np.array_equal(tower.encode(pixels), expected), "a file that is removed stays until it is let go"
    assert not mapped()
    write_gguf(path, reference.metadata(), reference.tensors())
    monkeypatch.setattr(ggml.functions(), "backend_alloc_ctx_tensors", lambda *_: None)
    with pytest.raises(EngineError, match=r"no memory on .* for the vision tower of .*mapped\.gguf"):
        load(path, use_gpu=False)
    assert not mapped()


def test_a_file_that_shrinks_before_it_is_mapped_is_refused(reference: Reference, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", reference.metadata(), reference.tensors())
    gguf = GGUFFile.open(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 500)
    cpu = ggml.functions().backend_dev_by_type(ggml.CPU)
    with ExitStack() as stack, pytest.raises(ModelFileError, match=r"ends inside tensor .*: it shrank"):
        vision_weights.load_weights(gguf, check_mmproj(gguf), 0, "CPU", cpu, stack)


def test_the_digest_is_that_of_the_file(reference: Reference, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", reference.metadata(), reference.tensors())
    with load(path) as tower:
        assert tower.digest == file_digest(path)
    os.utime(path, ns=(0, 0))
    with load(path) as other:
        assert other.digest == file_digest(path) != tower.digest


# Legacy files


def legacy(reference: Reference, keep: int, swap: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What convert_image_encoder_to_gguf.py writes: blocks cut, no feature layer, ffn names the other way round."""
    metadata = {key: value for key, value in reference.metadata().items() if key != "clip.vision.feature_layer"}
    metadata["clip.vision.block_count"] = keep
    tensors = {}
    for name, data in reference.tensors().items():
        if name.startswith("v.post_ln") or (name.startswith("v.blk.") and int(name.split(".")[2]) >= keep):
            continue
        if swap:
            name = name.replace("ffn_up", "ffn_X").replace("ffn_down", "ffn_up").replace("ffn_X", "ffn_down")
        tensors[name] = data
    return metadata, tensors


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("n_blocks", "keep", "run"), [(4, 3, 3), (4, 4, 3), (8, 7, 7), (2, 1, 1)])
def test_files_without_a_feature_layer(n_blocks: int, keep: int, run: int, swap: bool, tmp_path: Path) -> None:
    reference = Reference(n_blocks=n_blocks)  # transformers' -2
    path = write_gguf(tmp_path / "m.gguf", *legacy(reference, keep, swap))
    config = check_mmproj(GGUFFile.open(path))
    assert (config.n_blocks, config.ffn_swapped) == (run, swap)
    pixels = reference.pixels()
    with load(path) as tower:
        assert relative_error(tower.encode(pixels), reference.features(pixels)) <= F32_BAR


@pytest.mark.parametrize("class_token", [False, True])
def test_legacy_files_of_real_towers(class_token: bool) -> None:
    for stored, run in ((23, 23), (24, 23), (11, 11), (12, 11), (31, 31), (32, 31), (1, 1), (2, 1)):
        assert assumed_feature_layer(stored, class_token) == run


def test_legacy_files_of_siglip_so400m() -> None:
    """Its 27 blocks are the only odd number; a CLIP tower of 26 blocks would have them all."""
    assert [assumed_feature_layer(n, class_token=False) for n in (25, 26, 27, 28)] == [25, 26, 26, 27]
    assert [assumed_feature_layer(n, class_token=True) for n in (25, 26, 27, 28)] == [25, 25, 27, 27]


def test_equal_widths_are_named_as_llama_cpp_takes_them(tmp_path: Path) -> None:
    reference = Reference(n_ff=64)
    pixels = reference.pixels()
    write_gguf(tmp_path / "m.gguf", *legacy(reference, 3, swap=True))
    with load(tmp_path / "m.gguf") as tower:
        assert relative_error(tower.encode(pixels), reference.features(pixels)) <= F32_BAR


def test_a_file_of_2023_has_no_projector_type(reference: Reference, tmp_path: Path) -> None:
    metadata, tensors = legacy(reference, 3, swap=True)
    del metadata["clip.projector_type"]
    assert check_mmproj(GGUFFile.open(write_gguf(tmp_path / "m.gguf", metadata, tensors))).n_blocks == 3


def test_a_file_that_shrinks_after_the_check_is_refused(reference: Reference, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", reference.metadata(), reference.tensors())
    gguf = GGUFFile.open(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 500)
    last = max(gguf.tensors.values(), key=lambda info: info.offset)
    with path.open("rb") as file, pytest.raises(ModelFileError, match=rf"ends inside tensor {last.name}"):
        vision_weights.read_tensor(gguf, last.name, file)
