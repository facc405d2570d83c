"""Values side by side for numba: `WIDTH` float32, int32 or bools that are one value in a compiled function.

Knows LLVM's vectors and nothing of quantization. An operation is done for every lane, each the same IEEE operation that
C does on one value: none is fused with another, reordered or done in double precision. Written as vectors, sums stay in
registers, which LLVM's own vectorizer does not manage with loops over lanes; and they compile three times as fast.

`numba.extending` is where numba is told about types: https://numba.readthedocs.io/en/stable/extending/index.html.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

WIDTH = 16
"""Lanes: two registers of AVX2, whose work overlaps, or one of AVX-512."""


class _Vector(types.Type):  # type: ignore[misc]
    """The type of a vector in numba, by the name of its lanes."""

    def __init__(self, lane: str) -> None:
        super().__init__(f"{lane} x {WIDTH}")


FLOATS, INTS, BOOLS = _Vector("float32"), _Vector("int32"), _Vector("bool")

_I64, _I32, _I8 = ir.IntType(64), ir.IntType(32), ir.IntType(8)
_LLVM = {
    FLOATS: ir.VectorType(ir.FloatType(), WIDTH),
    INTS: ir.VectorType(_I32, WIDTH),
    BOOLS: ir.VectorType(ir.IntType(1), WIDTH),
}
_OF = {types.float32: FLOATS, types.int32: INTS, types.boolean: BOOLS}

Floats: TypeAlias = Any
Ints: TypeAlias = Any
Bools: TypeAlias = Any
"""What vectors are to a type checker, which does not see what numba makes of a function."""

Emit = Callable[..., Any]
"""Emits an operation: from a builder and LLVM values to an LLVM value."""


@register_model(_Vector)
class _Model(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, fe_type: _Vector) -> None:
        super().__init__(manager, fe_type, _LLVM[fe_type])


def _lane(index: int) -> Any:
    return ir.Constant(_I32, index)


def _splat(builder: Any, vector: _Vector, value: Any) -> Any:
    """A vector of equal lanes. Integers are cut to 32 bits."""
    if value.type == _I64:
        value = builder.trunc(value, _I32)
    undefined = ir.Constant(_LLVM[vector], ir.Undefined)
    first = builder.insert_element(undefined, value, _lane(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_LLVM[INTS], [0] * WIDTH))


# Operators. A number beside a vector means a vector of that number.


def _operators(table: dict[Any, dict[_Vector, Emit]], result: Callable[[_Vector], _Vector]) -> None:
    for function, kinds in table.items():
        cases = []
        for vector, emit in kinds.items():
            scalar = {FLOATS: types.float32, INTS: types.int64}.get(vector, vector)
            for pair in {(vector, vector), (vector, scalar), (scalar, vector)}:
                cases.append(signature(result(vector), *pair))
                lower_builtin(function, *pair)(_lowered(vector, emit))
        infer_global(function)(type(f"_{function.__name__}", (ConcreteTemplate,), {"cases": cases}))


def _lowered(vector: _Vector, emit: Emit) -> Emit:
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pairs = zip(sig.args, args, strict=True)
        return emit(builder, *(value if kind == vector else _splat(builder, vector, value) for kind, value in pairs))

    return lower


def _comparison(symbol: str) -> dict[_Vector, Emit]:
    floats = ir.IRBuilder.fcmp_unordered if symbol == "!=" else ir.IRBuilder.fcmp_ordered
    return {
        FLOATS: lambda builder, a, b: floats(builder, symbol, a, b),
        INTS: lambda builder, a, b: builder.icmp_signed(symbol, a, b),
    }


_B = ir.IRBuilder
_ADD: dict[_Vector, Emit] = {FLOATS: _B.fadd, INTS: _B.add}
_AND: dict[_Vector, Emit] = {INTS: _B.and_, BOOLS: _B.and_}
_OR: dict[_Vector, Emit] = {INTS: _B.or_, BOOLS: _B.or_}
_operators(
    {
        operator.add: _ADD,
        operator.iadd: _ADD,
        operator.sub: {FLOATS: _B.fsub, INTS: _B.sub},
        operator.mul: {FLOATS: _B.fmul},
        operator.truediv: {FLOATS: _B.fdiv},
        operator.and_: _AND,
        operator.iand: _AND,
        operator.or_: _OR,
        operator.ior: _OR,
        operator.xor: {INTS: _B.xor, BOOLS: _B.xor},
        operator.lshift: {INTS: _B.shl},
        operator.rshift: {INTS: _B.lshr},  # zeros come in from above
    },
    lambda vector: vector,
)
_operators(
    {
        operator.lt: _comparison("<"),
        operator.le: _comparison("<="),
        operator.gt: _comparison(">"),
        operator.ge: _comparison(">="),
        operator.eq: _comparison("=="),
        operator.ne: _comparison("!="),
    },
    lambda _: BOOLS,
)


def function(typed: Callable[..., Any]) -> Any:
    """A function in compiled code, from one that gives the signature and what emits it, for types of arguments."""
    return intrinsic(typed)


# Functions of vectors.


@function
def all_lanes(_: Any, value: Any) -> Any:
    """A vector whose lanes all are a float32, int32 or bool."""
    vector = _OF[types.unliteral(value)]
    return vector(value), lambda context, builder, sig, args: _splat(builder, vector, args[0])


@function
def as_ints(_: Any, value: Any) -> Any:
    """The bits of floats."""
    return INTS(FLOATS), lambda context, builder, sig, args: builder.bitcast(args[0], _LLVM[INTS])


@function
def as_floats(_: Any, value: Any) -> Any:
    """The floats of bits."""
    return FLOATS(INTS), lambda context, builder, sig, args: builder.bitcast(args[0], _LLVM[FLOATS])


@function
def to_floats(_: Any, value: Any) -> Any:
    """Ints as floats, rounded to nearest."""
    return FLOATS(INTS), lambda context, builder, sig, args: builder.sitofp(args[0], _LLVM[FLOATS])


@function
def to_ints(_: Any, value: Any) -> Any:
    """Floats as ints, rounded towards zero; of those that fit into none, what the processor makes of them."""
    return INTS(FLOATS), lambda context, builder, sig, args: builder.fptosi(args[0], _LLVM[INTS])


@function
def select(_: Any, condition: Any, yes: Any, no: Any) -> Any:
    """Of each lane the second or the third."""
    return yes(BOOLS, yes, yes), lambda context, builder, sig, args: builder.select(*args)


@function
def some(_: Any, condition: Any) -> Any:
    """Whether any lane is true."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = ir.IntType(WIDTH)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), ir.Constant(bits, 0))

    return types.boolean(BOOLS), emit


