"""Reading pickles of numpy arrays without running them.

Python's own unpickler calls what a file names. This one is a small machine for the few operations that arrays,
numbers, texts and plain containers need: a name imported by the file is compared with a list, everything on the list
has a stand-in here, and any other is refused by its name before it is looked up. Nothing is imported or called, numpy's
reconstructors included, and no array takes more memory than its bytes in the file.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Final

import numpy as np

from maskformer_fast.interop.names import ConvertError

_KINDS = frozenset("fiub")
_MAX_ITEM = 8


class _Mark:
    """Where the operations that take "all since the mark" stop."""


_MARK: Final = _Mark()


@dataclass
class _Dtype:
    """Stand-in for ``numpy.dtype`` while its byte order is yet to come."""

    code: str
    order: str = "="

    def build(self, state: Any) -> None:
        """Take the state that numpy pickles: version, byte order, then fields that plain numbers do not have."""
        plain = isinstance(state, tuple) and len(state) >= 5 and state[2:5] == (None, None, None)
        if not plain or state[1] not in ("<", ">", "=", "|"):
            raise ConvertError(f"numpy.dtype: expected a plain number, got {_short(state)}")
        self.order = state[1]

    def resolve(self) -> np.dtype[Any]:
        dtype = np.dtype(self.code)
        return dtype if self.order in "=|" else dtype.newbyteorder(self.order)  # type: ignore[arg-type]


@dataclass
class _Array:
    """Stand-in for an array whose contents are yet to come."""

    value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        """Take the state that numpy pickles: version, shape, dtype, Fortran order, bytes."""
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise ConvertError(f"numpy.ndarray: expected the state of an array, got {_short(state)}")
        shape, dtype, fortran, data = state[-4:]
        self.value = _array(data, dtype, shape, "F" if fortran is True or fortran == 1 else "C")


class _Ndarray:
    """Stand-in for the class ``numpy.ndarray``, which pickles name and pass on."""


class _Dict(dict[Any, Any]):
    """Stand-in for ``collections.OrderedDict``."""

    def build(self, state: Any) -> None:
        """Leave out the attributes: torch keeps version numbers there."""


def load(stream: IO[bytes]) -> Any:
    """The object that a pickle describes: containers, numbers, texts, bytes and numpy arrays of numbers.

    Args:
        stream: binary file, at the start of the pickle; whatever follows the pickle is not read.

    Raises:
        ConvertError: the pickle names anything but numpy's arrays, dtypes and numbers and ``collections.OrderedDict``
            (the message says what), holds an array of objects, is damaged, or is no pickle.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in the texts of damaged files
            return _settle(_Machine().run(stream))
    except ConvertError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, MemoryError, OverflowError) as error:
        # UnicodeDecodeError is a ValueError; all of them come from a stream that is no pickle, or half of one.
        raise ConvertError(f"not a readable pickle: {_short(error)}") from error


class _Machine:
    """The stack, the memo, and one method for each group of operations."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: IO[bytes]) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _LITERALS:
                self.stack.append(argument)
            elif name in _NEW:
                self.stack.append(_NEW[name]())
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise ConvertError(f"refused: the pickle's operation {name}, which arrays in plain containers do "
                                   "not need")
        raise ValueError("the pickle ends before it stops")

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("a reference to something that was never kept")
        self.stack.append(self.memo[index])

    def pop(self, _: object) -> None:
        self.stack.pop()

    def pop_mark(self, _: object) -> None:
        self.pop_to_mark()

    def make_list(self, _: object) -> None:
        self.stack.append(self.pop_to_mark())

    def make_dict(self, _: object) -> None:
        items = self.pop_to_mark()
        self.stack.append({})
        self.set_items(items)

    def make_tuple(self, _: object) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def make_short_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("the stack is too short for a tuple")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, _: object) -> None:
        self.extend([self.stack.pop()])

    def appends(self, _: object) -> None:
        self.extend(self.pop_to_mark())

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("items for something that is no list")
        self.stack[-1].extend(items)

    def set_item(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def set_items_to_mark(self, _: object) -> None:
        self.set_items(self.pop_to_mark())

    def set_items(self, items: list[Any]) -> None:
        """Keys are texts and numbers: hashing a deep tuple could exhaust the interpreter's own stack."""
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("items for something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, bytes, int, float)):
                raise ConvertError(f"expected texts and numbers as keys of dictionaries, got {type(key).__name__}")
            target[key] = value

    def global_name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_find(module, name))

    def stack_global(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_find(module, name))

    def reduce(self, _: object) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Function) or not isinstance(arguments, tuple):
            raise ConvertError(f"refused: a call of {_short(function)}")
        self.stack.append(function.call(*arguments))

    def build(self, _: object) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, (_Array, _Dtype, _Dict)):
            raise ConvertError(f"refused: a state for an object of type {type(target).__name__}")
        target.build(state)


