#!/usr/bin/env python3
"""What each type does to what tiny-llava says, and what importance matrices change: the README's table and plot.

    python benchmarks/quality.py [--plot docs/images/quality.png] [--scenes 75] [--repeat 3]

tiny-llava is quantized to every type: without an importance matrix, with one of texts, and with one of pictures. The
text matrix has read questions and answers of the model's world, as lines; the picture matrix has seen the pictures that
those are about, in the model's own chat format. Both come from scenes of the training set. What is measured are answers
about other scenes, which were held out from training, beside F32: as `local-llava compare` does it, with a KV cache in
F32. Where both find the same token likeliest all along an answer, the model would answer as F32 does.

What matrices gain at 3 and 4 bits is measured several times, each time with matrices from other scenes and
on other questions: what a matrix happens to see counts, and so does what is asked, since the model is unsure at few
places only. The seeds are fixed; another --seed gives another draw.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import machine
from PIL import Image

from local_llava import Llava, comparison_plot, imatrix
from local_llava.comparison import Comparison, Progress, compare
from local_llava.convert import convert, quantize_gguf
from local_llava.convert.mixes import LLM_MIXES, Mix
from local_llava.picture_sets import Question, questions_about
from local_llava.types import ModelFiles

TINY = Path(__file__).parent.parent / "models" / "tiny-llava"
sys.path.insert(0, str(TINY))

NONE, TEXT, PICTURES = "none", "text", "pictures"
N_SEEN, EACH = 48, 4
"""Scenes that a matrix is made from, and questions about each."""

Results: TypeAlias = dict[tuple[str, str], Comparison]
"""By type and kind of matrix."""

BITS = {"3 bits": ("IQ3", "Q3"), "4 bits": ("IQ4", "Q4")}
"""What the names of types begin with."""


def seen(seed: str) -> Iterator[tuple[Image.Image, str, str]]:
    """Pictures of training scenes, with questions and answers."""
    import scenes

    for scene, rng in itertools.islice(scenes.sample_scenes(seed, held_out=False), N_SEEN):
        picture = scenes.draw(scene)
        for q in scenes.sample_questions(scene, rng, EACH):
            yield picture, q.question, q.answer


def make_matrices(files: ModelFiles, directory: Path, seed: str) -> dict[str, Path]:
    """A matrix of texts and one of pictures, about the same scenes."""
    world = list(seen(seed))
    text = "\n".join(f"{question} {answer}" for _, question, answer in world)
    made = {
        TEXT: imatrix.collect(files.model, files.mmproj, texts=[text], datasets=[TEXT]),
        PICTURES: imatrix.collect(
            files.model, files.mmproj, questions=[(picture, q) for picture, q, _ in world], datasets=[PICTURES]
        ),
    }
    paths = {kind: directory / f"{kind}-{seed}.gguf" for kind in made}
    for kind, matrix in made.items():
        matrix.save(paths[kind])
    return paths


def variants(mix: Mix) -> tuple[str, ...]:
    """How a type can be made so that the files differ."""
    if mix.name in ("F32", "F16", "BF16", "Q8_0"):  # no search, which a matrix could guide
        return (NONE,)
    return (TEXT, PICTURES) if mix.guided else (NONE, TEXT, PICTURES)


def make(files: ModelFiles, directory: Path, mix: Mix, kind: str, matrix: Path | None, seed: str) -> Path:
    return quantize_gguf(files.model, directory / f"{mix.name}-{kind}-{seed}.gguf", mix.name, imatrix=matrix)


def measure(files: ModelFiles, models: Sequence[Path], questions: Sequence[Question]) -> list[Comparison]:
    """All beside F32, the reference first."""

    def tell(progress: Progress) -> None:
        if progress.done == progress.total:
            print(f"{Path(progress.model).stem} {progress.step}", end="\x1b[K\r", file=sys.stderr, flush=True)

    return compare(files.model, models, questions, mmproj=files.mmproj, kv_type="F32", on_progress=tell)


def n_right(files: ModelFiles, questions: Sequence[Question], answers: Sequence[str]) -> int:
    """Answers that are exactly the true ones."""
    with Llava.load(files.model, files.mmproj, kv_type="F32") as llava:
        replies = [llava.ask(question.text, question.image, max_tokens=64).text for question in questions]
    return sum(reply == answer for reply, answer in zip(replies, answers, strict=True))


def print_table(results: Results) -> None:
    """The README's."""
    kinds = (NONE, TEXT, PICTURES)
    print("\n| type | MB | KL: no matrix | text | pictures | answers as in F32: no matrix | text | pictures |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in dict.fromkeys(name for name, _ in results):
        mine = {kind: results[name, kind] for kind in kinds if (name, kind) in results}
        cells = [name, f"{next(iter(mine.values())).model_bytes / 1e6:.2f}"]
        cells += [f"{mine[kind].kl_mean:.1e}" if kind in mine else "" for kind in kinds]
        cells += [f"{mine[kind].same_answers:.1%}" if kind in mine else "" for kind in kinds]
        print("| " + " | ".join(cells) + " |")


def print_gain(pairs: Sequence[Results], title: str) -> None:
    """KL with one kind of matrix in parts of KL with another or none, type by type and over all of them."""
    names = [name for name in dict.fromkeys(name for name, _ in pairs[0]) if bits(name) == title]
    for kind, other in ((PICTURES, TEXT), (TEXT, NONE), (PICTURES, NONE)):
        print(f"\n{title}: KL, matrix of {kind} / {'no matrix' if other == NONE else f'matrix of {other}'}")
        logs: dict[str, list[float]] = {}
        for name in names:
            if (name, other) in pairs[0]:
                logs[name] = [math.log(pair[name, kind].kl_mean / pair[name, other].kl_mean) for pair in pairs]
                print(f"  {name:8} {', '.join(f'{math.exp(value):.2f}' for value in logs[name])}")
        every = [value for values in logs.values() for value in values]
        means = [statistics.mean(values[i] for values in logs.values()) for i in range(len(pairs))]
        print(
            f"  geometric mean {math.exp(statistics.mean(every)):.2f} "
            f"({', '.join(f'{math.exp(mean):.2f}' for mean in means)} each time); "
            f"smaller in {sum(value < 0 for value in every)} of {len(every)} cases"
        )


def report(args: argparse.Namespace, directory: Path) -> None:
    import scenes

    files = convert(TINY, directory / "exact", quant="F32", mmproj_quant="F32")
    pairs: list[Results] = []
    for i in range(max(1, args.repeat)):
        seed = f"{args.seed}-{i}"
        path = scenes.write(directory / f"scenes-{i}", args.seed + i, args.scenes, EACH)
        questions = questions_about(path.parent, path, ())
        matrices = make_matrices(files, directory, seed)
        # After the first time, only what the gain is measured on.
        mixes = [mix for mix in LLM_MIXES.values() if mix.name != "F32" and (i == 0 or bits(mix.name))]
        wanted = [(mix, kind) for mix in mixes for kind in variants(mix)]
        models = [make(files, directory, mix, kind, matrices.get(kind), seed) for mix, kind in wanted]
        reference, *measured = measure(files, models, questions)
        pairs.append({(mix.name, kind): result for (mix, kind), result in zip(wanted, measured, strict=True)})
        if i == 0:
            right = n_right(files, questions, answers_of(path)) / len(questions)
            print(f"{len(questions)} answers of {reference.positions} tokens; {right:.1%} are right in F32")
            print(f"F32 has {reference.model_bytes / 1e6:.2f} MB")
            print_table(pairs[0])
            if args.plot is not None:
                comparison_plot.draw([reference, *measured], args.plot)
    for title in BITS:
        print_gain(pairs, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="a .png or .svg file")
    parser.add_argument("--scenes", type=int, default=75, help=f"held-out, with {EACH} questions each (default 75)")
    parser.add_argument("--repeat", type=int, default=3, help="times that the gain is measured (default 3)")
    parser.add_argument("--seed", type=int, default=1, help="of the held-out scenes and of the matrices' (default 1)")
    args = parser.parse_args()
    started = time.perf_counter()
    print(machine.describe())
    print(f"python benchmarks/quality.py --scenes {args.scenes} --repeat {args.repeat} --seed {args.seed}")
    with tempfile.TemporaryDirectory() as temporary:
        report(args, Path(temporary))
    print(f"\n{time.perf_counter() - started:.0f} s")


def bits(name: str) -> str:
    """Which of `BITS` a type has; "" for another number."""
    return next((title for title, starts in BITS.items() if name.startswith(starts)), "")


def answers_of(path: Path) -> list[str]:
    """The true answers, in the order of `questions_about`."""
    return [json.loads(line)["answer"] for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
