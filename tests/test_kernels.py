"""Our quantization kernels against ggml's, byte by byte, and when they are used."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_quantize import Model, compare, quiet
from numpy.typing import NDArray

from local_llava import ggml_rows
from local_llava.convert import kernels, mixes, quantize

KINDS = [(type, weighted) for type in kernels.KERNELS for weighted in (False, True)]
every_kind = pytest.mark.parametrize(("type", "weighted"), KINDS, ids=lambda value: getattr(value, "name", None))

Rows = NDArray[np.float32]


def check(type: T, rows: Rows, importance: Rows | None) -> None:
    ours = kernels.load(type, importance is not None)(rows, importance)
    theirs = ggml_rows.quantize_chunk(type, rows, importance)
    if not np.array_equal(ours, theirs):
        length, size = GGML_QUANT_SIZES[type]
        block = int((ours != theirs).reshape(-1, size).any(axis=1).argmax())
        pytest.fail(f"block {block}: {rows.reshape(-1, length)[block]!r}, importance {importance!r}")


def noise(seed: int, *shape: int, scale: float = 0.02) -> Rows:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def ramp(n: int) -> Rows:
    return np.linspace(0, 1, n, dtype=np.float32)


# ---- bytes ----

# 32 values each, of a scale and a generator.
BLOCKS: dict[str, Callable[[np.float32, np.random.Generator], NDArray[np.generic]]] = {
    "noise": lambda scale, rng: rng.standard_normal(32) * scale,
    "zero": lambda scale, rng: np.zeros(32),
    "zeros of both signs": lambda scale, rng: rng.choice([0.0, -0.0], 32),
    "equal": lambda scale, rng: np.full(32, scale),
    "equal and negative": lambda scale, rng: np.full(32, -scale),
    "one outlier": lambda scale, rng: np.where(np.arange(32) == rng.integers(32), scale, 0) * rng.choice([-1, 1]),
    "negative": lambda scale, rng: -np.abs(rng.standard_normal(32)) * scale,
    "positive": lambda scale, rng: np.abs(rng.standard_normal(32)) * scale,
    "ties": lambda scale, rng: rng.integers(-16, 17, 32) / 2,
    "few values": lambda scale, rng: rng.choice([scale, scale / 2, 0, -scale], 32),
    "two values": lambda scale, rng: rng.choice([scale, -scale], 32),
    "almost equal": lambda scale, rng: scale * (1 + rng.standard_normal(32) * 1e-6),
    "denormal": lambda scale, rng: rng.integers(0, 1 << 23, 32).astype(np.uint32).view(np.float32),
    "huge": lambda scale, rng: rng.standard_normal(32) * 2.0**28,
}
scales = st.one_of(st.floats(-44, 9), st.floats(-5, 1)).map(lambda exponent: np.float32(10.0**exponent))
blocks = st.builds(
    lambda name, scale, seed: np.clip(BLOCKS[name](scale, np.random.default_rng(seed)), -(2.0**30), 2.0**30),
    st.sampled_from(list(BLOCKS)),
    scales,
    st.integers(0, 2**32 - 1),
)

WEIGHTS: dict[str, Callable[[np.random.Generator], NDArray[np.generic]]] = {
    "random": lambda rng: rng.random(256),
    "zero": lambda rng: np.zeros(256),
    "one": lambda rng: np.ones(256),
    "some zeros": lambda rng: rng.random(256) * (rng.random(256) < 0.5),
    "whole numbers": lambda rng: rng.integers(0, 3, 256),
    "of all sizes": lambda rng: 10 ** rng.uniform(-40, 12, 256),
}
weights = st.builds(
    lambda name, seed: WEIGHTS[name](np.random.default_rng(seed)).astype(np.float32),
    st.sampled_from(list(WEIGHTS)),
    st.integers(0, 2**32 - 1),
)


@every_kind
@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.lists(blocks, min_size=1, max_size=8), min_size=1, max_size=24), importance=weights)
def test_bytes_are_those_of_ggml(type: T, weighted: bool, parts: list[list[Rows]], importance: Rows) -> None:
    rows = np.array([[part[i % len(part)] for i in range(8)] for part in parts]).reshape(-1, 256).astype(np.float32)
    check(type, rows, importance if weighted else None)


@every_kind
def test_rows_of_noise(type: T, weighted: bool) -> None:
    """Many blocks of what weights look like: a rounding that differs shows in one of a hundred thousand values."""
    rows = np.concatenate([noise(0, 64, 4096), noise(1, 8, 4096, scale=1e-4), noise(2, 8, 4096, scale=30)])
    check(type, rows, ramp(4096) if weighted else None)


@every_kind
@pytest.mark.parametrize(("n_rows", "blocks_a_row"), [(1, 1), (1, 15), (1, 17), (16, 1), (5, 7), (33, 3)])
def test_any_number_of_blocks(type: T, weighted: bool, n_rows: int, blocks_a_row: int) -> None:
    """What lies side by side may be of several rows, and does not always fill all lanes."""
    n = GGML_QUANT_SIZES[type][0] * blocks_a_row
    check(type, noise(0, n_rows, n), ramp(n) if weighted else None)


def test_no_rows() -> None:
    assert kernels.load(T.Q4_K, False)(np.empty((0, 512), np.float32), None).shape == (0, 288)


def test_read_only_and_misaligned_rows() -> None:
    rows = np.frombuffer(b"x" + noise(0, 16, 256).tobytes(), np.float32, offset=1).reshape(16, 256)
    expected = ggml_rows.quantize_chunk(T.Q6_K, rows.copy())
    assert np.array_equal(kernels.load(T.Q6_K, False)(rows, None), expected)


def test_an_importance_of_another_length_is_a_defect() -> None:
    with pytest.raises(ValueError, match="importance must be of 512 columns"):
        kernels.load(T.Q4_K, True)(noise(0, 2, 512), ramp(256))


def test_halves_round_as_ggml_does() -> None:
    """Through the scale of a Q8_0 block, which is its largest value / 127."""
    rng = np.random.default_rng(0)
    scales = np.concatenate([rng.integers(0, 0x47800000, 50_000), np.arange(0, 0x7C00) << 13])
    rows = np.zeros((len(scales), 32), np.float32)
    rows[:, 0] = scales.astype(np.uint32).view(np.float32)
    check(T.Q8_0, rows, None)


def test_halves_are_rounded_away_from_zero_and_nothing_below_them() -> None:
    ties = np.arange(-12, 13, dtype=np.float32) / 2
    rows = np.zeros((3, 32), np.float32)
    rows[:, :25] = ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, ties * 2)
    rows[:, 31] = 127  # so that the scale is 1
    check(T.Q8_0, rows, None)


@pytest.fixture
def all_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel is used from the first value on."""
    process = kernels.Kernels()
    process._ready.update({kind: kernels.load(*kind) for kind in KINDS})
    monkeypatch.setattr(kernels, "PROCESS", process)


