"""Recipes: YAML files, read into a validated `Config`.

A recipe names only what departs from the defaults of `config.py`, or from another recipe, its ``base``::

    base: ade20k_150/maskformer_r50      # a packaged recipe, or a .yaml path relative to this file
    solver: {lr: 6e-5}
"""

from __future__ import annotations

import difflib
import io
import math
import types
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from maskformer_fast.config import Config, to_dict
from maskformer_fast.core.files import atomic_write

CONFIG_DIR = Path(__file__).parent
BASE_STEM = "_base"
"""File name of what recipes of one folder share; not a recipe itself."""



# Reading plain containers


def from_dict(data: Mapping[str, Any]) -> Config:
    """Inverse of `config.to_dict`; sections and keys that are left out keep their defaults.

    Raises:
        ValueError: an unknown key, a value of another type (both name the dotted key) or one the configuration refuses.
    """
    return _read(Config, data, "")


def _read(kind: Any, value: Any, key: str) -> Any:
    """Check ``value`` against a type of `config.py` and make it that type; ``key`` is its dotted name."""
    if is_dataclass(kind):
        return _read_section(kind, value, key)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = [arg for arg in args if arg is not type(None)]
        return None if value is None else _read(inner[0], value, key)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{key}: expected one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin is tuple:
        return _read_tuple(args, value, key)
    return _read_scalar(kind, value, key)


def _read_section(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key or 'recipe'}: expected a mapping, got {value!r}")
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    arguments = {}
    for name, item in value.items():
        dotted = f"{key}.{name}" if key else str(name)
        if name not in names:
            raise ValueError(f"{dotted}: expected one of {', '.join(names)}, got an unknown key{_hint(name, names)}")
        arguments[name] = _read(hints[name], item, dotted)
    return kind(**arguments)


def _read_tuple(args: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    variadic = args[-1] is Ellipsis
    length = "a list" if variadic else f"a list of {len(args)}"
    if not isinstance(value, (list, tuple)) or not (variadic or len(value) == len(args)):
        raise ValueError(f"{key}: expected {length}, got {value!r}")
    kinds = [args[0]] * len(value) if variadic else args
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(_read(kind, item, f"{key}[{index}]") for index, (kind, item) in pairs)


def _read_scalar(kind: type, value: Any, key: str) -> Any:
    if kind is float:
        return _read_number(value, key)
    # bool is a subclass of int, and `lr: true` is a mistake
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "an integer", bool: "true or false", str: "text"}
        raise ValueError(f"{key}: expected {names[kind]}, got {value!r}")
    return value


def _read_number(value: Any, key: str) -> float:
    try:
        # YAML 1.1 reads `1e-4` (no point) as text
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key}: expected a finite number, got {value!r}")
    return number


def _hint(name: object, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), choices, n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


# Recipe files


def recipe_names() -> list[str]:
    """Packaged recipes, sorted, as `load_recipe` and ``--config`` take them."""
    return [name for name in _packaged() if name.rpartition("/")[2] != BASE_STEM]


def _packaged() -> list[str]:
    return sorted(path.relative_to(CONFIG_DIR).with_suffix("").as_posix() for path in CONFIG_DIR.rglob("*.yaml"))


def load_recipe(name_or_path: str | PathLike[str]) -> Config:
    """A packaged recipe by name (``ade20k_150/maskformer_r50``), or a file ending in ``.yaml`` or ``.yml``.

    ``output`` is not inherited from a base: where the recipe itself does not say it, it is ``runs/`` and its name, so
    that two recipes never share a folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no such recipe, or it does not describe a configuration (the message names the file).
    """
    path = _locate(str(name_or_path), Path())
    data = _load_merged(path, ())
    name = path.relative_to(CONFIG_DIR) if path.is_relative_to(CONFIG_DIR) else Path(path.name)
    data.setdefault("output", (Path("runs") / name.with_suffix("")).as_posix())
    try:
        return from_dict(data)
    except ValueError as error:
        raise ValueError(f"{name_or_path}: {error}") from error


def _locate(name: str, folder: Path) -> Path:
    """File of a recipe; paths are relative to ``folder``."""
    if Path(name).suffix in (".yaml", ".yml"):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such recipe file{_hint(str(Path(name).with_suffix('')), _packaged())}")
        return path
    if name not in _packaged():
        raise ValueError(f"recipe: expected a file ending in .yaml or a packaged name (--list-recipes prints them), "
                         f"got {name!r}{_hint(name, recipe_names())}")
    return CONFIG_DIR / f"{name}.yaml"


def _load_merged(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Contents of a recipe over those of its bases; ``above`` are the recipes that led here."""
    if path.resolve() in above:
        raise ValueError(f"{path}: base: expected recipes that do not base on themselves, got a cycle")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:  # TypeError: a list or mapping as a key
        raise ValueError(f"{path}: expected YAML, {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping, got {data!r}")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ValueError(f"{path}: base: expected the name or path of one recipe, got {base!r}")
    inherited = _load_merged(_locate(base, path.parent), (*above, path.resolve()))
    inherited.pop("output", None)
    return _merge(inherited, data)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; in a recipe that hides a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key_node.value!r} is there twice",
                                                        key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def save_config(config: Config, path: str | PathLike[str]) -> None:
    """Write every field as YAML, atomically; `load_recipe` of a ``.yaml`` path reads the same configuration back."""
    text = io.StringIO()
    yaml.safe_dump(to_dict(config), text, sort_keys=False, default_flow_style=None, allow_unicode=True)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())
