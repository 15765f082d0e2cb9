"""CUDA graphs of `Predictor`, on a stand-in that records operations: what is captured, replayed, copied and dropped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskformer_fast import evaluate, predict
from maskformer_fast.config import BackboneConfig, DataConfig, TestConfig
from maskformer_fast.inference import cuda_graphs, device_postprocess
from maskformer_fast.inference.cuda_graphs import GraphCache
from maskformer_fast.inference.load import load, load_network
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.modeling import build_model
from tests.support.demo_cases import scene_predictor
from tests.support.images import photo
from tests.support.recorded_graphs import FakeCuda, Launches
from tests.support.tiny_bundle import tiny_bundle

TASKS: Any = ("semantic", "panoptic", "instance")
TEST = TestConfig(short_edge=None, object_mask_threshold=0.1, overlap_threshold=0.1, batch_size=4)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    monkeypatch.setattr(device_postprocess, "_on_gpu", lambda tensor: True)
    with FakeCuda().installed() as installed:
        yield installed


@pytest.fixture
def predictor() -> Any:
    torch.manual_seed(0)
    loaded: Any = load_network("demo", "cpu", TEST)
    loaded._graphs = GraphCache()
    return loaded


def plain(predictor: Any, images: list[np.ndarray], tasks: Any = TASKS) -> dict[str, list[Any]]:
    graphs, predictor._graphs = predictor._graphs, None
    try:
        return predictor.infer(images, tasks)
    finally:
        predictor._graphs = graphs


def assert_equal(got: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    assert got.keys() == wanted.keys()
    for task, results in wanted.items():
        for one, other in zip(got[task], results, strict=True):
            for name, value in vars(other).items():
                same = torch.equal(getattr(one, name), value) if isinstance(value, torch.Tensor) else None
                assert getattr(one, name) == value if same is None else same, (task, name)


def snapshot(results: dict[str, list[Any]]) -> list[torch.Tensor]:
    tensors = [v for of_task in results.values() for r in of_task for v in vars(r).values()]
    return [tensor.clone() for tensor in tensors if isinstance(tensor, torch.Tensor)]


@pytest.mark.parametrize("tasks", [("semantic",), ("panoptic",), ("instance",), TASKS])
def test_replays_give_the_results_of_their_own_images(fake: FakeCuda, predictor: Any, tasks: Any) -> None:
    batches = [[photo(seed, 60, 84), photo(seed + 50, 60, 84)] for seed in range(5)]
    kept: list[tuple[Any, list[torch.Tensor]]] = []
    for images in batches:
        got = predictor.infer(images, tasks)
        assert_equal(got, plain(predictor, images, tasks))
        kept.append((got, snapshot(got)))
    assert fake.calls.count("capture") == 1 and fake.calls.count("replay") == 4, "plain, captured, replayed"
    for got, before in kept:  # no later replay changes what the user has
        assert all(torch.equal(a, b) for a, b in zip(snapshot(got), before, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(kept[1][1], kept[2][1], strict=True))


@pytest.mark.parametrize(("tasks", "copies"), [(("semantic",), 1), (("panoptic",), 2), (("instance",), 6), (TASKS, 9)])
def test_a_replay_is_one_launch_between_copies(
    fake: FakeCuda, predictor: Any, tasks: Any, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(2):
        predictor.infer([photo(seed, 64, 64)], tasks)
    replay = GraphCache._replay

    def counted(*arguments: Any) -> Any:
        fake.calls.clear()
        with Launches(fake):
            return replay(*arguments)

    monkeypatch.setattr(GraphCache, "_replay", counted)
    predictor.infer([photo(3, 64, 64)], tasks)
    assert fake.calls == ["wait_event", "copy_", "replay", *["clone"] * copies, "record"]


@pytest.mark.parametrize("order", ["direct", "official", "official_panoptic", "huggingface"])
@pytest.mark.parametrize("sizes", [[(60, 84)], [(60, 84), (57, 81), (60, 84)]])
def test_all_of_post_processing_can_be_captured(fake: FakeCuda, predictor: Any, order: Any, sizes: Any) -> None:
    predictor.config = replace(predictor.config, test=replace(TEST, semantic_order=order))
    for seed in range(3):
        images = [photo(seed + 10 * index, *size) for index, size in enumerate(sizes)]
        assert_equal(predictor.infer(images, TASKS), plain(predictor, images))
    assert predictor._graphs.obstacle is None and fake.calls.count("replay") == 2


@pytest.mark.parametrize("kind", ["maskformer", "mask2former", "per_pixel", "per_pixel_plus"])
def test_networks_of_every_kind_can_be_captured(fake: FakeCuda, kind: Any) -> None:
    predictor: Any = scene_predictor("maskformer")
    pixel_decoder = replace(predictor.config.model.pixel_decoder, encoder_layers=1)
    changed = replace(
        predictor.config.model, type=kind, backbone=BackboneConfig("swin_micro"), pixel_decoder=pixel_decoder
    )
    network = build_model(changed).eval()
    predictor = Predictor(network, replace(predictor.config, model=changed, test=TEST), predictor.metadata, "cpu")
    predictor._graphs = GraphCache()
    for amp in ("off", "bf16"):
        predictor.amp = amp
        for seed in range(3):
            images = [photo(seed, 40, 70), photo(seed + 9, 64, 96)]
            assert_equal(predictor.infer(images, predictor.tasks), plain(predictor, images, predictor.tasks))
    assert predictor._graphs.obstacle is None and fake.calls.count("replay") == 4


def test_settings_and_sizes_have_graphs_of_their_own(fake: FakeCuda, predictor: Any) -> None:
    image = photo(0, 60, 84)

    def results() -> list[Any]:
        for _ in range(3):
            got = predictor.infer([image], ("panoptic", "instance"))
            assert_equal(got, plain(predictor, [image], ("panoptic", "instance")))
        return snapshot(got)

    results()
    predictor.config = replace(predictor.config, test=replace(predictor.test, top_k=3, object_mask_threshold=0.3))
    assert results()[1].shape[0] <= 3
    predictor.metadata = replace(predictor.metadata, is_thing=(True,) * predictor.metadata.num_classes)
    results()
    predictor.amp = "bf16"
    results()
    image = photo(0, 61, 84)  # of the same input size
    assert results()[0].shape == (61, 84)
    assert fake.calls.count("capture") == 5 and fake.calls.count("replay") == 10


def test_weights_changed_in_place_are_seen_and_replaced_ones_drop_the_graphs(fake: FakeCuda, predictor: Any) -> None:
    images = [photo(0, 64, 64)]
    decoder, other = predictor.network.pixel_decoder, load_network("demo", "cpu").network

    def compare(captures: int) -> list[torch.Tensor]:
        fake.calls.clear()
        got = predictor.infer(images, TASKS)
        assert_equal(got, plain(predictor, images))
        assert fake.calls.count("capture") == captures and fake.calls.count("replay") == 1
        return snapshot(got)

    predictor.infer(images, TASKS)
    first = compare(1)
    predictor.network.train()
    with torch.no_grad():
        for parameter in predictor.network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    changed = compare(0)
    assert predictor.network.training and any(not torch.equal(a, b) for a, b in zip(first, changed, strict=True))
    for change in (
        lambda: setattr(decoder.mask_features, "weight", nn.Parameter(-decoder.mask_features.weight.data)),
        lambda: setattr(decoder.mask_features.weight, "data", -decoder.mask_features.weight.data),
        lambda: setattr(decoder, "layer_1", other.pixel_decoder.layer_1),
        lambda: setattr(predictor, "network", other),
    ):
        change()
        compare(1)
    assert len(predictor._graphs._graphs) == 1


def test_a_replay_needs_nothing_in_memory_that_other_graphs_may_use(fake: FakeCuda, predictor: Any) -> None:
    for size in ((64, 64), (60, 84)):
        for seed in range(2):
            predictor.infer([photo(seed, *size)], TASKS)
    graphs = list(predictor._graphs._graphs.values())
    for graph in graphs:
        kept = [graph.images, graph.parts, list(predictor.network.parameters()), list(predictor.network.buffers())]
        assert graph.graph.spoil(kept) > 100
    for size in ((64, 64), (60, 84), (64, 64)):
        images = [photo(5, *size)]
        assert_equal(predictor.infer(images, TASKS), plain(predictor, images))
    assert fake.calls.count("capture") == 2 == len(graphs)


def test_a_network_with_hooks_runs_plainly(fake: FakeCuda, predictor: Any) -> None:
    images, seen = [photo(0, 64, 64)], []
    for _ in range(2):
        predictor.infer(images, TASKS)
    handle = predictor.network.backbone.register_forward_hook(lambda *_: seen.append(1))
    predictor.infer(images, TASKS)
    handle.remove()
    predictor.infer(images, TASKS)
    assert len(seen) == 1 and fake.calls.count("replay") == 2


def test_a_failed_capture_is_logged_once_and_work_goes_on(
    fake: FakeCuda, predictor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fake.failure = RuntimeError("operation not permitted when stream is capturing")
    for seed in range(4):
        images = [photo(seed, 64, 64)]
        assert_equal(predictor.infer(images, TASKS), plain(predictor, images))
    assert fake.calls.count("capture") == 1 and fake.calls.count("replay") == 0
    lines = [record.getMessage() for record in caplog.records if record.name == cuda_graphs.__name__]
    assert len(lines) == 1 and "without CUDA graphs" in lines[0] and "not permitted" in lines[0]


@pytest.mark.parametrize("fault", ["read", "copy from pageable memory"])
def test_what_the_host_does_amid_the_work_is_an_obstacle(
    fake: FakeCuda, predictor: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "read":
        compact = device_postprocess._compact
        monkeypatch.setattr(device_postprocess, "_compact", lambda used, most: compact(used, None))
    else:  # of flags, which are kept otherwise
        monkeypatch.setattr(device_postprocess, "_on_device", device_postprocess._on_device.__wrapped__)
    for _ in range(3):
        predictor.infer([photo(0, 64, 64)], ("panoptic",))
    assert f"CaptureError: a {fault}" in predictor._graphs.obstacle


def test_the_order_with_a_read_is_never_captured(fake: FakeCuda, predictor: Any) -> None:
    predictor.config = replace(predictor.config, test=replace(TEST, panoptic_order="official"))
    for _ in range(4):
        predictor.infer([photo(0, 64, 64)], ("panoptic",))
    assert "capture" not in fake.calls and predictor._graphs.obstacle is None


def test_the_least_recently_used_graph_goes_and_must_earn_its_return(
    fake: FakeCuda, predictor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    sizes = [(32, 32), (32, 33), (32, 34)]

    def use(index: int, times: int) -> tuple[int, int]:
        fake.calls.clear()
        for _ in range(times):
            predictor.infer([photo(0, *sizes[index])], ("semantic",))
        return fake.calls.count("capture"), fake.calls.count("replay")

    assert use(0, 2) == (1, 1) and use(1, 2) == (1, 1)
    assert use(0, 1) == (0, 1)
    assert use(2, 2) == (1, 1), "in the place of 1"
    assert "synchronize" in fake.calls and len(predictor._graphs._graphs) == 2
    assert use(0, 1) == (0, 1)
    assert use(1, cuda_graphs.DUE_AGAIN - 1) == (0, 0)
    assert use(1, 2) == (1, 2)
    monkeypatch.setattr(cuda_graphs, "MAX_COUNTED", 3)
    for width in range(40, 50):
        predictor.infer([photo(0, 32, width)], ("semantic",))
    assert len(predictor._graphs._uses) == 3


def test_threads_share_graphs(fake: FakeCuda, predictor: Any) -> None:
    images = [photo(seed, 64, 64) for seed in range(6)]
    wanted = [plain(predictor, [image]) for image in images]
    results: dict[int, Any] = {}
    predictor.infer(images[:1], TASKS)
    predictor.infer(images[:1], TASKS)

    def run(index: int) -> None:
        for _ in range(3):
            results[index] = predictor.infer([images[index]], TASKS)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(wanted):
        assert_equal(results[index], expected)


def test_graphs_are_for_gpus_and_off_by_default(tmp_path: Path) -> None:
    plain: Any = load("demo", "cpu", graphs=True)
    assert plain._graphs is None, "on a CPU"
    arguments = plain.network, plain.config, plain.metadata, "cuda"
    assert Predictor(*arguments)._graphs is None and Predictor(*arguments, graphs=True)._graphs is not None
    bundle, _ = tiny_bundle(tmp_path / "bundle", TEST)
    with pytest.raises(ValueError, match="graphs: expected False, as a bundle"):
        load(bundle.folder, graphs=True)


@pytest.mark.parametrize("command", [evaluate, predict])
@pytest.mark.parametrize("graphs", [False, True])
def test_commands_pass_the_option_on(command: Any, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def record(*arguments: Any, **options: Any) -> Any:
        given.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load", record)
    monkeypatch.setattr(command, "stored_options", lambda path: (DataConfig(), TestConfig()))
    images = ["photo.jpg"] if command is predict else []
    with pytest.raises(KeyboardInterrupt):
        command.main(["demo", *images, "--device", "cpu", *["--graphs"] * graphs])
    assert given["graphs"] is graphs
