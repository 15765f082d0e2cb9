"""Recipes: YAML files, read into a validated `Config`.

A recipe names only what departs from the defaults of `config.py`, or from another recipe, its ``base``::

    base: ade20k_150/maskformer_r50      # a packaged recipe, or a .yaml path relative to this file
    solver: {lr: 6e-5}
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import yaml

from maskformer_fast.config import Config, DataConfig
from maskformer_fast.core.checks import check, shown_value
from maskformer_fast.core.files import atomic_write
from maskformer_fast.core.typed import TypedReader, did_you_mean, to_plain

CONFIG_DIR = Path(__file__).parent
_MAX_KEYS = 1000
"""Keys of a mapping of a recipe."""

_EARLIER_DATA = {"keep_empty": False, "exif": True, "repeat_threshold": 0.0}
"""Fields of the section ``data`` that earlier versions lacked, with the values with which these trained."""
_DATA_FIELDS = {field.name for field in fields(DataConfig)}

_READER = TypedReader(absent_is_default=True, convert_floats=True)


def from_dict(data: Mapping[str, Any]) -> Config:
    """Configuration from plain containers; sections and keys that are left out keep their defaults.

    Inverse of `core.typed.to_plain`. Where the section ``data`` was written completely by an earlier version, fields
    that it lacked get the values with which it trained.

    Raises:
        ValueError: an unknown key, a value of another type (both name the dotted key) or one the configuration refuses.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"recipe: expected a mapping, got {shown_value(data)}")
    section = data.get("data")
    if isinstance(section, Mapping) and section.keys() >= _DATA_FIELDS - _EARLIER_DATA.keys():
        data = {**data, "data": {**_EARLIER_DATA, **section}}
    config: Config = _READER.read(Config, data, "")
    return config


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted, as `load_recipe` and ``--config`` take them.

    Files whose name begins with ``_`` are what recipes build on, and no recipes themselves.
    """
    return [name for name in _packaged_files() if not name.rpartition("/")[2].startswith("_")]


def _packaged_files() -> list[str]:
    """Names of the packaged YAML files, those that recipes build on included, sorted."""
    return sorted(path.relative_to(CONFIG_DIR).with_suffix("").as_posix() for path in CONFIG_DIR.rglob("*.yaml"))


def load_recipe(name_or_path: str | PathLike[str]) -> Config:
    """Read a packaged recipe by name (``ade20k_150/maskformer_r50``), or a file ending in ``.yaml`` or ``.yml``.

    ``output`` is not inherited from a base. A recipe without one writes to ``runs/`` and its name, so that two recipes
    never share a folder.

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
    """Path of a recipe's file; relative paths start at ``folder``."""
    if Path(name).suffix in (".yaml", ".yml"):
        path = folder / name
        if not path.is_file():
            hint = did_you_mean(Path(name).with_suffix("").as_posix(), _packaged_files())
            raise FileNotFoundError(f"{path}: no such recipe file{hint}")
        return path
    if name not in _packaged_files():
        raise ValueError(f"recipe: expected a file ending in .yaml or a packaged name (--list-recipes prints them), "
                         f"got {name!r}{did_you_mean(name, recipe_names())}")
    return CONFIG_DIR / f"{name}.yaml"


def _load_merged(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Merge a recipe's contents over those of its bases; ``above`` holds the recipes that build on this one."""
    if path.resolve() in above:
        raise ValueError(f"{path}: base: expected recipes that do not base on themselves, got a cycle")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except RecursionError as error:
        raise ValueError(f"{path}: expected YAML, got lists or mappings nested too deep") from error
    # A list or mapping as a key, and dates, numbers and flags that PyYAML takes for such and cannot read.
    except (yaml.YAMLError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: expected YAML, {error}") from error
    check(isinstance(data, dict), str(path), "a mapping", data)
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise ValueError(f"{path}: base: expected the name or path of one recipe, got {shown_value(base)}")
    try:
        base_path = _locate(base, path.parent)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{path}: base: {error}") from error
    inherited = _load_merged(base_path, (*above, path.resolve()))
    inherited.pop("output", None)
    return _merge(inherited, data)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Copy of ``base`` with the values of ``over`` in place of its own, section by section."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses equal keys: PyYAML keeps the last one without a word, which would hide a mistake.

    It also refuses mappings that others are merged into (``<<``) again and again.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MAX_KEYS:
            raise yaml.constructor.ConstructorError(None, None, f"expected at most {_MAX_KEYS} keys in a mapping, got "
                                                    f"{len(node.value)}", node.start_mark)

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
    plain = to_plain(config)
    text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, allow_unicode=True)
    if yaml.safe_load(text) != plain:  # a name with a line break of Unicode, which PyYAML would write as it is
        text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None)
    with atomic_write(path) as file:
        file.write(text.encode())
