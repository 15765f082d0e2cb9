"""Argument checks: one line each, and an error that names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any


def check(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise ``ValueError`` naming the argument, what it must be and what it is."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def check_choice(name: str, value: object, choices: tuple[Any, ...]) -> None:
    """``Literal`` is not enforced at run time; this does."""
    check(value in choices, name, "one of " + ", ".join(map(repr, choices)), value)
