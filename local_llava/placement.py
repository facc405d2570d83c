"""Where a pair of models goes: layers, tower and KV cache, between the computer's memory and that of its GPUs.

Knows what is preferred to what. How many bytes things take is `memory`'s, which devices there are `devices`'s; nothing
is loaded here.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from local_llava import devices, memory
from local_llava.devices import Device
from local_llava.errors import NotEnoughMemoryError, UsageError
from local_llava.gguf_file import GGUFFile
from local_llava.llm import N_BATCH
from local_llava.llm_file import LLMConfig
from local_llava.memory import Need, Weights, gb
from local_llava.mmproj import TowerConfig
from local_llava.pictures import anyres
from local_llava.types import KVType, Options

MAX_DEFAULT_N_CTX = 8192
"""Longest context that is chosen without being asked for: what Llama 3 was trained for; a picture takes 576, more of
LLaVA-NeXT."""
MAX_DEFAULT_PARALLEL = 8

_MIN_DEFAULT_N_CTX = 2048
"""Shorter ones hold too little besides a picture to be chosen unasked."""
_ROOM = 1024
"""Tokens besides the largest picture that a context chosen unasked has: of LLaVA-NeXT one may take 2,928."""
_ANSWER = 640
"""Tokens besides the largest picture that each of the answers given at the same time finds room for: a question and
the default `max_tokens`."""
_QUESTION = 192
"""Tokens besides the largest picture that a prompt may have to be read aside (`aside`)."""
_RESERVE, _RESERVE_SHARE = 300_000_000, 0.05
"""Of a GPU's memory, what is left to its driver and other programs: so many bytes, or such a part if that is more."""


@dataclass(frozen=True)
class Placement:
    """How a pair is loaded."""

    n_ctx: int
    """Tokens of one conversation at most."""
    n_cells: int
    """Tokens that the KV cache holds, of all sequences."""
    parallel: int
    """Answers at the same time."""
    n_gpu_layers: int
    """Layers on GPUs, counted from the end; the output matrix is one, so `n_layer + 1` are all."""
    tower_on_gpu: bool
    kv_type: KVType
    cpu: Need
    """Of the computer's memory."""
    gpus: tuple[tuple[Device, Need], ...] = ()
    """Of the memory of each GPU; where that is the computer's own, not counted in `cpu`."""
    notes: tuple[str, ...] = ()
    """What was given up, and why: a line each."""
    short: bool = False
    """Whether something was given up for lack of memory."""
    n_cells_aside: int = 0
    """Tokens of a second KV cache, where long prompts are read; 0 for none."""


def choose(
    llm: LLMConfig,
    tower: TowerConfig,
    gguf: GGUFFile,
    mmproj: GGUFFile,
    options: Options,
    all_outputs: bool = False,
) -> Placement:
    """Decide how a pair is loaded: as the options say, and for the rest what the memory allows.

    With all of it on GPUs if that is possible with some context, then the longest context, then the most answers at a
    time, then the most layers on GPUs. A KV cache in Q8_0, which rounds, is only chosen where none in F16 fits.

    Args:
        llm: The language model's sizes.
        tower: The tower's.
        gguf: The language model's header.
        mmproj: The tower's.
        options: Those of `Options.LOADING` that the user gave win, also where they need more memory of a GPU than it
            has by these estimates: then the driver has the last word.
        all_outputs: Whether all rows of a batch may have logits.

    Raises:
        UsageError: The user named a context longer than the model was trained for, or a KV cache that llama.cpp cannot
            have.
        NotEnoughMemoryError: The message has the numbers.
    """
    return _Choice(llm, tower, gguf, mmproj, options, all_outputs).best()


