"""Loading a pair: where its parts go, both models on their devices, and what they keep of pictures.

Knows the order of loading, and what to do where a GPU's driver fails. Knows no conversations and no threads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from local_llava import devices, ggml, hub, placement, tuning
from local_llava.chat import ChatFormat
from local_llava.corrections import corrected
from local_llava.embeddings import Encoder
from local_llava.errors import EngineError, ModelFileError
from local_llava.gguf_file import GGUFFile
from local_llava.image_cache import ImageCache
from local_llava.llm import LLM, N_BATCH, Observer
from local_llava.llm_file import check_llm, check_pair
from local_llava.mmproj import check_mmproj
from local_llava.picture_store import PictureStore
from local_llava.placement import Placement
from local_llava.scheduler import N_RETIRED
from local_llava.speculation import MAX_GUESSED
from local_llava.store.digest import file_digest
from local_llava.types import ModelFiles, Options
from local_llava.vision import VisionTower

log = logging.getLogger("local_llava")


@dataclass(frozen=True)
class Loaded:
    """A pair in memory."""

    files: ModelFiles
    options: Options
    """With what was measured for this machine."""
    placement: Placement
    tower: VisionTower
    llm: LLM
    encoder: Encoder
    store: PictureStore

    def chat_format(self) -> ChatFormat:
        """How a conversation is put to the language model.

        Raises:
            ModelFileError: The file does not say.
        """
        vocab, model = self.llm.config.vocab, self.files.model
        if vocab.chat_template is None:
            raise ModelFileError(f"{model}: tokenizer.chat_template is missing; it says how a question is put")
        return ChatFormat(vocab.chat_template, self.llm.specials, vocab.bos, vocab.eos, vocab.add_bos)


def load(
    files: ModelFiles,
    options: Options,
    explicit: Mapping[str, Any],
    stack: ExitStack,
    observer: Observer | None = None,
) -> Loaded:
    """Load a pair.

    Args:
        files: The pair.
        options: How to load it.
        explicit: Those of them that the user named.
        stack: Frees what was loaded.
        observer: Looks at what the language model's matrices are multiplied with. All rows of a batch may have logits
            then: without them, llama.cpp leaves the last layer out.

    Raises:
        ModelFileError: A file cannot be used, or the two do not belong together.
        UsageError: An option is not accepted.
        EngineError: There is not enough memory, or llama.cpp or ggml failed.
    """
    options = tuning.apply(options, explicit, files)
    gguf, mmproj = (corrected(GGUFFile.open(path)).gguf for path in (files.model, files.mmproj))
    llm_config, tower_config = check_llm(gguf), check_mmproj(mmproj)
    check_pair(llm_config, files.mmproj, tower_config.n_out)
    hub.check_pair_ids(gguf, mmproj)

    def place(options: Options) -> Placement:
        return placement.choose(llm_config, tower_config, gguf, mmproj, options, all_outputs=observer is not None)

    placed = place(options)
    try:
        tower, llm = _load_models(files, placed, options, stack, observer)
    except EngineError as e:
        if not placed.n_gpu_layers and not placed.tower_on_gpu:
            raise
        log.warning("the GPU cannot be used (%s): the CPU computes everything", e)
        placed = place(options.updated({"n_gpu_layers": 0}))
        tower, llm = _load_models(files, placed, options, stack, observer)
    # Who named a number of layers is told where they did not go to any GPU.
    level = logging.INFO if options.n_gpu_layers in ("auto", 0) or placed.gpus else logging.WARNING
    for note in placed.notes:
        log.log(level, "%s", note)
    store = _picture_store(files, placed, options, tower, llm)
    stack.callback(store.close)
    return Loaded(files, options, placed, tower, llm, Encoder(tower, store), store)


def _load_models(
    files: ModelFiles, placed: Placement, options: Options, stack: ExitStack, observer: Observer | None
) -> tuple[VisionTower, LLM]:
    # Every running answer has its next token in each batch, and a prompt some of its own.
    n_batch = max(options.n_batch or N_BATCH, 2 * placed.parallel)
    with ExitStack() as own:
        # First, since the language model's share of a GPU was computed with the tower there.
        tower = VisionTower.load(
            files.mmproj,
            n_threads=options.n_threads,
            use_gpu=placed.tower_on_gpu,
            flash_attention=options.flash_attention,
        )
        own.callback(tower.close)
        llm = LLM.load(
            files.model,
            n_cells=placed.n_cells,
            n_seq_max=placed.parallel + N_RETIRED + 1,
            n_batch=n_batch,
            n_outputs=placed.parallel + MAX_GUESSED if observer is None else n_batch,
            kv_type=placed.kv_type,
            n_threads=options.n_threads,
            n_gpu_layers=placed.n_gpu_layers,
            flash_attention=options.flash_attention,
            observer=observer,
        )
        own.callback(llm.close)
        stack.enter_context(own.pop_all())
    return tower, llm


def _picture_store(
    files: ModelFiles, placed: Placement, options: Options, tower: VisionTower, llm: LLM
) -> PictureStore:
    """What is kept on disk is called by all that it depends on, so that nothing else is ever taken for it."""
    cache, depends_tower, depends_llm = None, {}, {}
    if options.image_cache != "off":
        cache = ImageCache(max_bytes=options.image_cache_bytes)
        build = {
            # The corrections of published files may change from one release to the next, too.
            "local-llava": version("local-llava"),
            "llama-cpp-python": version("llama-cpp-python"),
            "cpu": ggml.cpu_features(),
            "flash_attention": options.flash_attention,
        }
        depends_tower = {**build, "mmproj": tower.digest, "device": tower.device}
        depends_llm = {
            **build,
            "model": file_digest(files.model),
            "devices": [device.description for device in devices.gpus()] if placed.n_gpu_layers else [],
            "n_gpu_layers": placed.n_gpu_layers,
            "kv_type": placed.kv_type,
            "kv_unified": True,
            # llama.cpp takes the factors for long contexts by the size of the whole KV cache.
            "n_cells": placed.n_cells if "rope_factors_long.weight" in llm.gguf.tensors else None,
        }
    return PictureStore(
        cache,
        options.image_cache,
        tower=depends_tower,
        llm=depends_llm,
        name=files.model.name,
        exact=placed.kv_type == "F32",
        after=options.image_cache_after,
    )
