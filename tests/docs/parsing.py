"""Check of the documentation's commands by the parsers of their programs, without running the commands."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import yaml

from maskformer_fast.cli import parse, parse_command
from maskformer_fast.recipes import load_recipe
from maskformer_fast.train import with_own_recipe
from tests.docs.pages import ROOT, Command

SHELL_ONLY = (
    "cat", "cd", "cmake", "cp", "ctest", "curl", "docker", "git", "ln", "ls", "mkdir", "nsys", "rsync", "scp", "ssh",
    "tensorboard", "trtexec", "tritonserver",
)  # fmt: skip
"""Other projects' programs, whose options are not checked: the shell must be able to read the line."""
PYTEST_OPTIONS = ("-q", "-x", "-v", "-k", "-m", "-s", "-n", "--lf", "--benchmark-only")
TOOLS = {"mypy": (), "ruff": ("check", "format")}
"""Other projects' Python modules that are run on the repository, and their subcommands."""
_VARIABLE = re.compile(r"^[A-Z_][A-Z0-9_]*=")


class CommandError(ValueError):
    """A command that its program would refuse."""


class Call(NamedTuple):
    """A command line, split."""

    variables: dict[str, str]
    program: str  # "python -m NAME", "torchrun -m NAME", or the program's own name
    arguments: list[str]  # of the module, or of the program


def split_command(text: str) -> Call:
    """Split a command line.

    Raises:
        CommandError: the shell cannot read the line, or it joins several commands.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise CommandError(f"not a command line: {error}") from error
    if joined := [word for word in words if word in ("|", "&&", "||", ";", "&", ">", ">>", "<", "<<")]:
        raise CommandError(f"expected one command on a line, got {joined[0]}")
    variables = {}
    while words and _VARIABLE.match(words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    if not words:
        raise CommandError("no command")
    program, *arguments = words
    if program == "python" and arguments[:1] == ["-m"] and len(arguments) > 1:
        return Call(variables, f"python -m {arguments[1]}", arguments[2:])
    if program == "torchrun":
        given = _torchrun(arguments)
        return Call(variables, f"torchrun -m {given.training_script}", given.training_script_args)
    return Call(variables, program, arguments)


def check(command: Command, folder: Path = ROOT) -> None:
    """Parse a command as its program does, in ``folder``, in which recipe files are searched.

    Raises:
        CommandError: an unknown program, option, value, recipe, target or extra; the message has the command's place.
    """
    try:
        with contextlib.chdir(folder):
            _check(split_command(command.text), command.text)
    except CommandError as error:
        raise CommandError(f"{command.place}: {command.text}\n  {error}") from None


def _check(call: Call, text: str) -> None:
    how, _, module = call.program.partition(" -m ")
    if how == "torchrun" or module.split(".")[0] in ("maskformer_fast", "benchmarks"):
        module_options(module, call.arguments)
    elif module == "pip" or call.program == "pip":
        _check_pip(call.arguments)
    elif module == "pytest":
        _check_pytest(call.arguments)
    elif module in TOOLS:
        if TOOLS[module] and call.arguments[:1] and call.arguments[0] not in TOOLS[module]:
            raise CommandError(f"{module}: expected one of {', '.join(TOOLS[module])}, got {call.arguments[0]}")
    elif module:
        raise CommandError(f"python -m {module}: unknown to docs-check; add it to tests/docs/parsing.py")
    elif call.program in ("python", "python3") and call.arguments:
        _check_python(call.arguments)
    elif call.program == "make":
        _check_make(call.arguments)
    elif call.program in SHELL_ONLY:
        result = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
        if result.returncode:
            raise CommandError(result.stderr.strip())
    else:
        raise CommandError(f"{call.program}: unknown to docs-check; add it to tests/docs/parsing.py")


def module_options(module: str, arguments: list[str]) -> Any:
    """Parse the arguments of one of this project's commands -> its options, or None if the arguments ask for help.

    Raises:
        CommandError: there is no such module, or it refuses the arguments.
    """
    if importlib.util.find_spec(module) is None:
        raise CommandError(f"{module}: no such module")
    # Paths of weights do not change how a command is parsed: equal ones let the cache answer.
    return _read_options(module, tuple("x" if _is_weights(word) else word for word in arguments))


def _is_weights(word: str) -> bool:
    return word.startswith("/data/") or word.endswith((".pkl", ".pth", ".safetensors"))


@functools.cache
def _read_options(module: str, arguments: tuple[str, ...]) -> Any:
    program = import_program(module)
    prog = f"python -m {module}"
    kinds = option_classes(program)
    if module == "maskformer_fast.train":
        return _quietly(lambda: parse_command(kinds[0], with_own_recipe(list(arguments)), prog=prog))
    if len(kinds) == 1:
        return _quietly(lambda: parse(kinds[0], arguments, prog=prog))
    if kinds:
        raise CommandError(f"{module}: expected one dataclass NAMEOptions, found {len(kinds)}")
    return _quietly(lambda: argparse_options(program, arguments)[1])


def import_program(module: str) -> ModuleType:
    """Import the module that ``python -m MODULE`` runs: of a package, its ``__main__``."""
    spec = importlib.util.find_spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return importlib.import_module(f"{module}.__main__" if is_package else module)


def option_classes(program: ModuleType) -> list[Any]:
    """Return the dataclasses NAMEOptions of a command: defined in its module, or in its package if it has one."""
    name, package = program.__name__, program.__name__.removesuffix("__main__")  # for a module, both are its name
    named = [value for key, value in vars(program).items() if key.endswith("Options")]
    return [
        kind for kind in named
        if dataclasses.is_dataclass(kind)
        and (kind.__module__ == name or (package != name and kind.__module__.startswith(package)))
    ]


class _Parsed(Exception):
    """The arguments are parsed, and the command must not go on."""


def argparse_options(program: Any, arguments: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Parse the arguments of a command that uses argparse -> its parser and the options; its ``main`` does no more.

    Raises:
        CommandError: ``main`` does not use argparse.
        SystemExit: the parser refuses the arguments, or they ask for help.
    """
    original, argv = argparse.ArgumentParser.parse_args, sys.argv
    parsed: list[tuple[argparse.ArgumentParser, argparse.Namespace]] = []

    def read_and_stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        parsed.append((self, original(self, args, namespace)))
        raise _Parsed

    argparse.ArgumentParser.parse_args = read_and_stop  # type: ignore[method-assign, assignment]
    sys.argv = [program.__name__, *arguments]
    try:
        program.main()
    except _Parsed:
        return parsed[0]
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
        sys.argv = argv
    raise CommandError(f"{program.__name__}: expected a dataclass NAMEOptions, or argparse")


