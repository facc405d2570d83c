"""Reads the pickle inside a PyTorch file without running anything: an own interpreter of the few opcodes torch writes.

Knows opcodes, and the globals of torch that make a dictionary of tensors; a global outside that table ends the reading.
Nothing is imported or called by a name from the file, so there is nothing that a file could run. Does not know where
the numbers of a tensor are (`pickle_file`).

Opcodes: `pickletools` of the standard library, which takes them apart but carries out none. What torch writes:
https://github.com/pytorch/pytorch/blob/main/torch/_utils.py and torch/serialization.py there.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

MAX_OPCODES = 1_000_000
"""Opcodes of a file: a tensor takes about 50. They bound the stack, the memo and the time, about two seconds."""

_MAX_DIMENSIONS = 16

_Values: TypeAlias = list[Any]


class PickleError(ValueError):
    """A pickle that is damaged, or holds more than tensors. The message has the reason alone."""


@dataclass(frozen=True)
class Storage:
    """The numbers of one or several tensors: an entry of the file."""

    dtype: str | None
    """As safetensors names it; None for bytes, of which only a tensor knows the dtype."""
    key: str
    """The entry's name."""
    count: int
    """Values; bytes where the dtype is None."""


@dataclass(frozen=True)
class StorageView:
    """A tensor: a view of a storage. Offset, sizes and strides count values and are as the file has them, unchecked."""

    storage: Storage
    dtype: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """Something that a pickle may name: a function with `call`, a dtype or a storage's type with `dtype`."""

    name: str
    call: Callable[[tuple[Any, ...]], Any] | None = None
    dtype: str | None = None


def read_tensors(data: bytes) -> Any:
    """What a pickle holds: dict, list, tuple, str, int, ... and `StorageView` for tensors.

    Of dictionaries only the entries with a text as key are kept.

    Raises:
        PickleError: It is damaged, too long, names a global that is not accepted, or does what torch does not.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count == MAX_OPCODES:
                raise PickleError(f"has more than {MAX_OPCODES} opcodes")
            step = _STEPS.get(opcode.name)
            if step is None:
                what = f"{opcode.name} {argument!a:.80}" if isinstance(argument, str) else opcode.name
                raise PickleError(f"uses the opcode {what}, which PyTorch does not write for tensors; nothing was run")
            step(machine, argument)
        return machine.only_value()
    except PickleError:
        raise
    except (IndexError, KeyError) as e:
        raise PickleError("is damaged: a value is missing") from e
    except ValueError as e:
        raise PickleError(f"is damaged: {ascii(str(e))[1:-1]:.120}") from e


class _Machine:
    """The state of an interpreter: a stack, which marks cut into levels, and a memo."""

    def __init__(self) -> None:
        self.stack: _Values = []
        self.below: list[_Values] = []
        """The levels below the last mark."""
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def to_mark(self) -> _Values:
        """Takes all that was pushed since the last mark."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def take(self, count: int) -> _Values:
        """Takes the last values."""
        if len(self.stack) < count:
            raise IndexError
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def only_value(self) -> Any:
        (value,) = self.take(1)
        if self.stack or self.below:
            raise PickleError("is damaged: it holds more than one value")
        return value

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def extend(self, values: _Values) -> None:
        if not isinstance(self.stack[-1], list):
            raise PickleError("is damaged: it appends to what is no list")
        self.stack[-1].extend(values)

    def set_items(self, values: _Values) -> None:
        if not isinstance(self.stack[-1], dict) or len(values) % 2:
            raise PickleError("is damaged: it sets items of what is no dictionary")
        # Hashes of texts are random in each process. Those of numbers and tuples are not, and could be made to cost.
        self.stack[-1].update((k, v) for k, v in zip(values[::2], values[1::2], strict=True) if isinstance(k, str))

    def find(self, module: Any, name: Any) -> None:
        known = _GLOBALS.get(f"{module}.{name}") if isinstance(module, str) and isinstance(name, str) else None
        if known is None:
            what = ascii(f"{module}.{name}")[1:-1] if isinstance(module, str) and isinstance(name, str) else "a value"
            raise PickleError(f"asks for {what:.100}; only tensors in dictionaries are accepted, and nothing was run")
        self.push(known)

    def reduce(self, _: Any) -> None:
        function, arguments = self.take(2)
        if not isinstance(function, _Global) or not function.call or not isinstance(arguments, tuple):
            raise PickleError("calls what is no function of torch; nothing was run")
        self.push(function.call(arguments))

    def build(self, _: Any) -> None:
        """Gives an object attributes. Those of dictionaries (`_metadata` of state dicts) are of no use here."""
        target, _attributes = self.take(2)
        if not isinstance(target, dict):
            raise PickleError("sets the state of an object that is no dictionary; nothing was run")
        self.push(target)

    def storage(self, _: Any) -> None:
        """A persistent id: (`"storage"`, type, key, device, number of values)."""
        (identity,) = self.take(1)
        match identity:
            case ("storage", _Global(name=name, dtype=dtype), str(key), str(), int(count)) if name in _STORAGES:
                self.push(Storage(dtype, key, count))
            case _:
                raise PickleError("is damaged: a storage is not described as PyTorch does it")


