"""The libraries are loaded once, from one place, and the wrapped calls refuse what ggml would abort for."""

from __future__ import annotations

import ctypes
import logging
import subprocess
import sys

import gguf
import numpy as np
import pytest

from local_llava import ggml, ggml_rows
from local_llava.gguf_file import TYPES


def rows(n_rows: int = 5, n: int = 512) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n_rows, n)).astype(np.float32)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("first", ["llama_cpp", "ggml"])
def test_the_libraries_are_mapped_once_whatever_is_imported_first(first: str) -> None:
    steps = {"llama_cpp": "import llama_cpp", "ggml": "from local_llava import ggml; ggml.functions()"}
    order = sorted(steps, key=lambda name: name != first)
    show = "print({line.split()[-1] for line in open('/proc/self/maps') if '/lib' in line})"
    result = python("\n".join([steps[name] for name in order] + [show]))
    assert result.returncode == 0, result.stderr
    mapped = [path for path in eval(result.stdout) if "libggml" in path or "libllama" in path]
    libraries = [path.rsplit("/", 1)[1].split(".")[0] for path in mapped]
    assert {"libggml", "libggml-base", "libllama"} <= set(libraries)
    assert len(libraries) == len(set(libraries)), mapped
    assert all("/llama_cpp/lib/" in path for path in mapped)


def test_importing_the_module_loads_no_library() -> None:
    result = python(
        "import sys, local_llava.ggml, local_llava.vision\n"
        "assert 'llama_cpp' not in sys.modules\n"
        "assert local_llava.ggml.functions.cache_info().currsize == 0\n"
        "local_llava.ggml.functions()\n"
        "assert 'llama_cpp' not in sys.modules"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16", "BF16", "F32"])
def test_quantized_rows_are_those_that_gguf_reads_back(name: str) -> None:
    number = gguf.GGMLQuantizationType[name]
    data = rows()
    packed = ggml_rows.quantize_chunk(number, data)
    assert packed.shape == (5, ggml_rows.row_size(number, 512)) and ggml_rows.validate_row_data(number, packed)
    block, size = gguf.GGML_QUANT_SIZES[number]
    assert ggml_rows.block_size(number) == block and packed.shape[1] == 512 // block * size
    back = gguf.quants.dequantize(packed, number)
    worst = {"Q4_0": 0.1, "Q8_0": 0.006, "Q4_K": 0.08, "Q6_K": 0.02, "F16": 3e-4, "BF16": 2e-3, "F32": 0}[name]
    assert np.linalg.norm(back - data) <= worst * np.linalg.norm(data)
    assert np.array_equal(ggml_rows.quantize_chunk(number, data[2:4]), packed[2:4]), "rows are independent"


@pytest.mark.parametrize("name", ggml_rows.QUANTIZABLE.values())
def test_dequantized_rows_are_those_that_gguf_reads(name: str) -> None:
    number = gguf.GGMLQuantizationType[name]
    packed = ggml_rows.quantize_chunk(number, rows())
    back = ggml_rows.dequantize(number, packed)
    assert back.dtype == np.float32 and back.shape == (5 * 512,)
    assert np.array_equal(back.reshape(5, 512), gguf.quants.dequantize(packed, number))


def test_every_float16_is_read_exactly() -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    expected = halves.astype(np.float32)
    found = ggml_rows.dequantize(ggml.F16, halves.view(np.uint8))
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found[expected == 0]), np.signbit(expected[expected == 0]))


def test_types_of_weights_can_be_dequantized() -> None:
    names = {TYPES[number].name for number in TYPES if not ggml_rows.has_dequantizer(number)}
    assert names == {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
    assert not any(ggml_rows.has_dequantizer(number) for number in (-1, 4, 5, 31, 43, 99, 1 << 40))


def test_what_cannot_be_dequantized_is_refused() -> None:
    packed = ggml_rows.quantize_chunk(ggml.Q8_0, rows())
    for number, data in ((9, packed), (99, packed), (ggml.Q8_0, packed.ravel()[1:]), (ggml.Q8_0, packed.view(np.int8))):
        with pytest.raises(ValueError, match=r"."):
            ggml_rows.dequantize(number, data)
    with pytest.raises(ValueError, match="C-contiguous"):
        ggml_rows.dequantize(ggml.Q8_0, packed[:, ::2])


def test_no_rows_make_no_bytes() -> None:
    assert ggml_rows.dequantize(ggml.Q8_0, np.empty(0, np.uint8)).shape == (0,)
    assert ggml_rows.quantize_chunk(ggml.Q8_0, rows(0)).shape == (0, 544)


@pytest.mark.parametrize(
    ("number", "data"),
    [
        (ggml.Q8_0, rows().astype(np.float64)),
        (ggml.Q8_0, rows()[:, ::2]),
        (ggml.Q8_0, rows().T),
        (ggml.Q8_0, rows()[0]),
        (ggml.Q8_0, rows(2, 40)),
        (12, rows(2, 128)),
        (ggml.F32, rows(2, 0)),
        (4, rows()),
        (99, rows()),
        (-1, rows()),
        (16, rows()),  # IQ2_XXS needs an importance matrix
    ],
)
def test_what_ggml_would_abort_for_is_refused(number: int, data: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"."):
        ggml_rows.quantize_chunk(number, data)


def test_damaged_scales_are_seen() -> None:
    packed = ggml_rows.quantize_chunk(ggml.Q8_0, rows())
    packed[1, :2] = 0xFF  # a float16 NaN
    assert not ggml_rows.validate_row_data(ggml.Q8_0, packed)
    with pytest.raises(ValueError, match="whole blocks of 34 bytes"):
        ggml_rows.validate_row_data(ggml.Q8_0, packed.ravel()[1:])


def test_names_outside_the_table_say_so() -> None:
    with pytest.raises(AttributeError, match="ggml_frobnicate"):
        ggml.functions().frobnicate(1)


def test_ggml_logs_to_our_logger(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    import llama_cpp

    ggml.route_log()
    load = llama_cpp.llama_cpp._lib.ggml_backend_load
    load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
    with caplog.at_level(logging.DEBUG, "local_llava"):
        assert not load(b"/nowhere/libggml-none.so")
    assert any("/nowhere" in record.message and record.name == "local_llava" for record in caplog.records)
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGABRT")
def test_the_reason_of_an_abort_is_logged() -> None:
    result = python("from local_llava import ggml; ggml.functions().quantize_chunk(8, 0, 0, 1, 1, 32, 0)")
    assert result.returncode == -6
    assert "ggml aborts the process: " in result.stderr and "GGML_ASSERT" in result.stderr
