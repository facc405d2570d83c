"""Rotary embeddings: a configuration's rope settings, and what of them a GGUF says in metadata and in tensors.

Knows transformers' rules (modeling_rope_utils.py of 5.23) and which of them llama.cpp computes alike. What it does not
is refused by name. Does not know the decoders, but for Phi-3's own kind, `read_long_rope`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from local_llava.convert.config import Config
from local_llava.convert.families import Row
from local_llava.errors import CheckpointError

Entry = tuple[str, float | str, GGUFValueType]
"""Key without the architecture, value, type."""

_CELLS = 256
"""llama.cpp rounds a context up to a multiple of this many tokens."""

_MAX = 1e6


@dataclass(frozen=True)
class Rope:
    """A rotary embedding as a GGUF has it."""

    base: float
    n_ctx: int
    """The longest context in which llama.cpp computes what transformers does, tokens."""
    entries: tuple[Entry, ...] = ()
    """Metadata besides `rope.freq_base` and `rope.dimension_count`."""
    factors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Tensors that frequencies are divided by, by name: [n_dims / 2]."""

    def rows(self) -> list[Row]:
        return [Row(name, None, values.shape, value=values) for name, values in self.factors.items()]


def read_rope(config: Config, n_dims: int) -> Rope:
    """Read the settings of a Llama, Mistral or Qwen2.

    NTK scaling ("dynamic") changes nothing up to max_position_embeddings, and longer contexts are not offered.

    Args:
        config: Of the language model.
        n_dims: Dimensions of a head that are rotated.

    Raises:
        CheckpointError: A value makes no sense, or the scaling is not supported.
    """
    where, kind = _settings(config, ("default", "linear", "llama3", "yarn", "dynamic"))
    base = _base(config, where)
    n_ctx = trained(config)
    if kind == "linear":
        return Rope(base, n_ctx, _scaling("linear", where.number("factor", None, 1, _MAX)))
    if kind == "llama3":
        return Rope(base, n_ctx, factors={"rope_freqs.weight": _llama3(config, where, base, n_dims)})
    if kind == "yarn":
        return Rope(base, n_ctx, _yarn(config, where))
    return Rope(base, n_ctx)


