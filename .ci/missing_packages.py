"""Lists what the installed maskformer_fast needs and this environment lacks. Arguments: extras. Status 1 if any."""

from __future__ import annotations

import importlib.metadata as metadata
import sys

from pip._vendor.packaging.requirements import Requirement


def missing(package: str, extras: set[str]) -> list[str]:
    """Requirements of the package, with these extras, that are absent or of a wrong version."""
    lacking = []
    for requirement in map(Requirement, metadata.requires(package) or []):
        wanted = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}
        )
        if not wanted:
            continue
        if requirement.name.replace("-", "_") == package:
            lacking += missing(package, set(requirement.extras))
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            lacking.append(f"{requirement.name}{requirement.specifier}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            lacking.append(f"{requirement.name}{requirement.specifier} (found {version})")
    return lacking


if __name__ == "__main__":
    found = sorted(set(missing("maskformer_fast", set(sys.argv[1:]))))
    if found:
        sys.exit("This Python lacks packages that maskformer_fast needs:\n  " + "\n  ".join(found))
