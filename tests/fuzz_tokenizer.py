"""Damages tokenizer.json files and reads each: prints how many were read and refused, and ends at anything else.

What is read goes on to a GGUF and the runtime's tokenizer.

    python tests/fuzz_tokenizer.py DIRECTORY COUNT SEED

DIRECTORY holds whole files, 0.json, 1.json, ..., and what a checkpoint has beside them.
"""

from __future__ import annotations

import json
import random
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from vocabularies import write_vocab

from local_llava.convert.tokenizer import read_tokenizer
from local_llava.errors import CheckpointError
from local_llava.llm_vocab import check_vocab
from local_llava.sentencepiece import SentencePiece, TextRun

TEXT = "</s> An answer,  to\n\u00e9 \U0001f600 <0x0A>\u2581"

ODD: list[Any] = [None, True, 0, -1, 2**70, 1.5, float("inf"), "", "\0", "\ud800", "<0x0A>", "x" * 3000]
ODD += [[], [[]], {}, {"type": 1}]


def mutate(node: Any, rng: random.Random) -> None:
    """Change one thing somewhere inside, more likely outside of vocab and merges."""
    while isinstance(node, (dict, list)) and node:
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys[:20] if rng.random() < 0.7 else keys)
        child = node[key]
        if isinstance(child, (dict, list)) and child and rng.random() < 0.8:
            node = child
            continue
        act = rng.random()
        if act < 0.6:
            node[key] = deepcopy(rng.choice(ODD))
        elif act < 0.8 and isinstance(node, dict):
            node[rng.choice(["type", "id", "\u2581", "a b", f"{key}x"])] = node.pop(key)
        elif act < 0.9:
            del node[key]
        elif isinstance(node, list):
            node.append(deepcopy(rng.choice([*ODD, child])))
        else:
            node[key] = [child]
        return


def damaged(text: str, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        raw = bytearray(text.encode())
        for _ in range(rng.randrange(1, 5)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        return bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.2 else raw)
    content = json.loads(text)
    for _ in range(rng.choice([1, 1, 2, 5])):
        mutate(content, rng)
    return json.dumps(content).encode()


def main(directory: Path, count: int, seed: int) -> None:
    sources = [path.read_text() for path in sorted(directory.glob("[0-9].json"))]
    rng = random.Random(seed)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(count):
        (directory / "tokenizer.json").write_bytes(damaged(rng.choice(sources), rng))
        try:
            tokenizer = read_tokenizer(directory, 800, {"text_config": {"bos_token_id": 1, "eos_token_id": 2}})
        except CheckpointError as e:
            message = str(e)
            assert message.isprintable() and len(message) < 500 and str(directory) in message, message
            outcomes["refused"] += 1
            continue
        gguf = write_vocab(tokenizer, directory / "vocab.gguf")
        ids = SentencePiece.from_gguf(gguf, check_vocab(gguf)).encode(TextRun((TEXT,)))
        assert all(0 <= i < 800 for i in ids)
        outcomes["read"] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
