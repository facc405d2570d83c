"""The values that pass between the parts of local-llava: frozen dataclasses, one set of defaults.

Knows no model, no file format and no library; everything may import it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from local_llava.errors import UsageError

PAIR_KEY = "local_llava.pair_id"
"""Metadata that both files of a conversion carry, equal if they belong together. Files of other tools lack it."""

DEFAULT_QUANT, DEFAULT_MMPROJ_QUANT = "Q4_K_M", "F16"
"""Types that a checkpoint is converted to unless others are named."""

MAX_CHAT_TEMPLATE = 64 << 10
"""Characters of the longest chat template that is converted and rendered; the longest in use have about 20,000."""

KVType: TypeAlias = Literal["F32", "F16", "Q8_0"]
KVChoice: TypeAlias = Literal["auto", "F32", "F16", "Q8_0"]
ImageCacheMode: TypeAlias = Literal["off", "embeddings", "kv"]
Overflow: TypeAlias = Literal["error", "drop_oldest"]
FinishReason: TypeAlias = Literal["stop", "length"]
Role: TypeAlias = Literal["system", "user", "assistant"]
PreprocessChoice: TypeAlias = Literal["checkpoint", "pad", "crop"]


@dataclass(frozen=True)
class Options:
    """How a model is loaded and how its answers are sampled. The defaults give the same answer every time.

    `Llava.load` takes them as the defaults of all answers; `ask`, `chat` and `stream` take those of one answer, where
    the fields of `LOADING` cannot be changed any more.

    Raises:
        UsageError: A value is out of its range; the message names the option and the range.
    """

    max_tokens: int = 512
    """Most tokens to generate, >= 1."""
    temperature: float = 0.0
    """0 takes the most likely token (greedy); higher values flatten the distribution."""
    top_k: int = 40
    """Sample among the k most likely tokens; 0 for all. Without effect at temperature 0, as are the next two."""
    top_p: float = 0.95
    """Sample among the most likely tokens that together reach this probability; 1 for all."""
    min_p: float = 0.05
    """Drop tokens less likely than this share of the most likely one's probability; 0 drops none."""
    repeat_penalty: float = 1.0
    """Divide the logits of the last 64 tokens by this; 1 leaves them as they are."""
    seed: int = 0
    """Seed of the sampling, 0 to 2**32 - 2."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer where they first occur; they are not part of it."""
    system: str | None = None
    """System prompt, put before a conversation that does not begin with its own."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report at each step, 0 to 20, beside the one taken; None for no report."""
    json_schema: Any = None
    """A schema that the answer must follow: a mapping, JSON text, or a pydantic model. docs/json-schema.md."""
    preprocess: PreprocessChoice = "checkpoint"
    """"pad" shows the tower the whole picture, "crop" its middle, "checkpoint" what the model's file says.
    LLaVA-NeXT, which cuts large pictures into tiles, sees with "pad" and "crop" one tile."""

    overflow: Overflow = "error"
    """What to do with a conversation that outgrows the context: "error" says so, "drop_oldest" leaves out the oldest
    turns, whole and with their pictures; `Reply.dropped` tells how many. The system prompt and the last turn stay."""
    speculate: bool | None = None
    """Guess tokens from what was read and written before, and keep the guesses that the model would have written
    itself: a greedy answer stays as it is, up to rounding (docs/engine.md). Only where one answer is given at a time.
    None for answers that follow a schema."""

    n_ctx: int | None = None
    """Longest conversation in tokens: prompt, pictures, answer. None for what model and memory allow, at most 8192."""
    parallel: int | None = None
    """Answers that are given at the same time, 1 to 64; None for what memory allows, at most 8."""
    max_waiting: int = 64
    """Questions that may wait beyond those; one more is refused with `BusyError`."""
    max_stall: float = 4.0
    """Seconds that a running answer may stand still for each of the prompts, with their pictures, that are read
    meanwhile. Shorter ones cost those speed."""
    n_batch: int | None = None
    """Tokens that are evaluated in one step at most; None for the default."""
    kv_type: KVChoice = "auto"
    """Type of the KV cache: F32, F16 or Q8_0; "auto" for F16, or Q8_0 where memory is short."""
    n_gpu_layers: int | Literal["auto"] = "auto"
    """Layers to put on the GPU, if there is one; -1 for all, "auto" for as many as fit. 0 keeps the tower on the CPU,
    too."""
    n_threads: int | None = None
    """CPU threads; None for one a physical core."""
    flash_attention: bool | None = None
    """Attention without a matrix of weights, of tower and language model. None: the language model as llama.cpp
    chooses, but without it where the KV cache is F32, since it rounds; the tower with it on a CPU, where it rounds
    nothing."""
    image_cache: ImageCacheMode = "off"
    """What is kept of pictures on disk, for later processes: nothing, their embeddings, or also the KV cache of the
    prompt up to them. It reveals pictures: see `local-llava cache dir`."""
    image_cache_bytes: int = 4_000_000_000
    """Most bytes of it; what was not used for the longest time goes first."""
    image_cache_after: int = 1
    """Questions about a picture until its KV cache is kept on disk."""

    LOADING: ClassVar[tuple[str, ...]] = (
        "n_ctx",
        "parallel",
        "max_waiting",
        "max_stall",
        "n_batch",
        "kv_type",
        "n_gpu_layers",
        "n_threads",
        "flash_attention",
        "image_cache",
        "image_cache_bytes",
        "image_cache_after",
    )
    """The fields that are settled when a model is loaded."""
    CHOICES: ClassVar[dict[str, Any]] = {
        "preprocess": PreprocessChoice,
        "overflow": Overflow,
        "kv_type": KVChoice,
        "image_cache": ImageCacheMode,
    }
    """The fields that are one of a few words."""

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "max_tokens": (1, 2**31 - 1),
            "temperature": (0, 100),
            "top_k": (0, 2**31 - 1),
            "top_p": (0, 1),
            "min_p": (0, 1),
            "repeat_penalty": (0.01, 100),
            # llama.cpp takes 2**32 - 1 for "choose one by chance".
            "seed": (0, 2**32 - 2),
            "logprobs": (0, 20),
            "n_ctx": (1, 2**27),
            "parallel": (1, 64),
            "max_waiting": (0, 2**20),
            "max_stall": (0, 3600),
            "n_batch": (1, 2048),
            "n_gpu_layers": (-1, 2**31 - 1),
            "n_threads": (1, 512),  # GGML_MAX_N_THREADS
            "image_cache_bytes": (0, 2**50),
            "image_cache_after": (1, 2**31 - 1),
        }
        optional = ("logprobs", "n_ctx", "parallel", "n_batch", "n_threads")
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if (value is None and name in optional) or (name == "n_gpu_layers" and value == "auto"):
                continue
            whole = name not in ("temperature", "top_p", "min_p", "repeat_penalty", "max_stall")
            if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool):
                words = ("a whole number" if whole else "a number") + (", or auto" if name == "n_gpu_layers" else "")
                raise UsageError(f"{name} must be {words}, not {value!r:.40}")
            if not low <= value <= high:
                raise UsageError(f"{name} must be {low:g} to {high:g}, not {value!r:.40}")
        for name, kind in self.CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)!r:.40}")
        for name in ("speculate", "flash_attention"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise UsageError(f"{name} must be True, False or None, not {getattr(self, name)!r:.40}")
        if self.system is not None and not isinstance(self.system, str):
            raise UsageError(f"system must be text, not {type(self.system).__name__}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise UsageError("stop must be texts that are not empty")
        object.__setattr__(self, "stop", tuple(stop))

    def updated(self, values: Mapping[str, Any], loaded: bool = False) -> Options:
        """These options with some others in their place.

        Args:
            values: By name of the field.
            loaded: Whether a model is loaded already, which settles those of `LOADING`.

        Raises:
            UsageError: No option is called that, or it cannot be changed any more.
        """
        known = [f.name for f in fields(self)]
        for name in values:
            if name not in known:
                raise UsageError(f"no option is called {name!r:.40}; there are {', '.join(sorted(known))}")
            if loaded and name in self.LOADING:
                raise UsageError(f"{name} is settled when the model is loaded: give it to Llava.load")
        return replace(self, **values)


@dataclass(frozen=True)
class Timings:
    """What an answer cost."""

    load_s: float
    """Seconds to load both models (once for all answers)."""
    image_s: float
    """Seconds to read, preprocess and encode the pictures."""
    prefill_s: float
    """Seconds to evaluate the prompt, pictures included, up to the first token's logits."""
    decode_s: float
    """Seconds to generate the answer."""
    prompt_tokens: int
    """Tokens of the prompt, image slots included."""
    image_tokens: int
    """Those of them that stand for pictures."""
    reused_tokens: int
    """Those of them that were not evaluated again: another answer's prompt or text, still in the KV cache, began with
    them, or they came from disk."""
    images_encoded: int
    """Pictures that went through the tower; the embeddings of others were known, or not needed."""
    completion_tokens: int
    """Tokens generated, the end of turn included."""
    restored_tokens: int = 0
    """Those of `reused_tokens` that came from the image cache on disk."""
    waited_s: float = 0.0
    """Seconds until the answer's turn came, where others were given before."""
    drafted_tokens: int = 0
    """Tokens that were guessed; see `Options.speculate`."""
    accepted_tokens: int = 0
    """Those of them that the model would have written itself, and that cost no step of their own."""

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of the prompt that were evaluated."""
        return self.prompt_tokens - self.reused_tokens

    @property
    def prefill_tokens_per_s(self) -> float:
        """Of the tokens that were evaluated."""
        return self.prefilled_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """The first token comes from the prefill, so one less than were generated."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, by the model alone: before temperature, penalties, filters and schema."""

    token: int
    text: str
    """Its text; half a character is shown as U+FFFD."""
    logprob: float
    """Natural logarithm of its probability."""
    top: tuple[tuple[int, str, float], ...] = ()
    """The likeliest tokens at its place, likeliest first: id, text, logprob."""


@dataclass(frozen=True)
class Reply:
    """An answer."""

    text: str
    tokens: tuple[int, ...]
    """Token ids of the answer, without the end of turn."""
    finish_reason: FinishReason
    """"stop": the model ended its turn, wrote a stop text, or the JSON is complete; "length": max_tokens or the context
    was reached before."""
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One for each of `tokens`, if they were asked for."""
    parsed: Any = None
    """Where a JSON schema was given and the answer is complete: its value, or an instance of the pydantic model."""
    dropped: int = 0
    """Messages that were left out at the beginning of the conversation; see `Options.overflow`."""


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer, as it comes."""

    text: str
    """May be empty: half of a character, or the beginning of a stop text, is held back."""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reply: Reply | None = None
    """On the last one: the whole answer."""


@dataclass(frozen=True)
class ModelFiles:
    """A runnable pair."""

    model: Path
    """The language model, a GGUF."""
    mmproj: Path
    """Vision tower and projector, a GGUF."""

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes of the two files."""
        return self.model.stat().st_size, self.mmproj.stat().st_size


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    text: str
    images: tuple[Any, ...] = field(default=())
    """Pictures that the turn shows, before its text: whatever `local_llava.images.load_image` takes."""
