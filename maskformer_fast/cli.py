"""Command lines: options, recipes with overrides, exit statuses, and errors in place of tracebacks."""

from __future__ import annotations

import logging
import os
import select
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
"""Type of a command's field ``config``; the names of its options have no prefix."""

USAGE_STATUS = 2
"""Exit status after an error of the user's input."""
INTERRUPTED_STATUS = 130
"""Exit status after Ctrl-C, the shells' 128 + SIGINT."""
TRACEBACK_VARIABLE = "MASKFORMER_FAST_TRACEBACK"
"""Environment variable; if set, expected errors keep their traceback."""


def parse(
    command: type[Options], argv: Sequence[str], *, prog: str, default: Options | None = None,
    description: str | None = None,
) -> Options:
    """Read typed options; nested dataclasses become dotted ones, spelled with ``-`` or ``_``.

    Args:
        command: dataclass of the options; its docstring is the description in ``--help`` unless one is given.
        argv: arguments without the program's name.
        prog: how the user calls the program.
        default: values of options that are not given; fields may be ``tyro.MISSING``. Without it, the class's defaults.
        description: text in ``--help``.

    Raises:
        SystemExit: status 0 after ``--help``; status 2, with what is wrong on stderr, for unknown options and values
            that are refused.
    """
    if default is None:
        return tyro.cli(command, args=list(argv), prog=prog, description=description)
    return tyro.cli(command, args=list(argv), prog=prog, description=description, default=default)


def leading_path(argv: Sequence[str]) -> str | None:
    """First argument, the file whose settings are the options' defaults; ``None`` for ``--help`` or no arguments.

    Raises:
        ValueError: the first argument is an option.
    """
    if not argv or any(argument in ("-h", "--help") for argument in argv):
        return None
    if argv[0].startswith("-"):
        raise ValueError(f"first argument: expected the checkpoint, followed by the options, got {argv[0]!r}")
    return argv[0]


@contextmanager
def cli_errors(*expected: type[Exception]) -> Iterator[None]:
    """Turn expected exceptions into ``error: message`` on stderr and exit status 2.

    ``ValueError``, ``OSError`` (missing files, full disks) and ``ModuleNotFoundError`` (an extra that is not installed)
    are expected everywhere; ``expected`` adds a command's own. Other exceptions are bugs and keep their traceback, as
    all do while ``MASKFORMER_FAST_TRACEBACK`` is set. A reader that closes standard output early, as ``head`` does, is
    no error.

    Raises:
        SystemExit: in place of an expected exception.
    """
    known: tuple[type[Exception], ...] = (ValueError, OSError, ModuleNotFoundError, *expected)
    try:
        yield
    except known as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            raise SystemExit(0) from error
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_STATUS) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED_STATUS) from error


def _output_is_closed() -> bool:
    """Whether the reader of standard output, a pipe, has closed it."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush_output() -> None:
    """Flush standard output; if its reader has closed it, redirect it, so that the flush at exit does not fail."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def set_up_logging(level: int = logging.INFO) -> None:
    """Log to stderr with the time of day; standard output is for results."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")


def run_command(main: Callable[[], int | None], *expected: type[Exception]) -> NoReturn:
    """Run a command's entry point and exit with its status (``None`` is 0); ``expected`` as for `cli_errors`."""
    set_up_logging()
    try:
        with cli_errors(*expected):
            status = main()
    finally:
        with cli_errors():  # a full disk
            _flush_output()
    sys.exit(status or 0)


def report_failures(failures: Sequence[str], what: str) -> int:
    """List inputs that failed on stderr -> exit status: 1 if there are any, else 0."""
    if failures:
        listing = "\n  ".join(failures)
        print(f"error: {len(failures)} {what}:\n  {listing}", file=sys.stderr)
    return int(bool(failures))


def parse_command(command: type[Command], argv: Sequence[str], default: str = "demo", *, prog: str) -> Command:
    """Read a command's options: a recipe (``--config NAME_OR_PATH``) with typed overrides, and options of its own.

    Args:
        command: dataclass with a field ``config: Recipe`` and defaults for all other fields.
        argv: arguments without the program's name.
        default: recipe without ``--config``.
        prog: how the user calls the program.

    Raises:
        SystemExit: status 0 after ``--help`` and ``--list-recipes``; status 2, with what is wrong on stderr.

    Example::

        @dataclass(frozen=True)
        class TrainOptions:
            \"\"\"Train a recipe.\"\"\"

            config: Recipe
            resume: bool = False
            \"\"\"Continue the run in ``output``.\"\"\"

        options = parse_command(TrainOptions, ["--config", "demo", "--resume", "--solver.lr", "1e-3"], prog="train")
    """
    if "--list-recipes" in argv:
        print_recipe_names()
        raise SystemExit(0)
    with cli_errors():
        name, overrides = _take_option(argv, "--config", default)
        recipe = _with_backbone_of(overrides, load_recipe(name))
    return parse(
        command, overrides, prog=prog, default=command(config=recipe),  # type: ignore[call-arg]
        description=f"{command.__doc__}\n\n{_recipe_usage(name)}",
    )  # fmt: skip


def print_recipe_names() -> None:
    """Print the names of the packaged recipes, one a line."""
    print("\n".join(recipe_names()))


def _with_backbone_of(overrides: Sequence[str], recipe: Config) -> Config:
    """Recipe without its backbone's settings if the overrides name another backbone; else the recipe itself."""
    name, _ = _take_option(overrides, "--model.backbone.name", recipe.model.backbone.name)
    if name == recipe.model.backbone.name:
        return recipe
    return replace(recipe, model=replace(recipe.model, backbone=BackboneConfig(name)))


def _recipe_usage(name: str) -> str:
    """Paragraph on ``--config`` for ``--help``; ``name`` is the chosen recipe."""
    return (
        f"Options below override the recipe that --config NAME_OR_PATH chooses (now {name}; a packaged recipe or a "
        ".yaml file). --list-recipes prints the packaged ones. Naming another --model.backbone.name drops what "
        "the recipe says of its own backbone (its weights too)."
    )


def _take_option(argv: Sequence[str], option: str, default: str) -> tuple[str, list[str]]:
    """Value of the last ``option VALUE`` or ``option=VALUE``, and the arguments without it.

    Raises:
        ValueError: no value follows the option.
    """
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
