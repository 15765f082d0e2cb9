"""A network with its classes and thresholds: images in, results out. `maskformer_fast.load` returns one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from maskformer_fast import postprocess
from maskformer_fast.bundle_predictor import (
    Backend,
    BundlePredictor,
    bundle_data,
    bundle_test,
    is_bundle,
    load_bundle,
)
from maskformer_fast.checkpoint import load_into, load_weights
from maskformer_fast.config import TASKS, Amp, Config, DataConfig, Task, TestConfig, check, check_choice
from maskformer_fast.data import dataset_metadata
from maskformer_fast.data.images import ImageLike, as_rgb_array
from maskformer_fast.data.loader import pad_images
from maskformer_fast.data.transforms import resize_image
from maskformer_fast.deploy.bundle import read_manifest
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.inference import convolves_bfloat16, prepare_for_inference
from maskformer_fast.ops import resize_images
from maskformer_fast.recipes import load_recipe, recipe_names
from maskformer_fast.resizing import short_edge_size
from maskformer_fast.structures import Metadata, Result, SemanticResult

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Predictor:
    """Runs a network on images of any size and turns its predictions into results at the images' own size."""

    def __init__(self, network: nn.Module, config: Config, metadata: Metadata, device: str | torch.device) -> None:
        self.network = network
        self.config = config
        self.metadata = metadata
        self.device = torch.device(device)

    @property
    def test(self) -> TestConfig:
        """Resizing, thresholds and batch size."""
        return self.config.test

    @property
    def input_test(self) -> TestConfig:
        """How a loader resizes the images that go to `infer`."""
        return self.config.test

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Tasks this network can do: a per-pixel baseline cannot tell instances apart."""
        return TASKS if self.config.model.type == "maskformer" else ("semantic",)

    def predict(self, images: ImageLike | Sequence[ImageLike], task: Task = "semantic") -> Any:
        """Segment one image (-> one result) or several (-> a list of results, in order).

        Args:
            images: paths, PIL images, uint8 RGB arrays [H, W, 3] or uint8 RGB tensors [3, H, W]; one or a sequence.
            task: "semantic" -> `SemanticResult`, "panoptic" -> `PanopticResult`, "instance" -> `InstanceResult`.

        Raises:
            TypeError, ValueError: for something that is not such an image, or a task the network cannot do.
        """
        self.check_task(task)
        if isinstance(images, ImageLike):
            return self.predict([images], task)[0]
        arrays = [as_rgb_array(image) for image in images]
        results: list[Result] = []
        for start in range(0, len(arrays), self.config.test.batch_size):
            batch = arrays[start : start + self.config.test.batch_size]
            results += self.infer([self.resize(array) for array in batch], batch, (task,))[task]
        return results

    def check_task(self, task: Task) -> None:
        """Raise ``ValueError`` for an unknown task or one that this kind of network cannot do."""
        check_choice("task", task, TASKS)
        check(task in self.tasks, "task", f"one that a {self.config.model.type} network can do {self.tasks}", task)

    def resize(self, image: np.ndarray) -> Tensor:
        """Image [H, W, 3] uint8 -> network input [3, h, w] uint8, by ``config.test``; on a GPU by the GPU."""
        test = self.config.test
        if self.device.type != "cuda" or test.short_edge is None:
            return resize_image(image, test.short_edge, test.max_size)
        check(image.size > 0, "image", "shape [H, W, 3]", image.shape)
        size = short_edge_size(image.shape[0], image.shape[1], test.short_edge, test.max_size)
        frames = torch.tensor(np.ascontiguousarray(image), device=self.device).unsqueeze(0)
        return resize_images(frames, [size])[0][0]

    def infer(
        self,
        inputs: Sequence[Tensor],  # each [3, h, w] uint8, already resized
        originals: Sequence[np.ndarray],  # each [H, W, 3] uint8
        tasks: Sequence[Task],
    ) -> dict[Task, list[Result]]:
        """One forward pass, then each task's results at the originals' sizes."""
        sizes = [(image.shape[0], image.shape[1]) for image in originals]
        test = self.config.test
        results: dict[Task, list[Result]] = {}
        with self._inference():
            if "semantic" in tasks and (test.multi_scale or test.flip):
                results["semantic"] = [self._augmented(image) for image in originals]
            remaining = [task for task in tasks if task not in results]
            if not remaining:
                return results
            predictions = self._forward(inputs)
            for task in remaining:
                if task == "semantic":
                    results[task] = list(postprocess.semantic(predictions, sizes, order=test.semantic_order))
                elif task == "panoptic":
                    results[task] = list(
                        postprocess.panoptic(
                            predictions,
                            sizes,
                            self.metadata.is_thing,
                            test.object_mask_threshold,
                            test.overlap_threshold,
                            test.panoptic_order,
                            test.panoptic_rule,
                        )
                    )
                else:
                    results[task] = list(
                        postprocess.instances(predictions, sizes, self.metadata.is_thing, test.top_k)
                    )
        return results

    def _forward(self, images: Sequence[Tensor]) -> Any:
        batch, valid_sizes = pad_images(list(images), self.config.model.size_divisibility)
        return self.network(batch.to(self.device), valid_sizes.to(self.device))

    def _augmented(self, image: np.ndarray) -> SemanticResult:
        """Average class scores over scales of the short edge and, if asked, the mirrored image."""
        test = self.config.test
        size = (image.shape[0], image.shape[1])
        total: Tensor | None = None
        for scale in test.multi_scale or (1.0,):
            short_edge = round((test.short_edge or min(size)) * scale)
            resized = resize_image(image, short_edge, round(test.max_size * scale))
            for view in (resized, resized.flip(-1))[: 2 if test.flip else 1]:
                scores = postprocess.semantic_scores(self._forward([view]), [size], test.semantic_order)[0]
                scores = scores if view is resized else scores.flip(-1)
                total = scores if total is None else total.add_(scores)
        assert total is not None  # at least one scale
        best = total.max(dim=0)
        views = len(test.multi_scale or (1.0,)) * (2 if test.flip else 1)
        dtype = torch.uint8 if total.shape[0] <= 255 else torch.int16
        return SemanticResult(best.indices.to(dtype), best.values / views)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode without gradients, in the precision of the solver; the former mode comes back after."""
        training = self.network.training
        self.network.eval()
        amp = self.config.solver.amp
        off = amp == "off" or (amp == "fp16" and self.device.type == "cpu")  # CPUs only emulate fp16
        autocast = nullcontext() if off else torch.autocast(self.device.type, AMP_DTYPES[amp])
        try:
            with torch.no_grad(), autocast:
                yield
        finally:
            self.network.train(training)