@function
def sqrt(_: Any, value: Any) -> Any:
    """Square roots, correctly rounded."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(_LLVM[FLOATS], [_LLVM[FLOATS]])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.sqrt.v{WIDTH}f32"), args)

    return FLOATS(FLOATS), emit


# Memory. Nothing checks bounds.


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return context.make_array(kind)(context, builder, array).data


def _vector_pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    first = builder.mul(index, ir.Constant(_I64, WIDTH))
    pointer = builder.gep(_data(context, builder, kind, array), [first])
    return builder.bitcast(pointer, _LLVM[_OF[kind.dtype]].as_pointer())


@function
def load(_: Any, array: Any, index: Any) -> Any:
    """The vector at `array[index * WIDTH]`; of an array of float32 or int32."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = builder.load(_vector_pointer(context, builder, sig.args[0], *args))
        vector.align = 4
        return vector

    return _OF[array.dtype](array, types.intp), emit


@function
def store(_: Any, array: Any, index: Any, vector: Any) -> Any:
    """Puts a vector where `load` finds it."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], _vector_pointer(context, builder, sig.args[0], *args[:2])).align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, _OF[array.dtype]), emit


def _places(context: Any, builder: Any, sig: Any, args: Any) -> list[Any]:
    """Pointers to `array[places[lane] + index]`."""
    start = builder.gep(_data(context, builder, sig.args[0], args[0]), [args[2]])
    places = _data(context, builder, sig.args[1], args[1])
    return [builder.gep(start, [builder.load(builder.gep(places, [_lane(lane)]))]) for lane in range(WIDTH)]


@function
def gather(_: Any, array: Any, places: Any, index: Any) -> Any:
    """Of each lane `array[places[lane] + index]`; of an array of float32 or int32. Places are int64."""
    kind = _OF[array.dtype]

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.Constant(_LLVM[kind], ir.Undefined)
        for lane, pointer in enumerate(_places(context, builder, sig, args)):
            vector = builder.insert_element(vector, builder.load(pointer), _lane(lane))
        return vector

    return kind(array, places, types.intp), emit


@function
def scatter(_: Any, array: Any, places: Any, index: Any, vector: Any) -> Any:
    """Puts lanes where `gather` finds them. In an array of uint8 goes the lowest byte of ints."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        for lane, pointer in enumerate(_places(context, builder, sig, args)):
            value = builder.extract_element(args[3], _lane(lane))
            builder.store(builder.trunc(value, _I8) if array.dtype == types.uint8 else value, pointer)
        return context.get_dummy_value()

    return types.void(array, places, types.intp, _OF.get(array.dtype, INTS)), emit
