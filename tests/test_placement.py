"""Where a pair goes: sizes against what llama.cpp takes, and choices on computers of all kinds."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as c
import pytest
from gguf_bytes import TinyLLM
from llava_checkpoints import TINY, random_model, save

from local_llava import EngineError, Llava, NotEnoughMemoryError, Options, UsageError, devices, ggml, memory, placement
from local_llava.convert import convert
from local_llava.devices import Device
from local_llava.gguf_file import GGUFFile, TensorInfo
from local_llava.llm import LLM, N_BATCH
from local_llava.llm_file import LLMConfig, check_llm
from local_llava.llm_vocab import Vocab
from local_llava.memory import Weights
from local_llava.mmproj import TowerConfig, check_mmproj
from local_llava.placement import Placement, choose
from local_llava.preprocessing import Preprocessing
from local_llava.scheduler import N_RETIRED
from local_llava.speculation import MAX_GUESSED

GB = 10**9


def header(name: str, sizes: dict[str, int]) -> GGUFFile:
    tensors = {tensor: TensorInfo(tensor, (1,), 0, 0, size) for tensor, size in sizes.items()}
    return GGUFFile(Path(name), 3, {}, {}, tensors)


def llama3_8b(**changes: Any) -> tuple[LLMConfig, TowerConfig, GGUFFile, GGUFFile]:
    """The sizes of llava-llama-3-8b in Q4_K_M; the first layer is larger than the others."""
    vocab = Vocab(128_256, "gpt2", bos=1, eos=2, eot=None, add_bos=True, chat_template=None)
    llm = LLMConfig(
        path=Path("8b.gguf"),
        n_embd=4096,
        n_layer=32,
        n_head=32,
        n_head_kv=8,
        n_embd_head=128,
        n_ff=14_336,
        n_ctx_train=8192,
        tied=False,
        vocab=vocab,
    )
    tower = TowerConfig(
        preprocessing=Preprocessing(336, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
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
    tensors = {"token_embd.weight": 295_000_000, "output.weight": 431_000_000, "output_norm.weight": 16_384}
    tensors |= {f"blk.{i}.ffn_down.weight": 124_000_000 if i else 200_000_000 for i in range(32)}
    return (
        replace(llm, **changes),
        tower,
        header("8b.gguf", tensors),
        header("mmproj.gguf", {"v.blk.0.ffn_up.weight": 624_000_000}),
    )


def gpu(
    free: float, total: float | None = None, name: str = "CUDA0", kind: Any = "gpu", backend: str = "CUDA"
) -> Device:
    return Device(1, name, f"NVIDIA {name}", kind, backend, int(free * GB), int((total or free) * GB), name)


@pytest.fixture
def computer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the computer has: gigabytes of memory, and GPUs."""

    def has(free: float, *gpus: Device) -> None:
        monkeypatch.setattr(memory, "available", lambda: int(free * GB))
        monkeypatch.setattr(devices, "devices", lambda: list(gpus))

    return has


# --- sizes ---


def layers_of(name: str) -> list[int]:
    weights = Weights.of(llama3_8b()[2], llama3_8b()[0])
    return list(weights.layers)


def test_every_layer_is_counted_where_it_goes() -> None:
    llm, _, gguf, _ = llama3_8b()
    weights = Weights.of(gguf, llm)
    assert len(weights.layers) == 33 and weights.layers[0] == 200_000_000 and weights.layers[-1] == 431_016_384
    assert weights.on_cpu(0) == sum(tensor.nbytes for tensor in gguf.tensors.values())
    assert weights.on_cpu(1) == weights.on_cpu(0) - 431_016_384, "the output matrix goes first"
    assert weights.on_cpu(2) == weights.on_cpu(1) - 124_000_000
    assert weights.on_cpu(33) == 295_000_000, "the embedding stays"


def test_an_embedding_that_is_the_output_too_is_counted_on_both_sides() -> None:
    llm, _, gguf, _ = llama3_8b(tied=True)
    tensors = {name: tensor for name, tensor in gguf.tensors.items() if name != "output.weight"}
    weights = Weights.of(replace(gguf, tensors=tensors), llm)
    assert weights.on_cpu(0) == sum(tensor.nbytes for tensor in tensors.values())
    assert weights.layers[-1] == 295_016_384 and weights.on_cpu(33) == 295_000_000


