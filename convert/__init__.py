"""Converts LLaVA checkpoints to GGUF, and GGUF files to other types.

`convert(source)` and `quantize_gguf(source, target, quant)` do it in one call. `prepare` and `prepare_gguf` first
decide and check everything; what they give can then be written.
"""

from local_llava.convert.companions import Companions
from local_llava.convert.conversion import Conversion, convert, prepare
from local_llava.convert.overrides import Overrides
from local_llava.convert.requantize import Requantization, prepare_gguf, quantize_gguf
from local_llava.convert.write import Progress

__all__ = [
    "Companions",
    "Conversion",
    "Overrides",
    "Progress",
    "Requantization",
    "convert",
    "prepare",
    "prepare_gguf",
    "quantize_gguf",
]