QUANTS = [name for name, mix in mixes.LLM_MIXES.items() if mix.base in kernels.KERNELS and not mix.guided]


@pytest.mark.usefixtures("all_ready")
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("model", [Model(), Model(n_embd=320, n_ff=352, n_layer=7)], ids=["256", "320"])
def test_whole_files_equal_those_of_llama_cpp(model: Model, quant: str, guided: bool, tmp_path: Path) -> None:
    with quiet():
        compare(model, quant, tmp_path, matrix=model.matrix() if guided else None)


# ---- which kernels are used ----


def counted(monkeypatch: pytest.MonkeyPatch) -> list[kernels.Kind]:
    """The kinds that are loaded from now on, and a threshold that everything passes."""
    loaded: list[kernels.Kind] = []
    load = kernels.load

    def count(type: T, weighted: bool) -> kernels.Quantize:
        loaded.append((type, weighted))
        return load(type, weighted)

    monkeypatch.setattr(kernels, "load", count)
    monkeypatch.setattr(kernels, "WORTHWHILE", 1000)
    return loaded


def test_what_is_small_is_ggmls(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = counted(monkeypatch)
    process = kernels.Kernels()
    process.prepare({(T.Q4_K, False): 999, (T.F16, False): 1 << 40, (T.IQ4_NL, False): 1 << 40})
    process.wait()
    assert loaded == []
    process.prepare({(T.Q6_K, False): 1000, (T.Q4_K, False): 2000})
    process.prepare({(T.Q6_K, False): 5000, (T.Q6_K, True): 1000})
    process.wait()
    assert loaded == [(T.Q4_K, False), (T.Q6_K, False), (T.Q6_K, True)]


def test_first_use_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = counted(monkeypatch)
    process, rows = kernels.Kernels(), noise(0, 64, 512)
    wanted = {kind: ggml_rows.quantize_chunk(kind[0], rows, ramp(512) if kind[1] else None) for kind in KINDS[-4:]}
    wrong: list[kernels.Kind] = []

    def use(kind: kernels.Kind) -> None:
        process.prepare(dict.fromkeys(wanted, 1000))
        for _ in range(50):
            if not np.array_equal(process.quantize(kind[0], rows, ramp(512) if kind[1] else None), wanted[kind]):
                wrong.append(kind)

    threads = [threading.Thread(target=use, args=(kind,)) for kind in [*wanted, *wanted]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.wait()
    assert wrong == []
    assert sorted(loaded) == sorted(wanted)
    assert process._ready.keys() == wanted.keys()


def test_a_kernel_whose_bytes_are_others_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    process = kernels.Kernels()
    numbers = kernels.KERNELS[T.Q4_K]
    changed = numbers._replace(plain=(144, 15, -1.0, 0.100001, 20), weighted=(144, 15, -0.9, 0.05, 35))
    monkeypatch.setitem(kernels.KERNELS, T.Q4_K, changed)
    with caplog.at_level(logging.INFO, "local_llava"):
        process.prepare(dict.fromkeys([(T.Q4_K, False), (T.Q4_K, True), (T.Q5_K, False)], 1 << 30))
        process.wait()
    assert [record.getMessage() for record in caplog.records] == [
        "ggml's own kernels quantize, several times slower than ours: ggml's Q4_K rounds differently here"
    ]
    assert process._ready.keys() == {(T.Q5_K, False)}
    rows = noise(0, 16, 512)
    assert np.array_equal(process.quantize(T.Q4_K, rows, None), ggml_rows.quantize_chunk(T.Q4_K, rows))


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


USE = """
import logging, sys
import numpy as np
from gguf import GGMLQuantizationType as T
from local_llava import ggml_rows
from local_llava.convert import kernels, mixes, quantize
logging.basicConfig(format="%(name)s: %(message)s")
kernels.PROCESS.prepare({(T.Q8_0, False): 1 << 30, (T.Q8_0, True): 1 << 30})
kernels.PROCESS.wait()
rows = np.random.default_rng(0).standard_normal((16, 256), np.float32)
assert np.array_equal(quantize.encode_rows(T.Q8_0, rows), ggml_rows.quantize_chunk(T.Q8_0, rows).reshape(-1))
"""


def test_without_numba_ggml_quantizes_and_one_line_says_so() -> None:
    process = python("import sys\nsys.modules['numba'] = None\n" + USE + "print(len(kernels.PROCESS._ready))")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "0\n"), err
    assert err == (
        "local_llava: ggml's own kernels quantize, several times slower than ours: import of numba halted; None in "
        "sys.modules\n"
    )


def test_without_a_place_for_the_cache_kernels_are_compiled_all_the_same() -> None:
    nowhere = "from numba.core import caching\ncaching.CacheImpl._locator_classes = []\n"
    process = python(nowhere + USE + "print(len(kernels.PROCESS._ready))")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "2\n", "")