@pytest.mark.parametrize("flash_attention", [True, False])
@pytest.mark.parametrize("n_cells", [512, 4096])
def test_the_buffers_are_as_large_as_llama_cpp_says(
    n_cells: int, flash_attention: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = TinyLLM(n_embd=256, n_head=8, n_head_kv=4, n_ff=768)
    model.entries["llama.context_length"] = ("u32", 8192)
    path = tmp_path / "m.gguf"
    path.write_bytes(model.bytes)
    with caplog.at_level(logging.DEBUG, "local_llava"):
        LLM.load(path, n_cells=n_cells, n_seq_max=1, n_outputs=16, flash_attention=flash_attention).close()
    said = {
        name: float(size) * 2**20
        for name, size in re.findall(r"CPU\S* +(\w+) buffer size = +([\d.]+) MiB", caplog.text)
    }
    config = check_llm(GGUFFile.open(path))
    assert said["KV"] == config.n_layer * memory.kv_layer(config, n_cells, "F16")
    ours = memory.compute_bytes(config, n_cells, N_BATCH, 16, flash_attention)
    # llama.cpp says megabytes with two digits.
    assert said["compute"] - 2**14 <= ours <= 1.25 * said["compute"] + 2**16, (ours, said)


def test_the_rows_of_logits_are_those_that_are_asked_for() -> None:
    assert MAX_GUESSED <= memory.OUTPUTS and N_RETIRED + 1 <= memory.OUTPUTS


def test_the_estimate_covers_what_llama_cpp_takes(tmp_path: Path) -> None:
    """Resident memory of a process that loads and asks, beyond that of the same process without a model."""
    text = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 8, "max_position_embeddings": 8192}
    checkpoint = save(random_model(text), tmp_path / "checkpoint")
    files = convert(checkpoint, tmp_path / "out", quant="F16")
    script = (
        "import sys, psutil, os\n"
        "from local_llava import Llava, memory, engine, llm\n"
        "from PIL import Image\n"
        "me = psutil.Process()\n"
        "before = me.memory_info().rss\n"
        "with Llava.load(sys.argv[1], sys.argv[2], n_ctx=8192, parallel=1, n_threads=1) as llava:\n"
        "    llava.ask('word ' * 200, Image.new('RGB', (40, 30)), max_tokens=2)\n"
        "    llava.ask('Now ' * 60, Image.new('RGB', (30, 40)), max_tokens=2)\n"
        "    assert llava._scheduler._aside._place is not None\n"
        "    print(me.memory_info().rss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(files.model), str(files.mmproj)], capture_output=True, text=True, check=True
    )
    taken = int(done.stdout)
    gguf, mmproj = GGUFFile.open(files.model), GGUFFile.open(files.mmproj)
    options = Options(n_ctx=8192, parallel=1, n_gpu_layers=0)
    needed = choose(check_llm(gguf), check_mmproj(mmproj), gguf, mmproj, options).cpu
    assert taken <= needed.total <= 2 * taken, (taken, needed)


# --- choices ---


def test_a_computer_with_much_memory(computer: Any) -> None:
    computer(64)
    placed = choose(*llama3_8b(), Options())
    assert (placed.n_ctx, placed.parallel, placed.kv_type, placed.n_gpu_layers) == (8192, 8, "F16", 0)
    assert placed.n_cells == 8 * (576 + 640) == 9728, "eight questions, each with a picture, fit at the same time"
    assert not placed.tower_on_gpu and placed.gpus == () and placed.notes == ()


def test_a_cache_aside_where_memory_is_left(computer: Any) -> None:
    computer(64)
    placed = choose(*llama3_8b(), Options())
    assert placed.n_cells_aside == 576 + 192 == 768
    without = choose(*llama3_8b(), Options(n_ctx=1024, parallel=1)).cpu
    assert without.kv_cache == 32 * 2 * 1024 * 2 * 1024, "none where it would be as large as the other one"
    computer((placed.cpu.total + 1) / GB)
    assert choose(*llama3_8b(), Options()) == placed
    computer((placed.cpu.total - 1) / GB)
    less = choose(*llama3_8b(), Options())
    assert (less.n_ctx, less.parallel, less.n_cells_aside, less.short) == (8192, 8, 0, False), "it goes first of all"
    computer(64, gpu(20))
    assert choose(*llama3_8b(), Options()).n_cells_aside == 0, "GPUs read all prompts beside each other"


