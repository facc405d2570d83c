"""Types that a user names, against `llama_model_quantize` with the same parameters, and patterns against std::regex."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_quantize import Model, compare, llama_quantize, quiet, tensor

from local_llava.convert.name_pattern import NamePattern
from local_llava.convert.overrides import Overrides
from local_llava.convert.plan import GGUFPlan
from local_llava.convert.write import write
from local_llava.errors import UsageError
from local_llava.ggml_rows import QUANTIZABLE
from local_llava.gguf_file import TYPES, GGUFFile


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def of(*tensor_types: str, output: str | None = None, embedding: str | None = None) -> Overrides:
    return Overrides.parse(tensor_types, output, embedding)


UNTIED, TIED = Model(n_layer=16), Model(n_layer=16, tied=True)

CASES = {
    "one role": (UNTIED, "Q4_K_M", of("attn_v=Q8_0")),
    "the first match decides": (UNTIED, "Q4_K_M", of(r"blk\.3\.ffn_down=Q3_K", "ffn_down=q5_0", "ffn_.*=f16")),
    # Tensors that were named are not counted by the rules for the others.
    "named tensors are not counted": (UNTIED, "Q4_K_M", of(r"blk\.(0|1|5)\.(attn_v|ffn_down)=Q2_K")),
    "named tensors are not counted, Q3_K_M": (UNTIED, "Q3_K_M", of(r"blk\.0\.(attn_v|ffn_down)=Q2_K")),
    "in capitals": (UNTIED, "Q4_K_S", of("BLK.*ATTN_K=iq4_nl")),
    "vectors stay": (UNTIED, "Q4_K_S", of(".*=Q8_0")),
    "all, the output too": (UNTIED, "Q6_K", of("weight=IQ3_S")),
    "rows that do not fit": (Model(n_embd=288, n_ff=80), "Q8_0", of("attn=IQ4_XS", "ffn_down=Q2_K", "ffn_up=Q5_1")),
    "no effect with a float": (UNTIED, "F16", of("attn_v=Q8_0")),
    "output": (UNTIED, "Q4_K_M", of(output="Q8_0")),
    "output wins over a pattern": (UNTIED, "Q4_K_M", of("output=Q4_0", output="F32")),
    "output with a float": (UNTIED, "BF16", of(output="Q5_K")),
    "tied output": (TIED, "Q4_K_M", of(output="Q3_K")),
    "tied output, rows that do not fit": (Model(n_embd=288, tied=True), "Q4_K_M", of(output="Q3_K")),
    "tied output, named by a pattern": (TIED, "Q4_K_M", of("token_embd=Q2_K", output="Q3_K")),
    "tied output with a float": (TIED, "F16", of(output="Q8_0")),
    "embedding": (UNTIED, "Q4_K_M", of(embedding="Q2_K")),
    "embedding wins over a pattern": (UNTIED, "Q2_K", of("token=Q8_0", embedding="BF16")),
    "embedding with a float": (UNTIED, "F32", of(embedding="Q8_0")),
    "embedding wins over a tied output": (TIED, "Q4_K_M", of(output="Q6_K", embedding="Q4_1")),
    "all three": (UNTIED, "IQ4_XS", of("attn_(q|k)=Q5_K", r"^blk\.\d\.ffn=Q4_1", output="IQ3_S", embedding="IQ4_NL")),
}


@pytest.mark.parametrize("name", CASES)
def test_files_equal_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    model, quant, overrides = CASES[name]
    types = compare(model, quant, tmp_path, overrides)
    changed = types != model.types(quant, model.tensors()).types
    assert changed == (name not in ("no effect with a float", "tied output with a float"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=st.builds(
        Model,
        n_embd=st.sampled_from([256, 288]),
        n_ff=st.sampled_from([40, 256]),
        n_layer=st.integers(1, 20),
        tied=st.booleans(),
    ),
    quant=st.sampled_from(["Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "Q8_0", "F16"]),
    patterns=st.lists(
        st.sampled_from(["attn_v", "ffn_down", r"blk\.\d\.", r"[02468]\.attn", "output", "embd", "ffn_(up|gate)", "."]),
        max_size=3,
    ),
    types=st.lists(st.sampled_from(sorted(QUANTIZABLE.values())), min_size=3, max_size=3),
    # These two take no fallback: types for any row.
    output=st.sampled_from([None, "F16", "Q8_0", "Q5_1"]),
    embedding=st.sampled_from([None, "F32", "Q4_0", "IQ4_NL"]),
)
def test_any_overrides_equal_llama_cpp(
    model: Model,
    quant: str,
    patterns: list[str],
    types: list[str],
    output: str | None,
    embedding: str | None,
    tmp_path: Path,
) -> None:
    overrides = Overrides(dict(zip(patterns, types, strict=False)), output, embedding)
    compare(model, quant, tmp_path, overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (of(output="Q4_K"), "--output-type Q4_K: the rows of output.weight have 288 columns, no multiple of 256; Q8_0"),
        (of(embedding="IQ4_XS"), "--embedding-type IQ4_XS: the rows of token_embd.weight have 288 columns"),
    ],
)
def test_what_llama_cpp_would_abort_for_is_refused(overrides: Overrides, expected: str) -> None:
    model = Model(n_embd=288, n_layer=1)
    with pytest.raises(UsageError) as raised:
        model.types("Q8_0", model.tensors(), overrides)
    assert str(raised.value).startswith(expected)


def test_what_meets_no_tensor_is_told() -> None:
    model = Model(n_layer=1, tied=True)
    overrides = of("attn_v=Q8_0", "attn_x=Q8_0", "attn_v.weight=Q6_K", embedding="Q8_0", output="Q8_0")
    assert model.types("Q4_K_M", model.tensors(), overrides).notes == (
        "--tensor-type attn_x meets no tensor that it could decide about",
        "--tensor-type attn_v.weight meets no tensor that it could decide about",
        "--output-type meets no tensor: the output is tied to the embeddings",
    )
    assert Model(n_layer=1).types("F16", Model(n_layer=1).tensors(), of("attn_v=Q8_0")).notes == (
        "--tensor-type attn_v has no effect with F16",
    )


@pytest.mark.parametrize("entry", ["attn_v", "=Q8_0", "attn_v=", ""])
def test_malformed_entries(entry: str) -> None:
    with pytest.raises(UsageError, match="must be PATTERN=TYPE, such as attn_v=Q8_0"):
        of(entry)


def test_unknown_types() -> None:
    with pytest.raises(UsageError, match=r"unknown tensor type 'Q4_K_M': use one of F32, .*IQ3_S.*BF16"):
        of("attn_v=Q4_K_M")
    with pytest.raises(UsageError, match="unknown tensor type 'a=Q8_0'"):
        of("(?!x)y=a=Q8_0")  # the first equals sign ends the pattern, as in llama-quantize
    assert of("a=Q8_0", "a=Q4_0").tensor_types == {"a": "Q8_0"}  # the first decides


# ---- patterns ----

PARTS = ("attn_q", "attn_v", "ffn_down", "ffn_up")
NAMES = [
    *("token_embd.weight", "output.weight", "per_layer_token_embd.weight"),
    *(f"blk.{i}.{part}.weight" for i in (0, 1, 9, 10, 21) for part in PARTS),
    *(f"{odd}weight" for odd in ("a", "aa", "aaaa", "ab", "abab", "b-c", "x]y", "a{2}", "a b", "A.B", "x^y$", "é", "")),
]


@pytest.fixture(scope="module")
def names_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a matrix of each name."""
    path = tmp_path_factory.mktemp("names") / "names.gguf"
    data = np.ones((2, 32), np.float32)
    write(GGUFPlan(Model().fields(), tuple(tensor(name, data, T.F32) for name in NAMES)), path)
    return path


