"""The stopwatch of stages."""

from __future__ import annotations

from maskformer_fast.core.stages import Stopwatch


def test_laps_of_one_stage_add_up_and_each_waits_for_the_device() -> None:
    times = iter([10.0, 11.0, 13.0, 13.5, 17.5])
    waits: list[None] = []
    stopwatch = Stopwatch(lambda: waits.append(None), lambda: next(times))
    for stage in ("preprocess", "network", "backbone", "network"):
        stopwatch.lap(stage)
    assert stopwatch.seconds == {"preprocess": 1.0, "network": 6.0, "backbone": 0.5}
    assert list(stopwatch.seconds) == ["preprocess", "network", "backbone"] and len(waits) == 5
    assert stopwatch.stage_seconds() == (1.0, 6.0, 0.0, 7.0)