def test_what_is_given_up_first() -> None:
    """From much memory to little: answers at a time, context, precision of the KV cache."""
    seen = list(sweep())
    assert (seen[0], seen[-1]) == (("F16", 8192, 8), ("Q8_0", 2048, 1)) and len(seen) > 5
    order = {"F16": 1, "Q8_0": 0}
    ranks = [(order[kv], n_ctx, parallel) for kv, n_ctx, parallel in seen]
    assert ranks == sorted(ranks, reverse=True)


def sweep() -> Iterator[tuple[str, int, int]]:
    last = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "devices", list)
        for free in range(8 * GB, 5 * GB, -10_000_000):
            patch.setattr(memory, "available", lambda free=free: free)
            try:
                placed = choose(*llama3_8b(), Options())
            except EngineError:
                return
            assert placed.cpu.total <= free
            key = (placed.kv_type, placed.n_ctx, placed.parallel)
            assert bool(placed.notes) == placed.short == (key != ("F16", 8192, 8))
            if key != last:
                yield key
            last = key
    raise AssertionError("too little memory was never told")


def test_too_little_memory_is_told_with_the_numbers(computer: Any) -> None:
    computer(3)
    with pytest.raises(EngineError) as error:
        choose(*llama3_8b(), Options())
    assert type(error.value) is NotEnoughMemoryError
    message = str(error.value)
    for part in ("8b.gguf: ", "needed for a context of 2048 tokens", "weights 5.4 GB", "KV cache", "3.0 GB are free"):
        assert part in message
    with pytest.raises(EngineError, match="for a context of 8000 tokens"):
        choose(*llama3_8b(), Options(n_ctx=8000))
    with pytest.raises(UsageError, match=r"n_ctx must be 1 to 8192, what 8b\.gguf was trained for, not 8193"):
        choose(*llama3_8b(), Options(n_ctx=8193))


def test_more_layers_on_a_larger_gpu(computer: Any) -> None:
    """All sizes of GPUs: what is planned fits, more memory never means fewer layers, and the tower goes first."""
    before = (False, -1)
    for fifths in range(60):
        card = gpu(fifths / 5, total=12)
        computer(64, card)
        placed = choose(*llama3_8b(), Options())
        ((_, need),) = placed.gpus
        assert need.total <= max(0, card.free - 600_000_000)
        assert (placed.tower_on_gpu, placed.n_gpu_layers) >= before, "the tower goes first"
        assert placed.n_gpu_layers == 33 or any("layers stay on the CPU" in note for note in placed.notes)
        assert placed.short == bool(placed.notes)
        before = (placed.tower_on_gpu, placed.n_gpu_layers)
    assert before == (True, 33) and placed.notes == ()
    assert placed.cpu.kv_cache == 0 and placed.cpu.weights == 295_000_000


def test_a_shorter_context_where_all_layers_then_fit(computer: Any) -> None:
    """Layers on the CPU would cost more than a context that nobody asked for is worth."""
    computer(64, gpu(6.6, total=12))
    placed = choose(*llama3_8b(), Options())
    assert placed.n_gpu_layers == 33 and placed.n_ctx == 4096 and "4096 tokens, not 8192" in placed.notes[0], placed
    longer = choose(*llama3_8b(), Options(n_ctx=8192))
    assert longer.n_gpu_layers < 33 and longer.n_ctx == 8192


def test_what_the_user_names_wins(computer: Any) -> None:
    computer(64, gpu(2))
    every = choose(*llama3_8b(), Options(n_gpu_layers=-1))
    assert every.n_gpu_layers == 33 and every.tower_on_gpu and "2.0 GB free" in every.notes[0] and not every.short
    assert choose(*llama3_8b(), Options(n_gpu_layers=1000)).n_gpu_layers == 33
    some = choose(*llama3_8b(), Options(n_gpu_layers=3))
    assert some.n_gpu_layers == 3 and some.tower_on_gpu
    none = choose(*llama3_8b(), Options(n_gpu_layers=0))
    assert none.n_gpu_layers == 0 and not none.tower_on_gpu and none.gpus == () and none.notes == ()
    computer(64)
    absent = choose(*llama3_8b(), Options(n_gpu_layers=-1))
    assert absent.n_gpu_layers == 0 and "llama-cpp-python knows none" in absent.notes[0]
    computer(6.4)
    assert choose(*llama3_8b(), Options(kv_type="Q8_0", n_ctx=8192, parallel=1)).kv_type == "Q8_0"
    with pytest.raises(EngineError, match="needed for a context of 8192 tokens"):
        choose(*llama3_8b(), Options(n_ctx=8192, kv_type="F32"))
    with pytest.raises(EngineError):
        choose(*llama3_8b(), Options(parallel=64))
    computer(64)
    assert choose(*llama3_8b(), Options(parallel=64)).n_cells == 64 * 1216
    assert choose(*llama3_8b(), Options(n_ctx=100, parallel=3)).n_cells == 512


