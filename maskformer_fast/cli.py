"""What the commands share: reading options, exit statuses, and errors a user can act on instead of tracebacks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, NoReturn, TypeVar

import tyro

from maskformer_fast.config import BackboneConfig, Config
from maskformer_fast.recipes import load_recipe, recipe_names

Options = TypeVar("Options")
Command = TypeVar("Command")
Recipe = Annotated[Config, tyro.conf.arg(name="")]
"""Type of a command's field ``config``: its options carry no prefix."""

USAGE_STATUS = 2
"""Exit status of a command that was asked for something it cannot do."""
INTERRUPTED_STATUS = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""
TRACEBACK_VARIABLE = "MASKFORMER_FAST_TRACEBACK"
"""Environment variable that, when set, keeps the traceback of expected errors."""


def parse(
    command: type[Options], argv: Sequence[str], *, prog: str, default: Options | None = None,
    description: str | None = None,
) -> Options:
    """Read typed options; nested dataclasses become dotted ones, spelled with ``-`` or ``_``.

    Args:
        command: dataclass of the options; its docstring is the description in ``--help`` unless one is given.
        argv: arguments without the program's name.
        prog: how the user calls the program.
        default: what options that are not given keep; fields may be ``tyro.MISSING``. Without it, the class's defaults.

    Raises:
        SystemExit: status 0 after ``--help``; status 2, with what is wrong on stderr, for options that do not exist
            and for values that cannot be.
    """
    if default is None:
        return tyro.cli(command, args=list(argv), prog=prog, description=description)
    return tyro.cli(command, args=list(argv), prog=prog, description=description, default=default)


def leading_path(argv: Sequence[str]) -> str | None:
    """The first argument, where defaults are read from before the options are; ``None`` if help or nothing is asked.

    Raises:
        ValueError: an option comes first, so that its defaults could not be told.
    """
    if not argv or any(argument in ("-h", "--help") for argument in argv):
        return None
    if argv[0].startswith("-"):
        raise ValueError(f"first argument: expected the checkpoint, followed by the options, got {argv[0]!r}")
    return argv[0]


@contextmanager
def cli_errors(*expected: type[Exception]) -> Iterator[None]:
    """Turn bad input into ``error: message`` on stderr and exit status 2.

    ``ValueError``, ``OSError`` (missing files, full disks) and ``ModuleNotFoundError`` (an extra that is not installed)
    are expected everywhere; a command adds its own. Other exceptions are bugs and keep their traceback, as all do
    while ``MASKFORMER_FAST_TRACEBACK`` is set.

    Raises:
        SystemExit: in place of an expected exception.
    """
    known: tuple[type[Exception], ...] = (ValueError, OSError, ModuleNotFoundError, *expected)
    try:
        yield
    except known as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_STATUS) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED_STATUS) from error


def set_up_logging(level: int = logging.INFO) -> None:
    """Log to stderr with the time of day; standard output stays free for results."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")


def run_command(main: Callable[[], int | None], *expected: type[Exception]) -> NoReturn:
    """Run a command's entry point and exit with its status (``None`` is 0); ``expected`` as in `cli_errors`."""
    set_up_logging()
    with cli_errors(*expected):
        status = main()
    sys.exit(status or 0)


def parse_command(command: type[Command], argv: Sequence[str], default: str = "demo", *, prog: str) -> Command:
    """Options of a command: a recipe (``--config NAME_OR_PATH``) with typed overrides, and options of its own.

    Raises ``SystemExit``: status 0 after ``--help`` and ``--list-recipes``; status 2, with what is wrong on stderr.
    ``default`` is the recipe where none is named; ``command`` is a dataclass with a field ``config: Recipe`` and
    defaults for all other fields::

        @dataclass(frozen=True)
        class TrainOptions:
            \"\"\"Train a recipe.\"\"\"

            config: Recipe
            resume: bool = False
            \"\"\"Continue the run in ``output``.\"\"\"

        options = parse_command(TrainOptions, ["--config", "demo", "--resume", "--solver.lr", "1e-3"], prog="train")
    """
    recipe, rest, usage = _choose_recipe(argv, default)
    return parse(command, rest, prog=prog, default=command(config=recipe),  # type: ignore[call-arg]
                 description=f"{command.__doc__}\n\n{usage}")


def _choose_recipe(argv: Sequence[str], default: str) -> tuple[Config, list[str], str]:
    """Recipe that the arguments name, the other arguments, and a line on ``--config`` for ``--help``."""
    if "--list-recipes" in argv:
        print("\n".join(recipe_names()))
        raise SystemExit(0)
    with cli_errors():
        name, rest = _take_option(argv, "--config", default)
        recipe = load_recipe(name)
        backbone, _ = _take_option(rest, "--model.backbone.name", recipe.model.backbone.name)
    usage = (
        f"Options below override the recipe that --config NAME_OR_PATH chooses (now {name}; a packaged recipe or a "
        ".yaml file). --list-recipes prints the packaged ones. Naming another --model.backbone.name drops what "
        "the recipe says of its own backbone (its weights too)."
    )
    if backbone != recipe.model.backbone.name:
        recipe = replace(recipe, model=replace(recipe.model, backbone=BackboneConfig(backbone)))
    return recipe, rest, usage


def _take_option(argv: Sequence[str], option: str, default: str) -> tuple[str, list[str]]:
    """Value of the last ``option VALUE`` or ``option=VALUE``, and the arguments without it."""
    value, rest, arguments = default, [], iter(argv)
    for argument in arguments:
        if argument == option:
            value = next(arguments, "")
            if not value or value.startswith("--"):
                raise ValueError(f"{option}: expected a value after it, got {value or 'nothing'}")
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    return value, rest
