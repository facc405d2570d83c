"""Holds sampling to a schema: which tokens may come next, so that the answer is valid JSON and ends in time.

The one importer of llguidance, which knows fast which tokens the grammar allows. How far the end is it does not know;
`parser` does, and where the budget gets short only tokens are allowed from which the answer can still be ended.
Knows no model: a vocabulary comes as the bytes of its tokens.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import deque
from collections.abc import Collection, Sequence

import llguidance
import numpy as np
from numpy.typing import NDArray

from local_llava.errors import EngineError, LocalLlavaError, UsageError
from local_llava.schema import rules
from local_llava.schema.grammar import Grammar
from local_llava.schema.parser import Parser, State

MAX_OPEN = 200
"""Values inside one another in an answer; Python's own json module gives up at 1000."""

MAX_CIRCLE = 150
"""Rules that call each other in a circle: llguidance needs 3 kB of stack for each, and a thread may have 512 kB."""

MAX_FOLLOWED = 300
"""Bytes of the shortest answer for which llguidance is asked, while a schema is checked, what could come instead."""

MAX_FORCED = 64
"""Bytes of a text that is forced which are looked at."""

MAX_TRIED = 48
"""Tokens that are tried one by one where the budget is short: the most likely ones."""

_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=50_000,
    step_max_items=500_000,
    initial_lexer_fuel=5_000_000,
    step_lexer_fuel=2_000_000,
    verbose_errors=False,
)
_JSON_MARKS = b'{}[],:"'
_JSON_STARTS = re.compile(rb'[{}\[\],:"]|[^{}\[\],:"]+')
_VALUE_STARTS = [bytes((byte,)) for byte in b'"{[-0123456789tfn']
_LOST = "the answer cannot be held to the schema any more"
_PRINTABLE = range(0x20, 0x7F)


class Vocabulary:
    """The tokens of a model as the bytes that they stand for. Made once a model; takes half a second for 128,000.

    Attributes:
        n_tokens: Number of tokens.
        ends: Ids of the tokens that end a turn.
        ids: Text -> id of the tokens that are text.
        longest: Bytes of the longest of them.
        starts: JSON tokens that may start in each token, at most: int32 [n_tokens].
        most_starts: The most of them.
    """

    def __init__(self, pieces: Sequence[bytes], ends: Collection[int], control: Collection[int]) -> None:
        """Take a vocabulary.

        Args:
            pieces: The bytes of each token, by id; empty for tokens that stand for no text.
            ends: Ids of the tokens that end a turn; at least one.
            control: Ids of tokens that are no text, whatever their pieces say: control tokens and the like.

        Raises:
            UsageError: The vocabulary cannot write JSON: a printable ASCII character has no token of its own.
        """
        self.n_tokens, self.ends = len(pieces), sorted(set(ends))
        single = {piece for piece in pieces if len(piece) == 1}
        missing = [byte for byte in _PRINTABLE if bytes((byte,)) not in single]
        if missing:
            raise UsageError(
                f"schema: the model's vocabulary has no token for {chr(missing[0])!a}, so it cannot write JSON"
            )
        no_text = {*control, *self.ends}
        # Where a byte of longer characters is missing, a token that ends inside one could be one too many.
        whole = not all(bytes((byte,)) in single for byte in range(0x80, 0xF5))
        texts = [b"" if i in no_text or (whole and not _is_utf8(p)) else p for i, p in enumerate(pieces)]
        self._texts = texts
        self.ids = {text: i for i, text in enumerate(texts) if text}
        self.longest = max(map(len, self.ids))
        self.starts = np.array([_starts(text) for text in texts], np.int32)
        self.most_starts = int(self.starts.max())
        self.tokenizer = llguidance.LLTokenizer(
            _Tokens(texts, pieces, no_text, self.ends[0]),  # type: ignore[arg-type]
            eos_token=self.ends,
            slices=llguidance.LLTokenizer.json_slices(),
        )

    def text(self, token: int) -> bytes:
        """The bytes of a token; none if it is no text."""
        return self._texts[token]

    def split(self, text: bytes) -> list[int]:
        """The fewest tokens that spell a text.

        Raises:
            UsageError: It cannot be spelled.
        """
        costs = [math.inf] * len(text) + [0.0]
        steps = [0] * len(text)
        for i in reversed(range(len(text))):
            for end in range(i + 1, min(i + self.longest, len(text)) + 1):
                if costs[end] + 1 < costs[i] and text[i:end] in self.ids:
                    costs[i], steps[i] = costs[end] + 1, end
        if costs[0] == math.inf:
            raise UsageError("schema: the model's vocabulary has no tokens for what it asks for")
        tokens, i = [], 0
        while i < len(text):
            tokens.append(self.ids[text[i : steps[i]]])
            i = steps[i]
        return tokens

    def greedy(self, text: bytes) -> list[int]:
        """Tokens that spell a text, each the longest that fits; none if that leads nowhere."""
        tokens, i = [], 0
        while i < len(text):
            ends = range(min(i + self.longest, len(text)), i, -1)
            end = next((end for end in ends if text[i:end] in self.ids), 0)
            if not end:
                return []
            tokens.append(self.ids[text[i:end]])
            i = end
        return tokens


