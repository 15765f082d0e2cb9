"""Checks of arguments, whose errors name the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any


def check(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise ``ValueError`` with the argument's name, what was expected and what came, unless the condition is true."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def check_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    """Raise ``ValueError`` unless a value is one of the choices; Python does not enforce ``Literal`` at run time."""
    check(value in choices, name, "one of " + ", ".join(map(repr, choices)), value)
