"""`Predictor`: an image's result does not depend on the images beside it."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer_fast.config import TASKS, Task, TestConfig
from maskformer_fast.core.results import PanopticResult
from maskformer_fast.data.bands import as_picture
from maskformer_fast.inference.batches import infer_each
from maskformer_fast.inference.predictor import Predictor
from tests.support.images import photo
from tests.support.tiny_bundle import tiny_bundle

SIZES = [(64, 64), (37, 50), (60, 60), (200, 31), (64, 64), (37, 50), (30, 120)]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    test = TestConfig(short_edge=None, object_mask_threshold=0.1, overlap_threshold=0.1, batch_size=7)
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "x", test)[1]


@pytest.fixture
def inputs(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Images that the network gets, batch by batch."""
    seen: list[torch.Tensor] = []
    hook = predictor.network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    monkeypatch.setattr(predictor, "_hook", hook, raising=False)
    return seen


def test_a_height_and_width_is_the_size_of_every_input(
    predictor: Predictor, inputs: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = replace(predictor.test, size=(40, 64), max_size=1)
    monkeypatch.setattr(predictor, "config", replace(predictor.config, test=fixed))
    results = predictor.predict([photo(number, *size) for number, size in enumerate(SIZES)])
    assert [tuple(result.labels.shape) for result in results] == SIZES and len(inputs) == 1
    step = predictor.config.model.size_divisibility
    assert inputs[0].shape == (len(SIZES), 3, -(-40 // step) * step, -(-64 // step) * step)
    inputs.clear()
    monkeypatch.setattr(predictor, "config", replace(predictor.config, test=replace(fixed, multi_scale=(0.5, 2.0))))
    predictor.predict(photo(0, 30, 30))
    assert [row.shape[2:] for row in inputs] == [(-(-h // step) * step, -(-w // step) * step)
                                                 for h, w in ((20, 32), (80, 128))]


@pytest.mark.parametrize("short_edge", [None, 48])
def test_the_network_sees_an_image_as_if_it_were_alone(
    predictor: Predictor, inputs: list[torch.Tensor], short_edge: int | None
) -> None:
    predictor.config = replace(predictor.config, test=replace(predictor.test, short_edge=short_edge))
    images = [photo(number, *size) for number, size in enumerate(SIZES)]
    alone = []
    for image in images:
        inputs.clear()
        predictor.predict(image)
        alone.append(inputs[0][0])
    inputs.clear()
    predictor.predict(images)
    assert len(inputs) < len(images), "equal sizes share a batch"
    together = [row for batch in inputs for row in batch]
    assert len(together) == len(images)
    for expected in alone:
        assert any(row.shape == expected.shape and torch.equal(row, expected) for row in together)


def test_results_are_those_of_each_image_alone_and_in_order(predictor: Predictor) -> None:
    images = [photo(number, *size) for number, size in enumerate(SIZES)]
    results = predictor.infer(images, ("semantic", "panoptic", "instance"))
    for index, image in enumerate(images):
        alone = predictor.infer([image], ("semantic", "panoptic", "instance"))
        labels: Any = results["semantic"][index], alone["semantic"][0]
        assert labels[0].labels.shape == image.shape[:2]
        assert (labels[0].labels == labels[1].labels).float().mean() > 0.999
        segments: Any = results["panoptic"][index], alone["panoptic"][0]
        assert isinstance(segments[0], PanopticResult) and len(segments[0].segments) == len(segments[1].segments)
        instances: Any = results["instance"][index], alone["instance"][0]
        torch.testing.assert_close(instances[0].scores, instances[1].scores, atol=1e-4, rtol=0)


def test_a_batch_that_fails_is_repeated_image_by_image(predictor: Predictor) -> None:
    good, bad = photo(0, 40, 40), np.zeros((0, 5, 3), np.uint8)
    first, second, third = infer_each(predictor, [good, bad, good], ("semantic",))
    assert isinstance(second, Exception)
    assert not isinstance(first, Exception) and not isinstance(third, Exception)
    assert infer_each(predictor, [], ("semantic",)) == []


def test_exif_orientation_has_one_rule_and_a_switch(predictor: Predictor, tmp_path: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    Image.fromarray(photo(0, 40, 56)).save(path, exif=exif)
    for image in (path, Image.open(path)):
        assert predictor.predict(image).labels.shape == (56, 40)
        assert predictor.predict(image, exif=False).labels.shape == (40, 56)
        assert predictor.predict([image], exif=False)[0].labels.shape == (40, 56)


def test_each_part_of_the_network_keeps_its_mode(predictor: Predictor) -> None:
    network, seen = predictor.network, []
    network.train()
    frozen = [module for number, module in enumerate(network.modules()) if number % 3 == 1]
    for module in frozen:
        module.training = False
    before = [module.training for module in network.modules()]
    handle = network.register_forward_pre_hook(
        lambda *_: seen.append(any(module.training for module in network.modules()))
    )
    try:
        predictor.predict(photo(0, 40, 40))
    finally:
        handle.remove()
        after = [module.training for module in network.modules()]
        network.eval()
    assert seen == [False] and after == before and any(before)


def test_an_image_is_read_while_the_network_runs_for_another(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        several = Predictor(predictor.network, predictor.config, predictor.metadata, "cpu", in_flight=2)
    finally:
        torch.set_num_threads(threads)
    calls = itertools.count()
    runs, reads, seen = threading.Event(), threading.Event(), []

    def read(image: Any, exif: bool, channels: int) -> Any:
        if next(calls) == 1:
            seen.append(runs.wait(20))
            reads.set()
        return as_picture(image, exif, channels)

    def run(*_: object) -> None:
        runs.set()
        seen.append(reads.wait(20))

    monkeypatch.setattr("maskformer_fast.inference.predictor.as_picture", read)
    handle = predictor.network.register_forward_pre_hook(run)
    try:
        assert len(several.predict([photo(0), photo(1)])) == 2
    finally:
        handle.remove()
    assert seen == [True] * 3, "both waited for the other"


@pytest.mark.parametrize("task", TASKS)
def test_images_in_flight_have_the_results_of_one_by_one(predictor: Predictor, task: Task) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = Predictor(predictor.network, predictor.config, predictor.metadata, "cpu", in_flight=5)
        images = [photo(number, *size) for number, size in enumerate(SIZES)]
        each = several.infer(images, (task,))[task]
        assert torch.get_num_threads() == 3
        assert several._pool is not None and several._pool._max_workers == 3  # no more than threads
        assert set(several._pool.map(lambda _: torch.get_num_threads(), range(9))) == {1}
    finally:
        torch.set_num_threads(threads)
    for result, given, image in zip(several.predict(images, task), each, images, strict=True):
        wanted = predictor.infer([image], (task,))[task][0]
        for name, value in vars(wanted).items():
            for got in (getattr(result, name), getattr(given, name)):
                if isinstance(value, torch.Tensor) and not value.is_floating_point():
                    assert got.shape == value.shape and (got == value).float().mean() > 0.999
    with pytest.raises(TypeError):
        several.predict([images[0], 5])
    with pytest.raises(ValueError, match="in_flight: expected > 0, got 0"):
        Predictor(predictor.network, predictor.config, predictor.metadata, "cpu", in_flight=0)
