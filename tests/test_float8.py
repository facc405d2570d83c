"""Weights in float8, multiplied by their scales: as torch and transformers do it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from local_llava.convert.float8 import with_scales
from local_llava.convert.pickle_file import read_pickle
from local_llava.convert.safetensors_file import read_safetensors
from local_llava.convert.source import SourceTensor
from local_llava.errors import CheckpointError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def opened(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, SourceTensor]:
    save_file(tensors, path / "x.safetensors")
    return with_scales(read_safetensors(path / "x.safetensors"))


def rows(tensor: SourceTensor, block: int = 37) -> NDArray[np.float32]:
    """All of a tensor, in blocks."""
    n_rows = int(np.prod(tensor.shape[:-1]))
    parts = [tensor.rows(i, min(n_rows, i + block)) for i in range(0, n_rows, block)]
    return np.concatenate(parts).reshape(tensor.shape)


def weight(*shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)


def scale(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.1).to(dtype)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_every_code(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    finite = codes[codes.float().isfinite()].reshape(2, -1)
    assert finite.numel() == {E4M3: 254, E5M2: 248}[dtype]
    one = torch.ones(1)
    found = opened(tmp_path, {"w": finite, "w_scale": one})
    assert np.array_equal(rows(found["w"]), finite.float().numpy())
    for code in codes[~codes.float().isfinite()].view(torch.uint8):
        bad = finite.clone()
        bad.view(torch.uint8)[1, 5] = code
        found = opened(tmp_path, {"w": bad, "w_scale": one})
        found["w"].rows(0, 1)
        with pytest.raises(CheckpointError, match=r"x\.safetensors: w: has values that are infinite or no numbers"):
            found["w"].rows(0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (300,), (300, 1)])
def test_scales_of_tensors_and_rows(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w, s = weight(300, 70), scale(*shape, dtype=dtype)
    found = opened(tmp_path, {"a.weight": w, "a.weight_scale": s, "a.bias": torch.ones(300)})
    assert list(found) == ["a.bias", "a.weight"] and found["a.weight"].shape == (300, 70)
    expected = w.float() * (s.float().reshape(-1, 1) if s.numel() > 1 else s.float().reshape(1, 1))
    assert np.array_equal(rows(found["a.weight"]), expected.numpy())


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (96, 64), (1280, 128)])
def test_scales_of_blocks_as_transformers_reads_them(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    n, k = shape
    w, s = weight(n, k), scale(-(-n // 128), -(-k // 128))
    found = opened(tmp_path, {"a.weight": w, f"a.{name}": s})
    parts = {"weight": [w], "weight_scale_inv": [s]}
    ours = rows(found["a.weight"])
    theirs = Fp8Dequantize(None).convert(parts)["weight"]
    assert isinstance(theirs, torch.Tensor) and np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize(("shape", "blocks", "size"), [
    ((200, 300), (2, 3), (128, 128)),
    ((576, 130), (5, 2), (128, 128)),
    ((64, 96), (2, 3), (32, 32)),
    ((64, 96), (64, 3), (1, 32)),
    ((96, 64), (1, 4), (96, 16)),
])  # fmt: skip
def test_scales_of_other_blocks(
    tmp_path: Path, shape: tuple[int, int], blocks: tuple[int, int], size: tuple[int, int]
) -> None:
    w, s = weight(*shape, dtype=E5M2), scale(*blocks)
    found = opened(tmp_path, {"w": w, "w_scale_inv": s})
    spread = s.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)[: shape[0], : shape[1]]
    expected = (w.float() * spread).numpy()
    for block in (1, 7, 128, 1000):
        assert np.array_equal(rows(found["w"], block), expected)
    with ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda i: found["w"].rows(i, i + 1), range(shape[0]))
        assert np.array_equal(np.concatenate(list(parts)), expected)


@pytest.mark.parametrize("shape", [(), (5,), (200,), (3, 5, 7)])
def test_weights_that_are_no_matrices(tmp_path: Path, shape: tuple[int, ...]) -> None:
    w, s = weight(*shape), scale(1)
    found = opened(tmp_path, {"w": w, "w_scale": s})
    assert np.array_equal(rows(found["w"], 2), (w.float() * s).reshape(shape).numpy())


def test_scales_are_taken_out(tmp_path: Path) -> None:
    half = torch.ones(4, 4).half()
    tensors = {
        "q.weight": weight(4, 4),
        "q.weight_scale": scale(1),
        "q.input_scale": scale(1),
        "q.input_scale_ub": scale(1),
        "attn.k_scale": scale(1),
        "norm.weight": half,
        "embed": half.clone(),
    }
    assert sorted(opened(tmp_path, tensors)) == ["embed", "norm.weight", "q.weight"]
    # Without float8 nothing is changed.
    plain = {"a.weight": half, "a.weight_scale": scale(1), "a.input_scale": scale(1)}
    assert opened(tmp_path, plain).keys() == plain.keys()


def test_pickled_weights(tmp_path: Path) -> None:
    w, s = weight(6, 4), scale(6, 1)
    torch.save({"w": w, "w_scale": s}, tmp_path / "x.bin")
    found = with_scales(read_pickle(tmp_path / "x.bin"))
    assert np.array_equal(rows(found["w"]), (w.float() * s).numpy())


@pytest.mark.parametrize(("tensors", "reason"), [
    ({}, "x.safetensors: w is F8_E4M3 and has 0 scales; one is needed: w_scale or w_scale_inv"),
    ({"w_scale": scale(1), "w_scale_inv": scale(1)}, "and has 2 scales"),
    ({"w_scale": scale(3)}, "w_scale has the shape (3,) and dtype F32, which are no scales for (4, 6); one, one a row"),
    ({"w_scale": scale(6, 1)}, "w_scale has the shape (6, 1)"),
    ({"w_scale": scale(3, 2)}, "w_scale has the shape (3, 2)"),
    ({"w_scale": scale(4, 1, 1)}, "w_scale has the shape (4, 1, 1)"),
    ({"w_scale": scale(0)}, "w_scale has the shape (0,)"),
    ({"w_scale": scale(1).to(torch.uint8)}, "dtype U8, which are no scales"),
    ({"w_scale": scale(1).to(torch.float8_e8m0fnu)}, "dtype F8_E8M0, which are no scales"),
    ({"w": weight(2, 3, 4), "w_scale": scale(2, 1)}, "are no scales for (2, 3, 4)"),
])  # fmt: skip
def test_scales_that_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path, {"w": weight(4, 6), **tensors})
    assert str(caught.value).startswith(str(tmp_path)) and reason in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_scales_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    found = opened(tmp_path, {"w": weight(4, 6), "w_scale": torch.tensor(value)})
    with pytest.raises(CheckpointError, match="w: has values that are infinite or no numbers, in rows 0 to 4"):
        found["w"].rows(0, 4)
