"""`Predictor` on a GPU: the pixels and the predictions of the CPU, and the seconds of its stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import maskformer_fast
from maskformer_fast.config import TestConfig
from maskformer_fast.inference import predictor as predictor_module
from maskformer_fast.inference.predictor import Predictor
from tests.support.images import photo

pytestmark = pytest.mark.gpu
TEST = TestConfig(short_edge=48)


@pytest.fixture(scope="module")
def pair() -> tuple[Predictor, Predictor]:
    """Predictors on the CPU and on the GPU."""
    on_cpu, on_gpu = (maskformer_fast.load("demo", device, test=TEST) for device in ("cpu", "cuda"))
    assert isinstance(on_cpu, Predictor) and isinstance(on_gpu, Predictor)
    return on_cpu, on_gpu


def test_a_gpu_resizes_to_the_pixels_of_the_cpu(pair: tuple[Predictor, Predictor]) -> None:
    on_cpu, on_gpu = pair
    rng = np.random.default_rng(0)
    for height, width in ((37, 50), (300, 90), (64, 64), (1, 5)):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for short_edge in (48, 24, 96):  # the last two as in test-time augmentation
            resized = on_gpu._resize(image, short_edge, TEST.max_size)
            assert resized.is_cuda
            assert torch.equal(resized.cpu(), on_cpu._resize(image, short_edge, TEST.max_size))


@pytest.mark.parametrize("sizes", [[(37, 50)], [(300, 90), (300, 90)], [(64, 64), (61, 64), (200, 190)]])
def test_a_gpu_resizes_and_pads_batches_as_a_cpu(
    pair: tuple[Predictor, Predictor], sizes: list[tuple[int, int]]
) -> None:
    images = [photo(seed, *size)[:, ::-1] for seed, size in enumerate(sizes)]
    on_cpu, on_gpu = (predictor._resized_batch(images) for predictor in pair)
    assert on_gpu.images.is_cuda and on_gpu.on_device.is_cuda and not on_gpu.valid_sizes.is_cuda
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_nothing_waits_for_the_gpu_but_the_transfer_of_results(amp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor: Any = maskformer_fast.load("demo", "cuda", test=TEST, amp=amp)
    images = [photo(seed, 96, 130) for seed in range(2)]
    predictor.infer(images, predictor.tasks)
    torch.cuda.synchronize()
    read, reads = predictor_module.read_results, []

    def recorded(parts: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        reads.append(len(parts))
        return read(parts)

    monkeypatch.setattr(predictor_module, "read_results", recorded)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = predictor.infer(images, predictor.tasks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reads == [3] and results["semantic"][0].labels.shape == images[0].shape[:2]


def test_stages_take_time_and_the_stopwatch_changes_no_result(pair: tuple[Predictor, Predictor]) -> None:
    predictor = pair[1]
    images = [photo(0), photo(1, 40, 90)]
    stopwatch = predictor.stopwatch()
    timed = predictor.infer(images, predictor.tasks, stopwatch)
    assert list(stopwatch.seconds) == ["preprocess", "network", "postprocess"] and min(stopwatch.seconds.values()) > 0
    results = predictor.infer(images, predictor.tasks)
    assert list(results) == list(timed) == ["semantic", "panoptic", "instance"]
    for one, other in zip(timed["semantic"], results["semantic"], strict=True):
        assert torch.equal(one.labels, other.labels)


def test_augmented_results_keep_the_images_size(pair: tuple[Predictor, Predictor]) -> None:
    predictor = pair[1]
    config = replace(predictor.config, test=replace(TEST, multi_scale=(0.5, 1.0), flip=True))
    augmented = Predictor(predictor.network, config, predictor.metadata, predictor.device)
    assert augmented.predict(photo()).labels.shape == (60, 84)
