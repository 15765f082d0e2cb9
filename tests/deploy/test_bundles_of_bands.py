"""Bundles of networks of bands: from a checkpoint through every command that takes them; the others refuse them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer_fast import evaluate, export, predict
from maskformer_fast.benchmark import __main__ as benchmark
from maskformer_fast.benchmark.runners import make_frames
from maskformer_fast.config import TASKS, Config, DataConfig, TestConfig
from maskformer_fast.core.image_resize import check_image
from maskformer_fast.core.machine import has_bfloat16
from maskformer_fast.data.images import read_index_png
from maskformer_fast.deploy.build.quantize import LEAST_IMAGES, covering_crop, image_files, readable_images
from maskformer_fast.deploy.bundle.folder import Bundle, extend_bundle
from maskformer_fast.deploy.bundle.manifest import BundleError, Preprocess
from maskformer_fast.deploy.runtime import load
from maskformer_fast.deploy.triton_server.options import TritonServerOptions
from maskformer_fast.deploy.triton_server.repository import write_repository
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import save_weights
from tests.deploy.test_bundles_of_networks import LIBRARIES, LOW, spread, written
from tests.support.demo_cases import scene_predictor
from tests.support.images import photo
from tests.support.tiny_bundle import tiny_bundle

pytest.importorskip("onnxruntime")
CHANNELS = 5
MEAN = (9000.0, 30000.0, 2000.0, 120.0, 41000.0)
STD = (1500.0, 9000.0, 40.0, 60.0, 8000.0)
"""Deviations of a hundredth of the mean up to its half: the scales of sensors."""


class Made(NamedTuple):
    kind: str
    checkpoint: Path
    bundle: Path
    data: Path
    predictor: Predictor


def scene(seed: int, height: int, width: int) -> np.ndarray:
    """Blocks of random values on the scale of each band -> [height, width, CHANNELS]."""
    colors = np.concatenate([photo(seed, height, width), photo(seed + 100, height, width)], 2)[..., :CHANNELS]
    pixels = np.asarray(MEAN) + (colors / 64.0 - 2) * STD
    return np.clip(pixels.round(), 0, 65535).astype(np.uint16)


def predictor_of_bands(kind: str) -> Predictor:
    """A predictor with random weights for pictures of `CHANNELS` bands."""
    rgb = scene_predictor(kind)
    config = rgb.config
    data = replace(config.data, dataset="folder", channels=CHANNELS, augment=replace(config.data.augment,
                                                                                     color_jitter=False))  # fmt: skip
    model = replace(config.model, pixel_mean=MEAN, pixel_std=STD)
    torch.manual_seed(1)
    network: Any = build_model(model).eval()
    if kind == "eomt":
        network.set_mask_probability([0.0] * model.decoder.layers)
    first = next(module for module in network.backbone.modules() if isinstance(module, torch.nn.Conv2d))
    torch.nn.init.normal_(first.weight, std=first.weight[0].numel() ** -0.5)  # another for each band
    images = torch.from_numpy(scene(5, 48, 48).astype(np.float32)).permute(2, 0, 1)[None].contiguous()
    spread(network, images)
    return Predictor(network, replace(config, data=data, model=model), rgb.metadata, "cpu")


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=[pytest.mark.slow, pytest.mark.no_cover])
                                        for kind in ("maskformer", "mask2former", "eomt")])  # fmt: skip
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A checkpoint of a small network, its bundle, and a folder of pictures of two sizes and formats with labels."""
    folder = tmp_path_factory.mktemp(request.param)
    predictor = predictor_of_bands(request.param)
    checkpoint = folder / "model.safetensors"
    save_weights(checkpoint, predictor.network, predictor.config, predictor.metadata, 0)
    command = [str(checkpoint), "--output", str(folder / "bundle"), "--sizes", "48x40", "2x37x50", *LOW]
    assert export.main(command) == 0
    data = folder / "data"
    for split in ("train", "val"):
        (data / "images" / split).mkdir(parents=True)
        (data / "annotations" / split).mkdir(parents=True)
        for number in range(LEAST_IMAGES):
            size = (48, 40) if number % 2 else (61, 43)
            np.save(data / "images" / split / f"{number}.npy", scene(number, *size))
            labels = np.random.default_rng(number).integers(0, predictor.metadata.num_classes, size, dtype=np.uint8)
            Image.fromarray(labels).save(data / "annotations" / split / f"{number}.png")
    metadata = predictor.metadata
    classes = [{"name": name, "isthing": int(thing)}
               for name, thing in zip(metadata.class_names, metadata.is_thing, strict=True)]  # fmt: skip
    (data / "classes.json").write_text(json.dumps(classes))
    yield Made(request.param, checkpoint, folder / "bundle", data, predictor)