def found_by_std_regex(pattern: str, names: Path) -> list[str] | None:
    """The names in which llama.cpp finds a pattern: they get Q4_0, the rest Q8_0. None if it refuses the pattern."""
    out = names.with_name("out.gguf")
    if not llama_quantize(names, out, "Q8_0", {pattern: "Q4_0"}):
        return None
    types = {t.name: TYPES[t.type].name for t in GGUFFile.open(out).tensors.values()}
    return [name for name in NAMES if types[name] == "Q4_0"]


def found_by_us(pattern: str) -> list[str]:
    compiled = NamePattern(pattern)
    return [name for name in NAMES if compiled.found_in(name)]


ACCEPTED = [
    *("attn_v", "ATTN_V", "^blk", "weight$", r"\.weight", r"blk\.(1|2)\.", r"blk\.[0-9]+\.attn_(q|v)", "^$", "a|"),
    *(r"\bq\b", r"_q\b", r"\d{2}", r"\d{2,}", r"a{2,3}weight", "(a?){3}w", "(?:ab)+w", "^(?!blk)", "(?!a)b", ".{30}"),
    *(
        "[^a-z_]",
        "[a-]",
        "[-a]",
        "[.]",
        r"[\]]",
        r"[\d\s]",
        r"a\{2\}",
        r"\^",
        "a*?b",
        "(a|b)*w",
        "()",
        "(a*)*b",
        "[A-C]",
    ),
    *(r"(blk\.9\..*)?ffn", "[^b]lk", "^(a|ab)(ab|b)?weight", r"(\b|a)*b", "(?!(?!a))a", "^.?weight", r"\w+-\w"),
]


