"""Eight bits: choice of images and nodes, ranges, labels, and errors for missing libraries and images."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from maskformer_fast.data import BrokenExampleError
from maskformer_fast.deploy.build.precision import to_half
from maskformer_fast.deploy.build.quantize import (
    LEAST_IMAGES,
    covering_crop,
    image_files,
    kept_nodes,
    quantize,
    quantizer_errors,
    readable_images,
)
from maskformer_fast.deploy.build.tensorrt import EngineConfig, build_engine
from tests.support.graphs import images, labels, raw_graph, run


def modelopt_missing() -> str:
    """Reason why modelopt's ONNX part cannot be used; empty where it can."""
    try:
        importlib.import_module("modelopt.onnx.quantization")
    except ImportError as error:
        return str(error).splitlines()[0]
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images of several sizes in two folders, one of them damaged."""
    root = tmp_path_factory.mktemp("calibration")
    (root / "more").mkdir()
    for index, (height, width) in enumerate([(64, 96), (96, 64), (40, 50), (128, 128)] * 2):
        array = images(1, height, width, seed=index)[0].transpose(1, 2, 0)
        Image.fromarray(array).save(root / ("more" if index % 2 else ".") / f"{index}.png")
    (root / "damaged.png").write_bytes(b"\x89PNG")
    return root


def test_image_files_are_limited_and_spread(folder: Path, tmp_path: Path) -> None:
    assert len(image_files(folder, 256)) == 9
    assert len(set(image_files(folder, 4))) == 4
    (folder / "._0.png").write_bytes(b"macOS")
    assert len(image_files(folder, 256)) == 9, "hidden files are left out"
    (folder / "._0.png").unlink()
    with pytest.raises(FileNotFoundError, match="calibration: expected a folder of images"):
        image_files(folder / "0.png", 4)
    with pytest.raises(FileNotFoundError, match="calibration: no image in"):
        image_files(tmp_path, 4)


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (33, 47), (1, 1), (256, 16)])
def test_covering_crops_are_centred_and_undistorted(size: tuple[int, int]) -> None:
    image = np.zeros((80, 120, 3), np.uint8)
    image[30:50, 50:70] = 255
    crop = covering_crop(image, size)
    assert crop.shape == (1, 3, *size) and crop.dtype == np.uint8
    if size != (1, 1):  # one pixel is the mean of a square
        assert crop[0, :, size[0] // 2, size[1] // 2].min() > 200
    # At this scale the entire image would take up to 39 GiB.
    assert covering_crop(np.full((1, 200_000, 3), 7, np.uint8), size).max() == 7
    same = covering_crop(image, (80, 120))
    assert np.array_equal(same[0].transpose(1, 2, 0), image)


def test_the_first_convolution_and_products_of_activations_are_kept() -> None:
    assert kept_nodes(raw_graph()) == ["conv1", "seen"]


def test_a_missing_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        if name.startswith("modelopt"):
            raise ImportError("No module named 'onnx_graphsurgeon'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"pip install maskformer_fast\[quantize\].*onnx_graphsurgeon"):
        quantize(raw_graph(), "int8", folder, (64, 96))
    with pytest.raises(ValueError, match="expected entropy or max for fp8"):
        quantize(raw_graph(), "fp8", folder, (64, 96), method="percentile")


MISSING = modelopt_missing()
needs_modelopt = pytest.mark.skipif(bool(MISSING), reason=f"modelopt's ONNX part cannot be used: {MISSING}")


@needs_modelopt
@pytest.mark.parametrize("method", ["entropy", "percentile", "max"])
def test_int8_keeps_labels(folder: Path, method: str) -> None:
    """Convolutions and linear layers are quantised, kept nodes are not, and most labels do not change."""
    model, inputs = raw_graph(seed=3), images(2, 128, 192)
    quantized = quantize(model, "int8", folder, (64, 96), method=method, progress=False)  # type: ignore[arg-type]
    makers = {name: node.op_type for node in quantized.graph.node for name in node.output}
    inputs_of = {node.name: [makers.get(name) for name in node.input] for node in quantized.graph.node}
    assert inputs_of["conv2"][:2] == ["DequantizeLinear"] * 2
    assert inputs_of["key"][:2] == ["DequantizeLinear"] * 2
    assert "DequantizeLinear" not in inputs_of["conv1"]
    assert inputs_of["seen"] == ["Softmax", "DequantizeLinear"]  # float32, though it shares an input with `key`
    exact = labels(run(model, inputs))
    for version in (quantized, to_half(quantized, "fp16")):
        assert (labels(run(version, inputs)) == exact).mean() > 0.9


@needs_modelopt
def test_percentile_is_narrower_than_max(folder: Path) -> None:
    def scales(method: str) -> dict[str, np.ndarray]:
        model = quantize(raw_graph(seed=3), "int8", folder, (64, 96), method=method, progress=False)  # type: ignore[arg-type]
        return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("scale")}

    narrow, wide = scales("percentile"), scales("max")
    assert narrow.keys() == wide.keys()
    assert all((narrow[name] <= wide[name] * 1.000001).all() for name in wide)
    assert any((narrow[name] < wide[name]).any() for name in wide)


def test_unreadable_pictures_are_named_and_too_few_are_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = image_files(folder, 256)
    assert sorted({*files} - {*readable_images(files, progress=False)}) == [folder / "damaged.png"]
    assert caplog.text.count("left out") == caplog.text.count("damaged.png") == 1
    readable = [path for path in files if path.name != "damaged.png"]
    assert len(readable_images(readable[:LEAST_IMAGES], progress=False)) == LEAST_IMAGES
    for few in (readable[1:], [folder / "damaged.png"], []):
        with pytest.raises(ValueError) as caught:
            readable_images(few, progress=False)
        count = len([path for path in few if path.name != "damaged.png"])
        assert str(caught.value) == f"calibration: expected at least 8 pictures that can be read, got {count}"


@needs_modelopt
def test_too_few_images_are_refused_before_the_quantiser_runs(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="calibration: expected at least 8 pictures that can be read, got 0"):
        quantize(raw_graph(), "int8", tmp_path, (64, 96), progress=False)


@needs_modelopt
def test_what_modelopt_refuses_is_one_line(folder: Path) -> None:
    model = raw_graph()
    model.graph.node[0].op_type = "Unknown"
    with pytest.raises(ValueError, match="graphs.raw: expected a graph that modelopt quantises, got") as caught:
        quantize(model, "int8", folder, (64, 96), progress=False)
    assert "\n" not in str(caught.value)


def test_errors_of_a_quantiser_become_one_line_but_not_those_of_files() -> None:
    wanted = "^graphs.raw: expected a graph that X quantises, got 'AssertionError: a b'$"
    with pytest.raises(ValueError, match=wanted), quantizer_errors("X"):
        raise AssertionError("a\n b")
    for error in (FileNotFoundError("f"), BrokenExampleError("p.png", "cut off"), ModuleNotFoundError("m")):
        with pytest.raises(type(error)) as caught, quantizer_errors("X"):
            raise error
        assert caught.value is error


@needs_modelopt
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_rtx_builds_eight_bits(folder: Path, precision: str) -> None:
    config = EngineConfig(
        precision=precision, calibration=str(folder), calibration_method="max", targets=("sm_89", "sm_120"),  # type: ignore[arg-type]
        min_shape=(1, 64, 64), opt_shape=(1, 64, 96), max_shape=(2, 128, 128), mask_dtype="float16",
    )  # fmt: skip
    content, engine = build_engine(raw_graph().SerializeToString(), config, progress=False)
    assert len(content) > 10_000
    assert engine.options["calibration_method"] == "max"
    assert [o.dtype for o in engine.outputs] == ["float32", "float16"]
