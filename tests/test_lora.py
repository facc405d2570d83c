"""LoRA adapters as peft writes them: merged as peft merges them, or refused by name."""

from __future__ import annotations

import json
import re
import threading
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from local_llava.convert import lora_merge
from local_llava.convert.lora import LoraAdapter
from local_llava.convert.source import SourceTensor
from local_llava.convert.weights import read_weights
from local_llava.errors import CheckpointError

LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=40,
    attention_bias=True,
)
TOWER = CLIPVisionConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
)


class Mixed(torch.nn.Module):
    """Layers that store their weights as [in, out], one of them square."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Conv1D(24, 16)
        self.square = Conv1D(16, 16)
        self.table = torch.nn.Embedding(10, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(self.square(self.table(x)))  # type: ignore[no-any-return]


def llama() -> torch.nn.Module:
    return LlamaForCausalLM(LLAMA)


def tower() -> torch.nn.Module:
    return CLIPVisionModel(TOWER)


@dataclass
class Made:
    """A base and an adapter on the disk, and what peft makes of them."""

    base: Path
    adapter: Path
    merged: dict[str, torch.Tensor]

    @property
    def tensors(self) -> dict[str, SourceTensor]:
        return dict(read_weights(self.base))

    def apply(self) -> dict[str, SourceTensor]:
        return LoraAdapter.open(self.adapter).apply(self.tensors)


def made(
    folder: Path,
    build: Any = llama,
    *,
    dtype: torch.dtype = torch.float32,
    safetensors: bool = True,
    **options: Any,
) -> Made:
    torch.manual_seed(0)
    model = build().to(dtype)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    (folder / "base").mkdir(parents=True)
    save_file(base, folder / "base" / "model.safetensors")
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fan_in_fan_out, and embeddings that are saved
        trained = peft.get_peft_model(model, peft.LoraConfig(**options))
        for name, value in trained.named_parameters():
            if "modules_to_save" in name or (options.get("bias", "none") != "none" and name.endswith("bias")):
                value.data.add_(torch.randn_like(value))
        trained.save_pretrained(folder / "adapter", safe_serialization=safetensors)
        fresh = build().to(dtype)
        fresh.load_state_dict(base)
        loaded = peft.PeftModel.from_pretrained(fresh, folder / "adapter").merge_and_unload()
    return Made(folder / "base", folder / "adapter", loaded.state_dict())


def rows(tensor: SourceTensor, block: int = 7) -> NDArray[np.float32]:
    """All of a tensor, in blocks."""
    n_rows = int(np.prod(tensor.shape[:-1]))
    parts = [tensor.rows(i, min(n_rows, i + block)) for i in range(0, n_rows, block)]
    return np.concatenate(parts).reshape(tensor.shape)


def check(made: Made, *, unchanged: str = "$^", tolerance: float = 1e-6) -> None:
    """That the result is what peft makes, and that peft changed all tensors but some."""
    found, before = made.apply(), made.tensors
    assert found.keys() == made.merged.keys() == before.keys()
    for name, value in made.merged.items():
        tensor, expected = found[name], value.float().numpy()
        assert (tensor.name, tensor.dtype, tensor.shape) == (name, before[name].dtype, tuple(value.shape))
        np.testing.assert_allclose(rows(tensor), expected, rtol=tolerance, atol=tolerance)
        changed = not np.array_equal(rows(before[name]), expected)
        assert changed == (not re.search(unchanged, name)), name


REST = r"norm|bias|patch_embedding|position|class_embedding|embed_tokens|lm_head"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]


@pytest.mark.parametrize("safetensors", [True, False])
def test_linear_layers(tmp_path: Path, safetensors: bool) -> None:
    made_ = made(tmp_path, target_modules=LINEAR, safetensors=safetensors)
    assert (made_.adapter / f"adapter_model.{'safetensors' if safetensors else 'bin'}").is_file()
    check(made_, unchanged=REST)


def test_a_tower(tmp_path: Path) -> None:
    layers = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    check(made(tmp_path, tower, target_modules=layers, r=16, lora_alpha=4), unchanged=r"norm|bias|embedding")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(tmp_path: Path, dtype: torch.dtype) -> None:
    """peft rounds the product and the sum to the base's dtype."""
    check(made(tmp_path, dtype=dtype, target_modules=LINEAR), unchanged=REST, tolerance=torch.finfo(dtype).eps)