@pytest.mark.parametrize("pattern", ACCEPTED)
def test_patterns_find_what_std_regex_finds(pattern: str, names_file: Path) -> None:
    assert found_by_us(pattern) == found_by_std_regex(pattern, names_file)


REFUSED = {
    "": "1 to 256 printable",
    "a" * 257: "1 to 256 printable",
    "é": "1 to 256 printable",
    "a\nb": "1 to 256 printable",
    "(a": "at character 3: a bracket is not closed",
    "a)": "at character 2: a bracket is closed that was not opened",
    "*a": "at character 1: '*' must follow",
    "a**": "at character 3: '*' must follow",
    "a++": "at character 3: '+' must follow",
    "^*": "at character 2: '*' must follow",
    r"\b+": "at character 3: '+' must follow",
    "(?!a)?": "must follow",
    "a|*": "must follow",
    "{2}": "must follow",
    "a{": "a count is {n}",
    "a{,2}": "a count is {n}",
    "a{2": "a count is {n}",
    "a{x}": "a count is {n}",
    "a{1000}": "at most three digits",
    "a{3,2}": "the larger one",
    "(((a{99}){99}){99}){99}": "more than 4096 characters",
    "a}": r"write \} for",
    "a]": r"write \] for",
    "(?=a)": "only (?:...) and (?!...)",
    "(?i)a": "only (?:...) and (?!...)",
    "(?P<x>a)": "only (?:...) and (?!...)",
    "(?<=a)b": "only (?:...) and (?!...)",
    r"(a)\1": "of the escapes",
    "a(?!^)": "at character 5: ^ is not accepted within",
    r"a(?!(b|\ba))": "is not accepted within",
    r"\D": "of the escapes",
    r"a\B": "of the escapes",
    r"\x41": "of the escapes",
    r"\Aa": "of the escapes",
    "a\\": "of the escapes",
    "[a": "not closed",
    "[]a]": "empty",
    "[^]": "empty",
    "[[:digit:]]": "bracket without a backslash",
    "[a-c-e]": "a dash in a set",
    r"[\d-x]": "a range is two characters",
    "[z-a]": "a range is two characters",
    r"[\b]": "of the escapes",
    "(" * 40 + ")" * 40: "at most 32 brackets",
}


@pytest.mark.parametrize("pattern", REFUSED)
def test_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError) as raised:
        NamePattern(pattern)
    assert REFUSED[pattern] in str(raised.value) and "\n" not in str(raised.value)


atoms = st.sampled_from(
    [
        *"abkw.",
        "[a-c]",
        "[^a]",
        "[0-9_]",
        "[a.]",
        r"\d",
        r"\w",
        r"\s",
        r"\.",
        "lk",
        "weight",
        "attn",
        "blk",
        "^",
        "$",
        r"\b",
    ]
)
quantifiers = st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,2}", "*?", "+?"])
grammar = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(inner, quantifiers).map(lambda pair: f"({pair[0]}){pair[1]}"),
        inner.map(lambda text: f"(?:{text})"),
        inner.map(lambda text: f"(?!{text})"),
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pattern=st.one_of(grammar, st.text("ab01.*+?{}[]()|^$-\\d,!:=", min_size=1, max_size=8)))
def test_what_is_accepted_means_the_same_to_std_regex(pattern: str, names_file: Path) -> None:
    """Also of what is no pattern at all: what we take, std::regex takes, and finds in the same names."""
    try:
        found = found_by_us(pattern)
    except UsageError:
        return
    assert found == found_by_std_regex(pattern, names_file)


@pytest.mark.parametrize(
    "pattern", ["(a*)*b", "(a|a)*b", r"(\w+\s?)+x", ".*" * 40 + "x", "((a{9}){9}){9}b", "(((a?)*)*)*b"]
)
def test_no_pattern_takes_long(pattern: str) -> None:
    """Backtracking, as of Python's re and of std::regex, would take more than 10^10 steps."""
    started = time.perf_counter()
    assert not NamePattern(pattern).found_in("a" * 63)
    assert time.perf_counter() - started < 10
