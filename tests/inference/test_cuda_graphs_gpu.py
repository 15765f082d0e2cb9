"""CUDA graphs of `Predictor` on a GPU: results of the plain way, weights in place, threads, no wait of the host."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import maskformer_fast
from maskformer_fast.config import TestConfig
from maskformer_fast.core.results import InstanceResult, PanopticResult
from maskformer_fast.inference import predictor as predictor_module
from tests.support.images import photo

pytestmark = pytest.mark.gpu
TASKS: Any = ("semantic", "panoptic", "instance")
TEST = TestConfig(short_edge=64, object_mask_threshold=0.1, overlap_threshold=0.1, batch_size=4)


def pair(amp: Any = "off", test: TestConfig = TEST) -> tuple[Any, Any]:
    """A predictor with graphs, and a plain one of the same network."""
    graphed: Any = maskformer_fast.load("demo", "cuda", test, amp=amp, graphs=True)
    return graphed, type(graphed)(graphed.network, graphed.config, graphed.metadata, graphed.device, amp)


def assert_like(got: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    for task, results in wanted.items():
        for one, other in zip(got[task], results, strict=True):
            if isinstance(other, InstanceResult):
                assert one.masks.shape == other.masks.shape and one.size == other.size
                torch.testing.assert_close(one.scores, other.scores, atol=1e-3, rtol=0)
            else:
                name = "id_map" if isinstance(other, PanopticResult) else "labels"
                assert (getattr(one, name) == getattr(other, name)).float().mean() > 0.999


def replayed(predictor: Any) -> int:
    assert predictor._graphs.obstacle is None
    return len(predictor._graphs._graphs)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("tasks", [("semantic",), ("panoptic",), ("instance",), TASKS])
def test_replays_equal_the_plain_way(amp: Any, tasks: Any) -> None:
    graphed, plain = pair(amp)
    kept = []
    for seed in range(5):
        images = [photo(seed, 96, 130), photo(seed + 9, 96, 130)]
        kept.append((graphed.infer(images, tasks), plain.infer(images, tasks)))
    for got, wanted in kept:
        assert_like(got, wanted)
    assert replayed(graphed) == 1


@pytest.mark.parametrize("order", ["official", "official_panoptic", "huggingface"])
def test_other_orders_are_captured(order: Any) -> None:
    graphed, plain = pair(test=replace(TEST, semantic_order=order))
    for seed in range(3):
        images = [photo(seed, 96, 130), photo(seed, 90, 120)]
        assert_like(graphed.infer(images, TASKS), plain.infer(images, TASKS))
    assert replayed(graphed) >= 1


def test_graphs_of_several_sizes_do_not_disturb_each_other() -> None:
    graphed, plain = pair("fp16")
    for seed in range(4):
        for height, width in ((96, 130), (64, 64), (130, 96)):
            images = [photo(seed, height, width)]
            assert_like(graphed.infer(images, TASKS), plain.infer(images, TASKS))
    assert replayed(graphed) == 3


def test_weights_in_place_are_seen_and_replaced_ones_captured_anew() -> None:
    graphed, plain = pair("bf16")
    images = [photo(0, 96, 130)]
    for _ in range(3):
        before = graphed.infer(images, TASKS)
    with torch.no_grad():
        for parameter in graphed.network.parameters():
            parameter.mul_(1.1)
    after = graphed.infer(images, TASKS)
    assert_like(after, plain.infer(images, TASKS))
    assert not torch.equal(after["instance"][0].scores, before["instance"][0].scores)
    convolution = graphed.network.pixel_decoder.mask_features
    convolution.weight = nn.Parameter(-convolution.weight.data)
    assert_like(graphed.infer(images, TASKS), plain.infer(images, TASKS))
    assert replayed(graphed) == 1


def test_threads_with_their_own_streams_share_graphs() -> None:
    graphed, plain = pair()
    images = [photo(seed, 96, 130) for seed in range(6)]
    wanted = [plain.infer([image], TASKS) for image in images]
    for _ in range(2):
        graphed.infer(images[:1], TASKS)
    torch.cuda.synchronize()
    results: dict[int, Any] = {}

    def run(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                results[index] = graphed.infer([images[index]], TASKS)
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(wanted):
        assert_like(results[index], expected)


def test_a_replay_waits_for_nothing_but_the_transfer_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed, _ = pair("fp16")
    images = [photo(0, 96, 130)]
    for _ in range(3):
        graphed.infer(images, TASKS)
    torch.cuda.synchronize()
    read = predictor_module.read_results

    def unwatched(parts: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return read(parts)

    monkeypatch.setattr(predictor_module, "read_results", unwatched)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed.infer(images, TASKS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
