"""The operators beside their peers: the cases of every ``benchmarks/cpu_*.py``."""

from __future__ import annotations

from benchmarks import cpu_algebra, cpu_criterion, cpu_matching, cpu_segments, cpu_semantic
from benchmarks.harness import Case


def cases() -> list[Case]:
    """Rows of the table."""
    files = (cpu_semantic, cpu_segments, cpu_matching, cpu_algebra, cpu_criterion)
    return [case for file in files for case in file.cases()]
