"""Renders chat templates, which come from files that nobody has vouched for.

Knows Jinja. A template runs in jinja2's sandbox, and against a budget besides: loops, calls and output all draw on
it, so that no template can hang the process or fill its memory. Knows nothing of models or tokens.
"""

from __future__ import annotations

import functools
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.filters import FILTERS as DEFAULT_FILTERS
from jinja2.sandbox import ImmutableSandboxedEnvironment

from local_llava.errors import PromptError
from local_llava.types import MAX_CHAT_TEMPLATE

BUDGET = 20_000_000
"""Characters that a rendering may handle in all; a turn of a loop or a call counts as the template's own length."""

FILTERS = frozenset(
    {"trim", "upper", "lower", "capitalize", "title", "length", "count", "tojson", "join", "replace", "default", "d"}
    | {"first", "last", "list", "string", "int", "float", "items", "selectattr", "rejectattr", "select", "reject"}
    | {"map", "unique", "reverse", "sort", "min", "max", "abs", "round", "safe"}
)

GROWING = frozenset(DEFAULT_FILTERS[name] for name in ("replace", "join"))
"""Those whose result can be longer than what they are given."""

STRING_METHODS = frozenset(
    {"strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "startswith", "endswith", "upper", "lower", "title"}
    | {"capitalize", "find", "count", "replace", "removeprefix", "removesuffix", "isdigit", "isalpha", "isspace"}
)
"""Methods of strings that a template may call: replace, and those whose result is no longer than the string."""


_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
"""transformers' own tag around what a model says, for training; it prints its content."""


class _Limited(ImmutableSandboxedEnvironment):
    """One rendering's environment, with what is left of its budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%", "//"))

    def __init__(self, cost: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=self._finalize)
        self.left, self.cost = BUDGET, cost
        self.filters = {name: self._bounded(self.filters[name]) for name in FILTERS}
        self.filters["tojson"] = self._bounded(_tojson)
        # namespace and range are what chat templates use; range has its own limit in the sandbox.
        self.globals = {name: self.globals[name] for name in ("namespace", "range", "dict")}
        self.globals |= {
            "_turns": self._turns,
            "_joined": self._joined,
            "_made": self._made,
            "raise_exception": _refuse,
        }

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise PromptError("the model's chat template does more work than a chat template may")

    def weigh(self, *values: Any) -> None:
        """Spend the deep size of values: a list that holds another twice counts it twice, as printing it would."""
        pending = list(values)
        while pending:
            value = pending.pop()
            if isinstance(value, str):
                self.spend(len(value))
            elif isinstance(value, (list, tuple, dict)):
                self.spend(10 * len(value) + 10)  # slower to walk than characters are
                pending += [*value, *value.values()] if isinstance(value, dict) else value

    def _finalize(self, value: Any) -> Any:
        self.weigh(value)
        return value

    def _made(self, value: Any) -> Any:
        self.weigh(value)
        return value

    def _bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # which keeps the marks by which jinja passes its context to a filter
        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.left
            self.weigh(*args, *kwargs.values())
            # No filter allowed here gives more than each character of one argument replaced by another argument.
            self.spend(self.cost + (before - self.left) ** 2 // 4 if function in GROWING else self.cost)
            return function(*args, **kwargs)

        return call

    def _turns(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(self.cost)
            yield item

    def _joined(self, *parts: Any) -> str:
        self.weigh(*parts)
        return "".join(str(p) for p in parts)

    def wrap_str_format(self, value: Any) -> None:
        """Leave `format` what it is, a method that `call` refuses: jinja's safe one makes texts of any width."""

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.spend(self.cost)
        self.weigh(*args, *kwargs.values())
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            if name not in STRING_METHODS:
                raise PromptError(f"the model's chat template calls {name}() of a string, which is not allowed")
            grown = len(owner) * max((len(a) for a in args if isinstance(a, str)), default=0)
            self.spend(grown if name == "replace" else len(owner))
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator_name: str, left: Any, right: Any) -> Any:
        text = isinstance(left, (str, list, tuple)) or isinstance(right, (str, list, tuple))
        if operator_name in ("*", "**", "%") and (text or operator_name == "**"):
            raise PromptError(f"the model's chat template uses {operator_name} in a way that is not allowed")
        if text:
            self.weigh(left, right)
        elif isinstance(left, int) and isinstance(right, int) and max(abs(left), abs(right)) > 1 << 62:
            raise PromptError("the model's chat template computes with numbers beyond 64 bits")
        functions: Mapping[str, Callable[[Any, Any], Any]] = {
            "+": operator.add,
            "*": operator.mul,
            "%": operator.mod,
            "//": operator.floordiv,
        }
        return functions[operator_name](left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
            if tree.find(kind) is not None:
                raise PromptError("the model's chat template loads another template, which is not allowed")
        for loop in tree.find_all(nodes.For):
            loop.iter = _call("_turns", [cast(nodes.Expr, loop.iter)])
        _guard(tree)
        return tree


def _call(name: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), args, [], None, None)


def _guard(node: nodes.Node) -> None:
    """Pass what `a ~ b` and list, tuple and dict displays make through the budget; jinja has no hook for them."""
    for field, value in node.iter_fields():
        children = value if isinstance(value, list) else [value]
        for i, child in enumerate(children):
            if not isinstance(child, nodes.Node):
                continue
            _guard(child)
            if isinstance(child, nodes.Concat):
                call = _call("_joined", child.nodes)
            elif isinstance(child, (nodes.List, nodes.Dict)) or (
                isinstance(child, nodes.Tuple) and child.ctx == "load"
            ):
                call = _call("_made", [cast(nodes.Expr, child)])
            else:
                continue
            if isinstance(value, list):
                value[i] = call
            else:
                setattr(node, field, call)


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    # As transformers does it: jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=False, indent=None if indent is None else min(int(indent), 8))


def _refuse(message: object = "") -> None:
    raise PromptError(f"the model's chat template refuses this conversation: {' '.join(str(message).split())[:200]}")


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Render a chat template.

    Args:
        template: Jinja source, as transformers' `apply_chat_template` takes it.
        variables: What it may use: messages, bos_token, add_generation_prompt, ...

    Raises:
        PromptError: The template is malformed, does what the sandbox forbids, or refuses the conversation.
    """
    if len(template) > MAX_CHAT_TEMPLATE:
        raise PromptError(f"the model's chat template has {len(template)} characters; {MAX_CHAT_TEMPLATE} are accepted")
    template = _GENERATION.sub(lambda m: m[1] + ("endif" if m[2] else "if true") + m[3], template)
    env = _Limited(cost=len(template))
    parts: list[str] = []
    try:
        for part in env.from_string(template).generate(**variables):
            env.spend(len(part))
            parts.append(part)
    except PromptError:
        raise
    except jinja2.TemplateError as e:
        raise PromptError(f"the model's chat template cannot be rendered: {str(e).splitlines()[0][:200]}") from e
    # A template is a program: whatever it raises, the fault is the template's.
    except (Exception, RecursionError) as e:
        raise PromptError(f"the model's chat template fails: {type(e).__name__}: {str(e)[:200]}") from e
    text = "".join(parts)
    if any("\ud800" <= ch <= "\udfff" for ch in text):  # of an escape, or of bytes that were no UTF-8
        raise PromptError("the model's chat template writes what is not valid Unicode text")
    return text
