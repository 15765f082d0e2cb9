"""What the documentation's prose names: options, settings, files, links and sections, each of which must exist."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import re
import typing
from pathlib import Path
from typing import Any

from maskformer_fast.config import Config
from tests.docs.pages import PROGRAMS, ROOT, Command, anchors, inline_code, links
from tests.docs.parsing import CommandError, check

OPTION_MODULES = ("train", "evaluate", "predict", "convert", "export", "benchmark", "demo", "deploy.triton_server.options")
OTHERS_OPTIONS = frozenset({"--help", "--config", "--list-recipes", "--rdzv-id", "--shm-size"})
"""Options that are no field of ours: of the recipe's choice, of torchrun, of Docker."""
SECTIONS = frozenset(field.name for field in dataclasses.fields(Config))
FOLDERS = ("", "maskformer_fast", "csrc", "maskformer_fast/ops", "maskformer_fast/data", "maskformer_fast/modeling")
FILES_OF_OTHERS = frozenset({"MODEL_ZOO.md"})
_SOURCE = re.compile(r"^[\w./-]+\.(py|cpp|cu|h|md)$")
_SETTING = re.compile(r"^([a-z_]+)(\.[a-z_]+)+$")
_FILE_ENDINGS = (".json", ".jsonl", ".png", ".pt", ".py", ".safetensors", ".yaml")  # of what is no setting


def problems(path: Path, root: Path = ROOT) -> list[str]:
    """Everything that a page names and that is not there, with its place."""
    found = []
    for place, code in inline_code(path, root):
        words = code.split(" ")
        if words[0] in PROGRAMS and len(words) > 1:
            try:
                check(Command(place, code, ""))
            except CommandError as error:
                found.append(str(error))
        elif words[0].startswith("--"):
            names = [word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")]
            found += [f"{place}: no command has the option {name}" for name in names if name not in option_names()]
        elif (setting := _SETTING.match(code)) and setting[1] in SECTIONS and not code.endswith(_FILE_ENDINGS):
            if f"--{code.replace('_', '-')}" not in option_names() and code not in sections():
                found.append(f"{place}: no setting {code}")
        elif _SOURCE.match(code) and "NAME" not in code and code not in FILES_OF_OTHERS:
            folders = [*(root / folder for folder in FOLDERS), path.parent]
            found += [] if any((folder / code).exists() for folder in folders) else [f"{place}: no file {code}"]
    for place, target in links(path, root):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists():
            found.append(f"{place}: no file {target}")
        elif anchor and anchor not in anchors(file):
            found.append(f"{place}: no section {target}")
    return found


@functools.cache
def sections() -> frozenset[str]:
    """Parts of the configuration that hold others, as ``data.augment``."""
    return frozenset(_walk(Config, "")[1])


@functools.cache
def option_names() -> frozenset[str]:
    """Every option of our commands, as ``--a.b-c``."""
    names = set(OTHERS_OPTIONS)
    for name in OPTION_MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(f"maskformer_fast.{name}")
            for key, kind in vars(module).items():
                if key.endswith("Options") and dataclasses.is_dataclass(kind):
                    names |= _walk(kind, "")[0]
    return frozenset(names)


def _walk(kind: Any, prefix: str) -> tuple[set[str], set[str]]:
    """Names of the options of a dataclass, and of those of its fields that hold others."""
    options, holders = set(), set()
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        inner = inner if dataclasses.is_dataclass(inner) else None
        if inner is None:
            own = field.name.replace("_", "-")
            options |= {f"--{prefix.replace('_', '-')}{own}", f"--{prefix.replace('_', '-')}no-{own}"}
        else:
            below = "" if field.name == "config" else f"{prefix}{field.name}."
            holders.add(f"{prefix}{field.name}")
            more, deeper = _walk(inner, below)
            options, holders = options | more, holders | deeper
    return options, holders