@dataclass(frozen=True)
class _Function:
    """Stand-in for a function that pickles of arrays name."""

    call: Callable[..., Any]


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _Ndarray:
        raise ConvertError(f"refused: an array of the class {_short(kind)}")
    return _Array()


def _dtype(code: Any, align: Any = False, copy: Any = False) -> _Dtype:
    text = code.decode("latin-1") if isinstance(code, bytes) else code
    if isinstance(text, str) and text.startswith(("O", "|O", "object")):
        raise ConvertError("refused: an array of Python objects (numpy dtype 'O')")
    kind, size = (text[:1], text[1:]) if isinstance(text, str) else ("", "")
    if kind not in _KINDS or not size.isdecimal() or not 1 <= int(size[:4]) <= _MAX_ITEM:
        raise ConvertError(f"refused: an array of the type {_short(code)}, expected one of numbers")
    return _Dtype(text)


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C")[()]


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _Array(_array(data, dtype, shape, order))


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """A view of the bytes, if there are exactly as many as the shape needs."""
    if isinstance(data, list):
        raise ConvertError("refused: an array of Python objects")
    raw = data.encode("latin-1") if isinstance(data, str) else data  # Python 2 wrote texts
    if not isinstance(raw, (bytes, bytearray)) or not isinstance(dtype, _Dtype) or order not in ("C", "F"):
        raise ConvertError(f"numpy.ndarray: expected bytes, a dtype and an order, "
                           f"got {type(data).__name__}, {_short(dtype)}, {_short(order)}")
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape) or len(shape) > 32:
        raise ConvertError("numpy.ndarray: expected a shape, got something else")
    resolved = dtype.resolve()
    needed = resolved.itemsize
    for side in shape:
        needed *= side
    if needed != len(raw):
        raise ConvertError(f"numpy.ndarray: expected {needed} bytes for shape {shape}, got {len(raw)}")
    return np.frombuffer(raw, resolved).reshape(shape, order=order)


def _encode(text: Any, encoding: Any) -> bytes:
    """Bytes, as pickles of protocol 2 and less hold them."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ConvertError(f"refused: _codecs.encode to {_short(encoding)}")
    return text.encode("latin-1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Function(_dtype),
    ("_codecs", "encode"): _Function(_encode),
    ("collections", "OrderedDict"): _Function(_Dict),
    **{
        (f"numpy.{core}.{module}", name): _Function(function)
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Names of modules in pickles of protocol 2 and less."""


def _find(module: Any, name: Any) -> Any:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("an import whose name is no text")
    if (module, name) not in _STAND_INS:
        wanted = f"{_PYTHON_2.get(module, module)}.{name}"[:200]
        raise ConvertError(f"refused: the pickle imports {wanted}, expected numpy arrays in plain containers alone; "
                           "nothing of it was run")
    return _STAND_INS[module, name]


def _settle(found: Any) -> Any:
    """Put arrays in the place of their stand-ins, in dictionaries and lists of any depth (tuples keep them)."""
    waiting, seen = [[found]], set[int]()
    root = waiting[0]
    while waiting:
        container: Any = waiting.pop()
        if id(container) in seen:
            continue
        seen.add(id(container))
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, _Array):
                if value.value is None:
                    raise ConvertError("numpy.ndarray: expected contents, got none")
                container[key] = value.value
            elif isinstance(value, (dict, list)):
                waiting.append(value)  # type: ignore[arg-type]
    return root[0]


def _short(value: object) -> str:
    """A few words on a value of the file, whose own text could be endless."""
    if isinstance(value, (str, bytes)):
        return repr(value[:200])
    if isinstance(value, Exception):
        return str(value)[:200] or type(value).__name__
    if isinstance(value, _Dtype):
        return f"dtype {value.code}"
    plain = value is None or isinstance(value, (bool, float))
    return repr(value) if plain else f"an object of type {type(value).__name__}"


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_NEW: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "LIST": _Machine.make_list,
    "DICT": _Machine.make_dict,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": lambda machine, _: machine.make_short_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_short_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_short_tuple(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items_to_mark,
    "GLOBAL": _Machine.global_name,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
}