def test_kernels_are_compiled_once_and_anew_when_a_source_changes(tmp_path: Path) -> None:
    show = USE + "from local_llava.convert.kernels import legacy\nprint(sum(legacy.q8_0.stats.cache_hits.values()))"
    changed = "from local_llava.convert import kernels\nkernels._sources = lambda: 'others'\n"
    hits = []
    for codes in ([show, show], [show], [changed + show], [changed + show]):
        processes = [python(code, NUMBA_CACHE_DIR=str(tmp_path)) for code in codes]
        for process in processes:
            out, err = process.communicate(timeout=60)
            assert (process.returncode, err) == (0, "")
        hits.append(int(out))
    assert hits[1:] == [2, 0, 2]


def test_small_conversions_do_not_import_numba(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom local_llava.convert import convert\n"
        "convert('models/tiny-llava', Path(sys.argv[1]), quant='Q4_K_M')\nassert 'numba' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_encoding_goes_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    process, rows = kernels.Kernels(), noise(0, 3, 256)
    process._ready[T.Q4_K, False] = lambda rows, importance: np.full((len(rows), 144), 7, np.uint8)
    monkeypatch.setattr(kernels, "PROCESS", process)
    assert (quantize.encode_rows(T.Q4_K, rows) == 7).all()
    guided = ggml_rows.quantize_chunk(T.Q4_K, rows, ramp(256))
    assert np.array_equal(quantize.encode_rows(T.Q4_K, rows, ramp(256)), guided.reshape(-1))
