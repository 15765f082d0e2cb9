"""Check of the documentation's prose: the options, settings, files, links and sections it names must exist."""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from pathlib import Path
from typing import Any

from maskformer_fast.config import Config
from tests.docs.pages import PROGRAMS, ROOT, Command, anchors, inline_code, links
from tests.docs.parsing import CommandError, argparse_options, check, import_program, option_classes

COMMANDS = (
    "maskformer_fast.train", "maskformer_fast.evaluate", "maskformer_fast.predict", "maskformer_fast.convert",
    "maskformer_fast.export", "maskformer_fast.benchmark", "maskformer_fast.demo",
    "maskformer_fast.deploy.triton_server",
)  # fmt: skip
"""Commands whose options are the fields of a dataclass."""
ARGPARSE_COMMANDS: dict[str, tuple[str, ...]] = {"benchmarks": (), "maskformer_fast.kernels.aot": ("--check",)}
"""Commands that use argparse, with the arguments that they require."""
OTHER_OPTIONS = frozenset({"--help", "--config", "--list-recipes", "--rdzv-id", "--shm-size"})
"""Options that are no field of a dataclass: those that choose a recipe, and those of torchrun and Docker."""
SECTIONS = frozenset(field.name for field in dataclasses.fields(Config))
FOLDERS = (
    "", "maskformer_fast", "csrc", "maskformer_fast/ops", "maskformer_fast/data", "maskformer_fast/modeling",
    "benchmarks/results",
)  # fmt: skip
"""Folders to which a page's paths may be relative, besides the page's own."""
FILES_OF_OTHERS = frozenset({"MODEL_ZOO.md"})
_SOURCE = re.compile(r"^[\w./-]+\.(py|cpp|cu|h|md)$")
_SETTING = re.compile(r"^([a-z_]+)(\.[a-z_]+)+$")
_FILE_ENDINGS = (".json", ".jsonl", ".png", ".pt", ".py", ".safetensors", ".yaml")  # a file is no setting


def problems(path: Path, root: Path = ROOT) -> list[str]:
    """List everything that a page names and that does not exist, with its place."""
    missing = []
    for place, code in inline_code(path, root):
        words = code.split(" ")
        if words[0] in PROGRAMS and len(words) > 1:
            try:
                check(Command(place, code, ""))
            except CommandError as error:
                missing.append(str(error))
        elif words[0].startswith("--"):
            names = [word.split("=")[0].replace("_", "-") for word in words if word.startswith("--")]
            missing += [f"{place}: no command has the option {name}" for name in names if name not in option_names()]
        elif (setting := _SETTING.match(code)) and setting[1] in SECTIONS and not code.endswith(_FILE_ENDINGS):
            if f"--{code.replace('_', '-')}" not in option_names() and code not in sections():
                missing.append(f"{place}: no setting {code}")
        elif _SOURCE.match(code) and "NAME" not in code and code not in FILES_OF_OTHERS:
            folders = [*(root / folder for folder in FOLDERS), path.parent]
            missing += [] if any((folder / code).exists() for folder in folders) else [f"{place}: no file {code}"]
    return missing + broken_links(path, root)


def broken_links(path: Path, root: Path = ROOT) -> list[str]:
    """List the links of a page to files and sections that do not exist, with their places."""
    broken = []
    for place, target in links(path, root):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists():
            broken.append(f"{place}: no file {target}")
        elif anchor and anchor not in anchors(file):
            broken.append(f"{place}: no section {target}")
    return broken


@functools.cache
def sections() -> frozenset[str]:
    """Return the sections of the configuration, as ``data.augment``."""
    return frozenset(_walk(Config, "")[1])


@functools.cache
def option_names() -> frozenset[str]:
    """Return the options of all commands, as ``--a.b-c``."""
    names = set(OTHER_OPTIONS)
    for name in COMMANDS:
        for kind in option_classes(import_program(name)):
            names |= _walk(kind, "")[0]
    for name, required in ARGPARSE_COMMANDS.items():
        parser, _ = argparse_options(import_program(name), required)
        names |= set(parser._option_string_actions)
    return frozenset(names)


def _walk(kind: Any, prefix: str) -> tuple[set[str], set[str]]:
    """Return the names of a dataclass's options, and those of its fields that are sections."""
    options, holders = set(), set()
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        inner = inner if dataclasses.is_dataclass(inner) else None
        if inner is None:
            name = field.name.replace("_", "-")
            options |= {f"--{prefix.replace('_', '-')}{name}", f"--{prefix.replace('_', '-')}no-{name}"}
        else:
            below = "" if field.name == "config" else f"{prefix}{field.name}."
            holders.add(f"{prefix}{field.name}")
            more, deeper = _walk(inner, below)
            options, holders = options | more, holders | deeper
    return options, holders
