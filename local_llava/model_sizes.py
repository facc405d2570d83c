"""What a model of the list weighs in a quantization type: on the disk, and in memory.

Knows no numbers of its own: the tensors are those that the converter would write for the model's configuration, their
types those that it would give them, and memory is reckoned as it is before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from local_llava import memory
from local_llava.convert import mixes, tensor_types, write
from local_llava.convert.config import Config
from local_llava.convert.conversion import decoder_types
from local_llava.convert.families import Decoder, Parts, Row
from local_llava.convert.families.decoders import read_decoder
from local_llava.convert.families.towers import read_tower
from local_llava.convert.plan import GGUFPlan, TensorPlan
from local_llava.llm_file import LLMConfig
from local_llava.llm_vocab import Vocab
from local_llava.mmproj import TowerConfig
from local_llava.model_list import ModelEntry
from local_llava.placement import MAX_DEFAULT_N_CTX
from local_llava.preprocessing import Preprocessing
from local_llava.types import DEFAULT_MMPROJ_QUANT, DEFAULT_QUANT

QUANTS = tuple(name for name, mix in mixes.LLM_MIXES.items() if not mix.guided)
"""Types of the language model that need no importance matrix, from the largest to the smallest."""

_FEATURE_LAYER = -2
"""The hidden state that the models of the list project: all but the last block run."""


@dataclass(frozen=True)
class Size:
    """Bytes that a pair takes, within 1 % of what the converter writes."""

    model: int
    """File of the language model."""
    mmproj: int
    memory: int
    """While it gives one answer, with the context that is chosen unasked where there is room for it, all on the CPU."""
    n_ctx: int
    """That context's length, tokens."""

    @property
    def files(self) -> int:
        return self.model + self.mmproj


def size(entry: ModelEntry, quant: str = DEFAULT_QUANT, mmproj_quant: str = DEFAULT_MMPROJ_QUANT) -> Size:
    """What a model needs.

    Args:
        entry: The model.
        quant: Type of the language model.
        mmproj_quant: Type of tower and projector.

    Raises:
        UsageError: There is no such type.
    """
    mix = mixes.get_mix(quant, mixes.LLM_MIXES)
    mmproj_mix = mixes.get_mix(mmproj_quant, mixes.MMPROJ_MIXES)
    parts = _parts(entry)
    decoder = read_decoder(parts.text, parts.tied)
    tower = read_tower(parts, decoder.n_embd)
    types = decoder_types(mix, decoder)
    model = entry.vocabulary_bytes + _bytes(decoder.rows, types)
    tower_rows = [*tower.rows, *tower.projector_rows]
    mmproj = _bytes(tower_rows, tensor_types.mmproj_types(mmproj_mix, _named(tower_rows)))
    llm = _llm_config(entry, decoder)
    n_ctx = min(MAX_DEFAULT_N_CTX, llm.n_ctx_train)
    tower_bytes = memory.picture_bytes(_tower_config(entry, decoder))
    need = memory.on_cpu(llm, (model, mmproj), tower_bytes, n_ctx)
    return Size(model, mmproj, need.total, n_ctx)


def download_bytes(entry: ModelEntry, quant: str, *, repository: str | None = None) -> int | None:
    """What has to be downloaded for a model of a type: its published GGUF files, or else the checkpoint.

    Args:
        entry: The model.
        quant: Type of the language model.
        repository: One of the entry's, to take that one; None for the preferred one.
    """
    chosen = entry.repository(repository) if repository else None
    published = entry.published(quant)
    if published is not None and chosen in (None, published[0]):
        reckoned = size(entry, quant)
        return (published[1].model_bytes or reckoned.model) + (published[1].mmproj_bytes or reckoned.mmproj)
    return (chosen or entry.checkpoint).bytes


def _named(rows: Sequence[Row]) -> list[tensor_types.Tensor]:
    return [tensor_types.Tensor(row.target, row.shape) for row in rows]


def _bytes(rows: Sequence[Row], types: tensor_types.Assignment) -> int:
    """Of a file with these tensors, and no metadata."""
    tensors = (TensorPlan(row.target, row.shape, types.types[row.target], _no_load, "") for row in rows)
    return write.output_size(GGUFPlan((), tuple(tensors)))


def _no_load(start: int, stop: int) -> NDArray[np.float32]:
    raise AssertionError("only sizes are asked for")


def _parts(entry: ModelEntry) -> Parts:
    """A checkpoint with the model's configuration, and without weights."""
    nowhere = Path("models.json")
    return Parts(
        directory=nowhere,
        text=Config(nowhere, entry.text_config, "text_config"),
        text_tensors={},
        tied=False,
        vision=Config(nowhere, entry.vision_config, "vision_config"),
        vision_tensors={},
        projector_tensors={},
        projector_bias=True,
        feature_layers=(_FEATURE_LAYER,),
        strategy="default",
        tokenizer=nowhere,
        top={},
        processor=nowhere,
        grid=entry.grid,
    )


def _llm_config(entry: ModelEntry, decoder: Decoder) -> LLMConfig:
    vocab = Vocab(decoder.n_vocab, "llama", bos=1, eos=2, eot=None, add_bos=True, chat_template=None)
    return LLMConfig(
        path=Path(entry.name),
        n_embd=decoder.n_embd,
        n_layer=decoder.n_layer,
        n_head=decoder.n_head,
        n_head_kv=decoder.n_head_kv,
        n_embd_head=decoder.n_embd // decoder.n_head,
        n_ff=entry.text_config["intermediate_size"],
        n_ctx_train=entry.text_config["max_position_embeddings"],
        tied=False,
        vocab=vocab,
    )


def _tower_config(entry: ModelEntry, decoder: Decoder) -> TowerConfig:
    config = entry.vision_config
    return TowerConfig(
        preprocessing=Preprocessing(config["image_size"], (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), grid=entry.grid),
        patch_size=config["patch_size"],
        n_embd=config["hidden_size"],
        n_ff=config["intermediate_size"],
        n_head=config["num_attention_heads"],
        eps=1e-5,
        activation="quick_gelu",
        feature_layers=(config["num_hidden_layers"] + 1 + _FEATURE_LAYER,),
        ffn_swapped=False,
        n_hidden=decoder.n_embd,
        n_out=decoder.n_embd,
    )
