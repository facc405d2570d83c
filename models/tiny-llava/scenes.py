#!/usr/bin/env python3
"""Scenes of coloured shapes, and questions about them with one right answer each.

Knows the world of the built-in model: what a scene is, how it is drawn, what can be asked and what the true answer
is. Knows nothing of models. `train.py` draws its training data from here, and anyone can draw fresh test data:

    python scenes.py OUT --seed 7 --count 125

writes OUT/0000.png ... and OUT/questions.jsonl (`image`, `question`, `answer`, `kind` a line).

One scene in ten is held out by a digest of its contents: training never sees those, and this command writes
nothing else, so that whatever seed you choose, no test scene occurred in training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 192
"""Width and height of a drawn scene, pixels. Coordinates of a scene are in these pixels."""

COLORS = {
    "red": (222, 40, 40),
    "orange": (250, 145, 30),
    "yellow": (245, 220, 50),
    "green": (40, 160, 70),
    "blue": (45, 95, 220),
    "purple": (135, 60, 175),
    "pink": (250, 150, 200),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross")
NUMBERS = ("None", "One", "Two", "Three")


@dataclass(frozen=True)
class Thing:
    """One shape: its colour and kind, its centre and radius in pixels, and the colour it is drawn with."""

    color: str
    shape: str
    x: int
    y: int
    radius: int
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def phrase(self) -> str:
        return f"{'an' if self.color[0] in 'aeiou' else 'a'} {self.name}"


@dataclass(frozen=True)
class Scene:
    """One to three things, ordered from left to right, on a light background."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]

    @property
    def held_out(self) -> bool:
        """True for the tenth of all scenes that training never uses."""
        return hashlib.sha256(repr(self).encode()).digest()[0] < 26


def sample_scene(rng: random.Random) -> Scene:
    """A random scene: no two things alike in both colour and shape, no overlap, and a clear order left to right."""
    count = rng.choice((1, 2, 2, 3, 3))
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        # Sharing a colour or a shape with what is there already makes the harder scenes, so draw some on purpose.
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        if pairs and rng.random() < 0.15:
            color = pairs[0][0]
        if pairs and rng.random() < 0.15:
            shape = pairs[0][1]
        if (color, shape) not in pairs:
            pairs.append((color, shape))
    while True:
        places: list[tuple[int, int, int]] = []
        for _ in range(count):
            radius = rng.randint(24, 38)
            places.append(
                (rng.randint(radius + 3, SIZE - radius - 3), rng.randint(radius + 3, SIZE - radius - 3), radius)
            )
        if all(
            abs(a[0] - b[0]) >= 24 and math.dist(a[:2], b[:2]) >= a[2] + b[2] + 3
            for i, a in enumerate(places)
            for b in places[:i]
        ):
            break
    things = [
        Thing(color, shape, *place, rgb=_jitter(rng, COLORS[color], 10))
        for (color, shape), place in zip(pairs, places, strict=True)
    ]
    return Scene(tuple(sorted(things, key=lambda t: t.x)), _jitter(rng, (240, 240, 240), 12))


