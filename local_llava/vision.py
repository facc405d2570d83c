"""A CLIP or SigLIP tower with LLaVA's projector on a device: pixels -> image embeddings, at once or in short pieces.

Knows the device and the time that pieces take. The arithmetic is `vision_graph`'s, the weights are `vision_weights`'s.
Knows nothing of picture files (`images`), of which files fit (`mmproj`), or of the language model.
"""

from __future__ import annotations

import ctypes
import logging
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from local_llava import devices, ggml
from local_llava.corrections import open_model
from local_llava.errors import EngineError
from local_llava.mmproj import TowerConfig, check_mmproj
from local_llava.pictures import anyres
from local_llava.preprocessing import Preprocessing
from local_llava.store.digest import file_digest
from local_llava.vision_graph import PATCHES, Graph, Places, new_context, patches
from local_llava.vision_weights import load_weights, read_newline

__all__ = ["Encoding", "TowerConfig", "VisionTower", "check_mmproj"]

logger = logging.getLogger("local_llava")

MAX_ACTIVATIONS, MAX_GPU_ACTIVATIONS = 64 << 20, 256 << 20
"""Bytes of intermediate results that one graph may take, estimated; it decides how many pictures go into one. A CPU
gains nothing by more pictures than it takes to outweigh the making of a graph."""

Arrays = dict[int, NDArray[np.float32]]
"""Values by their place in the computation."""


