"""Checks of arguments, whose errors name the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

_MAX_SHOWN = 200
"""Characters of a wrong value that an error shows."""


def check(condition: bool, name: str, expected: str, got: object, error: type[ValueError] = ValueError) -> None:
    """Raise an ``error`` that names the argument, what it must be and what it is."""
    if not condition:
        shown = repr(got)
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
        raise error(f"{name}: expected {expected}, got {shown}")


def check_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    """Raise ``ValueError`` unless a value is one of the choices; Python does not enforce ``Literal`` at run time."""
    check(value in choices, name, "one of " + ", ".join(map(repr, choices)), value)