def _quietly(read: Callable[[], Any]) -> Any:
    """Call a parser; what it prints before it exits becomes the error's text. Help (status 0) gives None."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            return read()
    except SystemExit as error:
        if error.code in (0, None):
            return None
        raise CommandError(printed.getvalue().strip() or str(error.code)) from None
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from error


def _torchrun(arguments: list[str]) -> argparse.Namespace:
    from torch.distributed.run import get_args_parser

    given = _quietly(lambda: get_args_parser().parse_args(arguments))
    if given is None or not given.module:
        raise CommandError("torchrun: expected -m and a module")
    return given


def _check_pip(arguments: list[str]) -> None:
    from pip._internal.commands import create_command

    if not arguments or arguments[0] not in ("install", "wheel"):
        raise CommandError("pip: expected install or wheel")
    options, names = _quietly(lambda: create_command(arguments[0]).parse_args(arguments[1:]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in [*names, *options.editables]:
        extras = re.search(r"^(\.|maskformer_fast)\[(.*)\]$", name)
        unknown = set(extras[2].split(",")) - set(project["optional-dependencies"]) if extras else set()
        if unknown:
            raise CommandError(f"pip: no extra {', '.join(sorted(unknown))} in pyproject.toml")
    for file in [*options.constraints, *options.requirements]:
        if not (ROOT / file).exists():
            raise CommandError(f"pip: no file {file}")


def _check_python(arguments: list[str]) -> None:
    if arguments[0] == "-c" and len(arguments) == 2:
        check_python(arguments[1])
    elif not arguments[0].endswith(".py"):
        raise CommandError(f"python {arguments[0]}: unknown to docs-check; add it to tests/docs/parsing.py")
    elif not (ROOT / arguments[0]).exists():
        raise CommandError(f"python: no such file: {arguments[0]}")


def check_python(text: str) -> None:
    """Check that text is Python, and that the names it imports from this package exist.

    Raises:
        CommandError: a syntax error, or a missing module or name.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise CommandError(f"not Python: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "maskformer_fast":
            try:
                module = importlib.import_module(node.module or "")
            except ImportError as error:
                raise CommandError(str(error)) from error
            for alias in node.names:
                if not hasattr(module, alias.name) and not importlib.util.find_spec(f"{node.module}.{alias.name}"):
                    raise CommandError(f"{node.module} has no {alias.name}")


def _check_pytest(arguments: list[str]) -> None:
    if wrong := [word for word in arguments if word.startswith("-") and word.split("=")[0] not in PYTEST_OPTIONS]:
        raise CommandError(f"pytest: unknown to docs-check; add it to tests/docs/parsing.py: {wrong[0]}")
    paths = [word.split("::")[0] for word in arguments if "/" in word or word.endswith(".py") or word == "tests"]
    if missing := [path for path in paths if not (ROOT / path).exists()]:
        raise CommandError(f"pytest: no such file: {missing[0]}")


def _check_make(arguments: list[str]) -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY:(.*)$", text, flags=re.MULTILINE)[1].split())  # type: ignore[index]
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        if is_variable and not re.search(rf"^{name}\s*[?:]?=|\$\({name}\)", text, flags=re.MULTILINE):
            raise CommandError(f"make: the Makefile has no variable {name}")
        if not is_variable and word not in targets:
            raise CommandError(f"make: the Makefile has no target {word}")


def check_recipe(text: str, folder: Path) -> Path:
    """Write a recipe of the documentation to ``mine.yaml``, which its commands use, and load it -> the file.

    Raises:
        CommandError: the recipe cannot be loaded.
    """
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load_recipe(path)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise CommandError(str(error)) from error
    return path