class VisionTower:
    """A tower with its projector, on one device. One thread at a time may use it.

    Attributes:
        config: Hyperparameters, as checked.
        preprocessing: How a picture becomes `encode`'s pixels.
        n_tokens: Embeddings per picture; see `TowerConfig.n_tokens` for where they are not one a patch.
        n_embd: Width of an embedding: that of the language model.
        newline: Of LLaVA-NeXT, the embedding that ends each row of a picture made of tiles: float32 [n_embd].
        device: Name of the device that computes.
        digest: Of the file that it was loaded from, as `store.digest.file_digest` makes it: hex digits.
        images_per_graph: Pictures that are computed at once; more are computed in several steps.
    """

    def __init__(
        self,
        config: TowerConfig,
        backends: list[_Backend],
        weights: dict[str, int],
        newline: NDArray[np.float32] | None,
        digest: str,
        flash_attention: bool | None,
        stack: ExitStack,
    ) -> None:
        """Use `load`. `stack` frees what was made, in the right order."""
        self.newline = newline
        self.digest = digest
        self.config = config
        self.preprocessing: Preprocessing = config.preprocessing
        self.n_tokens = config.n_tokens
        self.n_embd = config.n_out
        self.device = backends[0].name
        on_gpu = len(backends) > 1
        limit = MAX_GPU_ACTIVATIONS if on_gpu else MAX_ACTIVATIONS
        self.images_per_graph = max(1, min(64, limit // config.activation_bytes))
        self._places = Places(config)
        self._seconds_per_cost: float | None = None  # as measured last
        self._weights = weights
        # GPUs have kernels for float16 keys and values; the CPU's for float16 also sum in it, and lose by it.
        flash = not on_gpu if flash_attention is None else flash_attention
        self._kv_type = (ggml.F16 if on_gpu else ggml.F32) if flash else None
        self._max_nodes = 256 + 64 * config.n_blocks
        g = ggml.functions()
        handles = (ctypes.c_void_p * len(backends))(*(backend.handle for backend in backends))
        self._scheduler = g.backend_sched_new(handles, None, len(backends), self._max_nodes, False, False)
        stack.callback(g.backend_sched_free, self._scheduler)
        self._stack = stack

    def arrangement(self, size: tuple[int, int], how: Preprocessing) -> anyres.Arrangement:
        """That of the embeddings of a picture of a width and height, in pixels."""
        return anyres.arrangement(size[1], size[0], how, self.n_tokens, self.newline is not None)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        n_threads: int | None = None,
        use_gpu: bool = True,
        flash_attention: bool | None = None,
    ) -> VisionTower:
        """Load an mmproj, tensor by tensor.

        Args:
            path: An mmproj that `check_mmproj` accepts.
            n_threads: CPU threads; None for one a physical core.
            use_gpu: Take the first GPU that llama.cpp would take, if there is one.
            flash_attention: Keep no matrix of attention weights, for less memory and time. On a GPU keys and values
                are rounded to float16 for it, on a CPU nothing is. None: on a CPU.

        Raises:
            ModelFileError: The file cannot be read or used; the message names the field or tensor.
            EngineError: The device has no memory for it, or ggml failed.
        """
        digest = file_digest(path)  # before it is read: a file that changes meanwhile gets no key of its new content
        gguf = open_model(path)
        config = check_mmproj(gguf)
        with ExitStack() as stack:
            backends = _open_backends(use_gpu, n_threads, stack)
            first = backends[0]
            mapping_device = first.device if len(backends) == 1 else None
            weights = load_weights(gguf, config, first.handle or 0, first.name, mapping_device, stack)
            tower = cls(config, backends, weights, read_newline(gguf), digest, flash_attention, stack.pop_all())
        logger.debug("vision tower on %s, %d pictures in a graph", tower.device, tower.images_per_graph)
        return tower

    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute the embeddings of pictures.

        Args:
            pixels: float32 [n_images, 3, image_size, image_size], preprocessed.

        Returns:
            float32 [n_images, n_tokens, n_embd].

        Raises:
            ValueError: Another shape or dtype, or the tower is closed.
            EngineError: ggml failed, or memory ran out.
        """
        encoding = self.begin(pixels)
        encoding.advance()
        return encoding.result

    def begin(self, pixels: NDArray[np.float32]) -> Encoding:
        """Prepare to compute the embeddings of pictures piece by piece, in `Encoding.advance`.

        Args:
            pixels: As `encode` takes them; they must stay as they are until the end.

        Raises:
            ValueError: Another shape or dtype, or the tower is closed.
        """
        size = self.preprocessing.image_size
        if pixels.dtype != np.float32 or pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels must be float32 [n, 3, {size}, {size}], not {pixels.dtype} {pixels.shape}")
        self._check_open()
        return Encoding(self, pixels)

    def close(self) -> None:
        """Free the memory; the tower cannot be used after."""
        self._scheduler = None
        self._stack.close()

    def __enter__(self) -> VisionTower:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._scheduler:
            raise ValueError("the vision tower is closed")

    def _compute(self, start: int, stop: int, inputs: Arrays, outputs: Arrays) -> None:
        """Run a graph from one place to another; reads those of the inputs that it needs and fills the outputs."""
        self._check_open()
        g = ggml.functions()
        n = len(inputs[start])
        began = time.perf_counter()
        size = self._max_nodes * g.tensor_overhead() + g.graph_overhead_custom(self._max_nodes, False)
        with new_context(size) as context:
            graph = Graph(context, self._places, self._weights, n, self._kv_type, start, stop)
            plan = g.new_graph_custom(context, self._max_nodes, False)
            for place in sorted(graph.outputs):
                g.build_forward_expand(plan, graph.outputs[place])
            g.backend_sched_reset(self._scheduler)
            if not g.backend_sched_alloc_graph(self._scheduler, plan):
                raise EngineError(f"no memory on {self.device} to encode {n} pictures")
            for place, tensor in graph.inputs.items():
                g.backend_tensor_set(tensor, inputs[place].ctypes.data, 0, inputs[place].nbytes)
            status = g.backend_sched_graph_compute(self._scheduler, plan)
            if status != ggml.SUCCESS:
                raise EngineError(f"ggml failed to encode pictures on {self.device} (status {status})")
            for place, tensor in graph.outputs.items():
                g.backend_tensor_get(tensor, outputs[place].ctypes.data, 0, outputs[place].nbytes)
        self._seconds_per_cost = (time.perf_counter() - began) / (n * self._places.cost(start, stop))

    def _seconds(self, start: int, stop: int) -> float:
        """How long a piece of a picture will take, by what the last graph took; at first, forever."""
        if self._seconds_per_cost is None:
            return float("inf")
        return self._seconds_per_cost * self._places.cost(start, stop)


class Encoding:
    """Pictures on their way through a tower; `VisionTower.begin` makes it.

    A piece is one or more blocks of the tower, for one or more pictures. What lies between two pieces is in host
    memory: encodings of one tower may take turns, and one that is not wanted any more is just dropped. On a CPU, whose
    kernels compute every picture on its own, the result is that of one whole graph to the last bit.
    """

    def __init__(self, tower: VisionTower, pixels: NDArray[np.float32]) -> None:
        """Use `VisionTower.begin`."""
        self._tower, self._pixels = tower, pixels
        self._embeddings = np.empty((len(pixels), tower.n_tokens, tower.n_embd), np.float32)
        self._n_done = 0
        # Of the pictures that are computed now: how far they are, and what is still needed.
        self._place = PATCHES
        self._values: Arrays = {}

    @property
    def done(self) -> bool:
        """Whether all is computed."""
        return self._n_done == len(self._pixels)

    @property
    def result(self) -> NDArray[np.float32]:
        """The embeddings: float32 [n, n_tokens, n_embd].

        Raises:
            ValueError: They are not all computed.
        """
        if not self.done:
            raise ValueError("the pictures are not encoded yet")
        return self._embeddings

    def advance(self, seconds: float | None = None) -> bool:
        """Compute on.

        Args:
            seconds: For about so long, but at least one block of one picture; None to go to the end, in graphs that
                are as large as memory allows.

        Returns:
            Whether all is computed.

        Raises:
            ValueError: The tower is closed.
            EngineError: ggml failed, or memory ran out. What was computed before is kept.
        """
        began, first = time.perf_counter(), True
        while not self.done:
            left = None if seconds is None else seconds - (time.perf_counter() - began)
            if not self._values:
                self._next_pictures(seconds)
            stop = self._stop(left)
            if not first and left is not None and len(self._values[self._place]) * self._seconds_to(stop) > left:
                break
            self._compute(stop)
            first = False
        return self.done

    def _seconds_to(self, stop: int) -> float:
        return self._tower._seconds(self._place, stop)

    def _next_pictures(self, seconds: float | None) -> None:
        """Take up as many pictures as a graph may have, or as get through a block in time."""
        tower = self._tower
        n = tower.images_per_graph if seconds is None else 1
        while n < tower.images_per_graph and (n + 1) * tower._seconds(PATCHES, 1) <= (seconds or 0):
            n += 1
        self._values = {PATCHES: patches(self._pixels[self._n_done : self._n_done + n], tower.config)}
        self._place = PATCHES

    def _stop(self, seconds: float | None) -> int:
        """The place that is reached in time, at least a block further."""
        end = self._tower._places.end
        if seconds is None:
            return end
        n, stop = len(self._values[self._place]), max(self._place + 1, 1)
        while stop < end and n * self._seconds_to(stop + 1) <= seconds:
            stop += 1
        return stop

    def _compute(self, stop: int) -> None:
        tower, places = self._tower, self._tower._places
        n = len(self._values[self._place])
        if stop == places.end:
            outputs = {stop: self._embeddings[self._n_done : self._n_done + n]}
        else:
            wanted = places.outputs(self._place, stop)
            outputs = {place: np.empty(places.shape(place, n), np.float32) for place in wanted}
        tower._compute(self._place, stop, self._values, outputs)
        if stop == places.end:
            self._n_done += n
            self._values = {}
            return
        early = {place: self._values[place] for place in tower.config.feature_layers if place in self._values}
        self._values = early | outputs
        self._place = stop


class _Backend:
    """An initialised device."""

    def __init__(self, device: int, stack: ExitStack) -> None:
        g = ggml.functions()
        self.device = device
        self.name: str = g.backend_dev_description(device).decode("utf-8", "replace")
        self.handle: int | None = g.backend_dev_init(device, None)
        if not self.handle:
            raise EngineError(f"ggml cannot start the device {self.name}")
        stack.callback(g.backend_free, self.handle)


def _open_backends(use_gpu: bool, n_threads: int | None, stack: ExitStack) -> list[_Backend]:
    """The GPU, if wanted and there, then the CPU, which computes what the GPU's backend lacks."""
    g = ggml.functions()
    gpus = devices.gpus()[:1] if use_gpu else []
    backends = [_Backend(gpu.handle, stack) for gpu in gpus]
    cpu = _Backend(g.backend_dev_by_type(ggml.CPU), stack)
    # 512 is GGML_MAX_N_THREADS.
    ggml.set_n_threads(cpu.device, cpu.handle or 0, min(512, max(1, n_threads or devices.physical_cores())))
    return [*backends, cpu]
