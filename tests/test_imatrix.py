"""Collecting importance matrices: sums against transformers' own inputs, errors, interruptions."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenes
import torch
from llava_checkpoints import TINY, random_model, save
from next_checkpoints import random_next_model, save_next
from numpy.typing import NDArray
from PIL import Image
from test_parity import reference_inputs, write_processor_files
from transformers import LlavaForConditionalGeneration

from local_llava import EngineError, ImageError, PromptError, UsageError, ggml, imatrix
from local_llava.convert import convert
from local_llava.convert.imatrix import read_imatrix
from local_llava.imatrix import Imatrix, Progress, collect
from local_llava.llm import LLM
from local_llava.types import ModelFiles

EXACT: dict[str, Any] = {"kv_type": "F32", "n_threads": 1, "n_gpu_layers": 0}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def picture(seed: int) -> Image.Image:
    scene, _ = next(scenes.sample_scenes(seed, held_out=True))
    return scenes.draw(scene)


class Reference:
    """The same sums of transformers' model, by hooks on its linear layers."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.model = model
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.n_rows = self._first = 0
        for i, layer in enumerate(model.model.language_model.layers):
            for theirs, ours in NAMES.items():
                layer.get_submodule(theirs).register_forward_pre_hook(self._hook(f"blk.{i}.{ours}.weight"))

    def _hook(self, name: str) -> Any:
        def take(_: Any, inputs: tuple[torch.Tensor]) -> None:
            rows = inputs[0][0, self._first :].double().numpy()
            self.sums[name] = self.sums.get(name, 0) + (rows**2).sum(axis=0)

        return take

    def read(self, ids: list[int], first: int, **pixels: Any) -> None:
        """Evaluate tokens; those before the first are known already."""
        self._first = first
        self.n_rows += len(ids) - first
        with torch.no_grad():
            self.model(input_ids=torch.tensor([ids]), **pixels)

    def compare(self, found: Imatrix) -> None:
        assert found.sums.keys() == self.sums.keys() == found.counts.keys()
        assert set(found.counts.values()) == {self.n_rows}
        for name, expected in self.sums.items():
            assert found.sums[name].dtype == np.float32
            assert np.abs(found.sums[name] - expected).max() <= 1e-4 * expected.max(), name
            assert np.allclose(found.sums[name], expected, rtol=1e-4), name


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What each question made the model say."""
    found: list[list[int]] = []
    ask, read = imatrix._Reader._ask, imatrix._Reader._read

    def asking(self: Any, *args: Any) -> None:
        found.append([])
        ask(self, *args)
        del found[-1][0]  # the prompt's

    def reading(self: Any, units: Any) -> None:
        found[-1].append(units[-1])
        read(self, units)

    monkeypatch.setattr(imatrix._Reader, "_ask", asking)
    monkeypatch.setattr(imatrix._Reader, "_read", reading)
    return found


@pytest.mark.parametrize(
    ("text", "max_tokens", "n_batch"),
    [
        ({}, 0, 256),
        ({"num_key_value_heads": 1, "head_dim": 32}, 5, 7),
        ({"attention_bias": True, "mlp_bias": True}, 3, 64),
    ],
)
def test_sums_are_those_of_transformers(
    text: dict[str, Any], max_tokens: int, n_batch: int, answers: list[list[int]], tmp_path: Path
) -> None:
    """Pictures, questions and answers; what two questions about a picture begin with counts once."""
    model = random_model(text, seed=n_batch)
    checkpoint = save(model, tmp_path / "checkpoint")
    write_processor_files(checkpoint)
    files = convert(checkpoint, tmp_path / "out", quant="F32", mmproj_quant="F32")
    pictures = [picture(1), picture(2)]
    asked = [
        (pictures[0], "What do you see?"),
        (pictures[0], "What do you not see?"),
        (pictures[1], "Two\n\nlines 🦙"),
        (pictures[1], "Two\n\nlines 🦙"),
    ]
    found = collect(files.model, files.mmproj, questions=asked, max_tokens=max_tokens, n_batch=n_batch, **EXACT)
    reference = Reference(model)
    before: list[int] = []
    for i, ((image, question), answer) in enumerate(zip(asked, answers, strict=True)):
        inputs = reference_inputs(checkpoint, question, image)
        prompt = inputs["input_ids"][0].tolist()
        assert len(answer) <= max_tokens and (max_tokens == 0 or any(answers))
        differ = [j for j, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b]
        known = min([*differ, len(before), len(prompt) - 1]) if i % 2 else 0
        reference.read([*prompt, *answer], known, pixel_values=inputs["pixel_values"])
        before = [*prompt, *answer]
    reference.compare(found)


def test_texts_are_read_as_llama_imatrix_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that begin with the token that begins a text, without what is left over."""
    monkeypatch.setattr(imatrix, "CHUNK", 40)
    model = random_model(seed=4)
    files = convert(save(model, tmp_path / "checkpoint"), tmp_path / "out", quant="F32", mmproj_quant="F32")
    text = "one two three, 4 5 6. " * 12
    llm = LLM.load(files.model, n_cells=256, n_gpu_layers=0)
    bos = llm.config.vocab.bos
    tokens = [bos, *llm._tokenize(text)]
    llm.close()
    n, rest = divmod(len(tokens), 40)
    assert n >= 2 and rest
    reference = Reference(model)
    for at in range(0, 40 * n, 40):
        reference.read([bos, *tokens[at + 1 : at + 40]], 0)
    seen: list[Progress] = []
    found = collect(files.model, files.mmproj, texts=[text], n_batch=16, on_progress=seen.append, **EXACT)
    reference.compare(found)
    assert (seen[-1].done, seen[-1].total, seen[-1].rows) == (n, n, 40 * n)
    # A short one is read as it is; and no more than asked for.
    reference.sums, reference.n_rows = {}, 0
    reference.read(tokens[:40], 0)
    reference.compare(collect(files.model, files.mmproj, texts=[text], max_chunks=1, **EXACT))
    short = collect(files.model, files.mmproj, texts=["", text[:9]], **EXACT)
    assert 4 <= min(short.counts.values()) == max(short.counts.values()) <= 10 and short.n_chunks == 1


