"""Draws the pictures of README's section "Pictures": a wide scene, and what the tower sees of it in each mode.

    python docs/preprocessing.py

Writes preprocessing-scene.png, preprocessing-crop.png and preprocessing-pad.png beside this file. What the tower sees
is made by the same code that makes it when a question is asked.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image, ImageDraw

from local_llava.images import preprocess, with_mode
from local_llava.preprocessing import Preprocessing
from local_llava.types import PreprocessChoice

# The tower of LLaVA 1.5 and its kin: CLIP ViT-L/14 at 336 pixels.
TOWER = Preprocessing(336, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
FINE = 3
"""The scene is drawn this many times larger, and made small again for smooth edges."""


def scene(width: int = 840, height: int = 360) -> Image.Image:
    """A bay in the evening: a lighthouse at the left border, a boat in the middle, a whale's fluke at the right."""
    image = Image.new("RGB", (width * FINE, height * FINE))
    draw = ImageDraw.Draw(image)

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x * FINE, y * FINE) for x, y in points]

    horizon = 215
    for y in range(height):
        if y < horizon:
            t = y / horizon
            colour = (int(70 + 170 * t), int(110 + 75 * t), int(170 - 40 * t))
        else:
            t = (y - horizon) / (height - horizon)
            colour = (int(60 - 40 * t), int(105 - 55 * t), int(135 - 45 * t))
        draw.rectangle([0, y * FINE, width * FINE, (y + 1) * FINE], fill=colour)
    draw.ellipse(at((450, 165), (530, 245)), fill=(255, 214, 120))
    for i in range(9):  # the sun's path on the water
        half = 44 - 3.5 * i
        y = horizon + 6 + 12 * i
        draw.rounded_rectangle(at((490 - half, y), (490 + half, y + 4)), 2 * FINE, fill=(235, 190, 125))

    # the lighthouse on its rock
    draw.polygon(at((0, 360), (0, 235), (70, 225), (120, 262), (150, 360)), fill=(58, 52, 56))
    for i in range(5):
        top, bottom = 78 + 30 * i, 108 + 30 * i
        wide = [17 + 2.6 * (i + j) for j in (0, 1)]
        colour = (200, 55, 50) if i % 2 == 0 else (240, 236, 226)
        draw.polygon(
            at((58 - wide[0], top), (58 + wide[0], top), (58 + wide[1], bottom), (58 - wide[1], bottom)), fill=colour
        )
    draw.rectangle(at((46, 50), (70, 78)), fill=(255, 240, 170))
    draw.polygon(at((40, 50), (76, 50), (58, 30)), fill=(70, 40, 45))
    draw.rectangle(at((38, 76), (78, 82)), fill=(70, 40, 45))

    # the boat
    draw.polygon(at((330, 250), (450, 250), (432, 282), (352, 282)), fill=(120, 62, 45))
    draw.rectangle(at((386, 128), (391, 250)), fill=(70, 45, 40))
    draw.polygon(at((394, 134), (394, 240), (444, 240)), fill=(245, 240, 228))
    draw.polygon(at((382, 150), (382, 240), (340, 240)), fill=(228, 218, 200))

    # the whale's fluke
    draw.polygon(at((752, 300), (764, 232), (778, 232), (790, 300)), fill=(34, 44, 62))
    for side in (-1, 1):
        curve = [
            (771 + side * 58 * math.sin(a), 236 - 30 * a + 20 * math.sin(2.2 * a)) for a in np.linspace(0, 1.5, 20)
        ]
        draw.polygon(at(*curve, (771 + side * 22, 204), (771, 222)), fill=(34, 44, 62))
    draw.ellipse(at((730, 292), (812, 308)), fill=(120, 160, 178))
    draw.ellipse(at((744, 295), (798, 305)), fill=(34, 60, 80))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def seen(image: Image.Image, choice: PreprocessChoice) -> Image.Image:
    """The tower's pixels as a picture."""
    how = with_mode(TOWER, choice)
    values = preprocess([image], how)[0].transpose(1, 2, 0) * how.std + how.mean
    return Image.fromarray(np.rint(values / how.rescale).clip(0, 255).astype(np.uint8))


def main() -> None:
    """Write the pictures, with a palette each, for their size."""
    drawn = scene()
    pictures = {"scene": drawn} | {c: seen(drawn, c) for c in get_args(PreprocessChoice) if c != "checkpoint"}
    for name, picture in pictures.items():
        path = Path(__file__).with_name(f"preprocessing-{name}.png")
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path.name}: {picture.width} x {picture.height}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
