"""Reads how a checkpoint's image processor makes pixels of a picture.

Knows preprocessor_config.json and processor_config.json of transformers, and its CLIP and LLaVA image processors.
"""

from __future__ import annotations

import logging
from pathlib import Path

from local_llava.convert.config import Config, read_json
from local_llava.errors import CheckpointError
from local_llava.types import Preprocessing, PreprocessMode

log = logging.getLogger("local_llava")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MAX_MEAN = 1000
"""Without rescaling, means are 8-bit values."""

PROCESSORS = {"CLIPImageProcessor": False, "LlavaImageProcessor": True}
"""Supported processors, without the suffixes of their variants; True for those that may pad to a square."""


def read_preprocessing(directory: Path, image_size: int) -> Preprocessing:
    """The preprocessing of a checkpoint whose tower takes pictures of `image_size` pixels.

    Without a file of either kind, CLIP's own preprocessing is taken, and the log says so.

    Raises:
        CheckpointError: A file is damaged, asks for steps that are not supported, or contradicts the tower.
    """
    config = _find(directory)
    if config is None:
        log.warning("%s: no preprocessor_config.json; CLIP's own preprocessing is assumed", directory)
        return Preprocessing(image_size, CLIP_MEAN, CLIP_STD)
    kind = config.values.get("image_processor_type") or config.values.get("feature_extractor_type")
    base = str(kind or "CLIPImageProcessor")
    for suffix in ("Fast", "Pil"):
        base = base.removesuffix(suffix)
    base = base.replace("FeatureExtractor", "ImageProcessor")
    if base not in PROCESSORS:
        raise CheckpointError(
            f"{config.name('image_processor_type')} is {kind!a:.80}; supported: {', '.join(sorted(PROCESSORS))}"
        )
    if not config.flag("do_resize", True):
        raise CheckpointError(f"{config.name('do_resize')} is false; only resizing processors are supported")
    edge, crops = _size(config, image_size)
    pads = PROCESSORS[base] and config.flag("do_pad", False)
    mode: PreprocessMode = "pad" if pads else "crop" if crops else "resize"
    normalizes = config.flag("do_normalize", True)
    mean = config.numbers("image_mean", CLIP_MEAN, 3) if normalizes else (0.0, 0.0, 0.0)
    std = config.numbers("image_std", CLIP_STD, 3) if normalizes else (1.0, 1.0, 1.0)
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


def _size(config: Config, image_size: int) -> tuple[int, bool]:
    """The shortest edge after resizing, and whether the centre is cropped from it."""
    size, crop = config.values.get("size"), config.values.get("crop_size")
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
    if not config.flag("do_center_crop", True):
        raise CheckpointError(f"{config.name('do_center_crop')} is false, so pictures would not be square")
    wanted = {"height": image_size, "width": image_size}
    if crop is not None and crop != image_size and crop != wanted:
        raise CheckpointError(f"{config.name('crop_size')} is {crop!a:.80}, but the tower takes {wanted!r}")
    return edge, True
