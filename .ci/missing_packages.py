"""Lists packages that this environment lacks, and exits with 1 if there are any.

``--build``: what building needs (pyproject.toml); else what the installed maskformer_fast needs, extras as arguments.
``--tell`` before the extras: exits with 0, for what works in part without them.
"""

from __future__ import annotations

import importlib.metadata as metadata
import shutil
import sys
import tomllib
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

PACKAGE = "maskformer_fast"
PROGRAMS = {"cmake", "ninja"}  # the system's own will do


def missing(requirements: list[str], extras: set[str]) -> set[str]:
    """List the requirements, with these extras, that are absent or of a wrong version."""
    lacking = set()
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            continue
        if requirement.name.replace("-", "_") == PACKAGE:  # an extra that includes another
            lacking |= missing(metadata.requires(PACKAGE) or [], set(requirement.extras))
            continue
        if requirement.name in PROGRAMS and shutil.which(requirement.name):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            lacking.add(f"{requirement.name}{requirement.specifier}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            lacking.add(f"{requirement.name}{requirement.specifier} (found {version})")
    return lacking


def main(arguments: list[str]) -> None:
    if arguments == ["--build"]:
        pyproject = Path(__file__).parents[1] / "pyproject.toml"
        found = missing(tomllib.loads(pyproject.read_text())["build-system"]["requires"], set())
    else:
        found = missing(metadata.requires(PACKAGE) or [], set(arguments) - {"--tell"})
    if found:
        purpose = "building maskformer_fast" if arguments == ["--build"] else "maskformer_fast"
        text = f"This Python lacks packages that {purpose} needs:\n  " + "\n  ".join(sorted(found))
        if "--tell" not in arguments:
            sys.exit(text)
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
