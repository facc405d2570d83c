"""Guessing tokens: answers stay as they are, on tiny-llava and on a model that knows nothing; when it is worth it."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import json_schemas
import numpy as np
import pytest
from llava_checkpoints import TINY, random_model, save
from test_engine import picture
from test_schema_constraint import TINY as TINY_TOKENIZER
from test_schema_constraint import Model, vocabulary

from local_llava import Llava, Message, Options, Reply, UsageError
from local_llava.convert import convert
from local_llava.llm import Rows
from local_llava.request import Request, Shown, Unit
from local_llava.run import Run
from local_llava.schema.compiler import compile_schema
from local_llava.schema.constraint import Constraint, Vocabulary
from local_llava.speculation import MAX_GUESSED, Guesser, Guesses, _Costs
from local_llava.types import ModelFiles

QUESTIONS = ("What do you see?", "Describe the picture.", "Is there a circle?", "How many shapes are there?")
HOT: dict[str, Any] = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 60}
ITEM = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "price": {"type": "number"}}}
RECEIPT = {
    "type": "object",
    "properties": {
        "store": {"type": "string", "maxLength": 12},
        "items": {
            "type": "array",
            "items": {**ITEM, "required": ["name", "price"], "additionalProperties": False},
            "minItems": 2,
            "maxItems": 4,
        },
    },
    "required": ["store", "items"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return convert(TINY, tmp_path_factory.mktemp("pair"), quant="F32", mmproj_quant="F32")


@pytest.fixture(scope="module")
def llava(files: ModelFiles) -> Iterator[Llava]:
    with Llava.load(files.model, files.mmproj, kv_type="F32", n_threads=1, image_cache="off") as llava:
        yield llava


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows cost nothing: as much is guessed as may be."""
    monkeypatch.setattr(_Costs, "up_to", lambda self, n_rows: [1.0] * n_rows)