def read_long_rope(config: Config, n_dims: int) -> Rope:
    """Read the settings of a Phi-3.

    Its long models have two sets of factors. transformers takes the second one as soon as a text is longer than the
    original context; llama.cpp decides by the size of the context, which it rounds up. So only contexts that stay below
    the original one, rounded up, are the same in both, and none longer is offered.

    Args:
        config: Of the language model.
        n_dims: Dimensions of a head that are rotated.

    Raises:
        CheckpointError: A value makes no sense, or the scaling is not supported.
    """
    # The older names of the one kind that Phi-3 has, as in transformers' Phi3Config.
    where, kind = _settings(config, ("default", "longrope", "su", "yarn"))
    base = _base(config, where)
    n_ctx = trained(config)
    original = config.integer("original_max_position_embeddings", 4096, 1, 1 << 27)
    entries: tuple[Entry, ...] = (("rope.scaling.original_context_length", original, GGUFValueType.UINT32),)
    if kind == "default":
        return Rope(base, n_ctx, entries)
    if original < _CELLS:
        raise CheckpointError(
            f"{config.name('original_max_position_embeddings')} is {original}; with {kind} at least {_CELLS} are needed"
        )
    factor = where.number("factor", n_ctx / original, 0, float(1 << 27))
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    attention = where.number("attention_factor", usual, 1e-6, _MAX)
    return Rope(
        base,
        min(n_ctx, original // _CELLS * _CELLS),
        (*entries, ("rope.scaling.attn_factor", attention, GGUFValueType.FLOAT32)),
        {f"rope_factors_{name}.weight": _list(where, f"{name}_factor", n_dims // 2) for name in ("long", "short")},
    )


def trained(config: Config) -> int:
    """The context that the model was made for, tokens."""
    return config.integer("max_position_embeddings", 2048, 1, 1 << 27)


def _settings(config: Config, kinds: tuple[str, ...]) -> tuple[Config, str]:
    """transformers 5 keeps them in `rope_parameters`. Before, it was `rope_scaling`, which counts if it is there.

    Raises:
        CheckpointError: Layers differ in theirs, or the kind is not one of `kinds`.
    """
    scaling = config.sub("rope_scaling")
    where = scaling if scaling.values else config.sub("rope_parameters")
    for key, value in where.values.items():
        if isinstance(value, dict):
            raise CheckpointError(
                f"{where.name(key)} is an object; only the same settings for all layers are supported"
            )
    key = "type" if "type" in where.values and "rope_type" not in where.values else "rope_type"
    return where, where.choice(key, "default", kinds)


def _base(config: Config, where: Config) -> float:
    outer = config.number("rope_theta", 10000.0, 1, 1e12)
    return where.number("rope_theta", outer, 1, 1e12)


def _original(config: Config, where: Config) -> int:
    """The context before it was stretched; at the top level first, then with the scaling, as in transformers."""
    inner = where.integer("original_max_position_embeddings", trained(config), 1, 1 << 27)
    return config.integer("original_max_position_embeddings", inner, 1, 1 << 27)


def _scaling(kind: str, factor: float) -> tuple[Entry, ...]:
    return (
        ("rope.scaling.type", kind, GGUFValueType.STRING),
        ("rope.scaling.factor", factor, GGUFValueType.FLOAT32),
    )


def _yarn(config: Config, where: Config) -> tuple[Entry, ...]:
    """llama.cpp reads the bounds of its ramp (`beta_fast`, `beta_slow`) for other architectures only, and multiplies
    its own attention factor, which is that of the paper, with the file's."""
    original = _original(config, where)
    factor = where.number("factor", max(1.0, trained(config) / original), 1, _MAX)
    for key, usual in (("beta_fast", 32), ("beta_slow", 1)):
        # 0 means the default, too
        if where.number(key, usual, 0, 1e4) not in (0, usual):
            raise CheckpointError(f"{where.name(key)} is {where.values[key]}; supported: {usual}")
    if not where.flag("truncate", True):
        raise CheckpointError(f"{where.name('truncate')} is false; supported: true")
    own = _mscale(factor, 1)
    above, below = (where.number(key, 0, 0, 1e3) for key in ("mscale", "mscale_all_dim"))
    usual_attention = _mscale(factor, above) / _mscale(factor, below) if above and below else own
    attention = where.number("attention_factor", usual_attention, 1e-6, _MAX)
    entries = (
        *_scaling("yarn", factor),
        ("rope.scaling.original_context_length", original, GGUFValueType.UINT32),
    )
    if attention == own:
        return entries
    return (*entries, ("rope.scaling.attn_factor", attention / own, GGUFValueType.FLOAT32))


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1


def _llama3(config: Config, where: Config, base: float, n_dims: int) -> NDArray[np.float32]:
    """What frequencies are divided by: 1 for short waves, `factor` for long ones, between them something between.

    In float32 and in the order of llama.cpp's converter, where torch divides by taking reciprocals, so that the values
    are equal bit by bit: for every base that is in use, to the last bit for others.
    """
    factor = where.number("factor", None, 1, _MAX)
    low = where.number("low_freq_factor", None, 1e-6, _MAX)
    high = where.number("high_freq_factor", None, low, _MAX)
    if high <= low:
        raise CheckpointError(f"{where.name('high_freq_factor')} must be more than low_freq_factor, {low:g}")
    original = _original(config, where)
    f32 = np.float32
    exponent = np.arange(0, n_dims, 2, dtype=f32) / f32(n_dims)
    power = np.power(np.float64(f32(base)), exponent.astype(np.float64)).astype(f32)
    wave = f32(1) / (f32(1) / power) * f32(2 * math.pi)
    smooth = (f32(1) / wave * f32(original) - f32(low)) / f32(high - low)
    between = f32(1) / ((f32(1) - smooth) / f32(factor) + smooth)
    values = np.where(wave > f32(original / low), f32(factor), between)
    return np.asarray(np.where(wave < f32(original / high), f32(1), values), f32)


def _list(where: Config, key: str, count: int) -> NDArray[np.float32]:
    values = np.asarray(where.numbers(key, (), count), np.float32)
    if not (values > 0).all():
        raise CheckpointError(f"{where.name(key)} must be a list of {count} positive numbers")
    return values
