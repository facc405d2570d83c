"""Converts LLaVA checkpoints to GGUF: `convert(source)` in one call, or `prepare(source)` first to see what it would do."""

from local_llava.convert.conversion import Conversion, convert, prepare
from local_llava.convert.write import Progress

__all__ = ["Conversion", "Progress", "convert", "prepare"]