def test_the_manifest_has_the_bands_and_the_type_of_the_input(made: Made) -> None:
    manifest = Bundle.open(made.bundle).manifest
    assert manifest.channels == CHANNELS
    assert manifest.preprocess.mean == MEAN and manifest.preprocess.std == STD
    for graph in manifest.graphs.values():
        (images,) = graph.inputs
        assert images.dtype == "float32" and images.shape == ("B", CHANNELS, "H", "W")
    assert {entry.flavour for entry in manifest.parity} == {"raw", "complete"}
    assert all(entry.logit_error < 1e-4 and entry.labels_equal_at_margin == 1 for entry in manifest.parity)


@pytest.mark.parametrize("library", LIBRARIES)
def test_results_are_those_of_the_checkpoint(made: Made, library: Any) -> None:
    frames = [scene(number, *size) for number, size in enumerate([(48, 40), (61, 43), (33, 70)])]
    frames.append(np.minimum(frames[0] // 200, 255).astype(np.uint8))
    with load(made.bundle, library, precision="fp32") as runtime:
        results = runtime.predict(frames)
        for frame, result in zip(frames, results, strict=True):
            expected = made.predictor.predict(frame).labels.numpy()
            assert np.mean(result.labels == expected) > 0.995
        assert len(np.unique(np.concatenate([result.labels.ravel() for result in results]))) > 1
        streamed = list(runtime.stream(iter(frames)))
        assert all(np.array_equal(one.labels, other.labels) for one, other in zip(streamed, results, strict=True))


@pytest.mark.parametrize("library", LIBRARIES)
def test_other_frames_are_one_error(made: Made, library: Any) -> None:
    frame = scene(0, 48, 40)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (frame[..., :3], ValueError, r"expected shape \[H, W, 5\], got \(48, 40, 3\)"),
        (frame.astype(np.float32), TypeError, "expected uint8 or uint16, got float32"),
        (frame.astype(np.int16), TypeError, "expected uint8 or uint16, got int16"),
        ([[1]], TypeError, r"expected an array \[H, W, 5\], got list"),
    ]
    with load(made.bundle, library) as runtime:
        for bad, error, message in wrong:
            with pytest.raises(error, match=message):
                runtime.predict([frame, bad])
            with pytest.raises(error, match=message):
                runtime.timed([bad])
            stream = runtime.stream(iter([bad, frame]))
            with pytest.raises(error, match=message):
                next(stream)
            assert next(stream).labels.shape == frame.shape[:2]


def test_predict_and_evaluate_give_what_they_give_for_the_checkpoint(made: Made, tmp_path: Path) -> None:
    metrics = []
    exact = ["--precision", "fp32"]
    for name, source, more in (("bundle", made.bundle, exact), ("torch", made.checkpoint, LOW)):
        line = [str(source), str(made.data / "images/val"), "--task", *TASKS, "-o", str(tmp_path / name), *more]
        assert predict.main([*line, "--device", "cpu"]) == 0
        line = [str(source), "--data.dataset", "folder", "--data.root", str(made.data), *more, "--device", "cpu"]
        assert evaluate.main([*line, "--data.workers", "0", "--output", str(tmp_path / f"{name}.json")]) == 0
        metrics.append(json.loads((tmp_path / f"{name}.json").read_text())["miou"])
    pairs = list(zip(written(tmp_path / "bundle"), written(tmp_path / "torch"), strict=True))
    assert len(pairs) == LEAST_IMAGES and len(np.unique(np.concatenate([labels.ravel() for _, labels in pairs]))) > 1
    assert all(np.mean(got == expected) > 0.995 for got, expected in pairs)
    assert metrics[0] == pytest.approx(metrics[1], abs=0.005) and 0 < metrics[0] < 1


def test_predict_works_in_tiles_and_refuses_other_pictures(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    np.save(images / "good.npy", scene(0, 60, 50))
    np.save(images / "four.npy", scene(0, 60, 50)[..., :4])
    line = [str(made.bundle), str(images), "-o", str(tmp_path / "out"), "--test.tile", "32"]
    assert predict.main(line) == 1
    output = capsys.readouterr()
    assert "1 image" in output.out and "expected 5 bands as" in output.err
    assert read_index_png(tmp_path / "out/semantic/good.png").shape == (60, 50)


def test_benchmark_measures_it_beside_pytorch(made: Made, tmp_path: Path) -> None:
    pictures = made.data / "images"
    line = [str(made.bundle), "--checkpoint", str(made.checkpoint), "--against", "eager", "--batches", "1", "--size",
            "48x40", "--seconds", "0.05", "--pictures", str(pictures), "--output", str(tmp_path / "out")]  # fmt: skip
    assert benchmark.main(line) == 0
    rows = json.loads((tmp_path / "out" / "benchmark.json").read_text())["rows"]
    assert [row["runner"] for row in rows] == ["bundle", "PyTorch eager"] and rows[0]["labels_equal"] > 0.99


def test_frames_of_the_benchmark_have_the_bands(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", scene(0, 61, 43))
    drawn = make_frames(2, (20, 30), None, CHANNELS)
    assert all(frame.shape == (20, 30, CHANNELS) and frame.dtype == np.uint16 for frame in drawn)
    assert np.ptp(drawn[0]) > 30000
    read = make_frames(3, (20, 30), str(tmp_path), CHANNELS)
    assert all(frame.shape == (20, 30, CHANNELS) and frame.dtype == np.uint16 for frame in read)
    np.testing.assert_allclose(read[0].mean((0, 1)), scene(0, 61, 43).mean((0, 1)), rtol=0.05)
    assert make_frames(1, (20, 30), None)[0].shape == (20, 30, 3)


@pytest.mark.skipif(not has_bfloat16(), reason="the processor has no bfloat16")
def test_bfloat16_does_not_round_the_bands(made: Made) -> None:
    """A band whose deviation is a fiftieth of its mean loses its picture where its values are rounded to 8 bits."""
    pytest.importorskip("openvino")
    frames = [scene(number, 64, 64) for number in range(6)]
    results = []
    for precision in ("bf16", "fp32"):
        with load(made.bundle, "openvino", precision=precision) as runtime:  # type: ignore[arg-type]
            results.append(runtime.predict(frames))
    pairs = zip(*results, strict=True)
    assert np.mean([np.mean(got.labels == wanted.labels) for got, wanted in pairs]) > 0.95


def test_an_int8_engine_reads_bands(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    pytest.importorskip("openvino")
    from maskformer_fast.deploy.runtime.openvino_session import OpenvinoSession, shared_core

    line = [str(made.bundle), "--engine-only", "--engine.api", "openvino", "--engine.precision", "int8",
            "--engine.calibration", str(made.data / "images/train"), "--engine.opt-shape", "1", "48", "40"]  # fmt: skip
    assert export.main(line) == 0
    bundle = Bundle.open(made.bundle)
    (engine,) = bundle.manifest.engines
    model = shared_core().read_model(bundle.read(engine.file), bundle.read(engine.weights or ""))
    (images,) = model.get_parameters()
    readers = {port.get_node().get_type_name() for port in images.output(0).get_target_inputs()}
    assert "FakeQuantize" not in readers and any(op.get_type_name() == "FakeQuantize" for op in model.get_ops())
    outputs = []
    for file, weights in (("raw.onnx", None), (engine.file, bundle.read(engine.weights or ""))):
        pixels = scene(3, 61, 43).transpose(2, 0, 1)[None].astype(np.float32)
        classes, masks = OpenvinoSession(bundle.read(file), 1, weights).run(pixels)
        outputs.append((np.array(classes[0]), np.array(masks[0])))
    for exact, quantised in zip(*outputs, strict=True):
        assert np.corrcoef(exact.ravel(), quantised.ravel())[0, 1] > 0.9
    with load(bundle) as runtime:
        assert runtime.precision == "int8"
        assert runtime.predict(scene(1, 61, 43), "panoptic").id_map.shape == (61, 43)


def test_calibration_pictures_are_cut_as_rgb_is_and_keep_their_scale(tmp_path: Path) -> None:
    rgb = photo(3, 61, 43)
    bands = np.concatenate([rgb, rgb[..., :2]], 2).astype(np.uint16) * 200
    crop = covering_crop(bands, (32, 40))
    assert crop.dtype == np.float32 and crop.shape == (1, CHANNELS, 32, 40)
    np.testing.assert_allclose(crop[0, :3] / 200, covering_crop(rgb, (32, 40))[0], rtol=0, atol=1.01)
    np.save(tmp_path / "a.npy", bands)
    np.save(tmp_path / "b.npy", rgb)
    (tmp_path / "c.png").write_bytes(b"")
    files = image_files(tmp_path, 9, CHANNELS)
    assert [path.name for path in files] == ["a.npy", "b.npy", "c.png"]
    assert image_files(tmp_path, 9) == [tmp_path / "c.png"]
    with pytest.raises(ValueError, match=f"at least {LEAST_IMAGES} pictures that can be read, got 1"):
        readable_images(files, False, CHANNELS)


def test_what_takes_no_bands_says_so_before_any_work(made: Made, tmp_path: Path) -> None:
    for more, message in (
        (("--target", "sm_87", "--frames", "1x20x20"), "target: expected none for a network of 5 bands"),
        (("--with-engine",), "engine.api: expected openvino for a network of 5 bands"),
    ):
        with pytest.raises(ValueError, match=message):
            export.main([str(made.checkpoint), "--output", str(tmp_path / "bundle"), *more, *LOW])
    with pytest.raises(ValueError, match="engine.api: expected openvino for a network of 5 bands, got 'auto'"):
        export.main([str(made.bundle), "--engine-only"])
    with pytest.raises(BundleError, match="expected those of a network of RGB for a GPU, got 5 bands"):
        load(made.bundle, "tensorrt")
    bundle = Bundle.open(made.bundle)
    for model in ("results", "engine"):
        options_of_server = TritonServerOptions("unused", output=str(tmp_path / "models"), model=model)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="model: expected complete or raw of a network of 5 bands"):
            write_repository(bundle, options_of_server)
    assert not list(tmp_path.iterdir())
    served = write_repository(bundle, TritonServerOptions("unused", output=str(tmp_path / "models"), model="raw"))
    assert "TYPE_FP32" in (served / "config.pbtxt").read_text()


def test_means_of_other_graphs_are_refused(tmp_path: Path) -> None:
    bundle, _ = tiny_bundle(tmp_path / "bundle", TestConfig())
    assert bundle.manifest.channels == 0
    with pytest.raises(BundleError, match="std: expected as many numbers as mean"):
        Preprocess(MEAN, STD[:4], None, 99, 32)
    with pytest.raises(BundleError, match="preprocess.mean: expected 3 numbers, as graphs take uint8 RGB"):
        extend_bundle(bundle, {}, preprocess=Preprocess(MEAN, STD, None, 99, 32))
    graphs = {name: replace(graph, inputs=(replace(graph.inputs[0], dtype="float32"),))
              for name, graph in bundle.manifest.graphs.items()}  # fmt: skip
    other = extend_bundle(bundle, {}, graphs=graphs, preprocess=Preprocess(MEAN, STD, None, 99, 32))
    assert other.manifest.channels == CHANNELS
    with pytest.raises(BundleError, match=r"graphs.raw, images: expected tensor\(float\), got 'tensor\(uint8\)'"):
        load(other, "onnxruntime")


def test_frames_are_checked_by_their_bands() -> None:
    rgb = np.zeros((9, 9, 3), np.uint8)
    check_image(rgb)
    check_image(np.zeros((9, 9, 4), np.uint16), channels=4)
    with pytest.raises(TypeError, match="expected uint8, got uint16"):
        check_image(rgb.astype(np.uint16))
    with pytest.raises(ValueError, match=r"shape \[H, W, 4\]"):
        check_image(rgb, channels=4)


def test_networks_of_the_colours_of_imagenet_are_refused(tmp_path: Path) -> None:
    rgb = scene_predictor()
    augment = replace(rgb.config.data.augment, color_jitter=False)
    config: Config = replace(rgb.config, data=DataConfig(dataset="folder", channels=3, augment=augment))
    predictor = Predictor(rgb.network, config, rgb.metadata, "cpu")
    with pytest.raises(ValueError, match="model.pixel_mean: expected that of the bands"):
        export.make_bundle(predictor, export.ExportOptions("x", output=str(tmp_path / "bundle")))
