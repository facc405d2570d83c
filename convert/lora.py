"""Reads LoRA adapters and puts them on the weights of their base models.

Knows the files of the peft library, which XTuner writes too: adapter_config.json, and tensors that are named after the
modules they belong to. Does not know what a module means, or how weights are merged (`lora_merge`).

The result is that of peft's `merge_and_unload`, with scale = lora_alpha / r, or / sqrt(r) for rank-stabilized adapters
(https://arxiv.org/abs/2312.03732): https://github.com/huggingface/peft/blob/main/src/peft/tuners/lora/layer.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from local_llava.convert.config import Config, read_json
from local_llava.convert.lora_merge import Matrices, MergedTensor, Pair, RenamedTensor
from local_llava.convert.name_pattern import NamePattern
from local_llava.convert.source import FLOATS, SourceTensor
from local_llava.convert.weights import read_weights
from local_llava.errors import CheckpointError, UsageError

CONFIG = "adapter_config.json"

_MAX_MODULES = 1024
"""That an adapter may adapt; a model of 70 billion parameters has 560 linear layers."""
_MAX_PATTERNS = 1024
"""In rank_pattern or alpha_pattern; some ways to train write one for each module."""
_MAX_EXPRESSIONS = 8
"""Of those, such as are more than a name. With these limits the worst take half a minute."""

_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))")
_NAME = re.compile(r"[\w.-]+", re.ASCII)

_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "velora_config",
)
"""Fields that make another sum of the weights, where they are set."""

_INITIAL = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base weights as they are; PiSSA, OLoRA, LoftQ and others change them."""


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter, not yet read but for its configuration and the headers of its weights."""

    directory: Path
    base_model: str | None
    """What it calls the model that it adapts: a path or a name on the Hub. Says nothing about where that is now."""
    pairs: Mapping[str, Pair]
    """By the path of the module."""
    replacements: Mapping[str, SourceTensor]
    """Whole tensors in place of those of the base (modules_to_save, biases), by name."""
    fan_in_fan_out: bool
    """The adapted weights are stored as [in, out]."""

    @classmethod
    def open(cls, directory: Path, read: Callable[[Path], Mapping[str, SourceTensor]] = read_weights) -> LoraAdapter:
        """Read adapter_config.json and the headers of the weight files.

        Args:
            directory: The adapter.
            read: What reads the headers.

        Raises:
            CheckpointError: A file is missing or damaged, or the adapter is of a kind that is not supported.
        """
        path = directory / CONFIG
        if not path.is_file():
            raise CheckpointError(f"{directory}: no {CONFIG}, so this is no adapter")
        config = Config(path, read_json(path))
        config.choice("peft_type", None, ("LORA",))
        _check_supported(config)
        base = config.values.get("base_model_name_or_path")
        if not isinstance(base, str | None):
            raise CheckpointError(f"{config.name('base_model_name_or_path')} must be a text, not {base!a:.80}")
        tensors = _by_meaning(read(directory))
        if not tensors:
            raise CheckpointError(f"{directory}: the adapter has no tensors")
        pairs = _pairs(config, tensors)
        rest = {name: tensor for name, tensor in tensors.items() if not _TENSOR.fullmatch(name)}
        return cls(directory, base or None, pairs, rest, config.flag("fan_in_fan_out", False))

    def apply(self, tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
        """The tensors of the base model, with those that are adapted replaced by ones that merge when they are read.

        Reading a block of rows takes the same rows of W and of B, and the whole of A: the last ones are kept, at most
        `lora_merge.CACHE_BYTES` or two of them. For an embedding, and for a weight that is stored as [in, out], the
        whole of both is needed. A block of n values costs 2 r n operations.

        Names: the adapter's, without `base_model.model.`, are those of the model that was trained; those of a base
        checkpoint may have more or fewer prefixes. A tensor is meant that is called the same; else one whose name ends
        with the adapter's after a dot, if it is the only one; else the longest one that the adapter's ends with.

        Args:
            tensors: By name. Leave out parts that the adapter is not for, where names could be taken for each other.

        Raises:
            CheckpointError: A tensor of the adapter has no tensor of the base, or their shapes do not fit.
        """
        adapted = {f"{path}.weight": pair for path, pair in self.pairs.items()}
        found = _matches({*self.replacements, *adapted}, tensors)
        result = dict(tensors)
        for name, new in self.replacements.items():
            own = _one(new, name, found)
            base = tensors[own]
            if new.shape != base.shape:
                raise CheckpointError(f"{new} has the shape {new.shape}, and {base} {base.shape}")
            result[own] = RenamedTensor(new, own)
        matrices = Matrices()
        for name, pair in adapted.items():
            own = _one(pair.a, name, found)
            base = result[own]
            if isinstance(base, MergedTensor):
                raise CheckpointError(f"{pair.a} adapts {base}, which another tensor of the adapter adapts as well")
            result[own] = MergedTensor(base, pair, self._transposed(base, pair), matrices)
        return result

    def _transposed(self, base: SourceTensor, pair: Pair) -> bool:
        """Whether a weight has the shape of (B A)^T, which fits it; peft, too, asks the flag only of what may be it."""
        as_stored = (pair.b.shape[0], pair.a.shape[1])
        flipped = base.shape == as_stored[::-1] and (pair.embedding or self.fan_in_fan_out)
        if not flipped and (base.shape != as_stored or pair.embedding):
            wanted = as_stored[::-1] if pair.embedding else as_stored
            raise CheckpointError(f"{pair.a} and B make the shape {wanted}, and {base} has {base.shape}")
        return flipped


def _check_supported(config: Config) -> None:
    for key in _UNSUPPORTED:
        if config.values.get(key):
            raise CheckpointError(f"{config.name(key)} is set, which is not supported; plain LoRA is")
    initial = config.values.get("init_lora_weights")
    if not any(initial is known or initial == known for known in (None, *_INITIAL)):
        raise CheckpointError(
            f"{config.name('init_lora_weights')} is {initial!a:.40}, which changes the base weights; "
            "convert the adapter to plain LoRA with peft (path_initial_model_for_weight_conversion)"
        )


def _by_meaning(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """The tensors under the names that the base model would have for them, if it had lora_A and lora_B."""
    found: dict[str, SourceTensor] = {}
    for name, tensor in tensors.items():
        # peft has a `base_layer` around modules that are adapted.
        short = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if short in found:
            raise CheckpointError(f"{tensor} and {found[short].name} are the same tensor of the base model")
        special = "lora_" in short or "modules_to_save" in short or "token_adapter" in short
        if special and not _TENSOR.fullmatch(short):
            raise CheckpointError(f"{tensor} is not supported; lora_A and lora_B of linear layers and embeddings are")
        found[short] = tensor
    return found


def _pairs(config: Config, tensors: Mapping[str, SourceTensor]) -> dict[str, Pair]:
    parts: dict[str, dict[str, SourceTensor]] = {}
    for name, tensor in tensors.items():
        if found := _TENSOR.fullmatch(name):
            path, linear, embedding = found.groups()
            parts.setdefault(path, {})[linear or f"embedding_{embedding}"] = tensor
            if len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
                raise CheckpointError(
                    f"{tensor} has the shape {tensor.shape} and dtype {tensor.dtype}; LoRA is supported with matrices "
                    f"of {', '.join(FLOATS)}, of linear layers and embeddings"
                )
    if len(parts) > _MAX_MODULES:
        raise CheckpointError(f"{config.path.parent}: adapts {len(parts)} modules, more than {_MAX_MODULES}")
    rank = _Numbers(config, "r", "rank_pattern", 8, 1)
    alpha = _Numbers(config, "lora_alpha", "alpha_pattern", 8, -1e9)
    root = config.flag("use_rslora", False)
    pairs = {}
    for path, has in parts.items():
        embedding = "embedding_A" in has
        a, b = (has.get(f"embedding_{part}" if embedding else part) for part in "AB")
        if a is None or b is None or len(has) != 2:
            one = next(iter(has.values()))
            raise CheckpointError(f"{one}: of lora_A and lora_B of a module, only one is there, or more than these two")
        r = rank.of(path)
        if not a.shape[0] == b.shape[1] == r:
            raise CheckpointError(f"{a} and B have the shapes {a.shape} and {b.shape}, which are not of rank {r:g}")
        pairs[path] = Pair(a, b, alpha.of(path) / (math.sqrt(r) if root else r), embedding)
    return pairs


class _Numbers:
    """A number for each module: the first pattern that fits the end of its path counts, and else the default."""

    def __init__(self, config: Config, key: str, patterns_key: str, default: float, low: float) -> None:
        self._default = config.number(key, default, low, 1e9)
        patterns = config.sub(patterns_key)
        self._values = [(self._matcher(patterns, key), patterns.number(key, None, low, 1e9)) for key in patterns.values]
        expressions = sum(not _NAME.fullmatch(key) for key in patterns.values)
        if len(self._values) > _MAX_PATTERNS or expressions > _MAX_EXPRESSIONS:
            raise CheckpointError(
                f"{config.name(patterns_key)} has {len(self._values)} patterns, and {expressions} that are more than a "
                f"name; at most {_MAX_PATTERNS} and {_MAX_EXPRESSIONS} are accepted"
            )

    @staticmethod
    def _matcher(patterns: Config, key: str) -> Callable[[str], object]:
        if _NAME.fullmatch(key):
            return re.compile(rf"(.*\.)?({key})$").match
        if "{" in key:  # written out, they make long patterns
            raise CheckpointError(f"{patterns.path}: {patterns.section}: {key!a:.80}: counts are not supported")
        try:  # Python's own could take for ever. This one takes capital letters for small ones.
            pattern = NamePattern(rf"^(.*\.)?({key})$")
            return lambda path: pattern.found_in(path.lower())
        except UsageError as e:
            reason = str(e).rpartition(", at character ")[2]
            raise CheckpointError(f"{patterns.path}: {patterns.section}: {key!a:.80}: at character {reason}") from e

    def of(self, path: str) -> float:
        return next((value for matches, value in self._values if matches(path)), self._default)


def _matches(wanted: set[str], tensors: Iterable[str]) -> dict[str, list[str]]:
    """The tensors of the base that each name may mean; see `LoraAdapter.apply`."""
    longer: dict[str, list[str]] = {}
    known = set(tensors)
    for name in known:
        rest = name
        while rest := rest.partition(".")[2]:
            if rest in wanted:
                longer.setdefault(rest, []).append(name)
    found = {}
    for name in wanted:
        rest = name
        while rest and rest not in known:
            rest = rest.partition(".")[2]
        found[name] = [name] if name in known else longer.get(name) or ([rest] if rest else [])
    return found


def _one(tensor: SourceTensor, name: str, found: Mapping[str, list[str]]) -> str:
    match sorted(found[name]):
        case [one]:
            return one
        case []:
            raise CheckpointError(f"{tensor} adapts {name}, which the base model does not have")
        case [first, second, *_]:
            raise CheckpointError(f"{tensor} adapts {name}, which may be {first} or {second} of the base model")
    raise AssertionError
