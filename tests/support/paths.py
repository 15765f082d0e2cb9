"""Paths that tests share."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY_RECIPE = Path(__file__).with_name("tiny.yaml")
SHARED = ROOT.parent / "shared"
"""Recordings of other implementations and small real data sets; tests that need them are skipped without it."""
ORACLES = SHARED / "oracles/official"
