#!/usr/bin/env python3
"""What guessing tokens saves, and what it costs where every guess is wrong.

    python benchmarks/speculation.py tiny|1b|8b --directory /big/disk [--repeats N]

Each answer is given with `speculate` off and on, in turns, by one engine about one picture, and tokens per second are
compared. The models of `shapes.py` have random weights and write nothing that is worth guessing, so that here what they
write is dictated: the sampler gives the next token of a text, and everything else is done as ever. The texts:

- receipts: JSON that follows a schema, as Python's json module writes it, 3 to 7 items, split by the model's tokenizer.
- captions: sentences put together from phrases.
- contrary: words that came before, but never those that are guessed, or would be.

With `tiny` (the built-in model in F32) captions are the model's own answers about other pictures.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import shapes
from PIL import Image

from local_llava import Llava, Reply
from local_llava.convert import convert
from local_llava.sentencepiece import TextRun

TINY = Path(__file__).parent.parent / "models" / "tiny-llava"
QUESTION = "What do you see?"

ITEM = {
    "name": {"type": "string"},
    "quantity": {"type": "integer"},
    "unit_price": {"type": "number"},
    "discounted": {"type": "boolean"},
}
PROPERTIES = {
    "store": {"type": "string"},
    "date": {"type": "string", "format": "date"},
    "items": {
        "type": "array",
        "items": {"type": "object", "properties": ITEM, "required": [*ITEM], "additionalProperties": False},
    },
    "currency": {"enum": ["EUR", "USD", "GBP"]},
    "total": {"type": "number"},
}
SCHEMA = {"type": "object", "properties": PROPERTIES, "required": [*PROPERTIES], "additionalProperties": False}

GOODS = ("Whole milk", "Brown eggs", "Rye bread", "Olive oil", "Tomatoes", "Cheddar", "Green tea", "Bananas", "Rice")
STARTS = ("The image shows", "A photo of", "The picture shows", "There is")
SUBJECTS = ("a man", "two children", "a brown dog", "a young woman", "a group of people", "a black cat", "an old man")
PLACES = ("sitting on a wooden bench", "next to a red car", "on the beach", "in front of a brick building", "in a park")
REST = ("on a sunny day", "with mountains in the background", "at sunset", "while others watch", "near a lake")


def receipt(chance: random.Random) -> str:
    items = [
        {
            "name": chance.choice(GOODS),
            "quantity": chance.randint(1, 4),
            "unit_price": chance.randint(50, 2000) / 100,
            "discounted": chance.random() < 0.2,
        }
        for _ in range(chance.randint(3, 7))
    ]
    date = f"2024-{chance.randint(1, 12):02}-{chance.randint(1, 28):02}"
    total = round(sum(item["quantity"] * item["unit_price"] for item in items), 2)  # type: ignore[operator]
    store = chance.choice(["Corner Market", "Fresh & Co", "Old Mill Foods"])
    return json.dumps({"store": store, "date": date, "items": items, "currency": "EUR", "total": total})


def caption(chance: random.Random) -> str:
    return " ".join(map(chance.choice, (STARTS, SUBJECTS, PLACES, REST))) + "."


@dataclass
class Dictated:
    """A sampler that reads off what is to be written."""

    write: Callable[[], int]

    def sample(self, context: Any, row: int, logits: Any) -> int:
        return self.write()

    def close(self) -> None:
        pass


class Case:
    """A kind of answer, each of them given both ways."""

    def __init__(self, llava: Llava, name: str, options: Mapping[str, Any]) -> None:
        self.llava, self.name, self.options = llava, name, options
        self.rates: dict[bool, list[float]] = {False: [], True: []}
        self.drafted = self.accepted = self.tokens = 0
        self.same = True

    def give(self, image: Image.Image, dictate: Callable[[], Callable[[], int]] | None, first: bool) -> None:
        replies: dict[bool, Reply] = {}
        for speculate in (first, not first):
            if dictate is not None:
                write = dictate()
                self.llava._llm.sampler = lambda _, write=write: Dictated(write)  # type: ignore[assignment, misc]
            replies[speculate] = self.llava.ask(QUESTION, image, speculate=speculate, **self.options)
            self.rates[speculate].append(replies[speculate].timings.decode_tokens_per_s)
        timings = replies[True].timings
        self.drafted, self.accepted = self.drafted + timings.drafted_tokens, self.accepted + timings.accepted_tokens
        self.tokens += timings.completion_tokens
        self.same = self.same and replies[True].tokens == replies[False].tokens

    def report(self, same: bool = True) -> None:
        ratios = [on / off for off, on in zip(self.rates[False], self.rates[True], strict=True)]
        off, on = (statistics.median(self.rates[key]) for key in (False, True))
        equal = f", answers {'the same' if self.same else 'DIFFER'}" if same else ""
        n_wrong = self.drafted - self.accepted
        print(
            f"{self.name}: {off:.1f} -> {on:.1f} tokens/s, ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} answers, the first {ratios[0]:.2f}); of "
            f"{self.tokens} tokens {self.accepted} were guessed, with {n_wrong} wrong guesses{equal}",
            flush=True,
        )


def dictation(llava: Llava, texts: Iterator[str]) -> Iterator[Callable[[], Callable[[], int]]]:
    """For each text, what makes a reader of its tokens and then of the end of the turn."""
    end = llava._llm.config.vocab.eos
    for text in texts:
        tokens = llava._llm.tokenize(TextRun((text,), False, None))
        yield lambda tokens=tokens: iter([*tokens, *[end] * 2]).__next__  # type: ignore[misc]


def contrary(llava: Llava, seed: int) -> Callable[[], int]:
    """A reader of six words, never of the one that is expected."""
    chance = random.Random(seed)
    words = llava._llm.tokenize(TextRun((" one two three four five six",), False, None))

    def write() -> int:
        guesses = llava._scheduler._running[0]._guesses
        expected = {guess.tokens[0] for guess in guesses._last if guess.tokens} if guesses else set[int]()
        return chance.choice([word for word in words if word not in expected])

    return write


def dictated(llava: Llava, image: Image.Image, repeats: int) -> None:
    chance = random.Random(0)
    for name, text, options in (
        ("receipts", receipt, {"json_schema": SCHEMA, "max_tokens": 1000}),
        ("captions", caption, {"max_tokens": 1000}),
    ):
        case = Case(llava, name, options)
        for i, dictate in enumerate(dictation(llava, (text(chance) for _ in range(repeats)))):
            case.give(image, dictate, bool(i % 2))
        case.report(same=False)  # which says nothing of what is dictated
    llava._scheduler._guesser._kinds.clear()
    case = Case(llava, "contrary", {"max_tokens": 100})
    for i in range(repeats):
        case.give(image, lambda i=i: contrary(llava, i), bool(i % 2))  # type: ignore[misc]
    case.report(same=False)


def own(llava: Llava, repeats: int) -> None:
    sys.path.insert(0, str(TINY))
    import scenes

    case = Case(llava, "captions, the model's own", {})
    pictures = (scenes.draw(scene) for scene, _ in scenes.sample_scenes(7, held_out=True))
    for i, image in zip(range(10 * repeats), pictures, strict=False):
        case.give(image, None, bool(i % 2))
    case.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["tiny", "1b", "8b"])
    parser.add_argument("--directory", type=Path, required=True, help="where the pair may be written")
    parser.add_argument("--repeats", type=int, default=10, help="answers of each kind")
    args = parser.parse_args()
    print(machine.describe())
    if args.model == "tiny":
        files = convert(TINY, args.directory / "tiny-F32", quant="F32", mmproj_quant="F32", overwrite=True)
    else:
        files = shapes.pair(args.model, args.directory)
    with Llava.load(files.model, files.mmproj, n_ctx=1024, image_cache="off") as llava:
        llava.ask(QUESTION, Image.new("RGB", (64, 64), "gray"), max_tokens=8)
        if args.model == "tiny":
            own(llava, args.repeats)
        dictated(llava, Image.new("RGB", (64, 64), "gray"), args.repeats)
        costs = llava._scheduler._guesser._costs._measured
        print("seconds by rows:", ", ".join(f"{n}: {cost.seconds:.3g}" for n, cost in sorted(costs.items())))


if __name__ == "__main__":
    main()
