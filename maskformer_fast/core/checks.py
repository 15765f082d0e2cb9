"""Checks of arguments, whose errors name the argument, what was expected and what came."""

from __future__ import annotations

import math
import reprlib
from dataclasses import fields
from typing import Any

_MAX_SHOWN = 200
"""Characters of a wrong value that an error shows."""
_MAX_BITS = 4096
"""Bits of the largest integer that an error shows; Python refuses to write much larger ones."""


class _ShortRepr(reprlib.Repr):
    """Text of a container. Its size is limited however often parts refer to one another, as aliases of YAML can."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 8
        self.maxstring = self.maxlong = self.maxother = 3 * _MAX_SHOWN  # the middle of a longer one is left out
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 2 * _MAX_SHOWN
        self.left = 2 * _MAX_SHOWN

    def repr1(self, x: Any, level: int) -> str:
        self.left -= 1
        return super().repr1(x, level) if self.left > 0 else "..."

    def repr_int(self, x: int, level: int) -> str:
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > _MAX_BITS else super().repr_int(x, level)


def shown_value(value: object) -> str:
    """Text of a wrong value in errors, which takes little memory for any value that a file can describe."""
    return _ShortRepr().repr(value) if type(value) in (list, tuple, dict, set, int) else repr(value)


def check(condition: bool, name: str, expected: str, got: object, error: type[ValueError] = ValueError) -> None:
    """Raise an ``error`` that names the argument, what it must be and what it is."""
    if not condition:
        shown = shown_value(got)
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
        raise error(f"{name}: expected {expected}, got {shown}")


def check_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    """Raise ``ValueError`` unless a value is one of the choices; Python does not enforce ``Literal`` at run time."""
    check(value in choices, name, "one of " + ", ".join(map(repr, choices)), value)


def check_finite(section: object, name: str) -> None:
    """Raise ``ValueError`` for a number of a section that is NaN or infinite, alone or in a tuple."""
    for entry in fields(section):  # type: ignore[arg-type]
        value = getattr(section, entry.name)
        numbers = [part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, float)]
        check(all(map(math.isfinite, numbers)), f"{name}.{entry.name}", "finite numbers", value)
