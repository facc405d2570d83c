"""Sampling that is held to a schema: by models that know nothing, with tiny-llava's tokens, Llama 3's, and odd ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import llama3_tokenizer
import numpy as np
import pydantic
import pytest
import random_schemas
from json_schemas import BY_HAND, make
from test_schema_compiler import Cat, Dog, Everything

from local_llava.errors import EngineError, UsageError
from local_llava.llm_vocab import byte_alphabet
from local_llava.schema.compiler import compile_schema
from local_llava.schema.constraint import MAX_OPEN, Constraint, Vocabulary

TINY = Path(__file__).parent.parent / "models" / "tiny-llava" / "tokenizer.json"
END = b"<|eot_id|>"


def vocabulary(tokenizer: Path) -> Vocabulary:
    """The vocabulary of a byte-level tokenizer.json."""
    document = json.loads(tokenizer.read_text(encoding="utf-8"))
    bytes_of = {char: byte for byte, char in enumerate(byte_alphabet())}
    pieces = {i: bytes(bytes_of[char] for char in text) for text, i in document["model"]["vocab"].items()}
    special = {token["id"]: token["content"].encode() for token in document["added_tokens"]}
    pieces.update(special)
    ends = [i for i, text in special.items() if text in (END, b"<|end_of_text|>")]
    return Vocabulary([pieces.get(i, b"") for i in range(max(pieces) + 1)], ends, special)


@pytest.fixture(scope="module")
def tiny() -> Vocabulary:
    return vocabulary(TINY)


@pytest.fixture(scope="module")
def llama3() -> Vocabulary:
    return vocabulary(llama3_tokenizer.fetch() / "tokenizer.json")


class Model:
    """Random logits, at temperature 1: tokens are drawn by the largest of logit and Gumbel noise."""

    def __init__(self, n: int, seed: int) -> None:
        self.chance, self.n = np.random.default_rng(seed), n
        self.logits = self.chance.normal(0, 3, 3 * n).astype(np.float32)
        self.noise = self.chance.gumbel(size=3 * n).astype(np.float32)

    def draw(self, constraint: Constraint, remaining: int) -> int:
        logits, noise = (part[self.chance.integers(2 * self.n) :][: self.n] for part in (self.logits, self.noise))
        logits = logits.copy()
        constraint.apply(logits, remaining)
        return int(np.argmax(logits + noise))


def answer(schema_text: str, vocabulary: Vocabulary, budget: int, model: Model) -> tuple[bytes, Constraint]:
    """Sample an answer as the engine does."""
    constraint = Constraint(schema_text, vocabulary)
    text = b""
    for remaining in range(budget, 0, -1):
        token = model.draw(constraint, remaining)
        constraint.accept(token)
        text += vocabulary.text(token)
        if constraint.finished:
            break
    return text, constraint


def check(schema: Any, text: bytes) -> Any:
    """Parse an answer strictly, and validate it."""
    value = json.loads(text.decode("utf-8"))
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)
    return value


def schemas() -> Iterator[tuple[str, Any, str]]:
    """200 of them: name, schema, what it compiles to."""
    for name, schema in BY_HAND.items():
        yield name, schema, compile_schema(schema)
    seed, found = 0, len(BY_HAND)
    while found < 200:
        seed += 1
        try:
            text = compile_schema(make(seed))
        except UsageError as e:
            # Made by chance, some objects must have a property that they must not have.
            assert "nothing can satisfy" in str(e)
            continue
        found += 1
        yield f"made {seed}", make(seed), text


@pytest.fixture(scope="module")
def two_hundred() -> list[tuple[str, Any, str]]:
    return list(schemas())


@pytest.mark.parametrize("budget", [16, 64, 256, 1000])
def test_200_schemas(tiny: Vocabulary, two_hundred: list[tuple[str, Any, str]], budget: int) -> None:
    assert len(two_hundred) == 200
    n_fit, model = 0, Model(tiny.n_tokens, budget)
    for name, schema, text in two_hundred:
        found, constraint = answer(text, tiny, budget, model)
        if constraint.shortest > budget:
            with pytest.raises(UsageError, match=f"has {constraint.shortest} tokens, more than the {budget}"):
                constraint.require(budget)
            continue
        constraint.require(budget)
        n_fit += 1
        check(schema, found)
        assert constraint.complete, name
    assert n_fit > {16: 140, 64: 180, 256: 198, 1000: 200}[budget] - 5


def test_200_schemas_with_128_000_tokens(llama3: Vocabulary, two_hundred: list[tuple[str, Any, str]]) -> None:
    model = Model(llama3.n_tokens, 7)
    for i, (name, schema, text) in enumerate(two_hundred):
        budget = (24, 120)[i % 2]
        found, constraint = answer(text, llama3, budget, model)
        if constraint.shortest <= budget:
            check(schema, found)
            assert constraint.complete, name


def test_the_shortest_answer_fits_and_so_does_every_budget_above(
    tiny: Vocabulary, two_hundred: list[tuple[str, Any, str]]
) -> None:
    model = Model(tiny.n_tokens, 3)
    for name, schema, text in two_hundred:
        shortest = Constraint(text, tiny).shortest
        for budget in (shortest, shortest + 1, shortest + 2, shortest + 7):
            found, constraint = answer(text, tiny, budget, model)
            check(schema, found)
            assert constraint.complete, (name, budget)


@pytest.mark.parametrize("make_schema", [random_schemas.soup, random_schemas.one_of])
def test_keywords_thrown_together(tiny: Vocabulary, make_schema: Any) -> None:
    """What is accepted holds, however little sense it makes; the rest is refused in one line."""
    n_accepted, model = 0, Model(tiny.n_tokens, 4)
    for seed in range(300):
        schema = make_schema(seed)
        try:
            text = compile_schema(schema)
        except UsageError as e:
            assert "\n" not in str(e)
            continue
        n_accepted += 1
        for more in (0, 30):
            found, constraint = answer(text, tiny, Constraint(text, tiny).shortest + more or 1, model)
            check(schema, found)
            assert constraint.complete, schema
    assert n_accepted > 60


@pytest.mark.parametrize("kind", [Cat, Dog, Everything, list[Cat | Dog]])
def test_pydantic_validates_what_is_written_for_it(tiny: Vocabulary, kind: Any) -> None:
    model, text, adapter = Model(tiny.n_tokens, 5), compile_schema(kind), pydantic.TypeAdapter(kind)
    for budget in (120, 400, 400):
        adapter.validate_json(answer(text, tiny, budget, model)[0])


def test_llguidance_and_the_parser_allow_the_same_tokens(
    tiny: Vocabulary, two_hundred: list[tuple[str, Any, str]]
) -> None:
    """One grammar is given to both; they must read it alike, or a token would be allowed that has no cost."""
    chance, texts = np.random.default_rng(6), [tiny.text(i) for i in range(tiny.n_tokens)]
    for name, _, text in two_hundred[::3]:
        constraint = Constraint(text, tiny)
        parser = constraint._parser
        for _ in range(25):
            allowed, state = constraint._allowed(), constraint._state
            for token, piece in enumerate(texts):
                after = parser.walk(state, piece) if piece else None
                possible = after is not None and parser.cost(after) < float("inf")
                if token not in tiny.ends:
                    assert allowed[token] == possible or parser.farthest() == float("inf"), (name, piece)
                elif not constraint.finished:
                    assert allowed[token] == constraint.complete, name
            choices = [i for i in np.flatnonzero(allowed) if i not in tiny.ends]
            if not choices:
                break
            constraint.accept(int(chance.choice(choices)))


def test_order_and_white_space(tiny: Vocabulary) -> None:
    names = [f"p{i}" for i in (3, 1, 2, 0)]
    schema = {"type": "object", "properties": {n: {"type": ["string", "object"]} for n in names}, "required": names[:2]}
    text, model, spaced = compile_schema(schema), Model(tiny.n_tokens, 8), set()
    for _ in range(30):
        found = answer(text, tiny, 150, model)[0]
        written = list(check(schema, found))
        assert written == [name for name in names if name in written]
        outside = _outside_strings(found)
        assert not {"\n", "\t", "  "} & set(outside) and "  " not in outside
        assert outside.replace(", ", ",").replace(": ", ":").count(" ") == 0
        spaced |= {": " in outside, ", " in outside}
    assert spaced == {True, False}  # a space may come, and need not


def _outside_strings(text: bytes) -> str:
    outside, inside = [], False
    for i, char in enumerate(text.decode()):
        quoted = char == '"' and (len(text.decode()[:i]) - len(text.decode()[:i].rstrip("\\"))) % 2 == 0
        if not inside and not quoted:
            outside.append(char)
        inside ^= quoted
    return "".join(outside)


def test_after_the_end_only_the_end_of_the_turn_may_come(tiny: Vocabulary) -> None:
    constraint = Constraint(compile_schema({"const": [1]}), tiny)
    assert constraint.shortest <= 3 and not constraint.complete
    for piece in (b"[", b"1", b"]"):
        assert not constraint.finished
        constraint.accept(tiny.ids[piece])
    assert constraint.complete and constraint.finished
    logits = np.zeros(tiny.n_tokens + 30, np.float32)  # a model may have more logits than tokens
    constraint.apply(logits, 5)
    assert np.flatnonzero(np.isfinite(logits)).tolist() == tiny.ends
    constraint.accept(tiny.ends[0])
    constraint.apply(logits, 1)
    assert constraint.finished


def test_a_number_may_end_or_go_on(tiny: Vocabulary) -> None:
    constraint = Constraint(compile_schema({"type": "integer"}), tiny)
    constraint.accept(tiny.ids[b"1"])
    assert constraint.complete and not constraint.finished
    logits = np.zeros(tiny.n_tokens, np.float32)
    constraint.apply(logits, 9)
    assert np.isfinite(logits[[*tiny.ends, tiny.ids[b"7"]]]).all() and not np.isfinite(logits[tiny.ids[b" "]])


def test_logits_of_allowed_tokens_stay_as_they_are(tiny: Vocabulary) -> None:
    constraint = Constraint(compile_schema({"type": "boolean"}), tiny)
    before = np.random.default_rng(9).normal(size=tiny.n_tokens).astype(np.float32)
    logits = before.copy()
    constraint.apply(logits, 100)
    kept = np.isfinite(logits)
    assert {tiny.text(i)[:1] for i in np.flatnonzero(kept)} == {b"t", b"f"}
    assert (logits[kept] == before[kept]).all()


@pytest.mark.parametrize("piece", [b"x", b"\xff", b"\xc3", b"]"])
def test_a_forbidden_token_is_an_error_and_no_crash(tiny: Vocabulary, piece: bytes) -> None:
    constraint = Constraint(compile_schema({"type": "integer"}), tiny)
    with pytest.raises(EngineError, match=r"the token \d+ was sampled, which the schema forbids"):
        constraint.accept(tiny.ids[piece])
    with pytest.raises(EngineError):
        constraint.accept(tiny.ends[0])


def test_control_tokens_are_never_text(tiny: Vocabulary) -> None:
    """In a string any text may come, but not what only looks like the text of a control token."""
    constraint = Constraint(compile_schema({"type": "string"}), tiny)
    constraint.accept(tiny.ids[b'"'])
    logits = np.zeros(tiny.n_tokens, np.float32)
    constraint.apply(logits, 100)
    no_text = [i for i in range(tiny.n_tokens) if not tiny.text(i)]
    assert len(no_text) >= 7 and not np.isfinite(logits[no_text]).any()
    assert np.isfinite(logits[tiny.ids[b" the"]])


def test_recursion_stays_shallow_enough_to_be_read(tiny: Vocabulary) -> None:
    """A model that opens arrays as long as it may."""
    constraint = Constraint(compile_schema({"type": "array", "items": {"$ref": "#"}}), tiny)
    text = b""
    for remaining in range(5000, 0, -1):
        logits = np.array([tiny.text(i).count(b"[") - i / 1e4 for i in range(tiny.n_tokens)], np.float32)
        constraint.apply(logits, remaining)
        token = int(np.argmax(logits))
        constraint.accept(token)
        text += tiny.text(token)
        if constraint.finished or len(text) > 3000:
            break
    assert MAX_OPEN // 2 < max(_depths(text)) <= MAX_OPEN


def _depths(text: bytes) -> list[int]:
    depths = [0]
    for byte in text:
        depths.append(depths[-1] + (byte == ord("[")) - (byte == ord("]")))
    return depths


def odd_vocabulary(pieces: Sequence[bytes]) -> Vocabulary:
    return Vocabulary([b"<unk>", b"<s>", b"</s>", *pieces], ends=[2], control=[0, 1, 2])


ASCII = [bytes((byte,)) for byte in range(0x20, 0x7F)]
ODD = {
    "all bytes twice, as in SentencePiece": [bytes((i,)) for i in range(256)]
    + ASCII
    + [b' {"', b"\xe2\x96\x81", b"true"],
    "no bytes beyond ASCII": [*ASCII, b"\xc3\xa9", b"\xf0\x9f", b"\x98\x80", b"\xf0\x9f\x98\x80", b"\xe4\xb8", b'a"'],
    "tokens that end inside characters": [
        *ASCII,
        *(bytes((i,)) for i in range(0x80, 0x100)),
        b"\xf0\x9f\x98",
        b'\x80"',
    ],
    "hardly anything": ASCII,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_vocabularies(name: str) -> None:
    odd = odd_vocabulary(ODD[name])
    model = Model(odd.n_tokens, 10)
    for schema_name in ("person", "string", "anything", "tree", "map", "unit", "format uuid", "by pattern"):
        schema = BY_HAND[schema_name]
        for budget in (60, 200):
            found, constraint = answer(compile_schema(schema), odd, budget, model)
            check(schema, found)
            assert constraint.complete, schema_name


def test_what_a_vocabulary_cannot_write() -> None:
    with pytest.raises(UsageError, match="the model's vocabulary has no token for '@', so it cannot write JSON"):
        odd_vocabulary([piece for piece in ASCII if piece != b"@"])
    with pytest.raises(UsageError, match="the model's vocabulary has no tokens for what it asks for"):
        Constraint(compile_schema({"const": "\u00e9"}), odd_vocabulary(ASCII))
    either = compile_schema({"enum": ["\u00e9", "a", "e"]})
    model = Model(98, 11)
    assert {answer(either, odd_vocabulary(ASCII), 9, model)[0] for _ in range(20)} == {b'"a"', b'"e"'}


def test_tokens_that_span_json_tokens_make_room(tiny: Vocabulary) -> None:
    """The shortest answer counts them, and is followed even where its JSON tokens one by one would not fit."""
    text = compile_schema({"const": {"a": [1, {"b": None}], "c": ["x"]}})
    wide = odd_vocabulary([*ASCII, b'{"a":[1,{"b":null', b'}],"c":["', b'x"]}'])
    constraint = Constraint(text, wide)
    assert constraint.shortest == 3 < constraint._parser.cost(constraint._state)
    assert answer(text, wide, 3, Model(wide.n_tokens, 12))[0] == b'{"a":[1,{"b":null}],"c":["x"]}'


def test_dead_ends_are_not_entered(tiny: Vocabulary) -> None:
    """llguidance allows what a pattern and a length each allow; here that leads nowhere after a few letters."""
    text, model = compile_schema({"type": "string", "pattern": "^(a|b)*abb$", "maxLength": 5}), Model(tiny.n_tokens, 13)
    found = {answer(text, tiny, 100, model)[0] for _ in range(60)}
    assert len(found) > 3 and all(len(f) <= 7 and f.endswith(b'abb"') for f in found)


def test_far_from_the_budget_no_token_is_kept_back(tiny: Vocabulary) -> None:
    schema = {"type": "array", "items": BY_HAND["person"]}
    constraint = Constraint(compile_schema(schema), tiny)
    logits = np.zeros(tiny.n_tokens, np.float32)
    constraint.apply(logits, 10_000)
    assert (np.isfinite(logits) == constraint._allowed()).all()
