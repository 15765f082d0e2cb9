"""Bundles of Mask2Former and EoMT, from a checkpoint through every command, in each library and precision."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer_fast import evaluate, export, predict
from maskformer_fast.benchmark import __main__ as benchmark
from maskformer_fast.config import TASKS
from maskformer_fast.data.images import read_index_png
from maskformer_fast.deploy.build.quantize import LEAST_IMAGES
from maskformer_fast.deploy.build.tensorrt import EngineConfig, build_engine
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.bundle.manifest import Shape
from maskformer_fast.deploy.runtime import load
from maskformer_fast.deploy.runtime.mask_factors import FactoredMasks
from maskformer_fast.modeling.weights import save_weights
from maskformer_fast.ops.mask_product import layer_mask_logits
from tests.support.demo_cases import scene_predictor
from tests.support.images import photo

pytest.importorskip("onnxruntime")
pytestmark = [pytest.mark.slow, pytest.mark.no_cover]
KINDS = ("mask2former", "eomt")
SIZE = (48, 40)
LOW = ["--test.object-mask-threshold", "0.05", "--test.overlap-threshold", "0.05"]
DATA = ["--data.dataset", "shapes", "--data.shapes.size", "48", "40", "--data.shapes.num-things", "2",
        "--data.shapes.num-stuff", "2", "--data.shapes.max-shapes", "2", "--data.shapes.val-images", "6",
        "--data.workers", "0"]  # fmt: skip
LIBRARIES = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]


class Made(NamedTuple):
    kind: str
    checkpoint: Path
    bundle: Path
    pictures: Path


@torch.no_grad()
def spread(network: Any, images: torch.Tensor) -> None:
    """Enlarge the differences between queries, and make masks sure, as training would, by an image [1, C, 48, 48]."""
    head = network.predictor
    found = network(images, torch.tensor([[48, 48]]))
    for layer, outputs, size in (
        (head.class_embed, found.class_logits, 3.0), (head.mask_embed.layers[-1], found.mask_embeddings, 1.0),
    ):  # fmt: skip
        outputs = outputs.flatten(0, 2)
        scale = size / outputs.std(0).mean()
        layer.bias.sub_(outputs.mean(0)).mul_(scale)
        layer.weight.mul_(scale)
    scale = 4 / layer_mask_logits(network(images, torch.tensor([[48, 48]]))).std()
    head.mask_embed.layers[-1].weight.mul_(scale), head.mask_embed.layers[-1].bias.mul_(scale)


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A checkpoint of a small network with random weights, its bundle, and pictures of two sizes."""
    folder = tmp_path_factory.mktemp(request.param)
    predictor = scene_predictor(request.param)
    if request.param == "eomt":
        predictor.network.set_mask_probability([0.0] * predictor.config.model.decoder.layers)
    spread(predictor.network, torch.from_numpy(photo(5, 48, 48)).permute(2, 0, 1)[None].contiguous())
    checkpoint = folder / "model.safetensors"
    save_weights(checkpoint, predictor.network, predictor.config, predictor.metadata, 0)
    command = [str(checkpoint), "--output", str(folder / "bundle"), "--sizes", "48x40", "2x37x50", *LOW]
    assert export.main(command) == 0
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(LEAST_IMAGES):
        Image.fromarray(photo(number, *(SIZE if number % 2 else (61, 43)))).save(pictures / f"{number}.png")
    yield Made(request.param, checkpoint, folder / "bundle", pictures)


def written(folder: Path) -> list[np.ndarray]:
    """Semantic labels that `predict` wrote."""
    return [read_index_png(path) for path in sorted((folder / "semantic").iterdir())]


@pytest.mark.parametrize("library", LIBRARIES)
def test_predict_writes_what_it_writes_for_the_checkpoint(made: Made, tmp_path: Path, library: str) -> None:
    tasks = ["--task", *TASKS, "--no-overlays"]
    line = [str(made.bundle), str(made.pictures), *tasks, "-o", str(tmp_path / "bundle"), "--backend", library]
    assert predict.main(line) == 0
    line = [str(made.checkpoint), str(made.pictures), *tasks, "-o", str(tmp_path / "torch"), *LOW, "--device", "cpu"]
    assert predict.main(line) == 0
    pairs = list(zip(written(tmp_path / "bundle"), written(tmp_path / "torch"), strict=True))
    assert len(pairs) == LEAST_IMAGES and len(np.unique(pairs[0][1])) > 1
    assert all(np.mean(got == expected) > 0.995 for got, expected in pairs)
    segments, instances = (
        [json.loads((tmp_path / name / file).read_text()) for name in ("bundle", "torch")]
        for file in ("panoptic.json", "instances.json")
    )
    counts = [sum(len(entry["segments_info"]) for entry in one["annotations"]) for one in segments]
    assert counts[0] > LEAST_IMAGES and abs(counts[0] - counts[1]) <= 1
    assert len(instances[0]) > LEAST_IMAGES and abs(len(instances[0]) - len(instances[1])) <= 1