def _jitter(rng: random.Random, rgb: tuple[int, int, int], by: int) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, v + rng.randint(-by, by))) for v in rgb)
    return r, g, b


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Corners of a polygon that fits the circle of radius `r` around (x, y)."""

    def turn(count: int, start: float, radius: Callable[[int], float]) -> list[tuple[float, float]]:
        angles = [math.radians(start + 360 * i / count) for i in range(count)]
        return [(x + radius(i) * math.cos(a), y + radius(i) * math.sin(a)) for i, a in enumerate(angles)]

    if shape == "square":
        return turn(4, 45, lambda i: r)
    if shape == "diamond":
        return turn(4, 90, lambda i: r)
    if shape == "triangle":
        return turn(3, -90, lambda i: r)
    if shape == "star":
        return turn(10, -90, lambda i: r if i % 2 == 0 else 0.42 * r)
    if shape == "cross":
        long, wide = 0.92 * r, 0.32 * r
        signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
        corners: list[tuple[float, float]] = []
        for i, (sx, sy) in enumerate(signs):
            arm = [(long * sx, wide * sy), (wide * sx, wide * sy), (wide * sx, long * sy)]
            corners += arm if i % 2 == 0 else arm[::-1]
        return [(x + dx, y + dy) for dx, dy in corners]
    raise ValueError(f"no such shape: {shape}")


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of SIZE x SIZE, drawn at twice the size and halved for smooth edges."""
    image = Image.new("RGB", (2 * SIZE, 2 * SIZE), scene.background)
    pen = ImageDraw.Draw(image)
    for t in scene.things:
        x, y, r = 2 * t.x, 2 * t.y, 2 * t.radius
        if t.shape == "circle":
            pen.ellipse((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill=t.rgb)
        else:
            pen.polygon(_outline(t.shape, x, y, r), fill=t.rgb)
    return image.reduce(2)


@dataclass(frozen=True)
class Question:
    kind: str
    question: str
    answer: str


def _listing(phrases: list[str]) -> str:
    text = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return text[0].upper() + text[1:] + "."


def _describe(scene: Scene, rng: random.Random) -> tuple[str, str]:
    asked = ("Describe the picture.", "Describe this image.", "What do you see?", "What is in the picture?")
    return rng.choice(asked), _listing([t.phrase for t in scene.things])


def _name(scene: Scene, rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        return "Name the shapes from left to right.", ", ".join(t.shape for t in scene.things)
    spelled = rng.choice(("colors", "colours"))
    return f"Name the {spelled} from left to right.", ", ".join(t.color for t in scene.things)


def _color(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    shapes = [t.shape for t in scene.things]
    things = [t for t in scene.things if shapes.count(t.shape) == 1]
    if not things:
        return None
    thing = rng.choice(things)
    spelled = rng.choice(("color", "colour"))
    return f"What {spelled} is the {thing.shape}?", thing.color.capitalize() + "."


def _shape(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    colors = [t.color for t in scene.things]
    things = [t for t in scene.things if colors.count(t.color) == 1]
    if not things:
        return None
    thing = rng.choice(things)
    asked = (f"What shape is the {thing.color} one?", f"What shape is {thing.color}?")
    return rng.choice(asked), f"A {thing.shape}."


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    which = rng.random()
    if which < 0.4:
        return "How many shapes are there?", NUMBERS[len(scene.things)] + "."
    thing = rng.choice(scene.things)
    if which < 0.7:
        color = thing.color if rng.random() < 0.75 else rng.choice(list(COLORS))
        number = sum(t.color == color for t in scene.things)
        return f"How many {color} shapes are there?", NUMBERS[number] + "."
    shape = thing.shape if rng.random() < 0.75 else rng.choice(SHAPES)
    number = sum(t.shape == shape for t in scene.things)
    plural = shape + ("es" if shape.endswith("s") else "s")
    return f"How many {plural} are there?", NUMBERS[number] + "."


def _place(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    things = scene.things
    if len(things) == 1:
        return None
    asked = [("What is on the left?", things[0]), ("What is on the right?", things[-1])]
    asked += [(f"What is to the left of the {things[1].name}?", things[0])]
    asked += [(f"What is to the right of the {things[-2].name}?", things[-1])]
    if len(things) == 3:
        asked += [("What is in the middle?", things[1])]
    question, thing = rng.choice(asked)
    return question, _listing([thing.phrase])


def _side(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if len(scene.things) == 1:
        return None
    a, b = rng.sample(range(len(scene.things)), 2)
    side = rng.choice(("left", "right"))
    question = f"Is the {scene.things[a].name} to the {side} of the {scene.things[b].name}?"
    return question, "Yes." if (a < b) == (side == "left") else "No."


def _exists(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing, wanted = rng.choice(scene.things), rng.random() < 0.5
    about = rng.choice(("color", "shape", "both"))

    def true(color: str, shape: str) -> bool:
        return any(
            (about == "shape" or t.color == color) and (about == "color" or t.shape == shape) for t in scene.things
        )

    color, shape = thing.color, thing.shape
    while true(color, shape) != wanted:
        # A wrong question about a thing that is half there (its colour, or its shape) is the hard one.
        change = rng.choice(("color", "shape", "both"))
        color = rng.choice(list(COLORS)) if change != "shape" else thing.color
        shape = rng.choice(SHAPES) if change != "color" else thing.shape
    if about == "color":
        question = rng.choice((f"Is there anything {color}?", f"Is there a {color} shape?"))
    else:
        question = f"Is there a {shape}?" if about == "shape" else f"Is there a {color} {shape}?"
    return question.replace("a orange", "an orange"), "Yes." if wanted else "No."


def _json(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return "List the shapes as JSON.", json.dumps([{"color": t.color, "shape": t.shape} for t in scene.things])


KINDS: dict[str, Callable[[Scene, random.Random], tuple[str, str] | None]] = {
    "describe": _describe,
    "name": _name,
    "color": _color,
    "shape": _shape,
    "count": _count,
    "place": _place,
    "side": _side,
    "exists": _exists,
    "json": _json,
}
YES_NO = ("side", "exists")


def sample_questions(
    scene: Scene, rng: random.Random, count: int, kinds: Sequence[str] = tuple(KINDS)
) -> list[Question]:
    """`count` questions about a scene, each kind once before one comes again; not all kinds suit every scene."""
    asked: list[Question] = []
    while len(asked) < count:
        for kind in rng.sample(kinds, len(kinds)):
            pair = KINDS[kind](scene, rng)
            if pair and len(asked) < count:
                asked.append(Question(kind, *pair))
    return asked


def sample_scenes(seed: int | str, held_out: bool) -> Iterator[tuple[Scene, random.Random]]:
    """Endless scenes of one side of the split, each with the generator that its questions are drawn from."""
    index = 0
    while True:
        rng = random.Random(f"{seed}:{index}")
        scene = sample_scene(rng)
        if scene.held_out == held_out:
            yield scene, rng
        index += 1


def write(out: Path, seed: int, count: int, questions: int = 4) -> Path:
    """Write `count` held-out scenes and `questions` questions about each; returns the path of questions.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for index, (scene, rng) in zip(range(count), sample_scenes(seed, held_out=True), strict=False):
        name = f"{index:04d}.png"
        draw(scene).save(out / name)
        for q in sample_questions(scene, rng, questions):
            lines.append(json.dumps({"image": name, "question": q.question, "answer": q.answer, "kind": q.kind}))
    path = out / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write fresh scenes of coloured shapes, with questions and answers.")
    parser.add_argument("out", type=Path, help="directory for the PNG files and questions.jsonl")
    parser.add_argument("--seed", type=int, required=True, help="any integer; the same seed gives the same scenes")
    parser.add_argument("--count", type=int, required=True, help="number of scenes")
    parser.add_argument("--questions", type=int, default=4, help="questions about each scene (default 4)")
    args = parser.parse_args()
    print(write(args.out, args.seed, args.count, args.questions))


if __name__ == "__main__":
    main()