def test_rank_and_alpha_patterns(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"layers.0.self_attn.q_proj": 3, "v_proj": 5, r"[ko]_proj": 9, "roj": 7},
        "alpha_pattern": {
            "^model.layers.0.*": 11,
            r"layers\.\d+\.self_attn\.(q|v)_proj": 2.5,
            "(k_proj|o_proj)": 13,
            r"mlp\.[a-f]\w+_proj": -4,
            "proj": 17,
        },
    }
    made_ = made(tmp_path, target_modules=LINEAR, **patterns)  # peft sorts them when it saves
    check(made_, unchanged=REST)
    pairs = LoraAdapter.open(made_.adapter).pairs
    scales = {path.removeprefix("model.layers."): pair.scale for path, pair in pairs.items()}
    assert scales["0.self_attn.q_proj"] == 11 / 3 and scales["0.self_attn.k_proj"] == 13 / 9
    assert scales["0.mlp.up_proj"] == 11 / 4 and scales["1.mlp.up_proj"] == 6 / 4
    assert scales["1.self_attn.v_proj"] == 2.5 / 5 and scales["1.mlp.down_proj"] == -1


def test_rank_stabilized(tmp_path: Path) -> None:
    made_ = made(tmp_path, use_rslora=True, lora_alpha=3, rank_pattern={"v_proj": 9})
    check(made_, unchanged=REST + "|k_proj|o_proj|mlp")
    assert {pair.scale for pair in LoraAdapter.open(made_.adapter).pairs.values()} == {1.5, 1.0}


def test_embeddings(tmp_path: Path) -> None:
    """peft saves the whole embedding beside the adapter of it, which then counts."""
    made_ = made(tmp_path, target_modules=["embed_tokens", "lm_head", "q_proj"])
    assert any("base_layer" in name for name in load_file(made_.adapter / "adapter_model.safetensors"))
    check(made_, unchanged=r"norm|bias|[kvo]_proj|mlp")


