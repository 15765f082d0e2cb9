"""The stopwatch of stages."""

from __future__ import annotations

import pytest

from maskformer_fast.core import stages
from maskformer_fast.core.stages import Stopwatch


def test_laps_of_one_stage_add_up_and_each_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 13.0, 13.5, 17.5])
    waits: list[None] = []
    monkeypatch.setattr(stages, "perf_counter", lambda: next(times))
    stopwatch = Stopwatch(lambda: waits.append(None))
    for stage in ("preprocess", "network", "backbone", "network"):
        stopwatch.lap(stage)
    assert stopwatch.seconds == {"preprocess": 1.0, "network": 6.0, "backbone": 0.5}
    assert list(stopwatch.seconds) == ["preprocess", "network", "backbone"] and len(waits) == 5
    assert stopwatch.stage_seconds() == (1.0, 6.0, 0.0, 7.0)
