"""Converts LLaVA checkpoints to GGUF.

`convert(source)` does it in one call; `prepare(source)` first decides and checks everything, and can then be written.
"""

from local_llava.convert.conversion import Conversion, convert, prepare
from local_llava.convert.write import Progress

__all__ = ["Conversion", "Progress", "convert", "prepare"]