class _Choice:
    """What a choice depends on."""

    def __init__(
        self,
        llm: LLMConfig,
        tower: TowerConfig,
        gguf: GGUFFile,
        mmproj: GGUFFile,
        options: Options,
        all_outputs: bool,
    ) -> None:
        self.all_outputs = all_outputs
        self.llm, self.tower, self.options, self.path = llm, tower, options, gguf.path
        self.weights = Weights.of(gguf, llm)
        self.tower_weights = sum(tensor.nbytes for tensor in mmproj.tensors.values())
        self.picture = anyres.most_tokens(tower.preprocessing, tower.n_tokens)
        self.gpus = devices.gpus() if options.n_gpu_layers != 0 else []
        self.free = memory.available()
        # llama.cpp takes Phi-3's factors for long contexts by the size of the whole KV cache.
        self.longrope = "rope_factors_long.weight" in gguf.tensors

    def best(self) -> Placement:
        shapes, everything = self._shapes(), self.llm.n_layer + 1
        for kv_type in self._kv_types():
            if self.gpus and self.options.n_gpu_layers == "auto":
                for n_ctx, parallel in shapes:
                    if self._fits(placed := self._placement(n_ctx, parallel, kv_type, everything, True)):
                        return self._with_notes(placed)
            for n_ctx, parallel in shapes:
                for n_gpu_layers, tower_on_gpu in self._splits():
                    if self._fits(placed := self._placement(n_ctx, parallel, kv_type, n_gpu_layers, tower_on_gpu)):
                        return self._with_notes(placed)
        raise self._too_little(placed)

    def _contexts(self) -> list[int]:
        """Lengths to try, the longest first."""
        asked, trained = self.options.n_ctx, self.llm.n_ctx_train
        if asked is not None and asked > trained:
            raise UsageError(f"n_ctx must be 1 to {trained}, what {self.path.name} was trained for, not {asked}")
        if asked is not None:
            return [asked]
        least = self.picture + _ROOM
        longest = min(max(MAX_DEFAULT_N_CTX, least), trained)
        return [longest, *(n for n in (4096, _MIN_DEFAULT_N_CTX) if least <= n < longest)]

    def _kv_types(self) -> list[KVType]:
        asked, flash_attention = self.options.kv_type, self.options.flash_attention
        # What llama.cpp says to both is only that it cannot make a context.
        whole_blocks = self.llm.n_embd_head % 32 == 0
        if asked == "Q8_0" and not whole_blocks:
            raise UsageError(
                f"kv_type Q8_0 packs numbers by 32, but the heads of {self.path.name} have {self.llm.n_embd_head}; "
                "F16 is possible"
            )
        if asked == "Q8_0" and flash_attention is False:
            raise UsageError("kv_type Q8_0 is only possible with flash attention")
        if asked != "auto":
            return [asked]
        return ["F16", "Q8_0"] if whole_blocks and flash_attention is not False else ["F16"]

    def _parallels(self) -> list[int]:
        """Numbers of answers at the same time to try, the most first."""
        asked = self.options.parallel
        return [asked] if asked is not None else [MAX_DEFAULT_PARALLEL, 4, 2, 1]

    def _shapes(self) -> list[tuple[int, int]]:
        """Contexts and answers at the same time to try, the best first."""
        shapes = list(itertools.product(self._contexts(), self._parallels()))
        if self.options.parallel is None and self.longrope:
            shapes = [(n, p) for n, p in shapes if p == 1 or p * self._request(n) <= self.llm.n_ctx_train]
        return shapes

    def _request(self, n_ctx: int) -> int:
        """Tokens that each of the answers given at the same time finds room for."""
        return min(n_ctx, self.picture + _ANSWER)

    def _n_cells(self, n_ctx: int, parallel: int) -> int:
        n_cells = -(-max(n_ctx, parallel * self._request(n_ctx)) // memory.CELLS) * memory.CELLS
        return min(n_cells, self.llm.n_ctx_train) if self.longrope else n_cells

    def _splits(self) -> Iterator[tuple[int, bool]]:
        """Layers on GPUs, and whether the tower is on one: to try, the best first."""
        asked, everything = self.options.n_gpu_layers, self.llm.n_layer + 1
        if not self.gpus:
            yield 0, False
        elif asked != "auto":
            yield (everything if asked < 0 else min(asked, everything)), True
        else:
            # The tower goes before layers. llama.cpp lets a GPU multiply long batches by weights that stayed in the
            # computer's memory, so those cost time in each token of the answer only: of a model with 8B parameters in
            # Q4_K_M, as many as weigh what the tower does, an eighth, take 18 ms a token on two cores, the tower
            # 2.6 s a picture.
            yield from itertools.product(range(everything, -1, -1), (True,))
            yield from itertools.product(range(everything, -1, -1), (False,))

    def _placement(
        self, n_ctx: int, parallel: int, kv_type: KVType, n_gpu_layers: int, tower_on_gpu: bool
    ) -> Placement:
        n_cells = self._n_cells(n_ctx, parallel)
        kv = memory.kv_layer(self.llm, n_cells, kv_type)
        compute = self._compute(n_cells, parallel + memory.OUTPUTS, kv_type)
        tower = Need(self.tower_weights, 0, memory.picture_bytes(self.tower, parallel, tower_on_gpu))
        n_cpu = self.llm.n_layer + 1 - n_gpu_layers
        cpu = Need(self.weights.on_cpu(n_gpu_layers), min(n_cpu, self.llm.n_layer) * kv, compute + memory.PROCESS)
        needs = []
        free = [gpu.free if gpu.total else self.free for gpu in self.gpus]
        if tower_on_gpu:  # which is loaded first
            free[0] = max(0, free[0] - tower.weights)
        for layers in _shares(n_gpu_layers, free):
            mine = [n_cpu + i for i in layers]
            n_kv = sum(i < self.llm.n_layer for i in mine)
            needs.append(Need(sum(self.weights.layers[i] for i in mine), n_kv * kv, compute if mine else 0))
        if tower_on_gpu:
            needs[0] += tower
        else:
            cpu += tower
        gpus = tuple(zip(self.gpus, needs, strict=True))
        return Placement(n_ctx, n_cells, parallel, n_gpu_layers, tower_on_gpu, kv_type, cpu, gpus)

    def _compute(self, n_cells: int, n_outputs: int, kv_type: KVType) -> int:
        """Bytes of a context's intermediate results."""
        n_batch, flash = min(self.options.n_batch or N_BATCH, n_cells), self.options.flash_attention
        flash_attention = kv_type != "F32" if flash is None else flash
        n_outputs = max(n_outputs, n_batch) if self.all_outputs else n_outputs
        return memory.compute_bytes(self.llm, n_cells, n_batch, n_outputs, flash_attention)

    def _fits(self, placed: Placement) -> bool:
        shared = sum(need.total for gpu, need in placed.gpus if gpu.unified)
        if placed.cpu.total + shared > self.free:
            return False
        if self.options.n_gpu_layers != "auto":
            return True
        return all(need.total <= self._room(gpu) for gpu, need in placed.gpus if need.total)

    def _room(self, gpu: Device) -> int:
        """Bytes of a GPU's memory that may be used; of the computer's, where it does not tell of its own."""
        if not gpu.total:
            return self.free
        return max(0, gpu.free - max(_RESERVE, int(gpu.total * _RESERVE_SHARE)))

    def _with_notes(self, placed: Placement) -> Placement:
        return replace(self._with_aside(placed), notes=tuple(self._notes(placed)), short=self._short(placed))

    def _with_aside(self, placed: Placement) -> Placement:
        """With a KV cache for long prompts, where the CPU reads them and memory is left for it."""
        # A longrope model would read short contexts with other factors.
        if placed.n_gpu_layers or self.longrope:
            return placed
        n_cells = -(-(self.picture + _QUESTION) // memory.CELLS) * memory.CELLS
        kv = self.llm.n_layer * memory.kv_layer(self.llm, n_cells, placed.kv_type)
        need = Need(0, kv, self._compute(n_cells, 2, placed.kv_type))
        with_aside = replace(placed, cpu=placed.cpu + need, n_cells_aside=n_cells)
        return with_aside if 2 * n_cells <= placed.n_cells and self._fits(with_aside) else placed

    def _short(self, placed: Placement) -> bool:
        """Whether more memory would have given more of what nobody asked for in numbers."""
        options = self.options
        return (
            placed.n_ctx < self._contexts()[0]
            or (options.kv_type == "auto" and placed.kv_type != "F16")
            or placed.parallel < max(parallel for n_ctx, parallel in self._shapes() if n_ctx == placed.n_ctx)
            or (bool(self.gpus) and options.n_gpu_layers == "auto" and placed.n_gpu_layers <= self.llm.n_layer)
        )

    def _notes(self, placed: Placement) -> Iterator[str]:
        options, everything, longest = self.options, self.llm.n_layer + 1, self._contexts()[0]
        if options.n_gpu_layers not in ("auto", 0) and not self.gpus:
            yield "no layers on a GPU: llama-cpp-python knows none; local-llava doctor tells why"
        for gpu, need in placed.gpus:
            if need.total > self._room(gpu):
                yield (
                    f"{gpu.description} has {gb(gpu.free)} free and by estimate {gb(need.total)} are needed; trying as "
                    "asked"
                )
        if self.gpus and options.n_gpu_layers == "auto" and placed.n_gpu_layers < everything:
            free = ", ".join(f"{gpu.description} has {gb(gpu.free)} free" for gpu in self.gpus)
            also = "" if placed.tower_on_gpu else ", and the tower"
            yield f"{everything - placed.n_gpu_layers} of {everything} layers stay on the CPU{also}: {free}"
        if placed.n_ctx < longest:
            yield f"the context holds {placed.n_ctx} tokens, not {longest}, for lack of memory"
        if options.kv_type == "auto" and placed.kv_type != "F16":
            yield f"the KV cache is {placed.kv_type}, which rounds more than F16, for lack of memory"
        if options.parallel is None and placed.parallel < MAX_DEFAULT_PARALLEL:
            why = "the model takes no larger KV cache" if self.longrope else "for lack of memory"
            yield f"{placed.parallel} answers at the same time, not {MAX_DEFAULT_PARALLEL}: {why}"

    def _too_little(self, placed: Placement) -> NotEnoughMemoryError:
        shared = sum((need for gpu, need in placed.gpus if gpu.unified), Need())
        least = placed.cpu + shared
        return NotEnoughMemoryError(
            f"{self.path}: {gb(least.total)} of memory are needed for a context of {placed.n_ctx} tokens "
            f"(weights {gb(least.weights)}, KV cache {gb(least.kv_cache)}, computing {gb(least.compute)}), "
            f"{gb(self.free)} are free: close programs, or take a smaller --n-ctx, --kv-type Q8_0 or a smaller "
            "quantization"
        )


def _shares(n_layers: int, free: Sequence[int]) -> list[list[int]]:
    """Which of the layers go to which GPU: as `llama_model::load_tensors` deals them out, by what is free."""
    shares: list[list[int]] = [[] for _ in free]
    total = sum(free)
    ends = [end / total if total else (i + 1) / len(free) for i, end in enumerate(itertools.accumulate(free))]
    for layer in range(n_layers):
        shares[min(bisect.bisect_right(ends, layer / n_layers), len(free) - 1)].append(layer)
    return shares