def test_layers_are_dealt_out_as_llama_cpp_does(computer: Any) -> None:
    computer(64, gpu(4, name="CUDA0"), gpu(12, name="CUDA1"))
    placed = choose(*llama3_8b(), Options(n_gpu_layers=16))
    # The tower is loaded first, so that the first GPU has less left: (4 - 0.6) / 15.4 of 16 layers, rounded up.
    first, second = (need for _, need in placed.gpus)
    assert first.weights == 4 * 124_000_000 + 624_000_000
    assert second.weights == 11 * 124_000_000 + 431_016_384
    assert first.kv_cache * 11 == second.kv_cache * 4, "the output matrix has no KV cache"


def test_memory_that_is_shared_counts_once(computer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Options(n_ctx=8192, parallel=1, kv_type="F16")
    computer(64)
    with monkeypatch.context() as patch:
        patch.setattr(placement, "_QUESTION", 100_000)  # more than a cache aside may have
        total = choose(*llama3_8b(), alone).cpu.total
    for free in (total / GB + 0.5, total / GB - 0.1):
        computer(free, gpu(20, kind="igpu", name="Vulkan0", backend="Vulkan"))
        if free * GB < total:
            with pytest.raises(EngineError):
                choose(*llama3_8b(), alone)
        else:
            placed = choose(*llama3_8b(), alone)
            assert placed.n_gpu_layers == 33
            assert placed.cpu.total + placed.gpus[0][1].total <= free * GB


def test_a_gpu_that_does_not_tell_its_memory(computer: Any) -> None:
    computer(64, gpu(0, 0, kind="igpu"))
    assert choose(*llama3_8b(), Options()).n_gpu_layers == 33


def test_factors_for_long_contexts_are_never_taken(computer: Any) -> None:
    """llama.cpp goes by the size of the whole KV cache, so that more answers must not make it larger."""
    computer(64)
    llm, tower, gguf, mmproj = llama3_8b(n_ctx_train=4096)
    tensors = {**gguf.tensors, "rope_factors_long.weight": TensorInfo("rope_factors_long.weight", (48,), 0, 0, 192)}
    gguf = replace(gguf, tensors=tensors)
    placed = choose(llm, tower, gguf, mmproj, Options())
    assert (placed.n_ctx, placed.n_cells, placed.parallel) == (4096, 4096, 2)
    assert "takes no larger KV cache" in placed.notes[0] and not placed.short
    assert choose(llm, tower, gguf, mmproj, Options(parallel=8)).n_cells == 4096
    assert not placed.n_cells_aside, "where they would be the others"


def test_no_context_is_chosen_that_a_picture_fills(computer: Any) -> None:
    llm, tower, gguf, mmproj = llama3_8b()
    grid = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    many = replace(tower, preprocessing=replace(tower.preprocessing, grid=grid))
    computer(64)
    assert choose(llm, many, gguf, mmproj, Options()).n_cells == 28_672
    computer(6.1)
    with pytest.raises(EngineError, match="needed for a context of 4096 tokens"):
        choose(llm, many, gguf, mmproj, Options(kv_type="F16"))
    assert choose(llm, tower, gguf, mmproj, Options(kv_type="F16")).n_ctx == 2048
    assert memory.picture_bytes(many) == memory.picture_bytes(tower, 5), "the picture, and four tiles of it"


def test_a_kv_cache_that_llama_cpp_cannot_have(computer: Any) -> None:
    computer(64)
    with pytest.raises(UsageError, match=r"kv_type Q8_0 packs numbers by 32, but the heads of 8b\.gguf have 144"):
        choose(*llama3_8b(n_embd_head=144), Options(kv_type="Q8_0"))
    with pytest.raises(UsageError, match="kv_type Q8_0 is only possible with flash attention"):
        choose(*llama3_8b(), Options(kv_type="Q8_0", flash_attention=False))
    computer(5.87)
    assert choose(*llama3_8b(), Options()).kv_type == "Q8_0"
    for changes, options in (({"n_embd_head": 144}, Options()), ({}, Options(flash_attention=False))):
        with pytest.raises(EngineError):
            choose(*llama3_8b(**changes), options)


def test_a_limit_of_the_process_counts(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("ulimit")
    files = convert(TINY, tmp_path, quant="F16")
    command = f"ulimit -v 1500000; exec {sys.executable} -m local_llava.cli ask --model {files.model} --n-ctx 1024 hi"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ})
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1)
    command = (
        "ulimit -v 1500000; exec " + sys.executable + " -c 'from local_llava import memory; print(memory.available())'"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert 0 < json.loads(done.stdout) < 1_500_000 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="others do not count mapped files as free")
