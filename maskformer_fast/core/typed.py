"""Dataclasses from plain containers (dictionaries, lists, numbers, text) and back, with strict types.

Own code and not a library (dacite, cattrs), because every error names the dotted key, what was expected and what came,
and hints at the nearest key.
"""

from __future__ import annotations

import difflib
import functools
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from maskformer_fast.core.checks import check

_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}
"""Names of the types of single values in errors."""


@dataclass(frozen=True)
class TypedReader:
    """Builds frozen dataclasses from plain containers. Unknown keys and values of another type are errors."""

    error: type[ValueError] = ValueError
    """Class of the errors."""
    absent_is_default: bool = False
    """Keys that are left out keep the dataclass's default; otherwise every key must be there."""
    convert_floats: bool = False
    """Integers, and text such as ``1e-4``, become floats where a float is declared; otherwise they are errors."""
    locate_checks: bool = False
    """Errors of a dataclass's own checks get the dotted key of the object in front."""

    def read(self, kind: Any, value: Any, key: str) -> Any:
        """Value of a declared type from plain containers.

        Args:
            kind: dataclass, ``tuple``, ``dict``, ``Literal`` of texts, union, or type of a single value.
            value: plain containers.
            key: dotted name of the value in errors; keys of the outermost object stand alone where it is empty.

        Raises:
            ValueError: of class `error`: an unknown or missing key, a value of another type, or one that the
                dataclass refuses.
        """
        if is_dataclass(kind):
            return self._read_object(kind, value, key)
        origin, arguments = get_origin(kind), get_args(kind)
        if origin in (Union, types.UnionType):
            return self._read_union(arguments, value, key)
        if origin is tuple:
            return self._read_tuple(arguments, value, key)
        if origin is dict:
            check(isinstance(value, Mapping), key, "a mapping", value, self.error)
            return {name: self.read(arguments[1], item, _dotted(key, name)) for name, item in value.items()}
        if origin is Literal:
            known = isinstance(value, str) and value in arguments
            check(known, key, f"one of {', '.join(map(repr, arguments))}", value, self.error)
            return value
        return self._read_single(kind, value, key)

    def _read_object(self, kind: Any, value: Any, key: str) -> Any:
        check(isinstance(value, Mapping), key, "a mapping", value, self.error)
        hints = _field_types(kind)
        for name in value:
            if name not in hints:
                raise self.error(f"{_dotted(key, name)}: expected one of {', '.join(hints)}, got an unknown key"
                                 f"{did_you_mean(name, hints)}")
        if not self.absent_is_default:
            for name in hints:
                if name not in value:
                    raise self.error(f"{_dotted(key, name)}: expected a value, got none")
        items = {name: self.read(hints[name], item, _dotted(key, name)) for name, item in value.items()}
        try:
            return kind(**items)
        except ValueError as error:
            if not self.locate_checks:
                raise
            raise self.error(_dotted(key, error)) from None

    def _read_union(self, kinds: tuple[Any, ...], value: Any, key: str) -> Any:
        if value is None and type(None) in kinds:
            return None
        others = [kind for kind in kinds if kind is not type(None)]
        if len(others) == 1:
            return self.read(others[0], value, key)
        texts = [text for kind in others if get_origin(kind) is Literal for text in get_args(kind)]
        if isinstance(value, str) and value in texts:
            return value
        others = [kind for kind in others if get_origin(kind) is not Literal]
        tuples = [kind for kind in others if get_origin(kind) is tuple]
        if tuples and isinstance(value, (list, tuple)):
            return self._read_tuple(get_args(tuples[0]), value, key)
        single = [kind for kind in kinds if get_origin(kind) is not Literal]
        words = [f"a list of {len(get_args(kind))}" if kind in tuples else _WORDS[kind] for kind in single]
        words += map(repr, texts)
        check(type(value) in others, key, " or ".join(words), value, self.error)
        return self._read_single(type(value), value, key)

    def _read_tuple(self, kinds: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
        any_length = kinds[-1] is Ellipsis
        fits = isinstance(value, (list, tuple)) and (any_length or len(value) == len(kinds))
        check(fits, key, "a list" if any_length else f"a list of {len(kinds)}", value, self.error)
        item_kinds = kinds[:1] * len(value) if any_length else kinds
        items = enumerate(zip(item_kinds, value, strict=True))
        return tuple(self.read(kind, item, f"{key}[{index}]") for index, (kind, item) in items)

    def _read_single(self, kind: Any, value: Any, key: str) -> Any:
        if kind is float and self.convert_floats:
            value = _as_float(value)
        # By type and not by isinstance: a bool is no number here.
        fits = type(value) is kind and (kind is not float or math.isfinite(value))
        check(fits, key, _WORDS[kind], value, self.error)
        return value


def to_plain(value: Any, kind: Any = None) -> Any:
    """Plain containers for YAML and JSON, as `TypedReader.read` reads them back.

    Tuples become lists, and integers become floats where a float is declared. ``kind`` is the declared type; None takes
    the class of the value.
    """
    kind = type(value) if kind is None else kind
    if is_dataclass(kind):
        types_by_name: dict[str, Any] = _field_types(kind)  # type: ignore[arg-type]
        return {name: to_plain(getattr(value, name), field_type) for name, field_type in types_by_name.items()}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        others = [argument for argument in arguments if argument is not type(None)]
        if value is not None and len(others) == 1:
            return to_plain(value, others[0])
        return list(value) if isinstance(value, tuple) else value
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return [to_plain(item, item_kind) for item, item_kind in zip(value, kinds, strict=True)]
    if origin is dict:
        return {name: to_plain(item, arguments[1]) for name, item in value.items()}
    return float(value) if kind is float else value


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """Names that resemble a wrong one, as the end of an error; empty if none does."""
    close = difflib.get_close_matches(str(name), list(choices), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _as_float(value: object) -> object:
    """Float of an integer or of text, since YAML 1.1 reads ``1e-4`` as text; any other value as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


@functools.cache
def _field_types(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields by name, in their order."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _dotted(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
