"""Which type every tensor of a file gets.

Knows how llama.cpp chooses for language models (src/llama-quant.cpp of the version pinned in pyproject.toml), and what
a CLIP tower needs. The choices themselves are rows of `mixes`, or the user's (`overrides`). Does not know how
rows become bytes (`quantize`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from local_llava.convert.imatrix import ImportanceMatrix, some
from local_llava.convert.mixes import FLOATS, HOW_TO_GUIDE, Mix, Place
from local_llava.convert.overrides import NO_OVERRIDES, Overrides
from local_llava.errors import UsageError
from local_llava.ggml_rows import ALWAYS_GUIDED, GUIDED

T = GGMLQuantizationType

# A part of the name -> the role that rules are looked up by.
_ROLES = {
    "token_embd.weight": "token_embd",
    "attn_qkv.weight": "attn_v",
    "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k",
    "attn_q.weight": "attn_q",
    "attn_output.weight": "attn_output",
    "ffn_up": "ffn_up",
    "ffn_gate": "ffn_gate",
    "ffn_down": "ffn_down",
}
_COUNTED_BY_LAYERS = ("ffn_up", "ffn_gate", "ffn_down")

# In models with 80 layers attn_v is an eighth of attn_q, so that better types cost next to nothing.
_ATTN_V_OF_70B = {T.Q3_K: T.Q5_K, T.Q4_K: T.Q5_K}
_SMALLEST = (T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S)
"""Bases of mixes that do not get them all the same."""

# Where rows are not a multiple of the block: first this, and F16 where that does not fit either.
_FALLBACK = {
    T.IQ1_S: T.IQ4_NL,
    T.IQ1_M: T.IQ4_NL,
    T.IQ2_XXS: T.IQ4_NL,
    T.IQ2_XS: T.IQ4_NL,
    T.IQ2_S: T.IQ4_NL,
    T.IQ3_XXS: T.IQ4_NL,
    T.IQ3_S: T.IQ4_NL,
    T.IQ4_XS: T.IQ4_NL,
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}

_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"

_FEATURE_ERRORS = {"Q6_K": "1.5 to 3.5 %", "Q5_K": "2.5 to 7 %", "Q4_K": "4.5 to 13 %"}
"""Relative L2 error of the image features, as benchmarks/mmproj_types.py measures it: of tiny-llava, and of a tower of
CLIP-L/14-336's shape with random weights. F16 has 0.02 to 0.04 %, Q8_0 0.7 to 1.4 %."""


class Tensor(NamedTuple):
    """What a type is chosen by."""

    name: str
    shape: tuple[int, ...]
    """numpy's order: the last is the row length."""
    type: GGMLQuantizationType = T.F32
    """That of the source, which a tensor keeps that is not quantized. A checkpoint counts as an F32 GGUF."""


