"""A bundle in place of a checkpoint: equal results and metrics, in Python and by the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import maskformer_fast
from maskformer_fast import evaluate, predict
from maskformer_fast.config import DataConfig, ShapesConfig, TestConfig
from maskformer_fast.core.results import InstanceResult, PanopticResult, SemanticResult
from maskformer_fast.data import build_dataset
from maskformer_fast.data.datasets.presets import PRESETS
from maskformer_fast.deploy.bundle.manifest import BundleError
from maskformer_fast.evaluation.measure import measure
from maskformer_fast.inference import bundle_predictor, postprocess
from maskformer_fast.inference.bundle_predictor import BundlePredictor, _backend_of, bundle_data, bundle_test, is_bundle
from maskformer_fast.inference.load import stored_options
from maskformer_fast.inference.predictor import Predictor
from tests.support.images import photo
from tests.support.tiny_bundle import metadata_of, tiny_bundle

TEST = TestConfig(short_edge=64, max_size=90, object_mask_threshold=0.3, overlap_threshold=0.3, top_k=6)
DATA = DataConfig(shapes=ShapesConfig(size=(48, 40), num_things=2, num_stuff=2, val_images=5), workers=0)
SIZES = [(64, 64), (37, 50), (1, 1), (200, 31), (37, 50), (3, 300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[BundlePredictor, Predictor]:
    bundle, reference = tiny_bundle(folder / "resizing", TEST)
    predictor = maskformer_fast.load(bundle.folder, "cpu")
    assert isinstance(predictor, BundlePredictor)
    return predictor, reference


@pytest.fixture(scope="module")
def shapes(folder: Path) -> tuple[Path, Predictor]:
    """Path of a bundle with the classes of the synthetic data set, and a predictor with its weights."""
    dataset = build_dataset(DATA, "val")
    test = replace(TEST, short_edge=None)
    bundle, reference = tiny_bundle(folder / "shapes", test, metadata=dataset.metadata, seed=3)
    return bundle.folder, reference


@pytest.fixture(scope="module")
def photos(folder: Path) -> Path:
    (folder / "photos").mkdir()
    for number, size in enumerate(SIZES):
        Image.fromarray(photo(number, *size)).save(folder / "photos" / f"{number}.png")
    return folder / "photos"


def test_a_height_and_width_for_every_image_is_kept_in_a_bundle(folder: Path) -> None:
    test = replace(TEST, short_edge=40, size=(40, 72))
    bundle, reference = tiny_bundle(folder / "fixed size", test)
    predictor = maskformer_fast.load(bundle.folder, "cpu")
    assert predictor.test.size == (40, 72) and stored_options(bundle.folder)[1].size == (40, 72)
    images = [photo(number, *size) for number, size in enumerate(SIZES)]
    for got, expected in zip(predictor.predict(images), reference.predict(images), strict=True):
        assert (got.labels == expected.labels).float().mean() > 0.99
    with pytest.raises(ValueError, match=r"test\.size: expected \(40, 72\)"):
        maskformer_fast.load(bundle.folder, "cpu", test=replace(predictor.test, size=(41, 72)))


def test_semantic_results_equal_the_checkpoints(pair: tuple[BundlePredictor, Predictor]) -> None:
    predictor, reference = pair
    images = [photo(number, *size) for number, size in enumerate(SIZES)]
    for image, got, expected in zip(images, predictor.predict(images), reference.predict(images), strict=True):
        assert isinstance(got, SemanticResult) and got.labels.dtype == expected.labels.dtype and got.scores is None
        with torch.no_grad():
            scores = postprocess.semantic_scores(reference.run_network([image]), [image.shape[:2]])[0]
        top = scores.topk(2, 0).values
        sure = top[0] - top[1] > 1e-3
        assert sure.any() and torch.equal(got.labels[sure], expected.labels[sure])


def test_panoptic_results_equal_the_checkpoints(pair: tuple[BundlePredictor, Predictor]) -> None:
    predictor, reference = pair
    images = [photo(number, *size) for number, size in enumerate(SIZES)]
    pairs = list(zip(predictor.predict(images, "panoptic"), reference.predict(images, "panoptic"), strict=True))
    assert sum(len(got.segments) for got, _ in pairs) >= 5
    for got, expected in pairs:
        assert isinstance(got, PanopticResult) and torch.equal(got.id_map, expected.id_map)
        for one, other in zip(got.segments, expected.segments, strict=True):
            assert replace(one, score=other.score) == other and one.score == pytest.approx(other.score, abs=1e-4)


def test_instances_equal_the_checkpoints(pair: tuple[BundlePredictor, Predictor]) -> None:
    predictor, reference = pair
    images = [photo(number, *size) for number, size in enumerate(SIZES)]
    pairs = list(zip(predictor.predict(images, "instance"), reference.predict(images, "instance"), strict=True))
    assert sum(len(got.labels) for got, _ in pairs) >= 10
    for got, expected in pairs:
        assert isinstance(got, InstanceResult) and got.size == expected.size
        torch.testing.assert_close(got.scores, expected.scores, atol=1e-4, rtol=0)
        for name in ("labels", "masks", "boxes"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name


def test_one_forward_pass_serves_all_tasks(pair: tuple[BundlePredictor, Predictor]) -> None:
    predictor = pair[0]
    images = [photo(number, *size) for number, size in enumerate(SIZES)]
    backend: Any = predictor.runtime._backend
    session, passes = backend._session, []

    class Counting:
        @staticmethod
        def run(*arguments: Any) -> Any:
            passes.append(1)
            return session.run(*arguments)

    backend._session = Counting
    try:
        by_task = predictor.infer(images, predictor.tasks)
    finally:
        backend._session = session
    assert len(passes) == len(images) and list(by_task) == list(predictor.tasks)
    for task, results in by_task.items():
        for got, expected in zip(results, predictor.predict(images, task), strict=True):
            for name, value in vars(expected).items():
                same = torch.equal(getattr(got, name), value) if isinstance(value, torch.Tensor) else None
                assert getattr(got, name) == value if same is None else same, (task, name)


def test_every_kind_of_image_is_taken(pair: tuple[BundlePredictor, Predictor], tmp_path: Path) -> None:
    image = photo(1, 30, 41)
    Image.fromarray(image).save(tmp_path / "image.png")
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    kinds: list[Any] = [image, Image.fromarray(image), tensor, tmp_path / "image.png", str(tmp_path / "image.png")]
    first, *others = pair[0].predict(kinds)
    assert all(torch.equal(first.labels, other.labels) for other in others)
    assert torch.equal(pair[0].predict(tensor).labels, first.labels)
    with pytest.raises(ValueError, match="task: expected one of"):
        pair[0].predict(image, "depth")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="images: expected a uint8 array"):
        pair[0].predict(image.astype(np.float32))
    with pytest.raises(TypeError, match="images: expected a path, PIL image, array or tensor, got NoneType"):
        pair[0].predict(None)  # type: ignore[arg-type]


def test_metrics_equal_the_checkpoints(shapes: tuple[Path, Predictor]) -> None:
    path, reference = shapes
    dataset = build_dataset(DATA, "val")
    tasks = ("semantic", "panoptic", "instance")
    predictor = maskformer_fast.load(path, "cpu")
    (got, grid), (expected, _) = (measure(p, dataset, tasks, workers=0, pictures=2) for p in (predictor, reference))
    assert grid is not None and {"miou", "pq", "ap"} <= got.keys() and got["miou"] > 0
    flat = {key: value for key, value in expected.items() if not isinstance(value, dict)}
    assert {key: got[key] for key in flat} == pytest.approx(flat, abs=1e-6, nan_ok=True)


def test_evaluate_measures_a_bundle(shapes: tuple[Path, Predictor], tmp_path: Path) -> None:
    options = ["--data.shapes.size", "48", "40", "--data.shapes.num-things", "2", "--data.shapes.num-stuff", "2",
               "--data.shapes.val-images", "5", "--data.workers", "0"]  # fmt: skip
    command = [str(shapes[0]), "--backend", "onnxruntime", "--task", "panoptic", "semantic", *options]
    assert evaluate.main([*command, "--output", str(tmp_path / "m.json"), "--picture", str(tmp_path / "grid.png")]) == 0
    expected, _ = measure(shapes[1], build_dataset(DATA, "val"), ("panoptic", "semantic"), workers=0)
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["pq"] == pytest.approx(expected["pq"]) and metrics["miou"] == pytest.approx(expected["miou"])
    assert Image.open(tmp_path / "grid.png").size[0] > 100
    with pytest.raises(ValueError, match=r"test.flip: expected False, which the bundle was exported with, got True"):
        evaluate.main([*command, "--test.flip"])
    with pytest.raises(ValueError, match="data: expected the 4 classes"):
        evaluate.main([str(shapes[0])])


def test_predict_segments_by_a_bundle(shapes: tuple[Path, Predictor], photos: Path, tmp_path: Path) -> None:
    tasks = ["semantic", "panoptic", "instance"]
    assert predict.main([str(shapes[0]), str(photos), "-o", str(tmp_path), "--task", *tasks]) == 0
    assert len(list((tmp_path / "overlays").iterdir())) == 3 * len(SIZES)
    for number, expected in enumerate(shapes[1].predict([photo(n, *size) for n, size in enumerate(SIZES)])):
        written = np.asarray(Image.open(tmp_path / "semantic" / f"{number}.png"))
        assert (written == expected.labels.numpy()).mean() > 0.99
    assert json.loads((tmp_path / "panoptic.json").read_text())["annotations"]
    with pytest.raises(ValueError, match=r"test.short_edge: expected None, which the bundle was exported with, got 32"):
        predict.main([str(shapes[0]), str(photos), "-o", str(tmp_path), "--test.short-edge", "32"])


def test_a_bundle_stores_its_test_options_and_its_preset(pair: tuple[BundlePredictor, Predictor], folder: Path) -> None:
    manifest = pair[0].runtime.manifest
    assert replace(bundle_test(manifest), batch_size=1) == TEST and pair[0].test == bundle_test(manifest)
    assert stored_options(folder / "resizing") == (DataConfig(), bundle_test(manifest))
    for name in PRESETS:
        assert bundle_data(replace(manifest, metadata=replace(manifest.metadata, name=name))).dataset == name
    changed = maskformer_fast.load(folder / "resizing", test=replace(TEST, batch_size=7))
    assert changed.test.batch_size == 7
    assert is_bundle(folder / "resizing") and not is_bundle(folder) and not is_bundle("demo")


def test_classes_with_other_things_than_the_exported_ones_are_refused(pair: tuple[BundlePredictor, Predictor]) -> None:
    predictor = BundlePredictor(pair[0].runtime, pair[0].test)
    renamed = replace(metadata_of(5), name="other", category_ids=(9, 8, 7, 6, 5))
    predictor.metadata = renamed
    assert predictor.metadata is renamed
    with pytest.raises(ValueError, match="metadata.is_thing"):
        predictor.metadata = replace(renamed, is_thing=(True,) * 5)


@pytest.mark.parametrize(
    ("device", "backend", "error", "message"),
    [
        ("cpu", "tensorrt", ValueError, "device: expected one that tensorrt runs on, got 'cpu'"),
        ("cuda", "onnxruntime", ValueError, "device: expected one that onnxruntime runs on, got 'cuda'"),
        ("cuda:1", "auto", BundleError, "without engines"),
        ("auto", "tensorrt", BundleError, "without engines"),
        ("mps", "auto", ValueError, "device: expected auto, cpu, cuda or cuda:N, got 'mps'"),
        ("cuda:x", "auto", ValueError, "device: expected"),
        ("cpu:1", "auto", ValueError, "device: expected"),
    ],
)
@pytest.mark.usefixtures("pair")
def test_a_device_without_the_backend_is_refused(
    folder: Path, device: str, backend: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        maskformer_fast.load(folder / "resizing", device, backend=backend)


@pytest.mark.usefixtures("pair")
def test_precision_and_number_of_frames_are_the_runtimes(folder: Path) -> None:
    predictor = maskformer_fast.load(folder / "resizing", "cpu", precision="fp32", in_flight=3)
    assert isinstance(predictor, BundlePredictor)
    assert (predictor.runtime.precision, predictor.runtime.in_flight) == ("fp32", 3)
    with pytest.raises(ValueError, match="precision: expected none without a bundle; for a checkpoint .* amp"):
        maskformer_fast.load("demo", precision="bf16")
    with pytest.raises(ValueError, match="amp: expected none with a bundle, for which the option is precision"):
        maskformer_fast.load(folder / "resizing", amp="bf16")


def test_each_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _backend_of("cuda", "auto") == ("tensorrt", 0) and _backend_of("cuda:3", "auto") == ("tensorrt", 3)
    monkeypatch.setattr(bundle_predictor, "world_size", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert _backend_of("auto", "auto") == ("auto", 2) and _backend_of("cuda", "tensorrt") == ("tensorrt", 2)


def test_a_backend_needs_an_undamaged_bundle(folder: Path) -> None:
    with pytest.raises(ValueError, match="backend: expected auto, as demo is not a bundle"):
        maskformer_fast.load("demo", backend="onnxruntime")
    (folder / "broken").mkdir()
    (folder / "broken" / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="manifest"):
        maskformer_fast.load(folder / "broken")