def test_transposed_weights(tmp_path: Path) -> None:
    made_ = made(tmp_path, Mixed, target_modules=["wide", "square", "table"], fan_in_fan_out=True)
    assert json.loads((made_.adapter / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    check(made_, unchanged="bias")


def test_modules_to_save(tmp_path: Path) -> None:
    made_ = made(tmp_path, modules_to_save=["lm_head", "input_layernorm"])
    check(made_, unchanged=r"post_attention|model.norm|bias|[ko]_proj|mlp|embed_tokens")
    assert str(made_.adapter) in str(made_.apply()["lm_head.weight"])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases(tmp_path: Path, bias: str) -> None:
    unchanged = r"norm|mlp|embed_tokens|lm_head|[ko]_proj.weight" + ("" if bias == "all" else r"|[ko]_proj")
    check(made(tmp_path, bias=bias), unchanged=unchanged)


def test_ways_to_begin(tmp_path: Path) -> None:
    """Those that change the base weights are refused until peft has converted them."""
    for initial in (True, "gaussian", "orthogonal"):
        made_ = made(tmp_path / str(initial), init_lora_weights=initial)
        check(made_, unchanged="" if initial != "orthogonal" else "[^qv]_proj|norm|bias|embed|head")
    made_ = made(tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(CheckpointError, match="init_lora_weights is 'pissa', which changes the base weights; convert"):
        LoraAdapter.open(made_.adapter)


def test_the_base_model_of_an_adapter(tmp_path: Path) -> None:
    made_ = made(tmp_path)
    assert LoraAdapter.open(made_.adapter).base_model is None
    configure(made_.adapter, base_model_name_or_path="openai/clip-vit-large-patch14-336")
    assert LoraAdapter.open(made_.adapter).base_model == "openai/clip-vit-large-patch14-336"


@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.vision_tower.vision_tower.vision_model."])
@pytest.mark.parametrize("own", ["", "vision_model.", "x.vision_model."])
def test_prefixes_of_names(tmp_path: Path, prefix: str, own: str) -> None:
    """The base may call its tensors otherwise than the model that was trained, but for the end."""
    made_ = made(tmp_path, tower)
    rename(made_.base / "model.safetensors", lambda name: prefix + name.removeprefix("vision_model."))
    start = "base_model.model."
    rename(
        made_.adapter / "adapter_model.safetensors",
        lambda name: start + own + name.removeprefix(start).removeprefix("vision_model."),
    )
    if own.startswith("x") and prefix.startswith("model."):
        with pytest.raises(CheckpointError, match="which the base model does not have"):
            made_.apply()
        return
    found = made_.apply()
    for name, value in made_.merged.items():
        name = prefix + name.removeprefix("vision_model.")
        np.testing.assert_allclose(rows(found[name]), value.numpy(), rtol=1e-6, atol=1e-6)


def test_names_that_may_be_two(tmp_path: Path) -> None:
    made_ = made(tmp_path, tower)
    tensors = load_file(made_.base / "model.safetensors")
    both = {f"{tower}.{name}": value.clone() for tower in ("text", "vision") for name, value in tensors.items()}
    save_file(both, made_.base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"which may be text\..* or vision\..* of the base model"):
        made_.apply()
    # One that is called the same is meant, whatever else there is.
    save_file(tensors | both, made_.base / "model.safetensors")
    found = made_.apply()
    name = next(name for name in tensors if "q_proj.weight" in name)
    np.testing.assert_allclose(rows(found[name]), made_.merged[name].numpy(), rtol=1e-6, atol=1e-6)
    assert np.array_equal(rows(found[f"text.{name}"]), tensors[name].numpy())


def rename(path: Path, new: Any) -> None:
    save_file({new(name): value for name, value in load_file(path).items()}, path)


def configure(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'; supported: LORA"),
        ({"peft_type": None}, "peft_type is missing"),
        ({"use_dora": True}, "use_dora is set, which is not supported; plain LoRA is"),
        ({"target_parameters": ["mlp.experts.w"]}, "target_parameters is set"),
        ({"layer_replication": [[0, 4]]}, "layer_replication is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"r": 0}, "r must be a number from 1 to 1e+09, not 0"),
        ({"r": 8}, "are not of rank 8"),
        ({"r": "x"}, "r must be a number"),
        ({"lora_alpha": [1]}, "lora_alpha must be a number"),
        ({"rank_pattern": [1]}, "rank_pattern must be an object"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern.q_proj must be a number"),
        ({"rank_pattern": {"q_proj": 5}}, "are not of rank 5"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern.q_proj is missing"),
        ({"alpha_pattern": {"(": 5}}, "alpha_pattern: '(': at character"),
        ({"alpha_pattern": {"(a{9}){9}": 5}}, "alpha_pattern: '(a{9}){9}': counts are not supported"),
        ({"alpha_pattern": {"(a)\\1": 5}}, "alpha_pattern: '(a)\\\\1': at character"),
        ({"alpha_pattern": {f"a{i}*": 1 for i in range(9)}}, "has 9 patterns, and 9 that are more than a name"),
        ({"alpha_pattern": {f"a{i}": 1 for i in range(1025)}}, "has 1025 patterns"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out must be true or false"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path must be a text"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights is ['pissa']"),
    ],
)
def test_configurations_that_are_refused(plain: Made, tmp_path: Path, values: Mapping[str, Any], reason: str) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((plain.adapter / name).read_bytes())
    configure(adapter, **values)
    with pytest.raises(CheckpointError) as caught:
        LoraAdapter.open(adapter)
    assert str(caught.value).startswith(str(adapter)) and str(caught.value).isprintable()
    assert reason in str(caught.value)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({f"{Q}.lora_A.weight": None}, "q_proj.lora_B.weight: of lora_A and lora_B of a module, only one is there"),
        ({f"{Q}.lora_embedding_A": torch.zeros(4, 32)}, "or more than these two"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 32, 3, 3)}, "has the shape (4, 32, 3, 3) and dtype F32; LoRA is supp"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 32).long()}, "dtype I64"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 31)}, "and B make the shape (32, 31), and"),
        ({f"{Q}.lora_B.weight": torch.zeros(32, 5)}, "have the shapes (4, 32) and (32, 5), which are not of rank 4"),
        ({f"{Q}.lora_magnitude_vector": torch.zeros(32)}, "lora_magnitude_vector is not supported; lora_A"),
        ({f"{Q}.lora_B.bias": torch.zeros(32)}, "q_proj.lora_B.bias is not supported"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, "are the same tensor of the base"),
        ({f"{Q}.{x}weight": torch.zeros(32, 32) for x in ("base_layer.", "")}, "are the same tensor of the base"),
        ({"base_model.model.model.norm.weight": torch.zeros(31)}, "norm.weight has the shape (31,), and"),
        ({"base_model.model.score.weight": torch.zeros(3, 32)}, "score.weight adapts score.weight, which the base"),
        (
            {f"{Q.replace('q_proj', 'qkv')}.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"},
            "adapts model.layers.0.self_attn.qkv.weight, which the base model does not have",
        ),
        (
            {f"{Q.replace('model.layers', 'layers')}.lora_{x}.weight": torch.zeros(n) for x, n in
             {"A": (4, 32), "B": (32, 4)}.items()},
            "which another tensor of the adapter adapts as well",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(plain: Made, tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    tensors = load_file(plain.adapter / "adapter_model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((plain.adapter / "adapter_config.json").read_bytes())
    with pytest.raises(CheckpointError) as caught:
        LoraAdapter.open(tmp_path).apply(plain.tensors)
    assert str(caught.value).startswith(str(tmp_path)) and reason in str(caught.value)


def test_values_that_are_no_numbers(plain: Made, tmp_path: Path) -> None:
    tensors = load_file(plain.adapter / "adapter_model.safetensors")
    tensors[f"{Q}.lora_A.weight"][1, 2] = 3e38
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((plain.adapter / "adapter_config.json").read_bytes())
    configure(tmp_path, lora_alpha=1e6)
    tensor = LoraAdapter.open(tmp_path).apply(plain.tensors)["model.layers.0.self_attn.q_proj.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            CheckpointError, match=r"q_proj\.weight with .*lora_A\.weight: has values that are infinite"
        ):
            tensor.rows(0, 32)


def test_directories_that_are_no_adapters(plain: Made, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json, so this is no adapter"):
        LoraAdapter.open(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes((plain.adapter / "adapter_config.json").read_bytes())
    with pytest.raises(CheckpointError, match="no weights"):
        LoraAdapter.open(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="the adapter has no tensors"):
        LoraAdapter.open(tmp_path)


def test_expressions_that_take_python_for_ever(plain: Made, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes((plain.adapter / "adapter_model.safetensors").read_bytes())
    (tmp_path / "adapter_config.json").write_bytes((plain.adapter / "adapter_config.json").read_bytes())
    configure(tmp_path, alpha_pattern={"(([a-z0-9_.]+)+)+!": 1})
    start = time.monotonic()
    assert len(LoraAdapter.open(tmp_path).pairs) == 4
    assert time.monotonic() - start < 5


def test_threads_read_each_matrix_once(plain: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    lock = threading.Lock()

    @dataclass(frozen=True)
    class Counted:
        tensor: SourceTensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self.tensor, name)

        def rows(self, start: int, stop: int) -> NDArray[np.float32]:
            with lock:
                read.append(f"{self.tensor.name} {stop - start}")
            return self.tensor.rows(start, stop)

    adapter = LoraAdapter.open(plain.adapter, lambda path: {n: Counted(t) for n, t in read_weights(path).items()})
    found = adapter.apply(plain.tensors)
    merged = [found[f"{path}.weight"] for path in adapter.pairs]
    with ThreadPoolExecutor(4) as pool:
        for tensor in merged:
            blocks = list(pool.map(lambda i, tensor=tensor: tensor.rows(i, i + 1), range(tensor.shape[0])))
            np.testing.assert_allclose(np.concatenate(blocks), plain.merged[tensor.name].numpy(), rtol=1e-6, atol=1e-6)
    assert sorted(line for line in read if "lora_A" in line) == sorted(
        f"{pair.a.name} 4" for pair in adapter.pairs.values()
    )
    # However little is kept, two matrices are, which is what one weight takes at most.
    monkeypatch.setattr(lora_merge, "CACHE_BYTES", 0)
    read.clear()
    for tensor in merged:
        rows(tensor)
    assert len([line for line in read if "lora_A" in line]) <= 4
