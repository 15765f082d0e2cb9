"""Reading pickles of NumPy arrays without running them.

`load` is the standard library's unpickler with three limits: a list of allowed operations, a list of allowed names,
each of which has an inert stand-in here, and a stream that never gives more bytes than it has. Nothing is imported or
called, NumPy's reconstructors included, and arrays take no more memory than the file.

The unpickler is the one written in Python (``pickle._Unpickler``, as joblib uses it), not its twin in C. The twin
cannot check the keys of dictionaries: it hashes a tuple of 200,000 levels by recursion (the operations TUPLE1 and
SETITEM), which ends the process (``test_a_deep_tuple_as_a_key_is_refused``). It also takes 64 GiB for one large index
of its memo (LONG_BINPUT, ``test_bombs_stay_small``).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from maskformer_fast.interop.names import ConvertError

_KINDS = frozenset("fiub")
"""NumPy's letters of the kinds of numbers that are read: floating point, integers and booleans."""
_MAX_ITEM_BYTES = 8

_ALLOWED = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK",
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
))  # fmt: skip
"""Operations that arrays, numbers, texts and plain containers need."""

_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Names of modules in pickles of protocol 2 and less -> their names in Python 3."""


@dataclass
class _Dtype:
    """Stand-in for ``numpy.dtype``; BUILD sets its byte order."""

    code: str
    order: str = "="

    def resolve(self) -> np.dtype[Any]:
        dtype = np.dtype(self.code)
        return dtype if self.order in "=|" else dtype.newbyteorder(self.order)  # type: ignore[arg-type]


@dataclass
class _Array:
    """Stand-in for an array; BUILD sets its contents."""

    value: np.ndarray | None = None


class _Dict(dict[Any, Any]):
    """Stand-in for ``collections.OrderedDict``."""


@dataclass(frozen=True)
class _Name:
    """Stand-in for an imported class or function."""

    name: str
    call: Callable[..., Any] | None = None
    """Computes what a call of the name gives; ``None`` where calls are refused."""


class _Stream:
    """A binary file that raises ``EOFError`` for more bytes than it has, before memory is taken for them."""

    def __init__(self, file: IO[bytes]) -> None:
        start = file.tell()
        self.bytes = file.seek(0, os.SEEK_END) - start
        self._left = self.bytes
        self._file = file
        file.seek(start)

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise EOFError("the pickle is cut off")
        self._left -= size
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline()
        self._left -= len(line)
        return line


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler; what it could import, call or overwrite is refused."""

    stack: list[Any]
    """Values since the last mark; the base class makes it."""

    def __init__(self, stream: _Stream) -> None:
        super().__init__(stream, encoding="latin-1")  # type: ignore[arg-type]  # it reads, and nothing else
        self._encodable = stream.bytes
        names = [
            _Name("numpy.ndarray"),
            _Name("numpy.dtype", _dtype),
            _Name("_codecs.encode", self._encode),
            _Name("collections.OrderedDict", _Dict),
        ]
        for core in ("numpy.core", "numpy._core"):
            names += [
                _Name(f"{core}.multiarray._reconstruct", _reconstruct),
                _Name(f"{core}.multiarray.scalar", lambda dtype, data: self._array(data, dtype, (), "C")[()]),
                _Name(f"{core}.numeric._frombuffer", lambda *arguments: _Array(self._array(*arguments))),
            ]
        self._names = {name.name: name for name in names}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of an imported name."""
        full_name = f"{_PYTHON_2.get(module, module)}.{name}"
        # A name with dots would be an attribute of the name before it.
        if full_name not in self._names or "." in name:
            raise ConvertError(f"refused: the pickle imports {full_name[:200]}, expected numpy arrays in plain "
                               "containers alone; nothing of it was run")
        return self._names[full_name]

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or function.call is None or not isinstance(arguments, tuple):
            raise ConvertError(f"refused: a call of {_short(function)}")
        self.stack.append(function.call(*arguments))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Array):
            # Version, shape, dtype, Fortran order, bytes; the oldest pickles have no version.
            if not isinstance(state, tuple) or len(state) not in (4, 5):
                raise ConvertError(f"numpy.ndarray: expected the state of an array, got {_short(state)}")
            shape, dtype, fortran, data = state[-4:]
            target.value = self._array(data, dtype, shape, "F" if fortran is True or fortran == 1 else "C")
        elif isinstance(target, _Dtype):
            # Version, byte order, then fields that numbers do not have.
            is_number = isinstance(state, tuple) and len(state) >= 5 and state[2:5] == (None, None, None)
            if not is_number or state[1] not in ("<", ">", "=", "|"):
                raise ConvertError(f"numpy.dtype: expected a plain number, got {_short(state)}")
            target.order = state[1]
        elif not isinstance(target, _Dict):  # its attributes are left out: torch keeps version numbers there
            raise ConvertError(f"refused: a state for an object of type {type(target).__name__}")

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])  # the stack since the mark
        super().load_dict()  # type: ignore[misc]  # as the others: missing from the types of the standard library

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()  # type: ignore[misc]

    def _encode(self, text: Any, encoding: Any) -> bytes:
        """Bytes from a text, which is the form of bytes in pickles of protocol 2 and less."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise ConvertError(f"refused: _codecs.encode to {_short(encoding)}")
        self._encodable -= len(text)
        if self._encodable < 0:
            raise ConvertError("refused: bytes that take more memory than the file, from the same text again and again")
        return text.encode("latin-1")

    def _array(self, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        """A view of the bytes, if there are exactly as many as the shape needs."""
        if isinstance(data, list):
            raise ConvertError("refused: an array of Python objects")
        raw = self._encode(data, "latin-1") if isinstance(data, str) else data  # Python 2 wrote texts
        if not isinstance(raw, bytes) or not isinstance(dtype, _Dtype) or order not in ("C", "F"):
            raise ConvertError(f"numpy.ndarray: expected bytes, a dtype and an order, "
                               f"got {type(data).__name__}, {_short(dtype)}, {_short(order)}")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
            raise ConvertError("numpy.ndarray: expected a shape, got something else")
        resolved = dtype.resolve()
        needed = resolved.itemsize
        for size in shape:
            needed *= size
        if needed != len(raw):
            raise ConvertError(f"numpy.ndarray: expected {needed} bytes for shape {shape}, got {len(raw)}")
        return np.frombuffer(raw, resolved).reshape(shape, order=order)


def _refuse(operation: str) -> Callable[[_Unpickler], None]:
    def refuse(unpickler: _Unpickler) -> None:
        raise ConvertError(f"refused: the pickle's operation {operation}, which arrays in plain containers do not need")

    return refuse


def _dispatch() -> dict[int, Callable[[Any], None]]:
    """Operation's byte -> method of `_Unpickler`."""
    methods: dict[int, Callable[[Any], None]] = {}
    for operation in pickletools.opcodes:
        code = ord(operation.code)
        # The standard library's table has its methods; those that are overridden here are looked up by name.
        method = pickle._Unpickler.dispatch[code]
        allowed = operation.name in _ALLOWED
        methods[code] = getattr(_Unpickler, method.__name__) if allowed else _refuse(operation.name)
    # Of the same layout, and without memory for the announced length before the bytes are there.
    methods[pickle.BYTEARRAY8[0]] = methods[pickle.BINBYTES8[0]]
    return methods


_Unpickler.dispatch = _dispatch()


def load(file: IO[bytes]) -> Any:
    """The object that a pickle describes: containers, numbers, texts, bytes and NumPy arrays of numbers.

    Args:
        file: binary file that can seek, at the start of the pickle; whatever follows the pickle is not read.

    Raises:
        ConvertError: the pickle names anything but NumPy's arrays, dtypes and numbers and ``collections.OrderedDict``
            (the message has the name), contains an array of objects, is damaged, or is no pickle.
    """
    with _readable_errors():
        return _with_arrays(_Unpickler(_Stream(file)).load())


class _Unused:
    """Stand-in for everything that PyTorch's pickles make: it takes items and keeps none."""

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...


class _Inspector(_Unpickler):
    """Walks through a pickle of ``torch.save`` and makes nothing of it."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "bytearray":  # of any number of bytes, which one number in the file announces
            raise ConvertError("refused: the file imports bytearray, expected tensors in plain containers alone; "
                               "nothing of it was run")
        return _Unused()

    def load_reduce(self) -> None:
        self.stack[-2:] = [_Unused()]

    def load_build(self) -> None:
        self.stack.pop()

    def load_unused(self) -> None:
        self.stack[-1:] = [_Unused()]

    def load_empty(self) -> None:
        self.stack.append(_Unused())


_Inspector.dispatch = {
    code: getattr(_Inspector, method.__name__, method) for code, method in _Unpickler.dispatch.items()
} | {
    pickle.NEWOBJ[0]: _Inspector.load_reduce,
    pickle.BINPERSID[0]: _Inspector.load_unused,
    pickle.EMPTY_SET[0]: _Inspector.load_empty,
}


def inspect_torch(file: IO[bytes], count: int = 1) -> None:
    """Walk through consecutive pickles of ``torch.save`` before PyTorch reads them, which has no such limits.

    Raises:
        ConvertError: a pickle that takes memory without bytes in the file, has keys whose hash is recursive, has
            operations that tensors do not need, or is damaged.
    """
    with _readable_errors():
        for _ in range(count):
            _Inspector(_Stream(file)).load()


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Errors of a stream that is no pickle, or half of one, become ``ConvertError``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in the texts of damaged files
            yield
    except ConvertError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, MemoryError, EOFError,
            struct.error, pickle.UnpicklingError) as error:
        raise ConvertError(f"not a readable pickle: {_short(error)}") from error


def _check_keys(keys: list[Any]) -> None:
    """Refuse keys whose hash is recursive: a deep tuple would exhaust the interpreter's own stack."""
    for key in keys:
        items = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(item, (str, bytes, int, float, _Unused)) for item in items):
            raise ConvertError(f"expected texts and numbers as keys of dictionaries, got {type(key).__name__}")


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """An array whose contents BUILD brings."""
    if not isinstance(kind, _Name) or kind.name != "numpy.ndarray":
        raise ConvertError(f"refused: an array of the class {_short(kind)}")
    return _Array()


