"""How a picture becomes the tower's pixels, as the mmproj says.

Knows the keys and what values make sense. What is done with them is `images`'s; what checkpoints say, `convert`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from local_llava.errors import ModelFileError

PreprocessMode: TypeAlias = Literal["crop", "pad", "resize"]


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the tower's pixels. Stored in the mmproj, so that both sides of it share this table.

    "crop" resizes the shortest edge to `shortest_edge` and takes the centre, as Hugging Face's LLaVA does; "pad" makes
    the picture square with the mean colour first, as XTuner and the official LLaVA do; "resize" ignores the aspect.
    """

    image_size: int
    """Width and height of the tower's input, pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: PreprocessMode = "crop"
    shortest_edge: int = 0
    """Shortest edge after resizing in "crop"; 0 means `image_size`."""
    resample: int = 3
    """Pillow's number of the filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming."""
    rescale: float = 1 / 255
    """Factor from 8-bit values to the range that `mean` and `std` are given in."""
    grid: tuple[tuple[int, int], ...] = ()
    """Of LLaVA-NeXT (1.6): height and width, pixels, that a picture may be cut into tiles of `image_size` from, besides
    being seen as a whole. Empty where a picture is one tile."""

    KEYS: ClassVar[dict[str, str]] = {
        "mode": "local_llava.preprocess.mode",
        "shortest_edge": "local_llava.preprocess.shortest_edge",
        "resample": "local_llava.preprocess.resample",
        "rescale": "local_llava.preprocess.rescale_factor",
    }
    """GGUF keys of the fields that the `clip` architecture has no key for; files of other tools lack them."""

    def __post_init__(self) -> None:
        if not self.shortest_edge:
            object.__setattr__(self, "shortest_edge", self.image_size)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], where: str) -> Preprocessing:
        """Read from the metadata of an mmproj; `where` names the file in errors.

        Raises:
            ModelFileError: A value is missing or makes no sense.
        """
        values = {name: metadata[key] for name, key in cls.KEYS.items() if key in metadata}
        size = metadata.get("clip.vision.image_size")
        triples = [metadata.get(f"clip.vision.image_{name}") for name in ("mean", "std")]
        if not isinstance(size, int) or not 1 <= size <= 4096:
            raise ModelFileError(f"{where}: clip.vision.image_size must be 1 to 4096, not {size!a:.80}")
        for name, triple in zip(("mean", "std"), triples, strict=True):
            if not (
                isinstance(triple, (list, tuple)) and len(triple) == 3 and all(isinstance(v, float) for v in triple)
            ):
                raise ModelFileError(f"{where}: clip.vision.image_{name} must be three numbers, not {triple!a:.80}")
        mean, std = (tuple(t) for t in triples if t is not None)
        if values.get("mode", "crop") not in ("crop", "pad", "resize"):
            raise ModelFileError(f"{where}: {cls.KEYS['mode']} must be crop, pad or resize, not {values['mode']!a:.80}")
        if values.get("resample", 3) not in range(6):
            raise ModelFileError(f"{where}: {cls.KEYS['resample']} must be 0 to 5, not {values['resample']!a:.80}")
        edge, rescale = values.get("shortest_edge", size), values.get("rescale", 1 / 255)
        if not isinstance(edge, int) or not size <= edge <= 8192:
            raise ModelFileError(f"{where}: {cls.KEYS['shortest_edge']} must be {size} to 8192, not {edge!a:.80}")
        values["grid"] = _grid(metadata.get("clip.vision.image_grid_pinpoints", []), size, where)
        # Beyond these, pixels would overflow float32, or the colour of the bars in mode "pad" an integer.
        if not isinstance(rescale, float) or not 1e-6 <= rescale <= 1:
            raise ModelFileError(f"{where}: {cls.KEYS['rescale']} must be 1e-6 to 1, not {rescale!a:.80}")
        for name, triple, low, high in (("mean", mean, -1000, 1000), ("std", std, 1e-7, 1e6)):
            if not all(low <= v <= high for v in triple):
                raise ModelFileError(f"{where}: clip.vision.image_{name} must be {low:g} to {high:g}, not {triple!a}")
        return cls(image_size=size, mean=mean, std=std, **values)


MAX_TILES = 64
"""Tiles that a picture may be cut into; LLaVA-NeXT's largest grid has four."""
MAX_GRID_PIXELS = 1 << 25
"""Pixels of all tiles, which are in memory together."""


def fits_grid(height: int, width: int, tile: int) -> bool:
    """Whether pictures can be cut into whole tiles, and not too many, at a size in pixels."""
    most = min(MAX_TILES * tile * tile, MAX_GRID_PIXELS)
    return height > 0 and width > 0 and height % tile == 0 and width % tile == 0 and height * width <= most


GRID_RULE = f"multiples of the tile's size, of at most {MAX_TILES} tiles and {MAX_GRID_PIXELS} pixels"
"""What `fits_grid` accepts, in words."""


def _grid(flat: Any, size: int, where: str) -> tuple[tuple[int, int], ...]:
    """Pairs of height and width."""
    numbers = isinstance(flat, (list, tuple)) and all(type(v) is int for v in flat)
    grid = tuple(zip(flat[::2], flat[1::2], strict=False)) if numbers else ()
    if not numbers or len(flat) % 2 or len(flat) > 128 or not all(fits_grid(*pair, size) for pair in grid):
        raise ModelFileError(
            f"{where}: clip.vision.image_grid_pinpoints is {flat!a:.80}; accepted are up to 64 pairs, {GRID_RULE}"
        )
    return grid