@pytest.fixture
def wild(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Guesses of any length, some of them right for a while, whatever they cost. Returns their lengths as they come."""
    chance, lengths = random.Random(0), list[int]()

    def guess(self: Guesses, answer: Sequence[int], most: int) -> list[int]:
        self._learn(answer)
        most = chance.randint(0, min(most, MAX_GUESSED))
        tokens = self._looked_up(most)[0][: chance.randint(0, most)]
        tokens += [chance.randrange(300) for _ in range(most - len(tokens))]
        lengths.append(len(tokens))
        return tokens

    plan_tokens = Run.plan_tokens

    def plan(self: Run, rows: Rows) -> None:
        plan_tokens(self, rows)
        # The last token of an answer is not evaluated, and limit counts it.
        assert self.sequence.n_past + self.n_planned <= self.total + self.limit - 1

    monkeypatch.setattr(Guesses, "next", guess)
    monkeypatch.setattr(Run, "plan_tokens", plan)
    return lengths


def both(llava: Llava, *args: Any, **options: Any) -> Reply:
    """An answer that is the same with and without guessing. Returns the one with it."""
    plain, fast = (llava.ask(*args, **options, speculate=on) for on in (False, True))
    assert fast.tokens == plain.tokens and fast.text == plain.text
    assert fast.finish_reason == plain.finish_reason and fast.parsed == plain.parsed
    assert plain.timings.drafted_tokens == 0
    assert fast.timings.completion_tokens == plain.timings.completion_tokens
    return fast


# --- answers stay as they are ---


@pytest.mark.usefixtures("eager")
def test_greedy_answers_are_the_same(llava: Llava) -> None:
    drafted = accepted = 0
    for i in range(150):
        timings = both(llava, QUESTIONS[i % 4], picture(1000 + i)).timings
        drafted, accepted = drafted + timings.drafted_tokens, accepted + timings.accepted_tokens
    assert drafted > accepted > 50, "right guesses and wrong ones"


@pytest.mark.usefixtures("eager")
def test_without_a_word_only_schemas_are_guessed(llava: Llava) -> None:
    for _ in range(2):
        assert llava.ask(QUESTIONS[0], picture(1)).timings.drafted_tokens == 0
    assert llava.ask(QUESTIONS[0], picture(1), json_schema=RECEIPT).timings.drafted_tokens > 0
    assert llava.ask(QUESTIONS[0], picture(1), json_schema=RECEIPT, speculate=False).timings.drafted_tokens == 0


def test_wrong_guesses_change_nothing(llava: Llava, wild: list[int]) -> None:
    for i in range(20):
        both(llava, QUESTIONS[i % 4], picture(i))
        both(llava, QUESTIONS[0], picture(i), seed=i, **HOT)
        both(llava, QUESTIONS[0], picture(i), seed=i, **HOT | {"repeat_penalty": 1.3})
        both(llava, QUESTIONS[0], picture(i), repeat_penalty=1.3, max_tokens=30)
        both(llava, QUESTIONS[0], picture(i), json_schema=RECEIPT, seed=i, **HOT | {"max_tokens": 150})
    assert max(wild) == MAX_GUESSED


def test_logprobs(llava: Llava, wild: list[int]) -> None:
    plain, fast = (
        llava.ask(QUESTIONS[0], picture(3), logprobs=3, temperature=1.0, seed=1, speculate=on) for on in (False, True)
    )
    assert plain.logprobs is not None and fast.logprobs is not None and any(wild)
    assert [t.token for t in fast.logprobs] == [t.token for t in plain.logprobs]
    for a, b in zip(plain.logprobs, fast.logprobs, strict=True):
        assert abs(a.logprob - b.logprob) < 1e-4
        assert np.allclose([p for *_, p in a.top], [p for *_, p in b.top], atol=1e-4)


def test_ends(llava: Llava, wild: list[int]) -> None:
    """Stop texts and limits, at every place of an answer."""
    whole = both(llava, QUESTIONS[0], picture(3))
    for n in range(1, len(whole.tokens) + 2):
        reply = both(llava, QUESTIONS[0], picture(3), max_tokens=n)
        assert reply.tokens == whole.tokens[:n]
    for i in range(len(whole.text) - 2):
        stop = whole.text[i : i + 3]
        assert both(llava, QUESTIONS[0], picture(3), stop=stop).text == whole.text[: whole.text.index(stop)]
    assert any(wild)


def test_guesses_stay_within_the_context(files: ModelFiles, wild: list[int]) -> None:
    for n_ctx in range(24, 40):
        with Llava.load(files.model, files.mmproj, n_ctx=n_ctx, parallel=1, n_threads=1, kv_type="F32") as llava:
            n_prompt = len(llava.prompt_tokens("a b"))
            n_full = 0
            for seed in range(8):
                hot = {**HOT, "temperature": 100.0, "max_tokens": 1000}
                reply = both(llava, "a b", seed=seed, **hot)
                if reply.finish_reason == "length":
                    n_full += 1
                    assert n_prompt + len(reply.tokens) == n_ctx + 1
            assert n_full
    assert any(wild)


@pytest.mark.usefixtures("eager")
def test_200_schemas_on_a_model_that_knows_nothing(tmp_path: Path) -> None:
    files = convert(
        save(random_model({"max_position_embeddings": 2048}), tmp_path / "checkpoint"), tmp_path / "out", quant="F32"
    )
    made = ((f"made {seed}", json_schemas.make(seed)) for seed in range(10_000))
    schemas = {**json_schemas.BY_HAND}
    while len(schemas) < 200:
        name, schema = next(made)
        with contextlib.suppress(UsageError):
            compile_schema(schema)
            schemas[name] = schema
    n_same = accepted = 0
    with Llava.load(files.model, files.mmproj, n_threads=1, kv_type="F32", temperature=1.0, top_k=0) as llava:
        for i, schema in enumerate(schemas.values()):
            with contextlib.suppress(UsageError):
                reply = both(llava, "Go.", json_schema=schema, seed=i, max_tokens=(150, 60)[i % 2])
                assert reply.finish_reason == "stop"
                n_same, accepted = n_same + 1, accepted + reply.timings.accepted_tokens
    assert n_same > 170 and accepted > 100


def test_what_the_sequence_holds_afterwards(llava: Llava, wild: list[int]) -> None:
    """A follow-up reuses what was kept of the answer and no wrong guess, and goes on as without any guess."""
    for i, options in enumerate([{}, {"max_tokens": 5}, {"stop": " and"}, {**HOT, "seed": 5}]):
        scene = picture(2000 + i)
        first = llava.ask(QUESTIONS[0], scene, speculate=True, **options)
        turns = [
            Message("user", QUESTIONS[0], (scene,)),
            Message("assistant", first.text),
            Message("user", "Is there a circle?"),
        ]
        held = llava._worker.call(lambda: max(llava._scheduler._sequences.retired, key=lambda s: s.last_used))
        # The last token was not evaluated, unless the end of the turn came after it.
        kept = held.units[-first.timings.completion_tokens + 1 :] if first.timings.completion_tokens > 1 else []
        assert tuple(kept) == first.tokens[: first.timings.completion_tokens - 1]
        assert held.n_past == first.timings.prompt_tokens + first.timings.completion_tokens - 1
        second = llava.chat(turns, logprobs=5, speculate=False)
        if first.timings.completion_tokens > len(first.tokens):
            assert second.timings.reused_tokens >= first.timings.prompt_tokens + len(first.tokens)
        with Llava.load(llava.files.model, llava.files.mmproj, kv_type="F32", n_threads=1, image_cache="off") as fresh:
            alone = fresh.chat(turns, logprobs=5, speculate=False)
        assert alone.timings.reused_tokens == 0 and alone.tokens == second.tokens
        for a, b in zip(alone.logprobs or (), second.logprobs or (), strict=True):
            assert np.allclose([p for *_, p in a.top], [p for *_, p in b.top], atol=1e-3)
    assert any(wild)


def test_cancelling_in_the_middle(llava: Llava, wild: list[int]) -> None:
    whole = llava.ask(QUESTIONS[0], picture(5), speculate=False)
    for n in range(1, 6):
        stream = llava.stream(QUESTIONS[0], picture(5), speculate=True)
        text = "".join(next(stream).text for _ in range(n))
        stream.close()
        assert whole.text.startswith(text)
        assert both(llava, QUESTIONS[0], picture(5)).tokens == whole.tokens
    assert any(wild)


# --- what a schema forces ---


@pytest.fixture(scope="module")
def tiny() -> Vocabulary:
    return vocabulary(TINY_TOKENIZER)


def forced(vocabulary: Vocabulary, schema: Any, start: bytes) -> bytes:
    constraint = Constraint(compile_schema(schema), vocabulary)
    for token in vocabulary.split(start):
        constraint.accept(token)
    return b"".join(map(vocabulary.text, constraint.forced()))


def test_what_a_schema_forces(tiny: Vocabulary) -> None:
    starts = {
        b"": b'{"store": "',
        b'{"st': b'ore": "',
        b'{"store":': b' "',
        b'{"store": "a': b"",
        b'{"store": "a, ': b"",
        b'{"store": "a,': b"",
        b'{"store": "a"': b', "items": [{"name": "',
        b'{"store":"a"': b',"items":[{"name":"',
        b'{"store":"a","items":[{"name":"b"': b',"price":',
        b'{"store": "a", "items": [{"name": "b"': b', "price": ',
        b'{"store": "a", "items": [{"name": "b", "price": 1': b"",
        b'{"store": "a", "items": [{"name": "b", "price": 1}': b', {"name": "',
        b'{"store": "a", "items": [{"name": "b", "price": 1}, {"name": "b", "price": 1}]': b"}",
        b'{"store": "a", "items": [{"name": "b", "price": 1}, {"name": "b", "price": 1}]}': b"",
    }
    assert {start: forced(tiny, RECEIPT, start) for start in starts} == starts
    words = {"enum": ["cats", "catch"]}
    assert b"cat".startswith(forced(tiny, words, b'"')) and forced(tiny, {"const": "é\U0001f600"}, b"")
    assert len(forced(tiny, {"const": "x" * 5000}, b"")) < 100, "as much as is ever guessed"


@pytest.mark.parametrize("seed", range(60))
def test_asking_disturbs_nothing(tiny: Vocabulary, seed: int) -> None:
    try:
        schema = compile_schema(json_schemas.make(seed))
    except UsageError:
        return
    tokens: list[list[int]] = []
    for ask in (False, True):
        constraint, model, came = Constraint(schema, tiny), Model(tiny.n_tokens, seed), list[int]()
        for remaining in range(constraint.shortest + 40, 0, -1):
            if ask:
                constraint.forced()
            token = model.draw(constraint, remaining)
            constraint.accept(token)
            came.append(token)
            if constraint.finished:
                break
        assert constraint.complete
        tokens.append(came)
    assert tokens[0] == tokens[1]


# --- what is guessed, and when ---

Cost = Callable[[int], float]
PROMPT: list[Unit] = [1, 2, 3, Shown(b"a", 576), 4, 5, 6, 7, 8]
CURVES: dict[str, Cost] = {
    "8B on two cores": lambda n: float(np.interp(n, [1, 4, 8, 17], [137, 190, 380, 800])),
    "rows are free": lambda n: 10 + 0.1 * n,
    "every row costs the same": lambda n: 10 * n,
}


def request(prompt: Sequence[Unit], constraint: Constraint | None = None) -> Request:
    return Request(prompt, (), Options(speculate=True), constraint, 0.0, 0.0)


def begun(prompt: Sequence[Unit] = PROMPT, guesser: Guesser | None = None) -> Guesses:
    """Guesses where rows are cheap and guesses were right up to now."""
    guesser = guesser or Guesser()
    for n in range(1, MAX_GUESSED + 2):
        guesser.measure(n, CURVES["rows are free"](n))
    guesses = guesser.begin(prompt, request(prompt))
    guesses._kind.chances._right = guesses._kind.chances._all = [1000.0] * 9
    return guesses


def play(
    guesser: Guesser,
    cost: Cost,
    length: int,
    write: Callable[[Guesses, int], int],
    constraint: Constraint | None = None,
    noise: float = 0.0,
) -> tuple[float, float]:
    """An answer that is written, token by token. Returns what it costs, and what without guesses."""
    chance = random.Random(1)
    guesses, tokens, ahead = guesser.begin(PROMPT, request(PROMPT, constraint)), list[int](), list[int]()
    spent = 0.0
    while len(tokens) < length:
        tokens.append(ahead.pop(0) if ahead else write(guesses, len(tokens)))
        if constraint is not None:
            constraint.accept(tokens[-1])
        guessed = guesses.next(tokens, length - len(tokens))
        spent += cost(1 + len(guessed))
        guesser.measure(1 + len(guessed), cost(1 + len(guessed)) * chance.lognormvariate(0, noise))
        for token in guessed:
            ahead.append(write(guesses, len(tokens)))
            if ahead[-1] != token or len(tokens) == length:
                break
            tokens.append(ahead.pop())
            if constraint is not None:
                constraint.accept(token)
    guesses.finish(tokens)
    return spent, length * cost(1)


def test_the_longest_match_counts_and_of_those_the_newest() -> None:
    assert begun([1, 2, 3, 10, 9, 2, 3, 20, 9, 9]).next([1, 2, 3], 1) == [10]
    assert begun([1, 2, 3, 10, 9, 2, 3, 20, 9, 9]).next([7, 2, 3], 1) == [20]
    assert begun([1, 2, 3, 10, 1, 2, 3, 30, 9, 9]).next([1, 2, 3], 9) == [30, 9, 9, 1, 2, 3, 30, 9, 9]
    assert begun([1, 2, 3]).next([5, 6], 9) == []
    assert begun([1, 2]).next([7, 8, 7, 8, 7], 6) == [8, 7, 8, 7, 8, 7], "what repeats itself goes on"
    assert begun([1, 2]).next([7, 8, 7, 8, 7], 0) == []


def test_pictures_match_nothing() -> None:
    same = Shown(b"a", 576)
    assert begun([1, same, 2, 3, 4, 1, same]).next([2], 4) == []
    assert begun([1, 5, 2, 3, 4, 1, 5]).next([2], 1) == [3]
    assert begun([1, 2, 3, same, 4]).next([1, 2], 4) == [3], "and end a guess"


def test_earlier_answers_come_again() -> None:
    guesser = Guesser()
    first = begun([1, 2, 3, 4], guesser)
    first.next([50], 8)
    first.finish([50, 51, 52])
    second = guesser.begin([9, 3, 4], request([9, 3, 4]))
    assert second.next([50], 8) == [51, 52]
    assert begun([9, 3, 4]).next([50], 8) == [], "of the same engine"


def test_what_is_kept_is_bounded(tiny: Vocabulary) -> None:
    guesser = Guesser()
    for i in range(100):
        begun(PROMPT, guesser).finish(range(1000 * (i % 3), 1000 * (i % 3) + 900))
    assert all(len(kind.earlier.tokens) <= 4096 for kind in guesser._kinds.values())
    for i in range(20):
        constraint = Constraint(compile_schema({"type": "integer", "maximum": i}), tiny)
        guesser.begin(PROMPT, request(PROMPT, constraint))
    assert len(guesser._kinds) <= 8


def contrary(chance: random.Random, n_words: int) -> Callable[[Guesses, int], int]:
    """What is never what was guessed, or would have been, though all of it came before."""

    def write(guesses: Guesses, n: int) -> int:
        expected = {guess.tokens[0] for guess in guesses._last if guess.tokens}
        return chance.choice([word for word in range(n_words) if word not in expected])

    return write


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("n_words", [3, 6, 20])
def test_losses_are_bounded(curve: str, n_words: int) -> None:
    for noise, bound in ((0.0, 1.03), (0.3, 1.05)):
        guesser, chance = Guesser(), random.Random(n_words)
        spent, plain = play(guesser, CURVES[curve], 100, contrary(chance, n_words), noise=noise)
        assert spent <= bound * plain
        rest = [play(guesser, CURVES[curve], 100, contrary(chance, n_words), noise=noise) for _ in range(9)]
        assert spent + sum(s for s, _ in rest) <= 1.02 * 10 * plain, "and nothing is learned anew for each answer"


def test_structured_answers_win(tiny: Vocabulary) -> None:
    schema, chance = compile_schema(RECEIPT), random.Random(0)
    totals = dict.fromkeys(CURVES, (0.0, 0.0))
    for curve, cost in CURVES.items():
        guesser = Guesser()
        for _ in range(8):
            items = [{"name": chance.choice("abcdefgh") * 5, "price": chance.randint(1, 999) / 100} for _ in range(3)]
            text = json.dumps({"store": chance.choice("ABCDEF") * 8, "items": items})
            tokens = tiny.greedy(text.encode())
            constraint = Constraint(schema, tiny)
            spent, plain = play(guesser, cost, len(tokens), lambda _, n, t=tokens: t[n], constraint, noise=0.2)  # type: ignore[misc]
            totals[curve] = totals[curve][0] + spent, totals[curve][1] + plain
    gains = {curve: plain / spent for curve, (spent, plain) in totals.items()}
    assert gains["8B on two cores"] > 1.5 and gains["rows are free"] > 2.5
    assert gains["every row costs the same"] > 0.97


def test_a_slow_moment_is_forgotten() -> None:
    guesser, text = Guesser(), [10, 11, 12, 13, 14] * 200
    slow = {2: 500.0, 3: 500.0, 4: 500.0}
    guesser.measure(1, 10)
    for n, seconds in slow.items():
        guesser.measure(n, seconds)
    spent, plain = play(guesser, CURVES["rows are free"], len(text), lambda _, n: text[n])
    assert plain / spent > 3


def test_guessing_costs_little_at_8000_tokens() -> None:
    chance = random.Random(0)
    prompt = [chance.randrange(2000) for _ in range(8000)]
    best = 1.0
    for _ in range(5):
        guesses, answer = begun(prompt), list[int]()
        answer.append(1)
        guesses.next(answer, 16)
        started = time.thread_time()
        for token in prompt[4000:4300]:
            answer.append(token)
            guesses.next(answer, 16)
        best = min(best, (time.thread_time() - started) / 300)
    assert best < 1e-4
