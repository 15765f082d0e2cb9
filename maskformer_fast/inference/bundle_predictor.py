"""A bundle behind the interface of `inference.predictor.Predictor`, for the commands and for users' scripts.

The runtime does the work (`maskformer_fast.deploy.runtime`), without torch; here its arrays become tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from maskformer_fast.config import DataConfig, Task, TestConfig
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult
from maskformer_fast.data.datasets.presets import PRESETS
from maskformer_fast.data.images import ImageLike, as_rgb_array
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.bundle.manifest import MANIFEST_NAME, Manifest
from maskformer_fast.deploy.runtime.session import Runtime
from maskformer_fast.deploy.runtime.session import load as load_runtime
from maskformer_fast.distributed import world_size

Backend = Literal["auto", "onnxruntime", "tensorrt"]
CHANGEABLE = {"batch_size"}
"""Fields of the test configuration that a bundle does not fix."""
IMAGES_AT_ONCE = 4


class BundlePredictor:
    """Runs a bundle on images of any size that it takes, with the results of `Predictor`, on the CPU's memory."""

    def __init__(self, runtime: Runtime, test: TestConfig) -> None:
        self.runtime = runtime
        self.test = test
        self._metadata = runtime.manifest.metadata

    @property
    def metadata(self) -> Metadata:
        """Classes. Others of the same kinds may take their place, for their names and colours."""
        return self._metadata

    @metadata.setter
    def metadata(self, metadata: Metadata) -> None:
        fixed = self.runtime.manifest.metadata.is_thing
        check(metadata.is_thing == fixed, "metadata.is_thing", f"{fixed}, which the bundle was exported with",
              metadata.is_thing)
        self._metadata = metadata

    @property
    def input_test(self) -> TestConfig:
        """How a loader resizes the images that go to `infer`: not at all, that is the runtime's part."""
        return TestConfig(short_edge=None, batch_size=self.test.batch_size)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks the bundle can do."""
        return self.runtime.tasks

    def check_task(self, task: Task) -> None:
        """Raise ``ValueError`` for an unknown task."""
        check_choice("task", task, self.tasks)

    def predict(self, images: ImageLike | Sequence[ImageLike], task: Task = "semantic") -> Any:
        """Segment one image (-> one result) or several (-> a list); arguments and errors as `Predictor`'s."""
        self.check_task(task)
        if isinstance(images, ImageLike):
            return self.predict([images], task)[0]
        return [as_tensors(result) for result in self.runtime.predict([as_rgb_array(image) for image in images], task)]

    def resize(self, image: np.ndarray) -> Tensor:
        """Image [H, W, 3] uint8 -> what `infer` takes beside it, [3, H, W] uint8: unchanged, the runtime resizes."""
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

    def infer(
        self,
        inputs: Sequence[Tensor],  # not read
        originals: Sequence[np.ndarray],  # each [H, W, 3] uint8
        tasks: Sequence[Task],
    ) -> dict[Task, list[Result]]:
        """Each task's results at the images' sizes; by onnxruntime the network runs once, by TensorRT for each task."""
        found = self.runtime.predict_tasks(originals, tasks)
        return {task: [as_tensors(result) for result in results] for task, results in found.items()}


def is_bundle(path: str | Path) -> bool:
    """Whether a path is a folder with a manifest, so that it is a bundle or nothing."""
    return (Path(path) / MANIFEST_NAME).is_file()


def load_bundle(
    path: str | Path, device: str = "auto", test: TestConfig | None = None, backend: Backend = "auto"
) -> BundlePredictor:
    """A predictor from a bundle.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` (the first GPU, or that of this rank) or ``cuda:N``. One that is named
            decides the backend where that is ``auto``.
        test: must be what the bundle was exported with, but for the batch size, see `bundle_test`.
        backend: see `maskformer_fast.deploy.runtime.load`.

    Raises:
        BundleError: a damaged or changed bundle, or no engine for this GPU.
        ModuleNotFoundError: a library that the backend needs is not installed.
        ValueError: a test option that the bundle fixes, or a device that does not go with the backend.
    """
    opened = Bundle.open(path)
    fixed = bundle_test(opened.manifest)
    test = test or fixed
    for name in sorted(set(TestConfig.__dataclass_fields__) - CHANGEABLE):
        exported, got = getattr(fixed, name), getattr(test, name)
        check(got == exported, f"test.{name}", f"{exported!r}, which the bundle was exported with", got)
    backend, number = _backend_of(device, backend)
    return BundlePredictor(load_runtime(opened, backend, device=number), test)


def bundle_test(manifest: Manifest) -> TestConfig:
    """The test configuration that a bundle carries: its resizing and thresholds, one scale, masks resized once.

    The batch size is the number of images that the runtime is handed at a time; it has several in flight.
    """
    before, after = manifest.preprocess, manifest.postprocess
    return TestConfig(
        short_edge=before.short_edge,
        max_size=before.max_size,
        object_mask_threshold=after.object_mask_threshold,
        overlap_threshold=after.overlap_threshold,
        panoptic_rule=after.panoptic_rule,
        top_k=after.top_k,
        batch_size=IMAGES_AT_ONCE,
    )


def bundle_data(manifest: Manifest) -> DataConfig:
    """The data set that a bundle's classes are of, where they are a preset's; a bundle does not say where it lies."""
    name = manifest.metadata.name
    return DataConfig(dataset=name) if name in PRESETS else DataConfig()


def as_tensors(result: Result) -> Result:
    """A runtime's result with tensors in place of its arrays, sharing memory."""
    if isinstance(result, SemanticResult):
        return SemanticResult(torch.from_numpy(result.labels))
    if isinstance(result, PanopticResult):
        return PanopticResult(torch.from_numpy(result.id_map), result.segments)
    labels, scores, masks, boxes = map(torch.from_numpy, (result.labels, result.scores, result.masks, result.boxes))
    return InstanceResult(labels, scores, masks, boxes, result.size)


def _backend_of(device: str, backend: Backend) -> tuple[Backend, int]:
    """Backend and CUDA device number for a device as users name it."""
    own = torch.cuda.current_device() if world_size() > 1 and torch.cuda.is_available() else 0  # by `process_group`
    if device == "auto":
        return backend, own
    kind, _, number = device.partition(":")
    known = kind in ("cpu", "cuda") and (not number or (kind == "cuda" and number.isdecimal()))
    check(known, "device", "auto, cpu, cuda or cuda:N", device)
    on_device: Backend = "onnxruntime" if kind == "cpu" else "tensorrt"
    check(backend in ("auto", on_device), "device", f"one that {backend} runs on", device)
    return on_device, int(number) if number else own
