"""The export command: its bundles, and the options that it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maskformer_fast import export
from maskformer_fast.config import BackboneConfig, Config, DecoderConfig, ModelConfig, PixelDecoderConfig, TestConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.deploy.build import onnx as onnx_module
from maskformer_fast.deploy.build import tensorrt
from maskformer_fast.deploy.build.parity import ParityError
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.bundle.manifest import Engine, Profile, Shape
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.modeling import build_model

METADATA = Metadata("three", ("a", "b", "c"), (True, False, True), (1, 2, 3), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
CONFIG = Config(
    model=ModelConfig(
        num_classes=3, backbone=BackboneConfig("resnet_micro"), pixel_mean=(1.0, 2.0, 3.0),
        pixel_decoder=PixelDecoderConfig(conv_dim=16, mask_dim=12, norm_groups=4),
        decoder=DecoderConfig(layers=1, hidden_dim=16, num_heads=2, ffn_dim=24, num_queries=5),
    ),
    test=TestConfig(short_edge=64, top_k=4, overlap_threshold=0.7),
)  # fmt: skip


@pytest.fixture
def predictor() -> Predictor:
    torch.manual_seed(0)
    return Predictor(build_model(CONFIG.model).eval(), CONFIG, METADATA, "cpu")


@pytest.fixture
def tiny_checkpoint(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the command load `predictor` from a checkpoint named ``tiny``."""

    def load(path: str, device: str, test: TestConfig) -> Predictor:
        assert (path, device) == ("tiny", "cpu")
        return Predictor(predictor.network, replace(CONFIG, test=test), METADATA, device)

    monkeypatch.setattr(export, "stored_test", lambda _: CONFIG.test)
    monkeypatch.setattr("maskformer_fast.inference.load.load_network", load)


def build_nothing(raw_onnx: bytes, config: tensorrt.EngineConfig) -> tuple[bytes, Engine]:
    """Stands for minutes of TensorRT."""
    shape = Shape(1, 64, 64)
    engine = Engine(
        f"engines/{config.precision}.engine", "tensorrt_rtx", "1", config.precision, ("sm_87",),
        Profile(shape, shape, shape), {}, (),
    )  # fmt: skip
    return b"engine of " + raw_onnx[:4], engine


@pytest.mark.usefixtures("tiny_checkpoint")
def test_export_writes_a_bundle_and_adds_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = tmp_path / "out" / "bundle"
    command = ["tiny", "--output", str(folder), "--static", "2x40x72", "--test.top-k", "9"]
    assert export.main(command) == 0
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    assert bundle.digest in capsys.readouterr().out
    assert manifest.name == "tiny" and manifest.metadata == METADATA and manifest.num_queries == 5
    assert manifest.preprocess.mean == (1.0, 2.0, 3.0) and manifest.preprocess.short_edge == 64
    assert manifest.postprocess.top_k == 9 and manifest.postprocess.overlap_threshold == 0.7
    assert {entry.flavour for entry in manifest.parity} == {"raw", "complete"} == set(manifest.graphs)
    assert all(entry.shape == Shape(2, 40, 72) for entry in manifest.parity)
    assert manifest.created_with["torch"] == torch.__version__.split("+")[0] or manifest.created_with["torch"]

    monkeypatch.setattr(tensorrt, "build_engine", build_nothing)
    for precision in ("fp16", "fp32", "fp16"):
        assert export.main([str(folder), "--engine-only", "--engine.precision", precision]) == 0
    extended = Bundle.open(folder)
    assert [engine.precision for engine in extended.manifest.engines] == ["fp32", "fp16"]
    assert extended.read("engines/fp32.engine") == b"engine of " + bundle.read("raw.onnx")[:4]
    assert extended.manifest.graphs == manifest.graphs and extended.digest != bundle.digest
    with pytest.raises(ValueError, match="checkpoint: expected a checkpoint, or a bundle with --engine-only"):
        export.main([str(folder), "--output", str(tmp_path / "other")])


def test_static_shapes_are_parsed() -> None:
    assert export.parse_static("Bx32x64") == (Shape(1, 32, 64), True)
    assert export.parse_static("2x32x64") == (Shape(2, 32, 64), False)
    assert export.parse_static(None) == (None, False)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_checkpoint")
def test_a_graph_that_differs_from_pytorch_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch and the graph are made to differ by a thousandth of a weight."""
    forward = onnx_module.RawGraph.forward

    def inexact(self: Any, images: Any) -> Any:
        classes, masks = forward(self, images)
        return classes * 1.001, masks

    monkeypatch.setattr(onnx_module.RawGraph, "forward", inexact)
    with pytest.raises(ParityError, match="raw.onnx, 1x32x32: logits differ"):
        export.main(["tiny", "--output", str(tmp_path / "bundle"), "--static", "1x32x32"])
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("tiny_checkpoint")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--test.semantic-order", "official"], "test.semantic_order: expected 'direct'"),
        (["--test.panoptic-order", "official"], "test.panoptic_order: expected 'direct'"),
        (["--test.multi-scale", "0.5", "1.0"], "test.multi_scale"),
        (["--test.flip"], "test.flip"),
        (["--flavours", "cooked"], "flavours"),
        (["--flavours", "complete", "--with-engine"], "flavours: expected raw among them"),
        (["--target", "sm_87"], "target, frames: expected both"),
        (["--frames", "1x20x20"], "target, frames: expected both"),
        (["--static", "axb"], "shape"),
        (["--sizes", "0x5"], "shape"),
        (["--static", "1x32x32", "--sizes", "64x64"], "sizes: expected 1x32x32 alone"),
        (["--static", "1x32x32", "--sizes", "2x32x32"], "sizes: expected 1x32x32 alone"),
        (["--static", "Bx32x32", "--sizes", "2x32x64"], "sizes: expected Bx32x32 alone"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_work(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export.main(["tiny", "--output", str(tmp_path / "bundle"), *options])
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("tiny_checkpoint")
def test_output_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_module, "export_graphs", None)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="remove it first"):
        export.main(["tiny", "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="output: expected a folder"):
        export.main(["tiny"])
    with pytest.raises(ValueError, match="output: expected nothing"):
        export.main([str(tmp_path), "--engine-only", "--output", "x"])


def test_per_pixel_baselines_are_refused(predictor: Predictor, tmp_path: Path) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, type="per_pixel"))
    baseline = Predictor(build_model(config.model).eval(), config, METADATA, "cpu")
    with pytest.raises(ValueError, match="model.type: expected maskformer"):
        export.make_bundle(baseline, export.ExportOptions("x", output=str(tmp_path / "bundle")))


def test_defaults_of_the_test_settings_come_from_the_recipe() -> None:
    test = export.stored_test("demo")
    assert test is not None and test == export.load_recipe("demo").test
