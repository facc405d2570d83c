"""The table of quantization types: what a name such as Q4_K_M stands for.

Knows llama.cpp's choices for language models (src/llama-quant.cpp of the version pinned in pyproject.toml), made
without and with an importance matrix. Does not know how they are applied to the tensors of a file (`tensor_types`).

A new type is a row in `LLM_MIXES`, and for each tensor type that it brings a row in `_FALLBACK` of `tensor_types` and
one in `_SCALES` of `quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, LlamaFileType

from local_llava.convert.plan import Field
from local_llava.errors import UsageError

T, F = GGMLQuantizationType, LlamaFileType
FLOATS = (T.F32, T.F16, T.BF16)


@dataclass(frozen=True)
class Place:
    """Where a tensor stands among those that do the same work in other layers."""

    index: int
    """How many of them come before it; those that the user named a type for are not counted."""
    count: int
    """How many of them llama.cpp reckons with."""
    n_gqa: int
    """Query heads for each key and value head."""


def _always(_: Place) -> bool:
    return True


def _more_bits(place: Place) -> bool:
    """The first and the last eighth, and every third in between (`use_more_bits` in llama-quant.cpp)."""
    eighth = place.count // 8
    return place.index < eighth or place.index >= 7 * place.count // 8 or (place.index - eighth) % 3 == 2


def _grouped_by_four(place: Place) -> bool:
    return place.n_gqa >= 4


def _first(n: int) -> Callable[[Place], bool]:
    return lambda place: place.index < n


def _first_part(n: int) -> Callable[[Place], bool]:
    """The first n-th of the layers."""
    return lambda place: place.index < place.count // n


def _inner(place: Place) -> bool:
    """All but the first and the last eighth."""
    return place.count // 8 <= place.index < 7 * place.count // 8


Rule = tuple[Callable[[Place], bool], GGMLQuantizationType]
"""The type of the tensors for which the condition holds."""


@dataclass(frozen=True)
class Mix:
    """What a name such as Q4_K_M stands for."""

    name: str
    base: GGMLQuantizationType
    """The type of every matrix that nothing else speaks for."""
    file_type: LlamaFileType
    """`general.file_type`."""
    rules: Mapping[str, Sequence[Rule]] = field(default_factory=dict)
    """By role (see `_ROLES` in `tensor_types`); the first rule that holds decides."""
    guided_rules: Mapping[str, Sequence[Rule]] = field(default_factory=dict)
    """Those of roles that have others under an importance matrix."""
    head: GGMLQuantizationType = T.Q6_K
    """Of the matrix that makes logits, unless the base is F32, F16, BF16 or Q8_0, or its blocks do not fit the rows."""
    guided: bool = False
    """Whether it is made with an importance matrix only."""

    def rules_of(self, role: str, guided: bool) -> Sequence[Rule]:
        """The rules for tensors of a role, without or with an importance matrix."""
        if guided and role in self.guided_rules:
            return self.guided_rules[role]
        return self.rules.get(role, ())


def _by_name(*mixes: Mix) -> Mapping[str, Mix]:
    return {mix.name: mix for mix in mixes}


_BETTER_THIRD: Mapping[str, Sequence[Rule]] = {"attn_v": [(_more_bits, T.Q6_K)], "ffn_down": [(_more_bits, T.Q6_K)]}
_BETTER_START: Mapping[str, Sequence[Rule]] = {
    "attn_v": [(_grouped_by_four, T.Q5_K)],
    "ffn_down": [(_first_part(8), T.Q5_K)],
}
_FEWER_BITS: Mapping[str, Sequence[Rule]] = {
    "token_embd": [(_always, T.Q2_K)],
    "attn_v": [(_grouped_by_four, T.Q4_K), (_always, T.Q2_K)],
    "ffn_down": [(_first_part(8), T.Q2_K)],
}
_FEWEST_BITS: Mapping[str, Sequence[Rule]] = {**_FEWER_BITS, "attn_output": [(_always, T.IQ2_XXS)]}
_TWO_BITS: Mapping[str, Sequence[Rule]] = {
    "token_embd": [(_always, T.IQ3_S)],
    "attn_v": [(_grouped_by_four, T.Q4_K), (_always, T.IQ3_S)],
    "ffn_down": [(_first_part(8), T.IQ3_S)],
    "attn_output": [(_always, T.IQ3_S)],
}

LLM_MIXES: Mapping[str, Mix] = _by_name(
    Mix("F32", T.F32, F.ALL_F32),
    Mix("F16", T.F16, F.MOSTLY_F16),
    Mix("BF16", T.BF16, F.MOSTLY_BF16),
    Mix("Q8_0", T.Q8_0, F.MOSTLY_Q8_0),
    Mix("Q6_K", T.Q6_K, F.MOSTLY_Q6_K),
    Mix("Q5_K_M", T.Q5_K, F.MOSTLY_Q5_K_M, _BETTER_THIRD),
    Mix("Q5_K_S", T.Q5_K, F.MOSTLY_Q5_K_S),
    Mix("Q5_1", T.Q5_1, F.MOSTLY_Q5_1),
    # "Q4_1 and Q5_1 do go crazy on ffn_down without an imatrix", says llama-quant.cpp.
    Mix("Q5_0", T.Q5_0, F.MOSTLY_Q5_0, guided_rules={"ffn_down": [(_first_part(8), T.Q5_1)]}),
    Mix("Q4_K_M", T.Q4_K, F.MOSTLY_Q4_K_M, _BETTER_THIRD),
    Mix(
        "Q4_K_S",
        T.Q4_K,
        F.MOSTLY_Q4_K_S,
        {"attn_v": [(_first(4), T.Q5_K)], "ffn_down": [(_first_part(8), T.Q5_K)]},
    ),
    Mix("Q4_1", T.Q4_1, F.MOSTLY_Q4_1),
    Mix("Q4_0", T.Q4_0, F.MOSTLY_Q4_0, guided_rules={"ffn_down": [(_first_part(8), T.Q4_1)]}),
    Mix("IQ4_NL", T.IQ4_NL, F.MOSTLY_IQ4_NL, _BETTER_START, guided_rules={"ffn_down": ()}),
    Mix("IQ4_XS", T.IQ4_XS, F.MOSTLY_IQ4_XS, _BETTER_START, guided_rules={"ffn_down": ()}),
    Mix(
        "Q3_K_L",
        T.Q3_K,
        F.MOSTLY_Q3_K_L,
        {role: [(_always, T.Q5_K)] for role in ("attn_v", "ffn_down", "attn_output")},
    ),
    Mix(
        "Q3_K_M",
        T.Q3_K,
        F.MOSTLY_Q3_K_M,
        {
            "attn_v": [(_first(2), T.Q5_K), (_always, T.Q4_K)],
            "ffn_down": [(_first_part(16), T.Q5_K), (_always, T.Q4_K)],
            "attn_output": [(_always, T.Q4_K)],
        },
    ),
    Mix("Q3_K_S", T.Q3_K, F.MOSTLY_Q3_K_S),
    Mix(
        "IQ3_M",
        T.IQ3_S,
        F.MOSTLY_IQ3_M,
        {
            "attn_v": [(_always, T.Q4_K)],
            "ffn_down": [(_first_part(8), T.Q4_K)],
            "attn_output": [(_always, T.Q4_K)],
        },
    ),
    Mix("IQ3_S", T.IQ3_S, F.MOSTLY_IQ3_S, {"attn_v": [(_grouped_by_four, T.Q4_K)]}),
    Mix(
        "IQ3_XS",
        T.IQ3_S,
        F.MOSTLY_IQ3_XS,
        {
            "attn_v": [(_grouped_by_four, T.Q4_K)],
            **{role: [(_always, T.IQ3_XXS)] for role in ("attn_q", "attn_k")},
            **{role: [(_inner, T.IQ3_XXS)] for role in ("ffn_gate", "ffn_up")},
        },
        guided=True,
    ),
    Mix(
        "IQ3_XXS",
        T.IQ3_XXS,
        F.MOSTLY_IQ3_XXS,
        {
            "token_embd": [(_always, T.IQ3_S)],
            "attn_v": [(_grouped_by_four, T.Q4_K)],
            **{role: [(_always, T.IQ2_S)] for role in ("attn_q", "attn_k")},
            "attn_output": [(_always, T.IQ3_S)],
        },
        head=T.Q5_K,
        guided=True,
    ),
    Mix(
        "Q2_K",
        T.Q2_K,
        F.MOSTLY_Q2_K,
        {
            "attn_v": [(_grouped_by_four, T.Q4_K), (_always, T.Q3_K)],
            "ffn_down": [(_always, T.Q3_K)],
            "attn_output": [(_always, T.Q3_K)],
        },
    ),
    Mix(
        "Q2_K_S",
        T.Q2_K,
        F.MOSTLY_Q2_K_S,
        {"attn_v": [(_grouped_by_four, T.Q4_K)], "ffn_down": [(_first_part(8), T.Q4_K)]},
        guided=True,
    ),
    Mix("IQ2_M", T.IQ2_S, F.MOSTLY_IQ2_M, _TWO_BITS, head=T.Q5_K, guided=True),
    Mix("IQ2_S", T.IQ2_XS, F.MOSTLY_IQ2_S, _TWO_BITS, head=T.Q5_K, guided=True),
    Mix("IQ2_XS", T.IQ2_XS, F.MOSTLY_IQ2_XS, _FEWER_BITS, head=T.Q5_K, guided=True),
    Mix("IQ2_XXS", T.IQ2_XXS, F.MOSTLY_IQ2_XXS, _FEWER_BITS, head=T.Q5_K, guided=True),
    Mix("IQ1_M", T.IQ1_M, F.MOSTLY_IQ1_M, _FEWEST_BITS, head=T.Q5_K, guided=True),
    Mix("IQ1_S", T.IQ1_S, F.MOSTLY_IQ1_S, _FEWEST_BITS, head=T.Q5_K, guided=True),
)

MMPROJ_MIXES: Mapping[str, Mix] = _by_name(
    *(LLM_MIXES[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q6_K")),
    Mix("Q5_K", T.Q5_K, F.MOSTLY_Q5_K_S),
    Mix("Q4_K", T.Q4_K, F.MOSTLY_Q4_K_S),
)

_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""llama-quantize's short names."""