def test_evaluate_measures_what_it_measures_for_the_checkpoint(made: Made, tmp_path: Path) -> None:
    metrics = []
    for source, more in ((made.bundle, []), (made.checkpoint, LOW)):
        output = tmp_path / f"{len(metrics)}.json"
        assert evaluate.main([str(source), *DATA, *more, "--task", *TASKS, "--output", str(output)]) == 0
        metrics.append(json.loads(output.read_text()))
    for name in ("miou", "pq", "ap"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], abs=0.005), name


def test_benchmark_measures_it_beside_pytorch(made: Made, tmp_path: Path) -> None:
    line = [str(made.bundle), "--checkpoint", str(made.checkpoint), "--against", "eager", "--batches", "1",
            "--size", "48x40", "--seconds", "0.05", "--output", str(tmp_path / "report")]  # fmt: skip
    assert benchmark.main(line) == 0
    rows = json.loads((tmp_path / "report" / "benchmark.json").read_text())["rows"]
    assert [row["runner"] for row in rows] == ["bundle", "PyTorch eager"] and rows[0]["labels_equal"] > 0.99


def test_openvino_makes_the_masks_of_live_queries_only(made: Made) -> None:
    pytest.importorskip("openvino")
    from maskformer_fast.deploy.runtime.openvino_session import OpenvinoSession

    bundle = Bundle.open(made.bundle)
    session = OpenvinoSession(bundle.read("raw.onnx"), 1)
    images = np.ascontiguousarray(photo(3, 61, 43).transpose(2, 0, 1)[None])
    masks = session.run(images)[1]
    assert isinstance(masks, FactoredMasks) and masks[0][np.array([2, 0])].shape[0] == 2
    np.testing.assert_allclose(masks[0][np.array([2, 0])], np.asarray(masks[0])[[2, 0]], rtol=0, atol=1e-5)


def test_an_int8_engine_is_made_and_used(made: Made, tmp_path: Path) -> None:
    """The operators of masks, and deformable attention by the C++ operator, are those of the graph in float32."""
    pytest.importorskip("nncf")
    from maskformer_fast.deploy.runtime.openvino_attention import replace_attention
    from maskformer_fast.deploy.runtime.openvino_session import find_mask_tail, shared_core

    line = [str(made.bundle), "--engine-only", "--engine.api", "openvino", "--engine.precision", "int8",
            "--engine.calibration", str(made.pictures), "--engine.opt-shape", "1", *map(str, SIZE)]  # fmt: skip
    assert export.main(line) == 0
    bundle = Bundle.open(made.bundle)
    (engine,) = bundle.manifest.engines
    text = bundle.read(engine.file).decode()
    assert "FakeQuantize" in text
    model = shared_core().read_model(bundle.read(engine.file), bundle.read(engine.weights or ""))
    assert find_mask_tail(model) is not None
    assert replace_attention(model, 1) == (made.kind == "mask2former")
    frames = [photo(number, 61, 43) for number in range(4)]
    with load(bundle) as runtime, load(bundle, precision="fp32") as exact:
        assert (runtime.precision, exact.precision) == ("int8", "fp32")
        pairs = zip(runtime.predict(frames), exact.predict(frames), strict=True)
        assert np.mean([np.mean(got.labels == wanted.labels) for got, wanted in pairs]) > 0.8  # type: ignore[union-attr]
        for task in TASKS:
            assert len(runtime.predict(frames, task)) == len(frames)
    output = tmp_path / "metrics.json"
    assert evaluate.main([str(made.bundle), *DATA, "--precision", "int8", "--output", str(output)]) == 0
    assert 0 <= json.loads(output.read_text())["pq"] <= 1  # the data set's task is panoptic
    line = [str(made.bundle), str(made.pictures), "-o", str(tmp_path / "out"), "--precision", "int8"]
    assert predict.main(line) == 0 and len(written(tmp_path / "out")) == LEAST_IMAGES


def test_launches_are_recorded_and_compiled_for_a_gpu(made: Made) -> None:
    pytest.importorskip("triton")
    from maskformer_fast.deploy.build.record_launches import record_launches

    manifest = Bundle.open(made.bundle).manifest
    recorded = record_launches(manifest, [Shape(2, 61, 43)], TASKS, "float16")
    assert [sequence.task for sequence in recorded.sequences] == list(TASKS)
    for sequence in recorded.sequences:
        (masks,) = (buffer for buffer in sequence.buffers if buffer.name == "mask_logits")
        step = max(1, manifest.preprocess.size_divisibility)
        sides = [-(-side // step) * step // 4 for side in (sequence.images.height, sequence.images.width)]
        assert masks.shape == (2, manifest.num_queries, *sides) and sequence.after


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_for_rtx_builds_an_engine(made: Made, precision: str) -> None:
    shapes = {"min_shape": (1, 32, 32), "opt_shape": (1, 48, 40), "max_shape": (2, 96, 96)}
    config = EngineConfig(precision=precision, targets=("sm_86", "sm_89"), **shapes)  # type: ignore[arg-type]
    content, engine = build_engine(Bundle.open(made.bundle).read("raw.onnx"), config, progress=False)
    assert len(content) > 10_000 and engine.precision == precision and not engine.options["loaded"]
