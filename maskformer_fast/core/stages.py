"""Seconds of the stages of a batch, and the stopwatch that takes them."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple


class StageSeconds(NamedTuple):
    """Seconds of a batch's stages, and from the start of its work to its results; waiting before is not counted."""

    preprocess: float
    network: float
    postprocess: float
    total: float


class Stopwatch:
    """Adds up the seconds of stages that follow each other; it starts when it is made.

    Attributes:
        seconds: of each stage, in the order in which the stages first ended.
    """

    def __init__(
        self, synchronize: Callable[[], object] | None = None, clock: Callable[[], float] = perf_counter
    ) -> None:
        """Start at once.

        Args:
            synchronize: waits for a device that works asynchronously; it is called at the end of every stage.
            clock: gives the present time in seconds, such as that of the wall, or of the processor.
        """
        self.seconds: dict[str, float] = {}
        self._synchronize = synchronize
        self._clock = clock
        self._last = self._now()

    def lap(self, stage: str) -> None:
        """End a stage: the time since the last lap is that stage's."""
        now = self._now()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    def stage_seconds(self) -> StageSeconds:
        """Seconds of the stages that every runtime has, 0 for one that did not run, and their sum."""
        preprocess, network, postprocess = (self.seconds.get(stage, 0.0) for stage in StageSeconds._fields[:3])
        return StageSeconds(preprocess, network, postprocess, preprocess + network + postprocess)

    def _now(self) -> float:
        if self._synchronize is not None:
            self._synchronize()
        return self._clock()
