"""How much memory a pair needs, how much there is, and the context length that fits.

Knows the sizes of llama.cpp's buffers by formula, not by asking it: too little memory must be told before loading,
since the system would kill the process, or llama.cpp abort it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from local_llava import ggml
from local_llava.errors import EngineError, UsageError
from local_llava.llm import N_BATCH
from local_llava.llm_file import LLMConfig
from local_llava.mmproj import TowerConfig
from local_llava.pictures import anyres
from local_llava.types import KVType, ModelFiles, Options
from local_llava.vision import MAX_ACTIVATIONS

MAX_DEFAULT_N_CTX = 8192
"""Longest context that is chosen without being asked for: what Llama 3 was trained for; a picture takes 576, more of
LLaVA-NeXT."""

_MIN_DEFAULT_N_CTX = 2048
"""Shorter ones hold too little besides a picture to be chosen unasked."""

_ROOM = 1024
"""Tokens besides the largest picture that a context chosen unasked has: of LLaVA-NeXT one may take 2,928."""

_KV_BYTES: dict[KVType, float] = {"F32": 4, "F16": 2, "Q8_0": 34 / 32}

_PROCESS = 64 << 20
"""Python, numpy, and llama.cpp's tables of the vocabulary."""


@dataclass(frozen=True)
class Need:
    """Bytes of the computer's own memory that a loaded pair takes."""

    weights: int
    """Of both files. They are mapped, so the system may drop pages and read them again: at a hundredth of the speed."""
    kv_cache: int
    compute: int
    """Intermediate results."""

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.compute


def need(llm: LLMConfig, sizes: tuple[int, int], tower_bytes: int, n_ctx: int, options: Options) -> Need:
    """What a pair needs.

    Args:
        llm: The language model's sizes.
        sizes: Bytes of the two files.
        tower_bytes: Bytes of the tower's intermediate results.
        n_ctx: Context length, tokens.
        options: For the KV type, and for the layers that go to a GPU.
    """
    share = _share_on_cpu(llm, options.n_gpu_layers)
    cells = -(-n_ctx // 256) * 256  # llama.cpp rounds up
    per_token = 2 * llm.n_head_kv * llm.n_embd_head * _KV_BYTES[options.kv_type]
    row = llm.n_vocab + 3 * llm.n_ff + 8 * llm.n_embd
    if options.kv_type == "F32":  # no flash attention: see llm
        row += 2 * llm.n_head * cells
    weights = share * sizes[0] + (sizes[1] if share == 1 else 0)
    return Need(
        weights=int(weights),
        kv_cache=int(share * cells * llm.n_layer * per_token),
        compute=4 * min(N_BATCH, n_ctx) * row + tower_bytes + _PROCESS,
    )


def picture_bytes(tower: TowerConfig) -> int:
    """Bytes of the intermediate results of one picture, and in LLaVA-NeXT of what is made of its tiles."""
    if not tower.preprocessing.grid:
        return tower.activation_bytes
    n_tiles = anyres.most_tiles(tower.preprocessing)
    at_once = max(tower.activation_bytes, min(n_tiles * tower.activation_bytes, MAX_ACTIVATIONS))
    pixels = 3 * tower.preprocessing.image_size**2
    return at_once + 4 * n_tiles * (pixels + 2 * tower.n_tokens * tower.n_out)  # as tiles, and in order


def choose_n_ctx(llm: LLMConfig, files: ModelFiles, tower_bytes: int, options: Options, picture: int = 0) -> int:
    """The context length to load a pair with: what the user named, or the longest default that fits.

    Args:
        llm: The language model's sizes.
        files: The pair.
        tower_bytes: As of `need`; see `picture_bytes`.
        options: As of `need`, and for the length that the user named.
        picture: Most tokens that one picture takes. No default is chosen that it would fill.

    Raises:
        UsageError: The user named more than the model was trained for.
        EngineError: There is not enough memory; the message has the numbers.
    """
    if options.n_ctx is not None and options.n_ctx > llm.n_ctx_train:
        raise UsageError(
            f"n_ctx must be 1 to {llm.n_ctx_train}, what {llm.path.name} was trained for, not {options.n_ctx}"
        )
    free = available()
    longest = options.n_ctx or min(max(MAX_DEFAULT_N_CTX, picture + _ROOM), llm.n_ctx_train)
    shorter = [] if options.n_ctx else [n for n in (4096, _MIN_DEFAULT_N_CTX) if picture + _ROOM <= n < longest]
    for n_ctx in (longest, *shorter):
        least = need(llm, files.sizes, tower_bytes, n_ctx, options)
        if least.total <= free:
            return n_ctx
    raise EngineError(
        f"{files.model}: {_gb(least.total)} of memory are needed for a context of {n_ctx} tokens "
        f"(weights {_gb(least.weights)}, KV cache {_gb(least.kv_cache)}, computing {_gb(least.compute)}), "
        f"{_gb(free)} are free: close programs, or take a smaller --n-ctx, --kv-type Q8_0 or a smaller quantization"
    )


def available() -> int:
    """Bytes that this process may still take without swapping."""
    free = psutil.virtual_memory().available
    return max(0, min([free, *_cgroup_room(), *_address_room()]))


def _share_on_cpu(llm: LLMConfig, n_gpu_layers: int) -> float:
    """The part of the layers that stays in the computer's own memory; the output matrix counts as one."""
    g = ggml.functions()
    # Apple's GPU, like those inside a processor, has no memory of its own.
    if n_gpu_layers == 0 or sys.platform == "darwin" or not g.backend_dev_by_type(ggml.GPU):
        return 1.0
    n = llm.n_layer + 1
    return 0.0 if n_gpu_layers < 0 else max(0, n - n_gpu_layers) / n


def _cgroup_room() -> list[int]:
    """What the process's control group leaves, as containers have it (cgroup v2; v1 where that is mounted)."""
    for limit, used, reclaimable in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            most = int((root / limit).read_text())
            now = int((root / used).read_text())
            lines = (root / limit).with_name("memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # not there, or "max"
            continue
        cached = sum(int(line.split()[1]) for line in lines if line.split()[0] == reclaimable)
        return [most - now + cached]
    return []


def _address_room() -> list[int]:
    """What `ulimit -v` leaves; mapped files count."""
    if sys.platform == "win32":
        return []
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return [] if limit == resource.RLIM_INFINITY else [limit - psutil.Process().memory_info().vms]


def _gb(n: int) -> str:
    return f"{n / 1e9:.1f} GB"
