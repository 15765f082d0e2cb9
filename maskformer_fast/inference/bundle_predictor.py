"""`BundlePredictor`: a bundle behind the interface of `inference.predictor.Predictor`.

The runtime (`maskformer_fast.deploy.runtime`) does the work without torch; this file turns its arrays into tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskformer_fast.config import DataConfig, Task, TestConfig
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult
from maskformer_fast.data.bands import as_picture
from maskformer_fast.data.datasets.presets import PRESETS
from maskformer_fast.data.images import ImageLike
from maskformer_fast.deploy.bundle.folder import Bundle, naming
from maskformer_fast.deploy.bundle.manifest import MANIFEST_NAME, Manifest, Precision
from maskformer_fast.deploy.runtime.selection import Backend, choose_backend
from maskformer_fast.deploy.runtime.session import Runtime
from maskformer_fast.distributed import world_size
from maskformer_fast.inference.tiled import infer_some_tiled, with_tile

CHANGEABLE = {"batch_size", "tile", "tile_overlap", "tile_blend"}
"""Fields of the test configuration that a bundle does not fix."""
IMAGES_AT_ONCE = 4
"""Default batch size of a bundle's test configuration."""


class BundlePredictor:
    """Runs a bundle on images of any size that it takes; results are those of `Predictor`, as tensors on the CPU."""

    def __init__(self, runtime: Runtime, test: TestConfig) -> None:
        self.runtime = runtime
        self.test = test
        self._metadata = runtime.manifest.metadata

    @property
    def metadata(self) -> Metadata:
        """The bundle's classes, or classes set in their place: as many things and stuff, with other names or colours.

        Raises:
            ValueError: classes are set of which not the same ones are things.
        """
        return self._metadata

    @metadata.setter
    def metadata(self, metadata: Metadata) -> None:
        fixed = self.runtime.manifest.metadata.is_thing
        check(metadata.is_thing == fixed, "metadata.is_thing", f"{fixed}, which the bundle was exported with",
              metadata.is_thing)
        self._metadata = metadata

    @property
    def channels(self) -> int:
        """Number of bands of the pictures, as ``data.channels``: 0 for RGB of 8 bits."""
        return self.runtime.manifest.channels

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks the bundle can do."""
        return self.runtime.tasks

    def check_task(self, task: Task) -> None:
        """Raise ``ValueError`` for an unknown task."""
        check_choice("task", task, self.tasks)

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        task: Task = "semantic",
        exif: bool = True,
        tile: int | None = None,
    ) -> Any:
        """Segment one image (-> one result) or several (-> a list); arguments and errors as `Predictor`'s.

        As a bundle gives no scores, semantic labels of tiles are not blended: that of the nearest tile's middle counts.
        """
        self.check_task(task)
        if tile is not None:
            tiled = copy.copy(self)
            tiled.test = with_tile(self.test, tile)
            return tiled.predict(images, task, exif)
        if isinstance(images, ImageLike) or not isinstance(images, Iterable):
            return self.predict([images], task, exif)[0]  # which refuses what is no image
        arrays = [as_picture(image, exif, self.channels) for image in images]
        return self.infer(arrays, (task,))[task]

    def infer(
        self,
        images: Sequence[np.ndarray],  # each [H, W, 3] uint8 RGB, or bands [H, W, C] uint8 or uint16
        tasks: Sequence[Task],
    ) -> dict[Task, list[Result]]:
        """Each task's results at the images' sizes; on a CPU the network runs once, by TensorRT for each task."""
        tiled = infer_some_tiled(self, images, tasks)
        if tiled is not None:
            return tiled
        by_task = self.runtime.predict_tasks(images, tasks)
        return {task: [as_tensors(result) for result in results] for task, results in by_task.items()}


def is_bundle(path: str | Path) -> bool:
    """Whether a path is a folder with a manifest: a bundle, undamaged or not."""
    return (Path(path) / MANIFEST_NAME).is_file()


def load_bundle(
    path: str | Path,
    device: str = "auto",
    test: TestConfig | None = None,
    backend: Backend = "auto",
    precision: Precision | None = None,
    in_flight: int | None = None,
) -> BundlePredictor:
    """A predictor from a bundle.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` (the first GPU, or the GPU of this rank) or ``cuda:N``. Another than
            ``auto`` decides the backend where ``backend`` is ``auto``.
        test: the settings that the bundle was exported with; only the batch size may differ, see `bundle_test`.
        backend, precision: see `maskformer_fast.deploy.runtime.load`.
        in_flight: likewise, on a CPU; a GPU has memory for the default number.

    Raises:
        BundleError: a damaged or changed bundle, or no engine for this GPU or of this precision.
        ModuleNotFoundError: a library that the backend needs is not installed.
        ValueError: another value of a test option that the bundle fixes, or a device or precision that the
            backend does not have.
    """
    opened = Bundle.open(path)
    fixed = bundle_test(opened.manifest)
    test = test or fixed
    for name in sorted(set(TestConfig.__dataclass_fields__) - CHANGEABLE):
        exported, got = getattr(fixed, name), getattr(test, name)
        check(got == exported, f"test.{name}", f"{exported!r}, which the bundle was exported with", got)
    backend, number = _backend_of(device, backend)
    with naming(opened.folder):
        choice = choose_backend(opened.manifest, backend, number, precision)
    in_flight = None if choice.backend == "tensorrt" else in_flight
    return BundlePredictor(Runtime(opened, choice, number or 0, in_flight), test)


def bundle_test(manifest: Manifest) -> TestConfig:
    """The test configuration of a bundle: its resizing and thresholds, without test-time augmentation.

    The batch size is the number of images that the runtime gets in one call; it works on several at once.
    """
    before, after = manifest.preprocess, manifest.postprocess
    edge = before.short_edge
    short_edge, size = (min(edge), edge) if isinstance(edge, tuple) else (edge, None)
    return TestConfig(
        short_edge=short_edge,
        max_size=before.max_size,
        size=size,
        object_mask_threshold=after.object_mask_threshold,
        overlap_threshold=after.overlap_threshold,
        panoptic_rule=after.panoptic_rule,
        top_k=after.top_k,
        batch_size=IMAGES_AT_ONCE,
    )


def bundle_data(manifest: Manifest) -> DataConfig:
    """The data options of a bundle: the preset data set that its classes are from, else defaults, and its bands.

    They have no paths.
    """
    name = manifest.metadata.name
    data = DataConfig(channels=manifest.channels)
    return replace(data, dataset=name) if name in PRESETS else data


def as_tensors(result: Result) -> Result:
    """A runtime's result with tensors in place of its arrays; both share memory."""
    if isinstance(result, SemanticResult):
        return SemanticResult(torch.from_numpy(result.labels))
    if isinstance(result, PanopticResult):
        return PanopticResult(torch.from_numpy(result.id_map), result.segments)
    labels, scores, masks, boxes = map(torch.from_numpy, (result.labels, result.scores, result.masks, result.boxes))
    return InstanceResult(labels, scores, masks, boxes, result.size)


def _backend_of(device: str, backend: Backend) -> tuple[Backend, int | None]:
    """Backend and CUDA device number, None for the CPU, of a device as users name it."""
    # In a process group, `process_group` made the rank's GPU the current one.
    default = torch.cuda.current_device() if world_size() > 1 and torch.cuda.is_available() else 0
    if device == "auto":
        return backend, default
    kind, _, number = device.partition(":")
    known = kind in ("cpu", "cuda") and (not number or (kind == "cuda" and number.isdecimal()))
    check(known, "device", "auto, cpu, cuda or cuda:N", device)
    fits = backend == "auto" or (backend == "tensorrt") == (kind == "cuda")
    check(fits, "device", f"one that {backend} runs on", device)
    if kind == "cpu":
        return backend, None
    return "tensorrt", int(number) if number else default