@dataclass(frozen=True)
class Assignment:
    """The type of every tensor of a file."""

    types: Mapping[str, GGMLQuantizationType]
    """By tensor name."""
    notes: tuple[str, ...] = ()
    """What a user may not expect, one line each: other types than asked for, and why."""
    importance: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Of those tensors that an importance matrix speaks of; see `TensorPlan.importance`."""


def llama_order(name: str) -> tuple[int, str]:
    """A key to sort tensors by as llama.cpp does before it counts or writes them: by layer, then by name."""
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return (int(number) if first == "blk" and number.isdecimal() else -1, name)


def llm_types(
    mix: Mix,
    tensors: Iterable[Tensor],
    *,
    n_layer: int,
    n_head: int,
    n_head_kv: int,
    architecture: str = "llama",
    overrides: Overrides = NO_OVERRIDES,
    matrix: ImportanceMatrix | None = None,
) -> Assignment:
    """Gives every tensor of a language model the type that `llama_model_quantize` gives it.

    The order of `tensors` does not matter. Embeddings are tied to the output when there is no `output.weight`.

    Args:
        mix: A row of `LLM_MIXES`.
        tensors: All tensors of the file.
        n_layer: `block_count` of the metadata.
        n_head: `attention.head_count`.
        n_head_kv: `attention.head_count_kv`.
        architecture: `general.architecture`: llama, phi3 or qwen2.
        overrides: Types that the user named.
        matrix: How much each column of the matrices matters.

    Raises:
        UsageError: A type named for the embeddings or the output has blocks that do not divide their rows; or a
            tensor's type needs an importance that there is not.
        ModelFileError: The importance matrix is of another model.
    """
    ordered = sorted(tensors, key=lambda tensor: llama_order(tensor.name))
    names = [tensor.name for tensor in ordered]
    counts = {**Counter(map(_role, names)), **dict.fromkeys(_COUNTED_BY_LAYERS, n_layer)}
    chooser = _Chooser(
        mix,
        overrides,
        head=_OUTPUT if _OUTPUT in names else _EMBEDDING,
        counts=counts,
        n_gqa=n_head // n_head_kv,
        guided=matrix is not None,
        attn_v=_better_attn_v(mix, architecture, n_layer, n_head, n_head_kv),
    )
    types = {tensor.name: chooser.type_of(tensor) for tensor in ordered}
    importance, notes = _guidance(mix, ordered, types, matrix)
    return Assignment(types, (*_fallback_notes(chooser.fallbacks), *chooser.unused(), *notes), importance)


def _guidance(
    mix: Mix,
    tensors: Iterable[Tensor],
    types: Mapping[str, GGMLQuantizationType],
    matrix: ImportanceMatrix | None,
) -> tuple[Mapping[str, NDArray[np.float32]], list[str]]:
    """The importances of the tensors that are quantized, and what a user may not expect of them."""
    made = [t for t in tensors if types[t.name] not in FLOATS and (matrix is None or types[t.name] is not t.type)]
    if matrix is None:
        for tensor in made:
            if _needs_guidance(mix, tensor.name, types[tensor.name]):
                raise UsageError(
                    f"{tensor.name} as {types[tensor.name].name} needs an importance matrix: {HOW_TO_GUIDE}"
                )
        return {}, []
    found = matrix.fitting({tensor.name: tensor.shape[-1] for tensor in made})
    without = [tensor.name for tensor in made if tensor.name not in found]
    for name in without:
        if _needs_guidance(mix, name, types[name]):
            raise UsageError(f"{matrix.path}: has nothing for {name}, which {types[name].name} needs")
    notes = []
    if all(types[name] is T.Q8_0 for name in found):
        notes.append(f"{matrix.path} changes nothing: no type is made here that takes an importance matrix")
    # llama-imatrix leaves these two out unless it is told otherwise.
    elif lacking := [name for name in without if name not in (_EMBEDDING, _OUTPUT)]:
        notes.append(f"{matrix.path} has nothing for {some(lacking)}: made without")
    if strangers := [name for name in matrix.importance if name not in types]:
        notes.append(f"{matrix.path} is also of {some(strangers)} that this model lacks: is it the right one?")
    return found, notes


def _needs_guidance(mix: Mix, name: str, type: GGMLQuantizationType) -> bool:
    """Whether llama.cpp refuses to make a tensor without an importance (`tensor_requires_imatrix`), or ggml aborts."""
    if name in (_EMBEDDING, _OUTPUT):
        return type in ALWAYS_GUIDED
    return type in GUIDED or (type is T.Q2_K and mix.file_type is LlamaFileType.MOSTLY_Q2_K_S)


def _better_attn_v(
    mix: Mix, architecture: str, n_layer: int, n_head: int, n_head_kv: int
) -> Mapping[GGMLQuantizationType, GGMLQuantizationType]:
    large = _is_70b(architecture, n_layer, n_head, n_head_kv) and mix.base not in _SMALLEST
    return _ATTN_V_OF_70B if large else {}


def _is_70b(architecture: str, n_layer: int, n_head: int, n_head_kv: int) -> bool:
    """Whether llama.cpp takes a model for one of 70B (`LLM_TYPE_70B`): a Llama of 65B has no grouped queries."""
    return n_layer == 80 and (architecture == "qwen2" or (architecture == "llama" and n_head != n_head_kv))


@dataclass
class _Chooser:
    """`llama_tensor_get_type` in llama-quant.cpp, called for one tensor after the other, in llama.cpp's order."""

    mix: Mix
    overrides: Overrides
    head: str
    """The tensor that makes logits."""
    counts: Mapping[str, int]
    """Tensors by role."""
    n_gqa: int
    guided: bool
    """Whether there is an importance matrix."""
    attn_v: Mapping[GGMLQuantizationType, GGMLQuantizationType]
    """What attn_v gets in place of another type."""
    seen: Counter[str] = field(default_factory=Counter)
    fallbacks: list[_Fallback] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    """Options that decided a type."""

    def type_of(self, tensor: Tensor) -> GGMLQuantizationType:
        if not _is_matrix(tensor.shape) or not tensor.name.endswith("weight") or "_norm.weight" in tensor.name:
            return tensor.type
        for name, option, type in (
            (_EMBEDDING, "--embedding-type", self.overrides.embedding),
            (_OUTPUT, "--output-type", self.overrides.output),
        ):
            # These two are taken as they are: before a float base, and without a fallback.
            if tensor.name == name and type is not None:
                self.used.add(option)
                return _exactly(type, tensor, option)
        if self.mix.base in FLOATS:
            return self.mix.base
        fallback = _fit(tensor, self.wanted(tensor))
        if fallback.type is not fallback.wanted:
            self.fallbacks.append(fallback)
        return fallback.type

    def wanted(self, tensor: Tensor) -> GGMLQuantizationType:
        named = self.overrides.match(tensor.name)
        if named is not None:
            pattern, type = named
            self.used.add(f"--tensor-type {pattern}")
            return type
        if tensor.name == self.head:
            if self.overrides.output is not None:
                self.used.add("--output-type")
                return self.overrides.output
            return _head_type(self.mix, tensor.shape[-1])
        role = _role(tensor.name)
        place = Place(self.seen[role], self.counts[role], self.n_gqa)
        self.seen[role] += 1
        rules = self.mix.rules_of(role, self.guided)
        type = next((type for holds, type in rules if holds(place)), self.mix.base)
        return self.attn_v.get(type, type) if role == "attn_v" else type

    def unused(self) -> list[str]:
        """To llama-quantize an option that meets no tensor is no error; but it should not pass unseen."""
        is_float = self.mix.base in FLOATS
        no_effect = f"has no effect with {self.mix.name}" if is_float else "meets no tensor that it could decide about"
        options = {f"--tensor-type {pattern}": no_effect for pattern in self.overrides.tensor_types}
        if self.overrides.output is not None:
            options["--output-type"] = "meets no tensor: the output is tied to the embeddings"
        if self.overrides.embedding is not None:
            options["--embedding-type"] = "meets no tensor"
        return [f"{option} {why}" for option, why in options.items() if option not in self.used]


