"""`Predictor`: a network with its classes and thresholds, from images to results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maskformer_fast.config import TASKS, Amp, Config, Task, TestConfig
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.image_resize import short_edge_size
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import Result, SemanticResult
from maskformer_fast.core.stages import Stopwatch
from maskformer_fast.data.images import ImageLike, as_rgb_array
from maskformer_fast.data.loader import pad_images
from maskformer_fast.data.transforms import resize_image
from maskformer_fast.inference import postprocess
from maskformer_fast.modeling.autocast import autocast
from maskformer_fast.ops import resize_images


class Predictor:
    """Runs a network on images of any size and turns its predictions into results at the images' own size."""

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        metadata: Metadata,
        device: str | torch.device,
        amp: Amp | None = None,
    ) -> None:
        """``amp`` is the precision of inference, by default that of the training."""
        self.network = network
        self.config = config
        self.metadata = metadata
        self.device = torch.device(device)
        self.amp: Amp = config.solver.amp if amp is None else amp

    @property
    def test(self) -> TestConfig:
        """Resizing, thresholds and batch size."""
        return self.config.test

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks this network can do: a per-pixel baseline cannot tell instances apart."""
        return TASKS if self.config.model.type == "maskformer" else ("semantic",)

    def check_task(self, task: Task) -> None:
        """Raise ``ValueError`` for an unknown task or one that this kind of network cannot do."""
        check_choice("task", task, TASKS)
        check(task in self.tasks, "task", f"one that a {self.config.model.type} network can do {self.tasks}", task)

    def predict(self, images: ImageLike | Sequence[ImageLike], task: Task = "semantic", exif: bool = True) -> Any:
        """Segment one image (-> one result) or several (-> a list of results, in order).

        Args:
            images: paths, PIL images, uint8 RGB arrays [H, W, 3] or uint8 RGB tensors [3, H, W]; one or a sequence.
            task: "semantic" -> `SemanticResult`, "panoptic" -> `PanopticResult`, "instance" -> `InstanceResult`.
            exif: turn paths and PIL images as their EXIF orientation says.

        Raises:
            TypeError, ValueError: for something that is not such an image, or a task the network cannot do.
        """
        self.check_task(task)
        if isinstance(images, ImageLike):
            return self.predict([images], task, exif)[0]
        arrays = [as_rgb_array(image, exif) for image in images]
        size = self.config.test.batch_size
        results: list[Result] = []
        for start in range(0, len(arrays), size):
            results += self.infer(arrays[start : start + size], (task,))[task]
        return results

    def infer(
        self,
        images: Sequence[np.ndarray],  # each [H, W, 3] uint8 RGB
        tasks: Sequence[Task],
        stopwatch: Stopwatch | None = None,
    ) -> dict[Task, list[Result]]:
        """Each task's results at the images' sizes, from one forward pass for the images of each input size.

        The transformer attends to padding, so images of other input sizes in a batch would change an image's results.
        Semantic results with test-time augmentation (``config.test``) take additional forward passes. A ``stopwatch``,
        made by `stopwatch`, gets the stages ``preprocess``, ``network`` and ``postprocess``.
        """
        test = self.config.test
        stopwatch = stopwatch or Stopwatch()
        results: dict[Task, list[Result]] = {}
        if "semantic" in tasks and (test.multi_scale or test.flip):
            results["semantic"] = [self._augmented(image) for image in images]
            stopwatch.lap("network")
        if remaining := [task for task in tasks if task not in results]:
            each: list[dict[Task, Result]] = [{} for _ in images]
            for batch in self._batches_of_one_size(images):
                predictions = self.run_network([images[index] for index in batch], stopwatch)
                sizes = [(images[index].shape[0], images[index].shape[1]) for index in batch]
                for task, of_batch in self.postprocess(predictions, sizes, remaining).items():
                    for index, result in zip(batch, of_batch, strict=True):
                        each[index][task] = result
                stopwatch.lap("postprocess")
            results |= {task: [of_image[task] for of_image in each] for task in remaining}
        return results

    def _batches_of_one_size(self, images: Sequence[np.ndarray]) -> list[list[int]]:
        """Indices of the images whose inputs, with the padding that each has alone, have the same size."""
        test, step = self.config.test, max(self.config.model.size_divisibility, 1)
        batches: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            height, width = image.shape[:2]
            if test.edge is not None and image.size:
                height, width = short_edge_size(height, width, test.edge, test.max_size)
            batches.setdefault((-(-height // step), -(-width // step)), []).append(index)
        return list(batches.values())

    def run_network(
        self,
        images: Sequence[np.ndarray],  # each [H, W, 3] uint8 RGB; one batch
        stopwatch: Stopwatch | None = None,
    ) -> Any:
        """Resize and pad the images and run the network -> its predictions; `infer` without the post-processing."""
        test = self.config.test
        stopwatch = stopwatch or Stopwatch()
        with self._inference():
            inputs = self._batch([self._resize(image, test.edge, test.max_size) for image in images])
            stopwatch.lap("preprocess")
            predictions = self._predictions(*inputs)
            stopwatch.lap("network")
        return predictions

    def postprocess(
        self,
        predictions: Any,  # of `run_network`
        sizes: Sequence[tuple[int, int]],  # height, width of each image
        tasks: Sequence[Task],
    ) -> dict[Task, list[Result]]:
        """Each task's results at the images' sizes, from predictions; without test-time augmentation."""
        test, is_thing = self.config.test, self.metadata.is_thing
        results: dict[Task, list[Result]] = {}
        with self._inference():
            for task in tasks:
                if task == "semantic":
                    results[task] = list(postprocess.semantic(predictions, sizes, order=test.semantic_order))
                elif task == "panoptic":
                    results[task] = list(
                        postprocess.panoptic(
                            predictions,
                            sizes,
                            is_thing,
                            test.object_mask_threshold,
                            test.overlap_threshold,
                            test.panoptic_order,
                            test.panoptic_rule,
                        )
                    )
                else:
                    results[task] = list(postprocess.instances(predictions, sizes, is_thing, test.top_k))
        return results

    def stopwatch(self) -> Stopwatch:
        """A new stopwatch for `infer`, which waits for a GPU at the end of each stage."""
        on_gpu = self.device.type == "cuda"
        return Stopwatch(partial(torch.cuda.synchronize, self.device) if on_gpu else None)

    def _resize(self, image: np.ndarray, short_edge: int | tuple[int, int] | None, max_size: int) -> Tensor:
        """Image [H, W, 3] uint8 -> [3, h, w] uint8: on a CPU by Pillow, on a GPU there, to the same pixels."""
        if self.device.type != "cuda" or short_edge is None:
            return resize_image(image, short_edge, max_size)
        check(image.size > 0, "image", "shape [H, W, 3]", image.shape)
        size = short_edge_size(image.shape[0], image.shape[1], short_edge, max_size)
        frames = self._upload(torch.tensor(np.ascontiguousarray(image))).unsqueeze(0)
        return resize_images(frames, [size])[0][0]

    def _batch(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Resized images, each [3, h, w] uint8 -> the network's images, on its device, and valid sizes, on the host."""
        batch, valid_sizes = pad_images(images, self.config.model.size_divisibility)
        return self._upload(batch), valid_sizes

    def _predictions(self, images: Tensor, valid_sizes: Tensor) -> Any:
        """Run the network; the valid sizes of its predictions stay on the host, where post-processing needs them."""
        return self.network(images, self._upload(valid_sizes))._replace(valid_sizes=valid_sizes)

    def _upload(self, tensor: Tensor) -> Tensor:
        """Copy to the device. From pinned memory, the host does not wait for what a GPU has to do before."""
        if self.device.type != "cuda" or tensor.device.type != "cpu":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _augmented(self, image: np.ndarray) -> SemanticResult:
        """Average class scores over scales of the short edge and, if asked, the mirrored image."""
        test = self.config.test
        size = (image.shape[0], image.shape[1])
        total: Tensor | None = None
        with self._inference():
            for scale in test.multi_scale or (1.0,):
                edge = test.edge or min(size)
                scaled = [max(1, round(side * scale)) for side in (edge if isinstance(edge, tuple) else (edge,))]
                short_edge = (scaled[0], scaled[1]) if len(scaled) == 2 else scaled[0]
                resized = self._resize(image, short_edge, round(test.max_size * scale))
                for view in (resized, resized.flip(-1))[: 2 if test.flip else 1]:
                    predictions = self._predictions(*self._batch([view]))
                    scores = postprocess.semantic_scores(predictions, [size], test.semantic_order)[0]
                    scores = scores if view is resized else scores.flip(-1)
                    total = scores if total is None else total.add_(scores)
        assert total is not None  # at least one scale
        best = total.max(dim=0)
        views = len(test.multi_scale or (1.0,)) * (2 if test.flip else 1)
        dtype = torch.uint8 if total.shape[0] <= 255 else torch.int16
        return SemanticResult(best.indices.to(dtype), best.values / views)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode without gradients, in the predictor's precision; the former mode comes back after."""
        training = self.network.training
        self.network.eval()
        amp = "off" if self.amp == "fp16" and self.device.type == "cpu" else self.amp  # CPUs only emulate fp16
        try:
            with torch.no_grad(), autocast(self.device, amp):
                yield
        finally:
            self.network.train(training)