def _starts(text: bytes) -> int:
    """JSON tokens that may start in a text, at most."""
    return 1 if len(text.translate(None, _JSON_MARKS)) == len(text) else len(_JSON_STARTS.findall(text))


def _is_utf8(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


class _Tokens:
    """A vocabulary in the form that llguidance asks for (`TokenizerWrapper`)."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, texts: Sequence[bytes], pieces: Sequence[bytes], no_text: Collection[int], end: int) -> None:
        self.eos_token_id = end
        # 0xFF, which no text has, marks tokens that are none.
        self.tokens = [b"\xff" + pieces[i] if i in no_text else text for i, text in enumerate(texts)]

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError("the grammars of local-llava force no text, so none has to be split into tokens")


def check_grammar(grammar: Grammar) -> None:
    """See whether answers can be held to a grammar, by following the shortest one byte by byte.

    Raises:
        UsageError: The grammar is too large or too deep for that.
    """
    vocabulary = Vocabulary([*(bytes((byte,)) for byte in range(256)), b""], ends=[256], control=[])
    matcher, mask = _matcher(grammar, vocabulary), np.zeros(9, np.int32)
    parser = Parser(grammar, vocabulary.ids, vocabulary.longest)
    state: State | None = parser.start
    for i, byte in enumerate(parser.rest(parser.start)):
        if i < MAX_FOLLOWED:
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        matcher.consume_token(byte)
        _check(matcher, UsageError, "schema: it is too complex to hold an answer to")
        state = None if state is None else parser.step(state, byte)
        if state is None or parser.depth(state) > MAX_OPEN:
            raise UsageError(f"schema: its shortest answer nests more than {MAX_OPEN} values")


def _matcher(grammar: Grammar, vocabulary: Vocabulary) -> llguidance.LLMatcher:
    if grammar.depth() > MAX_CIRCLE:
        raise UsageError(f"schema: its definitions refer to each other in a circle of more than {MAX_CIRCLE} steps")
    matcher = llguidance.LLMatcher(vocabulary.tokenizer, grammar.lark(), log_level=0, limits=_LIMITS)
    _check(matcher, UsageError, "schema: it is too complex to hold an answer to")
    return matcher


def _check(matcher: llguidance.LLMatcher, error: type[LocalLlavaError], problem: str) -> None:
    if matcher.is_error():
        raise error(f"{problem}: llguidance says {_first_line(matcher.get_error())!a}")


def _first_line(message: str) -> str:
    return message.strip().split("\n", 1)[0][:200]


class Constraint:
    """One answer that is held to a schema.

    Attributes:
        finished: Whether the answer is complete and nothing more may come but the end of the turn.
        shortest: Tokens of the shortest answer that is known, the end of the turn not counted.
        schema: The schema's text.
    """

    def __init__(self, schema_text: str, vocabulary: Vocabulary) -> None:
        """Start an answer.

        Args:
            schema_text: What `json_schema.compile_schema` returned.
            vocabulary: The model's.

        Raises:
            UsageError: The vocabulary cannot write what the schema asks for.
        """
        self._vocabulary, self.schema = vocabulary, schema_text
        grammar = rules.grammar(json.loads(schema_text))
        self._matcher = _matcher(grammar, vocabulary)
        self._parser = Parser(grammar, vocabulary.ids, vocabulary.longest)
        self._farthest = self._parser.farthest()
        self._state = self._parser.start
        if self._parser.cost(self._state) == math.inf:
            raise UsageError("schema: the model's vocabulary has no tokens for what it asks for")
        self._mask = np.zeros((vocabulary.n_tokens + 31) // 32, np.int32)
        self._forced: deque[int] = deque()
        self._ended = False
        self._text = bytearray()
        self.shortest = len(vocabulary.split(self._parser.rest(self._state)))

    @property
    def complete(self) -> bool:
        """Whether what was accepted so far is a whole answer, even if more may come."""
        return self._ended or self._parser.complete(self._state)

    @property
    def finished(self) -> bool:
        return self._ended or self._parser.final(self._state)

    def require(self, max_tokens: int) -> None:
        """Raises UsageError, with the numbers, if no answer fits that many tokens."""
        if self.shortest > max_tokens:
            raise UsageError(
                f"schema: its shortest answer has {self.shortest} tokens, more than the {max_tokens} that are left "
                "(max_tokens, --max-tokens)"
            )

    def apply(self, logits: NDArray[np.float32], remaining: int) -> None:
        """Take the tokens that may not come next out of the running.

        Args:
            logits: float32 [n_vocab]; those of forbidden tokens become -inf, in place.
            remaining: Tokens that may still be sampled, the next one included, >= 1.

        Raises:
            EngineError: llguidance failed.
        """
        allowed = self._allowed()
        n = self._vocabulary.n_tokens
        logits[n:] = -np.inf
        if self.finished:
            allowed[:] = False
            allowed[self._vocabulary.ends] = True
        else:
            self._keep_in_time(allowed, logits[:n], remaining)
        np.copyto(logits[:n], -np.inf, where=~allowed)

    def accept(self, token: int) -> None:
        """Go on with a token that was sampled.

        Raises:
            EngineError: The schema forbids it.
        """
        if token in self._vocabulary.ends and self.complete:
            self._ended = True
            return
        state = None if self._ended else self._parser.walk(self._state, self._vocabulary.text(token))
        if state is None or not self._vocabulary.text(token):
            raise EngineError(f"the token {token} was sampled, which the schema forbids")
        self._matcher.consume_token(token)
        _check(self._matcher, EngineError, _LOST)
        self._state = state
        self._text += self._vocabulary.text(token)
        if self._forced and self._forced.popleft() != token:
            self._forced.clear()

    def forced(self) -> list[int]:
        """Tokens of the text that must come next, if there is one; else none.

        It may also be split into other tokens, and where a space may be left out it is taken to be there if it was
        after the last colon: what is returned is the likeliest.
        """
        if self._ended or self.finished:
            return []
        # A copy shares what llguidance knows of the grammar, and takes a microsecond.
        matcher, text = self._matcher.deep_copy(), b""
        colon = self._text.rfind(b'":', 0, -1)
        spaced = colon < 0 or self._text[colon + 2] == ord(" ")
        while len(text) < MAX_FORCED:
            piece = matcher.compute_ff_bytes()[: MAX_FORCED - len(text)]
            if not piece and (text or self._text)[-1:] in (b",", b":"):
                piece = self._after_mark(matcher, spaced)
            tokens = self._vocabulary.greedy(piece)
            if not tokens or not matcher.consume_tokens(tokens):
                break
            text += piece
        tokens = self._vocabulary.greedy(text)
        # A word that may go on is rarely split where the choice begins.
        return tokens[:-1] if text[-1:].isalnum() else tokens

    def _after_mark(self, matcher: llguidance.LLMatcher, spaced: bool) -> bytes:
        """The byte after a comma or a colon, if a space may come there and else only one other byte."""

        def may_come(byte: bytes) -> bool:
            return matcher.validate_tokens([self._vocabulary.ids[byte]]) == 1

        if not may_come(b" ") or may_come(b"z"):  # the latter inside a string
            return b""
        if spaced:
            return b" "
        starts = list(itertools.islice(filter(may_come, _VALUE_STARTS), 2))
        return starts[0] if len(starts) == 1 else b""

    def _allowed(self) -> NDArray[np.bool_]:
        """What the grammar allows: [n_tokens]."""
        if self._ended or self.finished:
            return np.zeros(self._vocabulary.n_tokens, np.bool_)
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        _check(self._matcher, EngineError, _LOST)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")
        return bits[: self._vocabulary.n_tokens].view(np.bool_)

    def _keep_in_time(self, allowed: NDArray[np.bool_], logits: NDArray[np.float32], remaining: int) -> None:
        """Forbid what would leave too few tokens to end the answer."""
        if self._forced:
            _only(allowed, [self._forced[0]])
            return
        parser = self._parser
        # What comes after a token costs at most: what it costs now, what a choice may add wherever a JSON token starts
        # in it, and what the last of those needs to be ended.
        spare = remaining - 1 - parser.cost(self._state) - self._farthest
        starts = spare / parser.growth if parser.growth else math.copysign(math.inf, spare)
        if starts < 1 or parser.depth(self._state) > MAX_OPEN // 2:
            self._try(allowed, logits, remaining)
        elif starts < self._vocabulary.most_starts:
            allowed &= self._vocabulary.starts <= starts

    def _try(self, allowed: NDArray[np.bool_], logits: NDArray[np.float32], remaining: int) -> None:
        """Allow only tokens after which the answer can be ended in time, found one by one."""
        tokens = np.flatnonzero(allowed)
        if len(tokens) > MAX_TRIED:
            tokens = tokens[np.argpartition(-logits[tokens], MAX_TRIED)[:MAX_TRIED]]
        fitting = [token for token in map(int, tokens) if self._fits(token, remaining)]
        if self._parser.complete(self._state):
            fitting += self._vocabulary.ends
        if not fitting and self._parser.cost(self._state) <= remaining:
            fitting = [self._vocabulary.ids[self._parser.next_token(self._state)]]
        elif not fitting:
            # Tokens that span several JSON tokens may make it shorter than its cost: only all of them together fit.
            self._forced = deque(self._vocabulary.split(self._parser.rest(self._state)))
            fitting = [self._forced[0]]
        _only(allowed, fitting)

    def _fits(self, token: int, remaining: int) -> bool:
        state = self._parser.walk(self._state, self._vocabulary.text(token)) if self._vocabulary.text(token) else None
        if state is None or self._parser.depth(state) > MAX_OPEN:
            return False
        return self._parser.cost(state) < remaining


def _only(allowed: NDArray[np.bool_], tokens: Sequence[int]) -> None:
    allowed[:] = False
    allowed[list(tokens)] = True
