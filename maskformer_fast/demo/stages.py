"""One image through a predictor, stage by stage: the time of each, and the tasks' results as they are asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from maskformer_fast.config import Task, TestConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import Result, SemanticResult
from maskformer_fast.inference import postprocess
from maskformer_fast.inference.bundle_predictor import BundlePredictor, as_tensors
from maskformer_fast.inference.predictor import Predictor

__all__ = ["StagedImage", "StagedPredictor"]


class StagedPredictor:
    """A predictor that tells what takes how long. One image is worked on at a time, whatever thread asks.

    The network runs once an image, so semantic results are those of one scale, whatever the test options say.
    """

    def __init__(self, predictor: Predictor | BundlePredictor) -> None:
        """The predictor is changed: its network is watched, and test-time augmentation is off."""
        self.predictor = predictor
        self.lock = threading.Lock()
        self.network: _WatchedNetwork | None = None
        if isinstance(predictor, Predictor):
            config = predictor.config
            predictor.config = replace(config, test=replace(config.test, multi_scale=(), flip=False))
            self.network = _WatchedNetwork(predictor.network, predictor.device)
            predictor.network = self.network

    @property
    def metadata(self) -> Metadata:
        return self.predictor.metadata

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks that the network can do."""
        return self.predictor.tasks

    @property
    def test(self) -> TestConfig:
        return self.predictor.test

    @property
    def runs_on(self) -> str:
        """Device or backend, for people to read."""
        return str(self.predictor.device) if isinstance(self.predictor, Predictor) else self.predictor.runtime.backend

    def open(
        self,
        image: np.ndarray,  # [H, W, 3] uint8 RGB
    ) -> StagedImage:
        """Nothing is computed yet."""
        return StagedImage(self, image)


class StagedImage:
    """An image, what the network said of it, and its results. Results and times are kept.

    Attributes:
        seconds: of the stages that serve all tasks, in their order; empty before the first result.
    """

    def __init__(self, owner: StagedPredictor, image: np.ndarray) -> None:
        self.image = image
        self.seconds: dict[str, float] = {}
        self._owner = owner
        self._predictions: Any = None
        self._results: dict[Task, tuple[Result, float]] = {}

    def result(self, task: Task) -> tuple[Result, float]:
        """A task's result at the image's size, and the seconds of its post-processing.

        The network runs for the first task that is asked for. A bundle post-processes all tasks then, and the seconds
        are those of all.

        Raises:
            ValueError: a task that the network cannot do, or a size that a bundle does not take.
        """
        self._owner.predictor.check_task(task)
        with self._owner.lock:
            if task not in self._results:
                if isinstance(self._owner.predictor, Predictor):
                    self._results[task] = self._infer(self._owner.predictor, task)
                else:
                    self._run_bundle(self._owner.predictor)
            return self._results[task]

    def _infer(self, predictor: Predictor, task: Task) -> tuple[Result, float]:
        network = self._owner.network
        assert network is not None  # every Predictor has one
        network.start(self._predictions)
        start = network.now()
        resized = predictor.resize(self.image)
        resize_end = network.now()
        result = predictor.infer([resized], [self.image], (task,))[task][0]
        end = network.now()
        if self._predictions is None:
            self._predictions = network.predictions
            self.seconds = {"resize": resize_end - start, **network.seconds()}
        network.predictions = None  # one image's, which is not kept longer than the image
        return result, end - network.end

    def _run_bundle(self, predictor: BundlePredictor) -> None:
        found, took = predictor.runtime.timed_tasks([self.image], predictor.tasks)
        self.seconds = {"resize": took.preprocess, "network": took.network}
        self._results = {task: (as_tensors(results[0]), took.postprocess) for task, results in found.items()}

    def pixel_scores(self) -> np.ndarray | None:
        """Score of the semantic label of every pixel -> [H, W] float32; None of a bundle, which gives labels alone.

        Of mask classification the sum over queries of class probability x mask probability, which may be above 1; of
        per-pixel classification the class's probability.
        """
        if self._predictions is None or not isinstance(self._owner.predictor, Predictor):
            return None
        size = (self.image.shape[0], self.image.shape[1])
        with self._owner.lock:
            found: SemanticResult = postprocess.semantic(
                self._predictions, [size], with_scores=True, order=self._owner.test.semantic_order
            )[0]
        assert found.scores is not None  # asked for
        return found.scores.float().cpu().numpy()


class _WatchedNetwork(nn.Module):
    """A network that notes when its parts are done, and gives predictions again that it is handed back."""

    def __init__(self, inner: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.inner = inner
        self.device = device
        self.predictions: Any = None
        self.end = 0.0
        self._marks: dict[str, float] = {}
        if isinstance(part := getattr(inner, "backbone", None), nn.Module):
            part.register_forward_hook(self._marker("backbone"))
        if isinstance(part := getattr(inner, "predictor", None), nn.Module):
            part.register_forward_pre_hook(self._marker("pixel decoder"))

    def _marker(self, stage: str) -> Callable[..., None]:
        def mark(*_: Any) -> None:
            self._marks[stage] = self.now()

        return mark

    def start(self, predictions: Any) -> None:
        """Before an image: predictions that it has already, or None."""
        self.predictions = predictions
        self._marks = {}

    def forward(self, *arguments: Any) -> Any:
        if self.predictions is None:
            self._marks["begin"] = self.now()
            self.predictions = self.inner(*arguments)
        self.end = self.now()
        return self.predictions

    def seconds(self) -> dict[str, float]:
        """Of the parts that ran, in their order; normalisation counts as the backbone's."""
        ends = [(stage, self._marks[stage]) for stage in ("backbone", "pixel decoder") if stage in self._marks]
        last = {0: "network", 1: "decoders", 2: "transformer decoder"}[len(ends)]
        if isinstance(getattr(self.inner, "predictor", None), nn.Conv2d):
            last = "classifier"
        begin = self._marks["begin"]
        found = {}
        for stage, end in [*ends, (last, self.end)]:
            found[stage] = end - begin
            begin = end
        return found

    def now(self) -> float:
        """Seconds; a GPU is waited for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()