HOW_TO_GUIDE = "local-llava imatrix makes one, which convert and quantize take with --imatrix"
"""What is said where an importance matrix is missing."""


def get_mix(name: str, mixes: Mapping[str, Mix], guided: bool = False) -> Mix:
    """Looks up what a user typed, in upper or lower case.

    Args:
        name: A quantization type, as in `mixes`, or one of llama-quantize's short names.
        mixes: `LLM_MIXES` or `MMPROJ_MIXES`.
        guided: Whether there is an importance matrix.

    Raises:
        UsageError: There is no such type, or it needs an importance matrix; the message lists those that there are.
    """
    upper = name.upper()
    mix = mixes.get(upper) or mixes.get(_ALIASES.get(upper, ""))
    if mix is not None and (guided or not mix.guided):
        return mix
    names = ", ".join(name for name, known in mixes.items() if guided or not known.guided)
    if mix is not None:
        raise UsageError(
            f"quantization type {upper} needs an importance matrix ({HOW_TO_GUIDE}); without one, use one of {names}"
        )
    raise UsageError(f"unknown quantization type {name!r}: use one of {names}")


def type_fields(mix: Mix) -> tuple[Field, Field]:
    """The metadata that says how a file is quantized, as `llama_model_quantize` writes it for every type."""
    return (
        Field("general.quantization_version", GGML_QUANT_VERSION, GGUFValueType.UINT32),
        Field("general.file_type", int(mix.file_type), GGUFValueType.UINT32),
    )
