"""The exceptions that local-llava raises for what a user can mend.

    LocalLlavaError            one clear line: what is wrong, where, and what would be accepted
    ├── UsageError             an argument or option that cannot be (also a ValueError)
    ├── CheckpointError        a source that cannot be converted: config, tensors, tokenizer
    ├── ModelFileError         a GGUF that is damaged, unsupported, or does not belong with the other one
    ├── ImageError             a picture that cannot be read
    ├── PromptError            a conversation that cannot be rendered, or does not fit the context
    ├── OutputError            a file that cannot be written: it exists, no room, no permission
    ├── DownloadError          what a repository of the Hub does not have, does not give, or gives damaged
    ├── BusyError              as many questions wait as may; the same one may be answered later
    └── EngineError            llama.cpp or ggml reported a failure, such as a failed decode
        └── NotEnoughMemoryError   a model that does not fit into the memory that is free now

Anything else that escapes is a defect of local-llava.
"""

from __future__ import annotations


class LocalLlavaError(Exception):
    """Base of all errors that local-llava raises on purpose. The message is one line, fit to be shown to a user."""


class UsageError(LocalLlavaError, ValueError):
    """An argument or option has a value that is not accepted."""


class CheckpointError(LocalLlavaError):
    """The source of a conversion cannot be used."""


class ModelFileError(LocalLlavaError):
    """A GGUF file cannot be used."""


class ImageError(LocalLlavaError):
    """A picture cannot be read."""


class PromptError(LocalLlavaError):
    """A conversation cannot be made into a prompt that fits."""


class OutputError(LocalLlavaError):
    """A file cannot be written."""


class DownloadError(LocalLlavaError):
    """Something cannot be had from the Hub: it is not there, not allowed, or does not arrive whole."""


class BusyError(LocalLlavaError):
    """Too many questions wait for an answer already."""


class EngineError(LocalLlavaError):
    """llama.cpp or ggml reported a failure."""


class NotEnoughMemoryError(EngineError):
    """A model does not fit into the memory that is free."""
