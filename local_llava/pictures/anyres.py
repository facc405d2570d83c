"""Pictures of any resolution, as LLaVA-NeXT (1.6) sees them: the tiles, and the order of their embeddings.

Knows the choices, roundings and order of transformers 5 (`LlavaNextImageProcessorPil`, `LlavaNextProcessor`, and
`pack_image_features` and `unpad_image` of `modeling_llava_next`), which follow "spatial_unpad" of the official
code (https://llava-vl.github.io/blog/2024-01-30-llava-next/). Knows no model, no file, and nothing of normalisation.

The embeddings of a tile must be its patches and nothing else. With a class token among them (the feature selection
"full" on CLIP), transformers cannot put the tiles together either: they come out wider than the newline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from local_llava.preprocessing import Preprocessing

__all__ = ["Arrangement", "arrangement", "best_resolution", "cut", "most_tiles", "most_tokens"]


@dataclass(frozen=True)
class Arrangement:
    """In which order the embeddings of a picture's tiles go to the language model.

    Those of the whole picture come first. In LLaVA-NeXT the grid of tiles follows, line by line as if it were one large
    picture, without the lines or columns that show only padding, and the newline after each line. A single tile has
    one newline at its end there, as in `pack_image_features`; in other models it is all there is.
    """

    tile: int
    """Embeddings of a tile; in LLaVA-NeXT those of a square of patches, by rows."""
    rows: int = 0
    """Tiles above each other, besides the whole picture."""
    columns: int = 0
    """Tiles beside each other."""
    margin: tuple[int, int] = (0, 0)
    """Patches of padding to leave out: at the top, and as many at the bottom; at the left, and as many at the right."""
    newline: bool = False
    """Whether the model has a newline."""

    @property
    def side(self) -> int:
        """Patches along the edge of a tile."""
        return math.isqrt(self.tile)

    @property
    def lines(self) -> int:
        """Lines of patches of the grid that are kept."""
        return self.rows * self.side - 2 * self.margin[0]

    @property
    def width(self) -> int:
        """Patches of such a line."""
        return self.columns * self.side - 2 * self.margin[1]

    @property
    def n_tokens(self) -> int:
        """Tokens that the picture takes in the prompt."""
        if not self.rows:
            return self.tile + self.newline
        return self.tile + self.lines * (self.width + self.newline)

    def apply(self, features: NDArray[np.float32], newline: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Put the embeddings in order.

        Args:
            features: float32 [1 + rows * columns, tile, n_embd]: the whole picture, then the tiles, by rows.
            newline: float32 [n_embd]; None where the model has none.

        Returns:
            A new array, float32 [n_tokens, n_embd].

        Raises:
            ValueError: Another shape, or a newline is missing.
        """
        shape = (1 + self.rows * self.columns, self.tile)
        if features.shape[:2] != shape or (newline is None) is self.newline:
            raise ValueError(f"features must be {[*shape, 'n_embd']}, not {list(features.shape)}, with their newline")
        parts = [features[0]]
        if self.rows:
            grid = features[1:].reshape(self.rows, self.columns, self.side, self.side, -1)
            grid = grid.swapaxes(1, 2).reshape(self.rows * self.side, self.columns * self.side, -1)
            top, left = self.margin
            grid = grid[top : top + self.lines, left : left + self.width]
            if newline is not None:
                ends = np.broadcast_to(newline, (self.lines, 1, len(newline)))
                grid = np.concatenate([grid, ends], axis=1)
            parts.append(grid.reshape(-1, features.shape[2]))
        elif newline is not None:
            parts.append(newline[None])
        return np.concatenate(parts)


def arrangement(height: int, width: int, how: Preprocessing, tile: int, newline: bool) -> Arrangement:
    """The arrangement of a picture, from its size alone.

    Args:
        height: Of the picture before any preprocessing, pixels.
        width: Likewise.
        how: Its preprocessing.
        tile: Embeddings of a tile; with a grid, a square number.
        newline: Whether the model has a newline.
    """
    if not how.grid:
        return Arrangement(tile, newline=newline)
    rows, columns = (edge // how.image_size for edge in best_resolution(height, width, how.grid))
    # unpad_image, in patches: it rounds otherwise than the padding in pixels did, so that some padding may stay.
    lines, places = rows * math.isqrt(tile), columns * math.isqrt(tile)
    if width / height > places / lines:
        margin = ((lines - int(round(height * (places / width), 7))) // 2, 0)
    else:
        margin = (0, (places - int(round(width * (lines / height), 7))) // 2)
    return Arrangement(tile, rows, columns, margin, newline)


def best_resolution(height: int, width: int, grid: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The height and width of the grid, pixels, that keeps most of a picture's pixels and wastes fewest of its own.

    transformers.image_processing_utils.select_best_resolution. Of equals, the first one counts.
    """

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - resolution[0] * resolution[1]

    return max(grid, key=merit)


def cut(image: Image.Image, how: Preprocessing) -> list[Image.Image]:
    """The tiles of a picture, by rows, without the one that shows it as a whole.

    The picture is resized into its best resolution, amid black, as transformers pads (the official code likewise).

    Args:
        image: An RGB picture.
        how: Its preprocessing, with a grid.

    Returns:
        RGB pictures of image_size x image_size.
    """
    size = how.image_size
    height, width = best_resolution(image.height, image.width, how.grid)
    # transformers.image_processing_utils.get_patch_output_size
    across, down = width / image.width, height / image.height
    if across < down:
        new = (width, min(math.ceil(image.height * across), height))
    else:
        new = (min(math.ceil(image.width * down), width), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(new, Image.Resampling(how.resample)), ((width - new[0]) // 2, (height - new[1]) // 2))
    return [
        canvas.crop((left, top, left + size, top + size))
        for top in range(0, height, size)
        for left in range(0, width, size)
    ]


def most_tiles(how: Preprocessing) -> int:
    """Tiles of the picture that has most of them, the one of the whole picture included."""
    return 1 + max((height * width // how.image_size**2 for height, width in how.grid), default=0)


def most_tokens(how: Preprocessing, tile: int) -> int:
    """Tokens of the picture that takes most: one of a resolution's own shape, which needs no padding.

    Args:
        how: Its preprocessing.
        tile: Embeddings of a tile; with a grid, a square number.
    """
    sizes = how.grid or ((how.image_size, how.image_size),)
    return max(arrangement(height, width, how, tile, bool(how.grid)).n_tokens for height, width in sizes)