def load(
    path_or_recipe: str | Path, device: str = "auto", test: TestConfig | None = None, backend: Backend = "auto",
    amp: Amp | None = None,
) -> Predictor | BundlePredictor:  # fmt: skip
    """A predictor from a checkpoint (weights file, checkpoint folder, run folder), a bundle or, untrained, a recipe.

    On a CPU its network is rebuilt for inference (`modeling.inference`) and cannot be trained, saved, moved to another
    device or exported; `load_network` leaves it as it is.

    Args:
        test: replaces the resizing and thresholds that the checkpoint or recipe carries; a bundle's cannot be replaced.
        backend: what runs a bundle, see `maskformer_fast.deploy.runtime.load`; of the others PyTorch is the only one.
        amp: precision of the network, by default that of its training; a bundle's is fixed.

    Raises:
        FileNotFoundError: neither a path nor a recipe.
        CheckpointError, BundleError: a damaged checkpoint or bundle.
        ValueError: `backend` for what is not a bundle, `amp` for a bundle, or `test` that is not the bundle's.
    """
    if is_bundle(path_or_recipe):
        check(amp is None, "amp", "none, as a bundle's precision was chosen when it was exported", amp)
        return load_bundle(path_or_recipe, device, test, backend)
    check(backend == "auto", "backend", f"auto, as {path_or_recipe} is not a bundle and runs in PyTorch", backend)
    predictor = load_network(path_or_recipe, device, test)
    if amp is not None:
        check_choice("amp", amp, get_args(Amp))
        config = predictor.config
        predictor.config = replace(config, solver=replace(config.solver, amp=amp))
    if predictor.device.type == "cpu" and torch.backends.mkldnn.is_available():
        half = predictor.config.solver.amp == "bf16" and convolves_bfloat16()
        prepare_for_inference(predictor.network, torch.bfloat16 if half else torch.float32)
    return predictor


def load_network(path_or_recipe: str | Path, device: str = "auto", test: TestConfig | None = None) -> Predictor:
    """`load` for what runs in PyTorch: checkpoints and recipes."""
    where = resolve_device(device)
    if not Path(path_or_recipe).exists() and str(path_or_recipe) in recipe_names():
        config = load_recipe(str(path_or_recipe))
        metadata = dataset_metadata(config.data)
        config = with_classes(config, metadata)
        network = build_model(config.model)
    else:
        config, metadata, weights, _ = load_weights(path_or_recipe)
        network = build_model(config.model)
        load_into(network, weights, path_or_recipe)
    return Predictor(network.to(where).eval(), replace(config, test=test or config.test), metadata, where)


def carried_options(path: str | Path) -> tuple[DataConfig, TestConfig]:
    """Data and test options that a checkpoint or a bundle carries. Errors are those of `load`."""
    if is_bundle(path):
        manifest, _ = read_manifest(path)  # `load` verifies the files
        return bundle_data(manifest), bundle_test(manifest)
    config = load_weights(path).config
    return config.data, config.test


def with_classes(config: Config, metadata: Metadata) -> Config:
    """The configuration with ``model.num_classes`` taken from the data set; a different explicit number is an error."""
    got = config.model.num_classes
    check(got in (0, metadata.num_classes), "model.num_classes", f"0 or the data set's {metadata.num_classes}", got)
    return replace(config, model=replace(config.model, num_classes=metadata.num_classes))


def resolve_device(device: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises ``ValueError`` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected auto or a device that torch can use here, got {device!r}") from error
    return resolved