def mmproj_types(mix: Mix, tensors: Iterable[Tensor]) -> Assignment:
    """Gives every tensor of a CLIP tower and projector its type.

    Vectors and the position and class embeddings stay F32: they are small, and ggml adds them as they are. The patch
    embedding is a convolution, whose rows (14 or 16 columns) no block fits: F16, or F32 where all is to be as exact as
    BF16 or F32 (llama.cpp has no convolution with BF16).

    Args:
        mix: A row of `MMPROJ_MIXES`.
        tensors: All tensors of the file.
    """
    types: dict[str, GGMLQuantizationType] = {}
    fallbacks = []
    for tensor in tensors:
        if not _is_matrix(tensor.shape) or ".position_embd" in tensor.name or ".class_embd" in tensor.name:
            types[tensor.name] = T.F32
        elif len(tensor.shape) > 2:
            types[tensor.name] = T.F32 if mix.base in (T.F32, T.BF16) else T.F16
        else:
            fallback = _fit(tensor, mix.base)
            types[tensor.name] = fallback.type
            if fallback.type is not mix.base:
                fallbacks.append(fallback)
    notes = _fallback_notes(fallbacks)
    if mix.name in _FEATURE_ERRORS:
        notes.append(
            f"{mix.name} changes image features by {_FEATURE_ERRORS[mix.name]}, as far as was measured; "
            "Q8_0 does by 1 %, F16 by 0.03 %"
        )
    return Assignment(types, tuple(notes))


def _role(name: str) -> str:
    return next((role for part, role in _ROLES.items() if part in name), "")


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether ggml counts two dimensions or more (`ggml_n_dims`): outer ones of size 1 are not counted."""
    return any(size > 1 for size in shape[:-1])


def _head_type(mix: Mix, row_length: int) -> GGMLQuantizationType:
    if mix.base is T.Q8_0 or not _fits(mix.base, row_length):
        return T.Q8_0
    return mix.head


class _Fallback(NamedTuple):
    """A tensor's type, and the one that it should have had."""

    tensor: Tensor
    wanted: GGMLQuantizationType
    type: GGMLQuantizationType


def _fits(type: GGMLQuantizationType, row_length: int) -> bool:
    return bool(row_length % GGML_QUANT_SIZES[type][0] == 0)


def _fit(tensor: Tensor, wanted: GGMLQuantizationType) -> _Fallback:
    """The type itself, or what takes its place where blocks do not divide the row (`tensor_type_fallback`)."""
    candidates = (wanted, _FALLBACK.get(wanted, wanted))
    return _Fallback(tensor, wanted, next((c for c in candidates if _fits(c, tensor.shape[-1])), T.F16))


def _exactly(type: GGMLQuantizationType, tensor: Tensor, option: str) -> GGMLQuantizationType:
    if not _fits(type, tensor.shape[-1]):
        other = "Q8_0" if _fits(T.Q8_0, tensor.shape[-1]) else "F16"
        raise UsageError(
            f"{option} {type.name}: the rows of {tensor.name} have {tensor.shape[-1]} columns, no multiple of "
            f"{GGML_QUANT_SIZES[type][0]}; {other} would fit"
        )
    return type


def _fallback_notes(fallbacks: Iterable[_Fallback]) -> list[str]:
    groups: dict[tuple[GGMLQuantizationType, GGMLQuantizationType, int], list[str]] = {}
    for tensor, wanted, type in fallbacks:
        groups.setdefault((wanted, type, tensor.shape[-1]), []).append(tensor.name)
    return [
        f"{len(names)} tensor{'s' * (len(names) > 1)} with rows of {length} ({names[0]}{', ...' * (len(names) > 1)}): "
        f"{type.name}, since {wanted.name} packs {GGML_QUANT_SIZES[wanted][0]} values"
        for (wanted, type, length), names in groups.items()
    ]