def test_tiles_and_pictures_with_texts(tmp_path: Path) -> None:
    """LLaVA-NeXT's pictures take as many tokens as their sizes ask for."""
    checkpoint = save_next(random_next_model([[28, 56], [56, 28]]), tmp_path / "checkpoint")
    files = convert(checkpoint, tmp_path / "out", quant="Q8_0", mmproj_quant="F32")
    asked = [(picture(3).resize(size), "?") for size in ((56, 28), (28, 28))]
    one, other, both = (
        set(collect(files.model, files.mmproj, questions=part, max_tokens=0, **EXACT).counts.values())
        for part in (asked[:1], asked[1:], asked)
    )
    ((n_one,), (n_other,), (n_both,)) = one, other, both
    assert n_one > n_other and n_both == n_one + n_other
    options = {**EXACT, "system": "Be brief."}
    more = collect(files.model, files.mmproj, questions=asked, texts=["one two"], max_tokens=0, **options)
    assert min(more.counts.values()) > n_both + 10


def test_a_picture_matrix_can_be_used(tiny: ModelFiles, tmp_path: Path) -> None:
    found = collect(TINY, questions=[(picture(5), "What do you see?")], datasets=("pictures",), **EXACT)
    found.save(tmp_path / "imatrix.gguf")
    matrix = read_imatrix(tmp_path / "imatrix.gguf")
    assert len(matrix.importance) == 28 and matrix.datasets == ("pictures",) and matrix.n_chunks == 1
    made = convert(TINY, tmp_path, quant="IQ3_XS", imatrix=tmp_path / "imatrix.gguf")
    assert made.model.stat().st_size < tiny.model.stat().st_size / 5


# ---- errors ----


def test_nothing_to_read() -> None:
    for nothing in ({}, {"texts": [""]}):
        with pytest.raises(UsageError, match="needs pictures with questions, or texts"):
            collect(**nothing)
    with pytest.raises(UsageError, match="no option is called 'nctx'"):
        collect(texts=["a"], nctx=5)


def test_pictures_are_opened_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError, match=r"bad\.png"):
        collect("nowhere.gguf", questions=[(picture(1), "?"), (tmp_path / "bad.png", "?")])


def test_a_question_that_does_not_fit(tiny: ModelFiles) -> None:
    with pytest.raises(PromptError, match=r"a question takes \d+ tokens, the context 64: raise n_ctx"):
        collect(tiny.model, tiny.mmproj, questions=[(picture(1), "What? " * 60)], n_ctx=64, **EXACT)


