"""How much memory a pair of models needs, and how much there is.

Knows the sizes of llama.cpp's buffers by formula, not by asking it: too little memory must be told before loading,
since the system would kill the process, or llama.cpp abort it. What fits where is `placement`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from local_llava import control_groups
from local_llava.gguf_file import GGUFFile, TensorInfo
from local_llava.llm import N_BATCH
from local_llava.llm_file import LLMConfig
from local_llava.mmproj import TowerConfig
from local_llava.pictures import anyres
from local_llava.types import KVType
from local_llava.vision import MAX_ACTIVATIONS, MAX_GPU_ACTIVATIONS

KV_BYTES: Mapping[KVType, float] = {"F32": 4, "F16": 2, "Q8_0": 34 / 32}

PROCESS = 64 << 20
"""Python, numpy, and llama.cpp's tables of the vocabulary."""

CELLS = 256
"""llama.cpp rounds the KV cache up to a multiple of this many tokens."""

OUTPUTS = 16
"""Rows, besides one of each answer, that llama.cpp has room for the logits of: tokens that were guessed; and as many
for each sequence that is kept for later."""


@dataclass(frozen=True)
class Need:
    """Bytes of one memory, the computer's or a GPU's, that a pair takes."""

    weights: int = 0
    """Of both files. In the computer's memory they are mapped, so the system may drop pages and read them again: at a
    hundredth of the speed."""
    kv_cache: int = 0
    compute: int = 0
    """Intermediate results."""

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.compute

    def __add__(self, other: Need) -> Need:
        return Need(self.weights + other.weights, self.kv_cache + other.kv_cache, self.compute + other.compute)


@dataclass(frozen=True)
class Weights:
    """Bytes of a language model's tensors, by where llama.cpp can put them."""

    layers: tuple[int, ...]
    """One for each layer, and the output matrix, which llama.cpp counts as the last one."""
    embedding: int
    """Looked up in the computer's memory, wherever the layers are."""
    tied: bool
    """Whether the output matrix is the embedding, of which a GPU then gets a copy."""

    @classmethod
    def of(cls, gguf: GGUFFile, llm: LLMConfig) -> Weights:
        layers = [0] * (llm.n_layer + 1)
        embedding = 0
        for name, tensor in gguf.tensors.items():
            if name == "token_embd.weight":
                embedding = tensor.nbytes
            else:
                layers[_layer(tensor, llm.n_layer)] += tensor.nbytes
        if llm.tied:
            layers[-1] += embedding
        return cls(tuple(layers), embedding, llm.tied)

    def on_cpu(self, n_gpu_layers: int) -> int:
        """Bytes that stay in the computer's memory with that many layers, counted from the end, on GPUs."""
        stay = sum(self.layers[: len(self.layers) - n_gpu_layers]) + self.embedding
        return stay - (self.embedding if self.tied and not n_gpu_layers else 0)


def _layer(tensor: TensorInfo, n_layer: int) -> int:
    parts = tensor.name.split(".")
    return int(parts[1]) if parts[0] == "blk" else n_layer


def kv_layer(llm: LLMConfig, n_cells: int, kv_type: KVType) -> int:
    """Bytes of a layer's part of the KV cache."""
    return int(2 * llm.n_head_kv * llm.n_embd_head * KV_BYTES[kv_type] * n_cells)


def compute_bytes(llm: LLMConfig, n_cells: int, n_batch: int, n_outputs: int, flash_attention: bool) -> int:
    """Bytes of a language model's intermediate results, on each device that has some of its layers.

    Args:
        llm: The sizes.
        n_cells: Of the KV cache.
        n_batch: Rows of a batch at most.
        n_outputs: Rows whose logits are computed.
        flash_attention: Whether the matrix of attention weights is never there as a whole.
    """
    # Measured with shapes of 1B to 13B parameters: llama.cpp tells the size of each buffer.
    row = 3 * llm.n_ff + 4 * llm.n_embd + n_cells // 2  # the last is which cells a row may see, in F16
    if not flash_attention:
        row = max(row, (llm.n_head + 1) * n_cells + 7 * llm.n_embd)
    return 4 * (n_batch * row + 2 * n_outputs * llm.n_vocab)


def on_cpu(llm: LLMConfig, sizes: tuple[int, int], tower_bytes: int, n_ctx: int) -> Need:
    """What a pair needs that gives one answer at a time, all in the computer's memory.

    Args:
        llm: The language model's sizes.
        sizes: Bytes of the two files.
        tower_bytes: Bytes of the tower's intermediate results: see `picture_bytes`.
        n_ctx: Context length, tokens.
    """
    n_cells = -(-n_ctx // CELLS) * CELLS
    compute = compute_bytes(llm, n_cells, min(N_BATCH, n_cells), 1 + OUTPUTS, flash_attention=True)
    return Need(sum(sizes), llm.n_layer * kv_layer(llm, n_cells, "F16"), compute + tower_bytes + PROCESS)


def picture_bytes(tower: TowerConfig, n_pictures: int = 1, on_gpu: bool = False) -> int:
    """Bytes of the intermediate results of pictures that are encoded together, and in LLaVA-NeXT of what is made of
    their tiles."""
    n_tiles = n_pictures * (anyres.most_tiles(tower.preprocessing) if tower.preprocessing.grid else 1)
    limit = MAX_GPU_ACTIVATIONS if on_gpu else MAX_ACTIVATIONS
    at_once = max(tower.activation_bytes, min(n_tiles * tower.activation_bytes, limit))
    pixels = 3 * tower.preprocessing.image_size**2
    return at_once + 4 * n_tiles * (pixels + 2 * tower.n_tokens * tower.n_out)  # as tiles, and in order


_reserved = 0


def reserve(n: int) -> None:
    """Leave that many bytes to other processes: their weights, which are mapped from files.

    Linux counts those as free, since it may drop the pages and read them again.
    """
    global _reserved
    _reserved = n if sys.platform == "linux" else 0


def available() -> int:
    """Bytes that this process may still take without swapping."""
    free = psutil.virtual_memory().available - _reserved
    return max(0, min([free, *_cgroup_room(), *_address_room()]))


def _cgroup_room() -> list[int]:
    """What the process's control groups leave, as containers and services have them, in either version."""
    rooms = []
    for group in control_groups.directories("memory"):
        for limit, used, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                most = int((group / limit).read_text())
                now = int((group / used).read_text())
                lines = (group / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # not there, or "max"
                continue
            cached = sum(int(line.split()[1]) for line in lines if line.split()[0] == reclaimable)
            rooms.append(most - now + cached)
    return rooms


def _address_room() -> list[int]:
    """What `ulimit -v` leaves; mapped files count."""
    if sys.platform == "win32":
        return []
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return [] if limit == resource.RLIM_INFINITY else [limit - psutil.Process().memory_info().vms]


def gb(n: int) -> str:
    return f"{n / 1e9:.1f} GB"
