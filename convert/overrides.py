"""Types that a user names for single tensors of a language model: llama-quantize's options of the same meaning.

Knows how they are written and which types there are. Which tensors they reach is for `mixes` to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gguf import GGMLQuantizationType

from local_llava.convert.name_pattern import NamePattern
from local_llava.errors import UsageError
from local_llava.ggml_rows import GUIDED, QUANTIZABLE

_TYPES = (*QUANTIZABLE.values(), *GUIDED.values())


@dataclass(frozen=True)
class Overrides:
    """Types for single tensors, in place of those that the quantization type gives them.

    Types are ggml's (Q8_0, Q6_K, ..., in upper or lower case), not mixes such as Q4_K_M.

    Raises:
        UsageError: An unknown type, or a pattern that cannot be used.
    """

    tensor_types: Mapping[str, str] = field(default_factory=dict)
    """Pattern -> type: regular expressions that are searched for in tensor names, in lower case (see `name_pattern`).
    The first that is found decides. They reach matrices only, and have no effect with F32, F16 and BF16; where the
    type's blocks do not divide a row, its fallback is taken."""
    output_type: str | None = None
    """Of `output.weight`, whatever the patterns say. Where there is none, because the output is tied to the embeddings,
    of these, unless a pattern or `embedding_type` names them, or all is F32, F16 or BF16."""
    embedding_type: str | None = None
    """Of `token_embd.weight`, whatever the patterns say."""

    _patterns: tuple[tuple[str, NamePattern, GGMLQuantizationType], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        patterns = tuple((text, NamePattern(text), _type(name)) for text, name in self.tensor_types.items())
        object.__setattr__(self, "_patterns", patterns)
        for name in (self.output_type, self.embedding_type):
            if name is not None:
                _type(name)

    @classmethod
    def parse(
        cls, tensor_types: Iterable[str], output_type: str | None = None, embedding_type: str | None = None
    ) -> Overrides:
        """Read what was typed: `PATTERN=TYPE`, any number of times.

        Raises:
            UsageError: An entry is of another form, or as for the class.
        """
        types: dict[str, str] = {}
        for entry in tensor_types:
            pattern, _, name = entry.partition("=")
            if not pattern or not name:
                raise UsageError(f"--tensor-type must be PATTERN=TYPE, such as attn_v=Q8_0, not {entry!r}")
            types.setdefault(pattern, name)
        return cls(types, output_type, embedding_type)

    @property
    def output(self) -> GGMLQuantizationType | None:
        return None if self.output_type is None else _type(self.output_type)

    @property
    def embedding(self) -> GGMLQuantizationType | None:
        return None if self.embedding_type is None else _type(self.embedding_type)

    def match(self, name: str) -> tuple[str, GGMLQuantizationType] | None:
        """The first pattern that is found in a tensor's name, and its type."""
        return next(((text, type) for text, pattern, type in self._patterns if pattern.found_in(name)), None)

    def __bool__(self) -> bool:
        return bool(self.tensor_types) or self.output_type is not None or self.embedding_type is not None


def _type(name: str) -> GGMLQuantizationType:
    upper = name.upper()
    if upper in _TYPES:
        return GGMLQuantizationType[upper]
    raise UsageError(f"unknown tensor type {name!r}: use one of {', '.join(_TYPES)}")


NO_OVERRIDES = Overrides()