def test_what_is_reserved_for_others_is_not_available() -> None:
    try:
        before = memory.available()
        memory.reserve(before // 2)
        assert abs(memory.available() - before / 2) < 0.1 * before
        memory.reserve(before * 100)
        assert memory.available() == 0
    finally:
        memory.reserve(0)


def test_any_computer_gets_a_plan_that_fits_it(computer: Any) -> None:
    """Random computers and options: what comes out fits, or too little memory is told."""
    rng = random.Random(7)
    placed_at_all = 0
    for _ in range(300):
        cards = [gpu(rng.uniform(0, 24), 24, f"CUDA{i}") for i in range(rng.choice((0, 1, 1, 2, 3)))]
        free = rng.uniform(1, 32)
        computer(free, *cards)
        options = Options(
            n_ctx=rng.choice((None, None, 512, 4096, 8192)),
            parallel=rng.choice((None, None, 1, 3, 16)),
            n_batch=rng.choice((None, 32, 2048)),
            flash_attention=rng.choice((None, None, False, True)),
        )
        try:
            placed = choose(*llama3_8b(), options)
        except EngineError as e:
            assert "of memory are needed" in str(e)
            continue
        placed_at_all += 1
        check_fits(placed, free * GB, options)
    assert placed_at_all > 150


def check_fits(placed: Placement, free: float, options: Options) -> None:
    assert placed.cpu.total <= free
    for card, need in placed.gpus:
        assert not need.total or need.total <= card.free - 0.05 * card.total
    assert options.n_ctx in (None, placed.n_ctx) and options.parallel in (None, placed.parallel)
    assert placed.n_cells % 256 == 0 and placed.n_cells >= placed.n_ctx
    assert 0 <= placed.n_gpu_layers <= 33
    assert placed.parallel <= placement.MAX_DEFAULT_PARALLEL or options.parallel == placed.parallel


@pytest.mark.parametrize(("asked", "told"), [(-1, True), (3, True), (0, False), ("auto", False)])
def test_who_asks_for_a_gpu_that_is_not_there_is_told(
    asked: Any, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "gpus", list)
    files = convert(TINY, tmp_path, quant="F16")
    with caplog.at_level(logging.WARNING, "local_llava"), Llava.load(files.model, files.mmproj, n_gpu_layers=asked):
        pass
    assert any("no layers on a GPU" in record.message for record in caplog.records) == told


@pytest.mark.parametrize("failing", ["the tower", "the language model", "nothing"])
def test_a_gpu_that_fails_is_not_used(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The CPU stands in for a GPU; what a driver can fail in returns what it returns then."""
    cpu = next(device for device in devices.devices() if device.kind == "cpu")
    monkeypatch.setattr(devices, "devices", lambda: [replace(cpu, kind="gpu", name="CUDA0", backend="CUDA"), cpu])
    g = ggml.functions()
    load_file, start_device = c.llama_model_load_from_file, g.backend_dev_init
    asked: list[int] = []
    started: list[int] = []

    def load_model(path: bytes, params: Any) -> Any:
        asked.append(params.n_gpu_layers)
        return None if params.n_gpu_layers and failing == "the language model" else load_file(path, params)

    def start(device: int, parameters: None) -> Any:
        started.append(device)
        return None if len(started) == 1 and failing == "the tower" else start_device(device, parameters)

    monkeypatch.setattr(c, "llama_model_load_from_file", load_model)
    monkeypatch.setattr(g, "backend_dev_init", start)
    files = convert(TINY, tmp_path, quant="F16")
    with caplog.at_level(logging.WARNING, "local_llava"), Llava.load(files.model, files.mmproj, n_threads=1) as llava:
        assert llava.ask("What do you see?", max_tokens=1).tokens
    told = [record.message for record in caplog.records if "the CPU computes everything" in record.message]
    assert len(told) == (failing != "nothing")
    assert asked == {"the tower": [0], "the language model": [5, 0], "nothing": [5]}[failing]
