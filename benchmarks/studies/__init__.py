"""Measurements that are no cases beside a peer, each a command of its own: ``python -m benchmarks.studies.NAME``."""

from __future__ import annotations

from pathlib import Path

OUTPUT = Path(__file__).parents[1] / "output"
"""Folder of the results, which git ignores; ``make record`` copies it to benchmarks/results."""