def _view(arguments: tuple[Any, ...]) -> StorageView:
    """`_rebuild_tensor_v2(storage, offset, sizes, strides, requires_grad, hooks, metadata)`, the last ones optional."""
    match arguments:
        case (Storage() as storage, int(offset), tuple(sizes), tuple(strides), *rest) if storage.dtype:
            _check_view(sizes, strides, rest[2:])
            return StorageView(storage, storage.dtype, offset, sizes, strides)
    raise PickleError("is damaged: a tensor is not described as PyTorch does it")


def _view_with_dtype(arguments: tuple[Any, ...]) -> StorageView:
    """`_rebuild_tensor_v3(storage, offset, sizes, strides, requires_grad, hooks, dtype, metadata)`."""
    match arguments:
        case (Storage(dtype=None) as storage, int(offset), tuple(sizes), tuple(strides), _, _, dtype, *rest):
            if isinstance(dtype, _Global) and dtype.dtype and dtype.name in _DTYPES:
                _check_view(sizes, strides, rest)
                return StorageView(storage, dtype.dtype, offset, sizes, strides)
    raise PickleError("is damaged: a tensor is not described as PyTorch does it")


def _check_view(sizes: tuple[Any, ...], strides: tuple[Any, ...], metadata: _Values) -> None:
    if len(sizes) != len(strides) or len(sizes) > _MAX_DIMENSIONS or any(type(n) is not int for n in sizes + strides):
        raise PickleError("is damaged: the sizes and strides of a tensor are not those of one")
    if any(metadata):
        raise PickleError("holds a tensor whose values are negated or conjugated when read, which is not supported")


def _parameter(arguments: tuple[Any, ...]) -> StorageView:
    """`_rebuild_parameter(tensor, requires_grad, hooks)`, in later versions also with attributes."""
    match arguments:
        case (StorageView() as view, _, _) | (StorageView() as view, _, _, _):
            return view
    raise PickleError("is damaged: a parameter is not described as PyTorch does it")


def _with_attributes(arguments: tuple[Any, ...]) -> Any:
    """`_rebuild_from_type_v2(function, type, arguments, attributes)`: a tensor with attributes, which are left out."""
    match arguments:
        case (_Global(name=name), _Global(), tuple(inner), _) if name in _VIEWS:
            return _VIEWS[name](inner)
    raise PickleError("is damaged: a tensor with attributes is not described as PyTorch does it")


def _dictionary(arguments: tuple[Any, ...]) -> dict[str, Any]:
    if arguments:
        raise PickleError("is damaged: an OrderedDict has arguments")
    return {}


_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint64": "U64",
    "torch.uint32": "U32",
    "torch.uint16": "U16",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
_STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.storage.UntypedStorage": None,
}
_VIEWS: Mapping[str, Callable[[tuple[Any, ...]], StorageView]] = {
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view_with_dtype,
}
_CALLS: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    **_VIEWS,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.Size": tuple,
    "collections.OrderedDict": _dictionary,
}
_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_GLOBALS: Mapping[str, _Global] = {
    **{name: _Global(name) for name in _TYPES},
    **{name: _Global(name, call) for name, call in _CALLS.items()},
    **{name: _Global(name, dtype=dtype) for name, dtype in {**_DTYPES, **_STORAGES}.items()},
}

_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.to_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.take(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.take(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.take(3))),
    "APPEND": lambda machine, _: machine.extend(machine.take(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.to_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.take(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.to_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": _Machine.memoize,
    "GLOBAL": lambda machine, names: machine.find(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.find(*machine.take(2)),
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
"""What each opcode does; an opcode that is not here ends the reading. https://docs.python.org/3/library/pickletools.html"""
