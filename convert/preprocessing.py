"""Reads how a checkpoint's image processor makes pixels of a picture.

Knows preprocessor_config.json and processor_config.json of transformers, and its CLIP, LLaVA and SigLIP image
processors.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from local_llava.convert.config import Config, read_json
from local_llava.errors import CheckpointError
from local_llava.preprocessing import Preprocessing, PreprocessMode

log = logging.getLogger("local_llava")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_MEAN = 1000
"""Without rescaling, means are 8-bit values."""


@dataclass(frozen=True)
class Processor:
    """An image processor of transformers: what it does where its configuration says nothing."""

    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    crops: bool = True
    """Resizes the shortest edge and takes the centre; otherwise it ignores the aspect."""
    may_pad: bool = False
    """Pads to a square with the mean colour if it is told to."""


PROCESSORS = {
    "CLIPImageProcessor": Processor(),
    "LlavaImageProcessor": Processor(may_pad=True),
    # Its `do_pad` is about the number of tiles, not about pixels.
    "LlavaNextImageProcessor": Processor(),
    "SiglipImageProcessor": Processor(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crops=False),
}
"""Supported processors, without the suffixes of their variants."""


def read_preprocessing(directory: Path, image_size: int) -> Preprocessing:
    """The preprocessing of a checkpoint whose tower takes pictures of `image_size` pixels.

    Without a file of either kind, the tower's own preprocessing is taken, and the log says so.

    Raises:
        CheckpointError: A file is damaged, asks for steps that are not supported, or contradicts the tower.
    """
    config = _find(directory)
    if config is None:
        assumed = _assumed(directory)
        log.warning("%s: no preprocessor_config.json; that of %s is assumed", directory, assumed)
        config = Config(directory / "preprocessor_config.json", {"image_processor_type": assumed})
    kind = config.values.get("image_processor_type") or config.values.get("feature_extractor_type")
    base = str(kind or _assumed(directory))
    for suffix in ("Fast", "Pil"):
        base = base.removesuffix(suffix)
    base = base.replace("FeatureExtractor", "ImageProcessor")
    if base not in PROCESSORS:
        raise CheckpointError(
            f"{config.name('image_processor_type')} is {kind!a:.80}; supported: {', '.join(sorted(PROCESSORS))}"
        )
    processor = PROCESSORS[base]
    if not config.flag("do_resize", True):
        raise CheckpointError(f"{config.name('do_resize')} is false; only resizing processors are supported")
    edge, crops = _size(config, image_size, processor.crops)
    pads = processor.may_pad and config.flag("do_pad", False)
    mode: PreprocessMode = "pad" if pads else "crop" if crops else "resize"
    normalizes = config.flag("do_normalize", True)
    mean = config.numbers("image_mean", processor.mean, 3) if normalizes else (0.0, 0.0, 0.0)
    std = config.numbers("image_std", processor.std, 3) if normalizes else (1.0, 1.0, 1.0)
    if not all(abs(v) <= MAX_MEAN for v in mean):
        raise CheckpointError(f"{config.name('image_mean')} must be from -{MAX_MEAN} to {MAX_MEAN}, not {list(mean)}")
    if not all(1e-6 <= v <= 1e6 for v in std):
        raise CheckpointError(f"{config.name('image_std')} must be from 1e-6 to 1e6, not {list(std)}")
    return Preprocessing(
        image_size=image_size,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        mode=mode,
        shortest_edge=edge,
        resample=config.integer("resample", 3, 0, 5),
        rescale=config.number("rescale_factor", 1 / 255, 1e-6, 1) if config.flag("do_rescale", True) else 1.0,
    )


def _find(directory: Path) -> Config | None:
    path = directory / "preprocessor_config.json"
    if path.is_file():
        return Config(path, read_json(path))
    path = directory / "processor_config.json"
    if path.is_file():
        config = Config(path, read_json(path))
        if "image_processor" in config.values:
            return config.sub("image_processor")
    return None


def _assumed(directory: Path) -> str:
    """The processor that belongs to the tower that the checkpoint's configuration names."""
    path = directory / "config.json"
    if path.is_file() and path.stat().st_size:
        config = Config(path, read_json(path))
        if any(c.values.get("model_type") == "siglip_vision_model" for c in (config, config.sub("vision_config"))):
            return "SiglipImageProcessor"
    return "CLIPImageProcessor"


def _size(config: Config, image_size: int, crops: bool) -> tuple[int, bool]:
    """The shortest edge after resizing, and whether the centre is cropped from it; `crops` by default."""
    size, crop = config.values.get("size"), config.values.get("crop_size")
    if size is None and not crops:
        return image_size, False
    if isinstance(size, dict) and "shortest_edge" in size:
        edge: object = size["shortest_edge"]
    elif isinstance(size, dict) and size.keys() >= {"height", "width"}:
        if (size["height"], size["width"]) != (image_size, image_size):
            raise CheckpointError(
                f"{config.name('size')} is {size!a:.80}, but the tower takes {image_size} x {image_size}"
            )
        return image_size, False
    else:
        edge = image_size if size is None else size  # up to transformers 4.26, a bare number
    if not isinstance(edge, int) or isinstance(edge, bool) or not image_size <= edge <= 8192:
        raise CheckpointError(
            f"{config.name('size')}: the shortest edge must be {image_size} to 8192, not {edge!a:.80}"
        )
    if not config.flag("do_center_crop", crops):
        raise CheckpointError(f"{config.name('do_center_crop')} is false, so pictures would not be square")
    wanted = {"height": image_size, "width": image_size}
    if crop is not None and crop != image_size and crop != wanted:
        raise CheckpointError(f"{config.name('crop_size')} is {crop!a:.80}, but the tower takes {wanted!r}")
    return edge, True