def _dtype(code: Any, align: Any = False, copy: Any = False) -> _Dtype:
    text = code.decode("latin-1") if isinstance(code, bytes) else code
    if isinstance(text, str) and text.startswith(("O", "|O", "object")):
        raise ConvertError("refused: an array of Python objects (numpy dtype 'O')")
    kind, size = (text[:1], text[1:]) if isinstance(text, str) else ("", "")
    if kind not in _KINDS or not size.isdecimal() or not 1 <= int(size[:4]) <= _MAX_ITEM_BYTES:
        raise ConvertError(f"refused: an array of the type {_short(code)}, expected one of numbers")
    return _Dtype(text)


def _with_arrays(content: Any) -> Any:
    """Put arrays in the place of their stand-ins, in dictionaries and lists of any depth (tuples keep them)."""
    waiting, seen = [[content]], set[int]()
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
    """A short text for a value of the file, whose full text could be endless."""
    if isinstance(value, (str, bytes)):
        return repr(value[:200])
    if isinstance(value, Exception):
        return str(value)[:200] or type(value).__name__
    if isinstance(value, _Dtype):
        return f"dtype {value.code}"
    if isinstance(value, _Name):
        return value.name
    has_short_text = value is None or isinstance(value, (bool, float))
    return repr(value) if has_short_text else f"an object of type {type(value).__name__}"
