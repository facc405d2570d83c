"""Odd texts and chat templates, which every kind of file may hold."""

from __future__ import annotations

import random

TEXTS: tuple[str | bytes, ...] = (
    "",
    " ",
    "x",
    "%s%n%x",
    "{0.__class__}",
    "a\nb",
    "\x1b[31m",
    "a\0b",
    "\ufeff",
    "\u202e",
    "\u2581",
    "\U0001f600",
    "\u0130" * 40,
    "e\u0301" * 400,
    "A" * 300,
    "A" * 70_000,
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"half \xf0\x9f\x98",
    "../../etc/passwd",
    "<0x41>",
    "<0xZZ>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "<|eot_id|>",
    "[PAD600]",
    "0",
    "-1",
    "nan",
    "true",
    "null",
    "llama",
    "clip",
    "gpt2",
    "bert",
    "mlp",
    "pad",
    "crop",
    "resize",
    "linear",
    "yarn",
    "longrope",
    "default",
    "llama-bpe",
    "model",
    "Phi-3",
    "prepend",
    "never",
)
"""UTF-8 where it is bytes, and that wrong."""

TEMPLATES = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ 9**9**9**9 }}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{{ messages[99].content }}",
    "{{ undefined.x.y }}",
    "{{ raise_exception('no,\nnot so') }}",
    "{{ raise_exception(messages) }}",
    "{{ 1 / 0 }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "{{ lipsum(n=10**7) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ messages | map(attribute='content') | list | tojson }}",
    "{{ strftime_now('%Y' * 99999) }}",
    "{{ bos_token }}{{ eos_token }}{{ bos_token }}",
    "<image>" * 9,
    "{% generation %}{% endgeneration %}",
    "{% break %}",
    "{% raw %}",
    "{{ '\\x00' }}",
    "{{ '\\ud800' }}",
    "{#",
    "{{",
    "{% if",
    "{{ " + "(" * 5000,
    "{{ " + "not " * 5000 + "x }}",
    "{% if x %}" * 3000,
    "\u2028\x85\x0c",
    "x" * 70_000,
)


def odd_text(rng: random.Random, old: str | bytes = "") -> str | bytes:
    """A text out of the way, or the old one with a small change."""
    if not old or rng.random() < 0.6:
        return rng.choice(TEXTS)
    if isinstance(old, bytes):
        return old + b"\x80"
    at = rng.randrange(len(old) + 1)
    new = rng.choice(("", "\0", "\n", "x", " ", "\u0301", "\ufffd", old[at : at + 3].upper()))
    match rng.randrange(4):
        case 0:
            return old[:at]
        case 1:
            return old[:at] + old[at + 1 :]
        case 2:
            return old[:at] + new + old[at:]
        case _:
            return old[:at] + new + old[at + 1 :]


def odd_template(rng: random.Random, old: object) -> str | bytes:
    """A chat template with something hostile or broken in it, in place of a tag, between two, or alone."""
    new = rng.choice(TEMPLATES)
    if not isinstance(old, str) or rng.random() < 0.2:
        return new
    if rng.random() < 0.3:
        return odd_text(rng, old)
    starts = [i for i in range(len(old)) if old[i : i + 2] in ("{{", "{%")] or [0]
    at = rng.choice(starts)
    end = next((i + 2 for i in range(at, len(old)) if old[i : i + 2] in ("}}", "%}")), at)
    return old[:at] + new + old[end if rng.random() < 0.5 else at :]