def test_a_model_that_computes_infinity(tiny: ModelFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    take = imatrix._Sums.take

    def poisoned(self: Any, name: str, inputs: NDArray[np.float32]) -> None:
        if name == "blk.1.ffn_up.weight":
            inputs[0, 0] = np.inf
        take(self, name, inputs)

    monkeypatch.setattr(imatrix._Sums, "take", poisoned)
    with pytest.raises(EngineError, match=r"blk\.1\.ffn_up\.weight: what it is multiplied with is not finite"):
        collect(tiny.model, tiny.mmproj, texts=["one two"], **EXACT)


class Stop(BaseException):
    """As KeyboardInterrupt: no Exception."""


def test_what_the_caller_raises_ends_it(tiny: ModelFiles) -> None:
    n_threads = threading.active_count()
    calls: list[Progress] = []

    def progress(now: Progress) -> None:
        calls.append(now)
        raise Stop

    with pytest.raises(Stop):
        collect(tiny.model, tiny.mmproj, texts=["one two three " * 2000], on_progress=progress, **EXACT)
    assert len(calls) == 1 and threading.active_count() == n_threads


# ---- the callback ----


@pytest.fixture
def watched(tiny: ModelFiles) -> Iterator[tuple[LLM, list[tuple[str, tuple[int, ...]]], list[BaseException]]]:
    seen: list[tuple[str, tuple[int, ...]]] = []
    to_raise: list[BaseException] = []

    class Watching:
        def wants(self, name: str) -> bool:
            return "attn_q" in name or name == "output.weight"

        def take(self, name: str, inputs: NDArray[np.float32]) -> None:
            seen.append((name, inputs.shape))
            if to_raise:
                raise to_raise.pop()

    llm = LLM.load(tiny.model, n_cells=256, n_outputs=8, n_gpu_layers=0, observer=Watching())
    yield llm, seen, to_raise
    llm.close()


def rows_of(n: int, outputs: Any = "all") -> Any:
    from local_llava.llm import Rows

    rows = Rows()
    rows.add(0, 0, list(range(1, n + 1)), outputs)
    return rows


def test_observers_see_what_they_want(watched: Any) -> None:
    llm, seen, _ = watched
    llm.decode(rows_of(5))
    n_layer, n_embd = llm.config.n_layer, llm.config.n_embd
    layers = [(f"blk.{i}.attn_q.weight", (5, n_embd)) for i in range(n_layer)]
    assert seen == [*layers, ("output.weight", (5, n_embd))]
    with_observer = llm.logits().copy()
    plain = LLM.load(llm.config.path, n_cells=256, n_outputs=8, n_gpu_layers=0)
    plain.decode(rows_of(5))
    assert np.array_equal(plain.logits(), with_observer), "looking changes nothing"
    plain.close()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_what_an_observer_raises_is_raised(watched: Any, error: BaseException, capfd: Any) -> None:
    llm, seen, to_raise = watched
    to_raise.append(error)
    with pytest.raises(type(error)):
        llm.decode(rows_of(5))
    assert len(seen) == 1, "the batch ended"
    llm.keep(0, 0)
    llm.decode(rows_of(4))
    assert len(seen) == llm.config.n_layer + 2 and seen[-1] == ("output.weight", (4, llm.config.n_embd))
    assert capfd.readouterr().err == ""


def test_the_tensor_of_a_known_graph() -> None:
    """`struct ggml_tensor` as ctypes has it, against what ggml's functions made."""
    g = ggml.functions()
    assert g.op_name(ggml.MUL_MAT) == b"MUL_MAT"
    context = g.init(ggml.InitParams(8 * g.tensor_overhead(), None, True))
    try:
        shape = (ctypes.c_int64 * 4)(6, 5, 1, 1)
        weight = g.new_tensor(context, ggml.F32, 2, shape)
        inputs = g.new_tensor(context, ggml.F32, 2, (ctypes.c_int64 * 4)(6, 3, 1, 1))
        node = ggml.Tensor.from_address(g.mul_mat(context, weight, inputs))
        assert (node.op, node.type, list(node.ne)) == (ggml.MUL_MAT, ggml.F32, [5, 3, 1, 1])
        assert list(node.nb) == [4, 20, 60, 60] and list(node.src) == [weight, inputs, *[None] * 8]
        g.set_output(ctypes.addressof(node))
        assert node.flags == 2  # GGML_TENSOR_FLAG_OUTPUT
        view = ggml.Tensor.from_address(g.view_3d(context, weight, 2, 2, 1, 24, 48, 24))
        assert (view.view_src, view.view_offs, list(view.ne)) == (weight, 24, [2, 2, 1, 1])
        assert view.name == b" (view)"
        assert ctypes.sizeof(ggml.Tensor) == g.tensor_overhead() - 32  # struct ggml_object
    finally:
        g.free(context)


def test_names_of_copies() -> None:
    from local_llava.llm import observing

    for name, expected in (
        (b"blk.0.attn_k.weight", "blk.0.attn_k.weight"),
        (b"CUDA0#blk.0.attn_k.weight#0", "blk.0.attn_k.weight"),
    ):
        assert observing._weight_name(ggml.Tensor(name=name)) == expected
