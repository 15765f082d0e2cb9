"""`Predictor`: a network with its classes and thresholds, from images to results."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from maskformer_fast.config import TASKS, Amp, Config, Task, TestConfig
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.image_resize import short_edge_size
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import Result, SemanticResult
from maskformer_fast.core.stages import Stopwatch
from maskformer_fast.data.bands import as_picture
from maskformer_fast.data.images import ImageLike
from maskformer_fast.data.loader import pad_images
from maskformer_fast.data.transforms import resize_image
from maskformer_fast.inference.cuda_graphs import GraphCache
from maskformer_fast.inference.device_parts import DevicePart, read_results
from maskformer_fast.inference.device_postprocess import (
    in_one_precision,
    panoptic_maps,
    ranked_instances,
    semantic_maps,
    semantic_score_maps,
)
from maskformer_fast.inference.tiled import infer_some_tiled, with_tile
from maskformer_fast.inference.windows import window_labels, window_origins
from maskformer_fast.modeling.autocast import autocast
from maskformer_fast.ops import resize_images


class _Inputs(NamedTuple):
    """Inputs of the network, and valid sizes on the host too."""

    images: Tensor  # [B, 3, H, W] uint8 RGB, on the network's device
    valid_sizes: Tensor  # [B, 2] int64
    on_device: Tensor  # the same on the network's device


class Predictor:
    """Runs a network on images of any size and turns its predictions into results at the images' own size."""

    def __init__(
        self,
        network: nn.Module,
        config: Config,
        metadata: Metadata,
        device: str | torch.device,
        amp: Amp | None = None,
        graphs: bool = False,
        in_flight: int = 1,
    ) -> None:
        """Keep the network, which must be on the device.

        Args:
            amp: precision of inference, by default that of the training.
            graphs: on a GPU, replay CUDA graphs for batches whose sizes come again (`inference.cuda_graphs`). Results
                are the same. Changes of weights are seen; other state of the network must not change.
            in_flight: on a CPU, number of images that are worked on at once where several are given, at most that of
                PyTorch's threads, which are divided among them. This gives the most images a second, where all threads
                on one image give the least latency.

        Raises:
            ValueError: ``in_flight`` is below 1.
        """
        check(in_flight > 0, "in_flight", "> 0", in_flight)
        self.network = network
        self.config = config
        self.metadata = metadata
        self.device = torch.device(device)
        self.amp: Amp = config.solver.amp if amp is None else amp
        self._graphs = GraphCache() if graphs and self.device.type == "cuda" else None
        workers = min(in_flight, torch.get_num_threads())
        self._pool = _open_pool(workers) if self.device.type == "cpu" and workers > 1 else None

    @property
    def test(self) -> TestConfig:
        """Resizing, thresholds and batch size."""
        return self.config.test

    @property
    def channels(self) -> int:
        """Number of bands of the pictures, as ``data.channels``: 0 for RGB of 8 bits."""
        return self.config.data.channels

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks this network can do: a per-pixel baseline cannot tell instances apart."""
        return TASKS if self.config.model.classifies_masks else ("semantic",)

    def check_task(self, task: Task) -> None:
        """Raise ``ValueError`` for an unknown task or one that this kind of network cannot do."""
        check_choice("task", task, TASKS)
        check(task in self.tasks, "task", f"one that a {self.config.model.type} network can do {self.tasks}", task)

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        task: Task = "semantic",
        exif: bool = True,
        tile: int | None = None,
    ) -> Any:
        """Segment one image (-> one result) or several (-> a list of results, in order).

        Args:
            images: paths, PIL images, uint8 RGB arrays [H, W, 3] or uint8 RGB tensors [3, H, W]; one or a sequence. For
                a network of bands (`channels`) paths, or arrays [H, W, C] uint8 or uint16.
            task: "semantic" -> `SemanticResult`, "panoptic" -> `PanopticResult`, "instance" -> `InstanceResult`.
            exif: turn paths and PIL images as their EXIF orientation says.
            tile: side in pixels of the tiles that larger images are cut into, in place of the test configuration's.

        Raises:
            TypeError, ValueError: for something that is not such an image, or a task the network cannot do.
        """
        if tile is not None:
            tiled = copy.copy(self)
            tiled.config = replace(self.config, test=with_tile(self.test, tile))
            return tiled.predict(images, task, exif)
        self.check_task(task)
        if isinstance(images, ImageLike) or not isinstance(images, Iterable):
            return self.predict([images], task, exif)[0]  # which refuses what is no image
        if self._pool is not None:
            return list(self._pool.map(lambda image: self._predict_one(image, task, exif), images))
        arrays = [as_picture(image, exif, self.channels) for image in images]
        size = self.config.test.batch_size
        results: list[Result] = []
        for start in range(0, len(arrays), size):
            results += self.infer(arrays[start : start + size], (task,))[task]
        return results

    def _predict_one(self, image: ImageLike, task: Task, exif: bool) -> Result:
        return self._infer([as_picture(image, exif, self.channels)], (task,))[task][0]

    def infer(
        self,
        images: Sequence[np.ndarray],  # each [H, W, 3] uint8 RGB
        tasks: Sequence[Task],
        stopwatch: Stopwatch | None = None,
    ) -> dict[Task, list[Result]]:
        """Each task's results at the images' sizes, from one forward pass for the images of each input size.

        The transformer attends to padding, so images of other input sizes in a batch would change an image's results.
        Semantic results with test-time augmentation (``config.test``) take additional forward passes. A ``stopwatch``,
        made by `stopwatch`, gets the stages ``preprocess``, ``network`` and ``postprocess``, and images are then not
        in flight together. The replay of a CUDA graph counts as ``network``, whose stages are one launch, and so do
        all stages of an image in tiles.
        """
        if self._pool is None or len(images) < 2 or stopwatch is not None:
            return self._infer(images, tasks, stopwatch)
        each = list(self._pool.map(lambda image: self._infer([image], tasks), images))
        return {task: [results[task][0] for results in each] for task in tasks}

    def _infer(
        self, images: Sequence[np.ndarray], tasks: Sequence[Task], stopwatch: Stopwatch | None = None
    ) -> dict[Task, list[Result]]:
        """Do as `infer`, in this thread."""
        test = self.config.test
        stopwatch = stopwatch or Stopwatch()
        tiled = infer_some_tiled(self, images, tasks)
        if tiled is not None:
            stopwatch.lap("network")
            return tiled
        results: dict[Task, list[Result]] = {}
        if "semantic" in tasks and (test.multi_scale or test.flip):
            results["semantic"] = [self._augmented(image) for image in images]
            stopwatch.lap("network")
        elif "semantic" in tasks and test.windows:
            results["semantic"] = [self._windowed(image) for image in images]
            stopwatch.lap("network")
        if remaining := [task for task in tasks if task not in results]:
            batches = self._batches_of_one_size(images)
            parts: list[DevicePart] = []
            for batch in batches:
                parts += self._batch_parts([images[index] for index in batch], remaining, stopwatch)
            each: list[dict[Task, Result]] = [{} for _ in images]
            work = [(batch, task) for batch in batches for task in remaining]
            for (batch, task), of_batch in zip(work, read_results(parts), strict=True):
                for index, result in zip(batch, of_batch, strict=True):
                    each[index][task] = result
            results |= {task: [of_image[task] for of_image in each] for task in remaining}
            stopwatch.lap("postprocess")
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
        stopwatch = stopwatch or Stopwatch()
        inputs = self._resized_batch(images)
        stopwatch.lap("preprocess")
        with self._inference():
            predictions = self._predictions(inputs)
        stopwatch.lap("network")
        return predictions

    def _batch_parts(
        self,
        images: Sequence[np.ndarray],  # each [H, W, 3] uint8 RGB; one batch
        tasks: Sequence[Task],
        stopwatch: Stopwatch,
    ) -> list[DevicePart]:
        """Do all of `infer` for a batch but the reading of results, where possible by replaying a CUDA graph."""
        sizes = tuple((image.shape[0], image.shape[1]) for image in images)
        inputs = self._resized_batch(images)
        stopwatch.lap("preprocess")
        parts = self._replayed(inputs, sizes, tasks)
        if parts is not None:
            stopwatch.lap("network")
            return parts
        with self._inference():
            predictions = self._predictions(inputs)
            stopwatch.lap("network")
            parts = self._device_parts(predictions, sizes, tasks)
            stopwatch.lap("postprocess")
        return parts

    def _replayed(
        self, inputs: _Inputs, sizes: tuple[tuple[int, int], ...], tasks: Sequence[Task]
    ) -> list[DevicePart] | None:
        """Results of a batch from its CUDA graph; None where it has none, and without ``graphs``."""
        test, kind = self.config.test, self.device.type
        # The panoptic order ``official`` reads the number of masks amid the work.
        if self._graphs is None or ("panoptic" in tasks and test.panoptic_order == "official"):
            return None

        batch, valid_sizes, on_device = inputs

        def work(images: Tensor) -> list[DevicePart]:
            with self._inference():
                return self._device_parts(self._predictions(_Inputs(images, valid_sizes, on_device)), sizes, tasks)

        valid = tuple(map(tuple, valid_sizes.tolist()))
        precision = self.amp, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        key = (tuple(batch.shape), valid, sizes, tuple(tasks), precision, test, tuple(self.metadata.is_thing))
        return self._graphs.run(key, self.network, batch, work)

    def postprocess(
        self,
        predictions: Any,  # of `run_network`
        sizes: Sequence[tuple[int, int]],  # height, width of each image
        tasks: Sequence[Task],
    ) -> dict[Task, list[Result]]:
        """Each task's results at the images' sizes, from predictions; without test-time augmentation.

        The host waits for a GPU once, after all tasks' operators are launched.
        """
        with self._inference():
            return dict(zip(tasks, read_results(self._device_parts(predictions, sizes, tasks)), strict=True))

    def _device_parts(
        self, predictions: Any, sizes: Sequence[tuple[int, int]], tasks: Sequence[Task]
    ) -> list[DevicePart]:
        """What a device does for each task: all of `postprocess` but the reading."""
        test, is_thing = self.config.test, self.metadata.is_thing
        predictions = in_one_precision(predictions)
        parts: list[DevicePart] = []
        for task in tasks:
            if task == "semantic":
                parts.append(semantic_maps(predictions, sizes, order=test.semantic_order))
            elif task == "panoptic":
                thresholds = test.object_mask_threshold, test.overlap_threshold
                orders = test.panoptic_order, test.panoptic_rule
                parts.append(panoptic_maps(predictions, sizes, is_thing, *thresholds, *orders))
            else:
                parts.append(ranked_instances(predictions, sizes, is_thing, test.top_k))
        return parts

    def stopwatch(self) -> Stopwatch:
        """A new stopwatch for `infer`, which waits for a GPU at the end of each stage."""
        on_gpu = self.device.type == "cuda"
        return Stopwatch(partial(torch.cuda.synchronize, self.device) if on_gpu else None)

    def _resize(self, image: np.ndarray, short_edge: int | tuple[int, int] | None, max_size: int) -> Tensor:
        """Image [H, W, 3] uint8 -> [3, h, w] uint8: on a CPU by Pillow, on a GPU there, to the same pixels.

        Bands [H, W, C] become float32 [C, h, w] by Pillow.
        """
        if not self._resizes_on_gpu or short_edge is None:
            return resize_image(image, short_edge, max_size)
        return self._resize_on_gpu([image], short_edge, max_size).images[0]

    def _resize_on_gpu(
        self,
        images: Sequence[np.ndarray],  # each [H, W, 3] uint8 RGB
        short_edge: int | tuple[int, int],
        max_size: int,
        divisor: int = 1,
    ) -> _Inputs:
        """Upload, resize and pad; images of one size take one upload and one launch."""
        for image in images:
            check(image.size > 0, "image", "shape [H, W, 3]", image.shape)
        sizes = [short_edge_size(image.shape[0], image.shape[1], short_edge, max_size) for image in images]
        if len({image.shape for image in images}) == 1:
            batch, on_device = resize_images(self._upload_frames(images), sizes, divisor)
        else:
            frames = [self._upload_frames([image])[0] for image in images]
            batch, on_device = resize_images(frames, sizes, divisor)
        return _Inputs(batch, torch.tensor(sizes), on_device)

    def _batch(self, images: Sequence[Tensor]) -> _Inputs:
        """Pad resized images, each [3, h, w] uint8."""
        batch, valid_sizes = pad_images(images, self.config.model.size_divisibility)
        return _Inputs(self._upload(batch), valid_sizes, self._upload(valid_sizes))

    def _resized_batch(self, images: Sequence[np.ndarray]) -> _Inputs:
        """Resize images [H, W, 3] uint8 as the test configuration says, and pad them."""
        test = self.config.test
        if self._resizes_on_gpu and test.edge is not None:
            divisor = max(self.config.model.size_divisibility, 1)
            return self._resize_on_gpu(images, test.edge, test.max_size, divisor)
        return self._batch([resize_image(image, test.edge, test.max_size) for image in images])

    def _predictions(self, inputs: _Inputs) -> Any:
        """Run the network; the valid sizes of its predictions stay on the host, where post-processing needs them."""
        return self.network(inputs.images, inputs.on_device)._replace(valid_sizes=inputs.valid_sizes)

    @property
    def _resizes_on_gpu(self) -> bool:
        return self.device.type == "cuda" and self.channels == 0

    def _upload_frames(self, frames: Sequence[np.ndarray]) -> Tensor:
        """Copy frames of one shape [H, W, 3], uint8, to the device, each once on the host -> [N, H, W, 3]."""
        pinned = torch.empty((len(frames), *frames[0].shape), dtype=torch.uint8, pin_memory=True)
        for target, frame in zip(pinned.numpy(), frames, strict=True):
            np.copyto(target, frame)
        return pinned.to(self.device, non_blocking=True)

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
                    predictions = self._predictions(self._batch([view]))
                    scores = semantic_score_maps(predictions, [size], test.semantic_order)[0]
                    scores = scores if view is resized else scores.flip(-1)
                    total = scores if total is None else total.add_(scores)
        assert total is not None  # at least one scale
        best = total.max(dim=0)
        views = len(test.multi_scale or (1.0,)) * (2 if test.flip else 1)
        dtype = torch.uint8 if total.shape[0] <= 255 else torch.int16
        return SemanticResult(best.indices.to(dtype), best.values / views)

    def _windowed(self, image: np.ndarray) -> SemanticResult:
        """Labels from the mean scores of windows along the longer side of the resized image."""
        test = self.config.test
        with self._inference():
            resized = self._resize(image, test.short_edge, test.max_size)
            origins, side = window_origins(*(grid := (resized.shape[1], resized.shape[2])))
            windows = self._batch([resized[:, top : top + side, left : left + side] for top, left in origins])
            predictions = self._predictions(windows)
            return SemanticResult(window_labels(predictions, origins, grid, (image.shape[0], image.shape[1])))

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode without gradients, in the predictor's precision; the former modes come back after."""
        # `eval` and `train` would take 0.75 ms for a ResNet-50, in which a GPU waits; this takes 0.1 ms.
        training = [module for module in self.network.modules() if module.training]
        for module in training:
            module.training = False
        amp = "off" if self.amp == "fp16" and self.device.type == "cpu" else self.amp  # CPUs only emulate fp16
        try:
            with torch.no_grad(), autocast(self.device, amp):
                yield
        finally:
            for module in training:
                module.training = True


def _open_pool(workers: int) -> ThreadPoolExecutor:
    """Threads that divide PyTorch's threads among them; the number of the calling thread stays."""
    threads, started = torch.get_num_threads(), threading.Barrier(workers + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first call takes the number that was set last, by whichever thread
        torch.set_num_threads(max(1, threads // workers))
        started.wait()

    pool = ThreadPoolExecutor(workers, "maskformer_fast", start)
    for _ in range(workers):
        pool.submit(int)  # a thread starts with each, as none is idle yet
    started.wait()
    torch.set_num_threads(threads)  # of threads that start later too
    return pool
