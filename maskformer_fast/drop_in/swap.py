"""Methods of one object, replaced by a subclass of the object's class, and put back."""

from __future__ import annotations

from collections.abc import Callable
from types import new_class
from typing import Any


def swap_methods(target: Any, methods: dict[str, Any], equip: Callable[..., Any], options: dict[str, Any]) -> None:
    """Give an object a subclass of its class, of the same name, with other methods.

    What the object holds stays as it is, so saving and state dicts do not change. Copies and unpickled objects are made
    by ``equip(plain object, **options)``.
    """
    plain: Any = type(target)
    members = {**methods, "_plain_class": plain, "_equip": (equip, options), "__reduce__": _reduce}
    members.update((key, getattr(plain, key)) for key in ("__module__", "__qualname__", "__doc__"))
    target.__class__ = new_class(plain.__name__, (plain,), exec_body=lambda names: names.update(members))


def restore_methods(target: Any) -> None:
    """Give an object its own class again, if `swap_methods` has replaced it."""
    if plain := vars(type(target)).get("_plain_class"):
        target.__class__ = plain


def _reduce(self: Any) -> tuple[Any, ...]:
    equip, options = type(self)._equip
    return _restore, (self._plain_class, equip, options, self.__dict__)


def _restore(plain: type, equip: Callable[..., Any], options: dict[str, Any], state: dict[str, Any]) -> Any:
    target: Any = object.__new__(plain)
    target.__dict__.update(state)
    return equip(target, **options)
