"""One image through a predictor, with the seconds of each stage; each task's result is made when it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from maskformer_fast.config import Task
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import Result
from maskformer_fast.core.stages import Stopwatch
from maskformer_fast.inference import postprocess
from maskformer_fast.inference.bundle_predictor import BundlePredictor, as_tensors
from maskformer_fast.inference.predictor import Predictor

__all__ = ["StagedImage", "StagedPredictor"]


class StagedPredictor:
    """A predictor whose stages are timed. It works on one image at a time, whatever threads call.

    The network runs once an image, so semantic results are without test-time augmentation, also if the test options
    ask for it.
    """

    def __init__(self, predictor: Predictor | BundlePredictor) -> None:
        self.predictor = predictor
        self.lock = threading.Lock()

    @property
    def metadata(self) -> Metadata:
        """Classes."""
        return self.predictor.metadata

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks that the network can do."""
        return self.predictor.tasks

    @property
    def runs_on(self) -> str:
        """Device or backend, for people to read."""
        return str(self.predictor.device) if isinstance(self.predictor, Predictor) else self.predictor.runtime.backend

    def open(
        self,
        image: np.ndarray,  # [H, W, 3] uint8 RGB
    ) -> StagedImage:
        """An image to be segmented; this computes nothing yet."""
        return StagedImage(self, image)


class StagedImage:
    """An image, the network's predictions for it, and its results. Results and times are kept.

    Attributes:
        seconds: of the stages that serve all tasks, in their order; empty before the first result.
    """

    def __init__(self, owner: StagedPredictor, image: np.ndarray) -> None:
        self.image = image
        self.seconds: dict[str, float] = {}
        self._owner = owner
        self._size = (image.shape[0], image.shape[1])
        self._predictions: Any = None
        self._results: dict[Task, tuple[Result, float]] = {}

    def result(self, task: Task) -> tuple[Result, float]:
        """A task's result at the image's size, and the seconds of its post-processing.

        The network runs for the first task that is asked for. A bundle then post-processes all tasks, and the seconds
        are those of all.

        Raises:
            ValueError: a task that the network cannot do, or a size that a bundle does not take.
        """
        predictor = self._owner.predictor
        predictor.check_task(task)
        with self._owner.lock:
            if task not in self._results:
                if isinstance(predictor, BundlePredictor):
                    self._run_bundle(predictor)
                else:
                    if self._predictions is None:
                        self._run_network(predictor)
                    stopwatch = predictor.stopwatch()
                    result = predictor.postprocess(self._predictions, [self._size], (task,))[task][0]
                    stopwatch.lap("postprocess")
                    self._results[task] = result, stopwatch.seconds["postprocess"]
            return self._results[task]

    def pixel_scores(self) -> np.ndarray | None:
        """Score of the semantic label of every pixel -> [H, W] float32; None for a bundle, which gives labels alone.

        In mask classification it is the sum over queries of class probability x mask probability, which may be above 1;
        in per-pixel classification, the class's probability.
        """
        predictor = self._owner.predictor
        if self._predictions is None or not isinstance(predictor, Predictor):
            return None
        with self._owner.lock:
            result = postprocess.semantic(
                self._predictions, [self._size], with_scores=True, order=predictor.test.semantic_order
            )[0]
        assert result.scores is not None  # asked for
        scores: np.ndarray = result.scores.float().cpu().numpy()
        return scores

    def _run_network(self, predictor: Predictor) -> None:
        stopwatch = predictor.stopwatch()
        with _timed_parts(predictor.network, stopwatch):
            self._predictions = predictor.run_network([self.image], stopwatch)
        seconds = stopwatch.seconds
        # The stage "network" is the rest of the network, after the timed parts; it gets the name of that rest.
        rest = ("network", "decoders", "transformer decoder")[("backbone" in seconds) + ("pixel decoder" in seconds)]
        if isinstance(getattr(predictor.network, "predictor", None), nn.Conv2d):
            rest = "classifier"
        names = {"preprocess": "resize", "network": rest}
        self.seconds = {names.get(stage, stage): took for stage, took in seconds.items()}

    def _run_bundle(self, predictor: BundlePredictor) -> None:
        by_task, seconds = predictor.runtime.timed_tasks([self.image], predictor.tasks)
        self.seconds = {"resize": seconds.preprocess, "network": seconds.network}
        self._results = {task: (as_tensors(results[0]), seconds.postprocess) for task, results in by_task.items()}


@contextmanager
def _timed_parts(network: nn.Module, stopwatch: Stopwatch) -> Iterator[None]:
    """Time the backbone, normalisation included, and the pixel decoder as separate stages inside the block."""
    backbone, head = getattr(network, "backbone", None), getattr(network, "predictor", None)
    handles = []
    if isinstance(backbone, nn.Module):
        handles.append(backbone.register_forward_hook(lambda *_: stopwatch.lap("backbone")))
    if isinstance(head, nn.Module):
        handles.append(head.register_forward_pre_hook(lambda *_: stopwatch.lap("pixel decoder")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
