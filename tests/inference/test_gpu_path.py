"""What a GPU does in `Predictor` and post-processing: no wait of the host before the last launch, half-precision masks.

On CPU tensors, where the same functions run that run on a GPU's; the files beside this one are for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from maskformer_fast.config import TestConfig
from maskformer_fast.inference import device_postprocess, postprocess
from maskformer_fast.inference.load import load, load_network
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.structures import Predictions
from tests.support.host_reads import NoHostRead
from tests.support.images import photo
from tests.support.postprocess_cases import INPUT_SIZE, OUTPUT_SIZES, all_results, random_predictions
from tests.support.recorded_graphs import FakeCuda, Launches

IS_THING = (True, False, True, False, True, False, True)
TASKS: dict[str, Callable[[Predictions], list[Any]]] = {
    "semantic": lambda predictions: postprocess.semantic(predictions, OUTPUT_SIZES),
    "semantic with scores": lambda predictions: postprocess.semantic(predictions, OUTPUT_SIZES, True),
    "panoptic": lambda predictions: postprocess.panoptic(predictions, OUTPUT_SIZES, IS_THING, 0.4, 0.3),
    "instance": lambda predictions: postprocess.instances(predictions, OUTPUT_SIZES, IS_THING, 10),
}


class Events(NoHostRead):
    """Records the launches of our operators; `read` records that of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "maskformer_fast":
            self.names.append("launch")
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def record_reads(events: Events) -> Iterator[None]:
    """Add a ``read`` for each tensor whose values the host reads, but for valid sizes, which are on the host."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__contains__"):
            original = getattr(torch.Tensor, name)

            def recorded(self: Any, *arguments: Any, original: Any = original) -> Any:
                if self.dtype != torch.int64 or self.shape[-1:] != (2,):
                    events.names.append("read")
                return original(self, *arguments)

            patched.setattr(torch.Tensor, name, recorded)
        yield


def assert_like(one: Any, other: Any) -> None:
    """Results of the same kind and shapes, equal in nearly all values."""
    for name, value in vars(other).items():
        got = getattr(one, name)
        if not isinstance(value, torch.Tensor):
            assert name == "segments" or got == value
        elif value.is_floating_point():
            torch.testing.assert_close(got, value, atol=1e-4, rtol=0)
        else:
            assert got.shape == value.shape and got.dtype == value.dtype
            assert value.numel() == 0 or (got == value).float().mean() > 0.99


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_postprocess, "_on_gpu", lambda tensor: True)


@pytest.mark.parametrize(("task", "reads"), [("semantic", 0), ("semantic with scores", 0), ("panoptic", 1),
                                             ("instance", 1)])  # fmt: skip
@pytest.mark.usefixtures("on_gpu")
def test_values_are_read_once_and_after_the_last_launch(
    task: str, reads: int
) -> None:
    predictions = random_predictions()
    TASKS[task](predictions)  # tensors of flags are copied to the device once
    events = Events()
    with record_reads(events), events:
        TASKS[task](predictions)
    launches = len(events.names) - reads
    assert launches >= 3 and events.names == ["launch"] * launches + ["read"] * reads


@pytest.mark.parametrize("tasks", [("semantic",), ("instance", "panoptic"), ("semantic", "panoptic", "instance")])
def test_a_predictor_reads_once_for_all_its_tasks_and_images(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor: Any = load("demo", "cpu")
    images = [photo(0, 40, 56), photo(1, 64, 64), photo(2, 40, 56)]  # two batches
    predictor.config = replace(predictor.config, test=replace(TestConfig(), short_edge=None, object_mask_threshold=0.1))
    wanted = {task: predictor.infer(images, (task,))[task] for task in tasks}
    monkeypatch.setattr(device_postprocess, "_on_gpu", lambda tensor: True)
    predictor.infer(images, tasks)
    events = Events()
    with record_reads(events), events:
        got = predictor.infer(images, tasks)
    reads = 1 if len(tasks) > 1 else 0
    launches = len(events.names) - reads
    assert launches >= 2 * len(tasks) and events.names == ["launch"] * launches + ["read"] * reads
    for task in tasks:
        for one, other in zip(got[task], wanted[task], strict=True):
            assert_like(one, other)


def test_results_equal_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = random_predictions(queries=30)
    wanted = all_results(predictions, OUTPUT_SIZES)
    monkeypatch.setattr(device_postprocess, "_on_gpu", lambda tensor: True)
    for ours, theirs in zip(all_results(predictions, OUTPUT_SIZES), wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(a, torch.Tensor):
                assert a.shape == b.shape and a.dtype == b.dtype
                assert (a == b).float().mean() > 0.999 if not a.is_floating_point() else torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("on_gpu")
def test_masks_have_the_precision_of_the_network(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = random_predictions()
    predictions = predictions._replace(mask_embeddings=predictions.mask_embeddings.to(dtype))  # features: as of a norm
    seen = []
    for name in ("panoptic_inference", "instance_inference", "semantic_inference"):
        original = getattr(device_postprocess, name)

        def recorded(logits: torch.Tensor, *arguments: Any, name: str = name, original: Any = original) -> Any:
            seen.append(logits.dtype)
            assert name != "semantic_inference" or logits.stride(1) == 1, "the kernel reads a pixel's logits together"
            return original(logits, *arguments)

        monkeypatch.setattr(device_postprocess, name, recorded)
    for task in TASKS.values():
        task(predictions)
    assert len(seen) >= 9 and set(seen) == {dtype}


def test_valid_sizes_of_a_predictors_predictions_are_the_hosts() -> None:
    predictor: Any = load("demo", "cpu")
    given = []
    predictor.network.register_forward_pre_hook(lambda module, inputs: given.append(inputs[1]))
    upload = predictor._upload
    predictor._upload = lambda tensor: upload(tensor).clone()  # as a copy on another device
    predictions = predictor.run_network([photo(height=60, width=84)])
    assert predictions.valid_sizes is not given[0] and torch.equal(predictions.valid_sizes, given[0])


@pytest.mark.parametrize("sizes", [[(60, 84)], [(60, 84), (60, 84)], [(64, 64), (61, 64), (200, 190)]])
def test_frames_are_copied_once_and_resized_in_one_call(
    sizes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor: Any = load("demo", "cpu", TestConfig(short_edge=48))
    images = [photo(seed, *size)[:, ::-1] for seed, size in enumerate(sizes)]  # as a view with any strides
    for image in images:
        image.flags.writeable = False
    wanted = predictor._resized_batch(images)
    pinned, empty = [], torch.empty

    def unpinned(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        pinned.extend(shape * pin_memory)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(Predictor, "_resizes_on_gpu", True)
    events = Events()
    with events:
        got = predictor._resized_batch(images)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    frames = {(len(images), *images[0].shape)} if len(set(sizes)) == 1 else {(1, *image.shape) for image in images}
    assert set(pinned) == frames and events.names == ["launch"]


def test_features_beyond_float16_spoil_their_surroundings_only(on_gpu: None) -> None:
    predictions = random_predictions(valid_sizes=[INPUT_SIZE])
    wanted = all_results(predictions, [INPUT_SIZE])[0][0]
    predictions.pixel_features[0, :, 5, 7] = 1e5
    for dtype in (torch.float16, torch.bfloat16):
        embeddings = predictions.mask_embeddings.to(dtype)
        labels: Any = all_results(predictions._replace(mask_embeddings=embeddings), [INPUT_SIZE])[0][0]
        near = torch.zeros(INPUT_SIZE, dtype=torch.bool)
        near[16:28, 24:36] = True  # to which the tap is interpolated
        assert (labels == wanted)[~near].float().mean() > 0.97 and int(labels.max()) < 7
        overflown = predictions.pixel_features.to(dtype).isinf().any()
        assert bool(overflown) == (dtype == torch.float16)


@pytest.mark.parametrize("images", [None, 3, [None], object()])
def test_what_is_no_image_is_named(images: Any) -> None:
    predictor: Any = load("demo", "cpu")
    with pytest.raises(TypeError, match=r"images: expected a path, PIL image, array or tensor, got"):
        predictor.predict(images)


@pytest.mark.parametrize(("task", "most"), [("semantic", 5), ("panoptic", 22), ("instance", 29)])
@pytest.mark.usefixtures("on_gpu")
def test_post_processing_launches_no_more_than_recorded(task: Any, most: int) -> None:
    predictor: Any = load_network("demo", "cpu", TestConfig(short_edge=None))
    images = [photo(0, 64, 64)]
    predictions = predictor.run_network(images)
    predictions = predictions._replace(mask_embeddings=predictions.mask_embeddings.half())  # as autocast leaves them
    predictor.postprocess(predictions, [(64, 64)], (task,))
    counts = []
    for tasks in ((), (task,), (task, task)):
        fake = FakeCuda()
        with Launches(fake):
            predictor._device_parts(predictions, [(64, 64)], tasks)
        counts.append(len(fake.calls))
    assert counts[0] == 3, "features and projection are converted once for all tasks"
    assert counts[1] - counts[0] <= most and counts[2] - counts[1] == counts[1] - counts[0]
