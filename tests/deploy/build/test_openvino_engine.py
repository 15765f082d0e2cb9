"""INT8 graphs for OpenVINO: options, pictures, the bundle that they are added to, and its results without NNCF."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskformer_fast import export, predict
from maskformer_fast.deploy.build.onnx import export_graphs
from maskformer_fast.deploy.build.openvino_engine import FILE, is_transformer, quantise_model
from maskformer_fast.deploy.build.quantize import LEAST_IMAGES
from maskformer_fast.deploy.build.tensorrt import EngineConfig, EngineError
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.bundle.manifest import BundleError, Shape
from maskformer_fast.deploy.runtime import load, openvino_session
from maskformer_fast.deploy.runtime.openvino_session import find_mask_tail, shared_core
from maskformer_fast.modeling import build_model
from maskformer_fast.recipes import load_recipe
from tests.support.graphs import raw_graph
from tests.support.tail_graph import tail_bundle, tail_graph

openvino = pytest.importorskip("openvino")
pytest.importorskip("nncf")
SIZE = (36, 52)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many pictures as are needed, and a damaged one."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    for number in range(LEAST_IMAGES):
        array = rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{number}.png")
    (folder / "damaged.png").write_bytes(b"\x89PNG")
    return folder


def command(bundle: Bundle, pictures: Path, *more: str) -> list[str]:
    return [
        str(bundle.folder), "--engine-only", "--engine.api", "openvino", "--engine.precision", "int8",
        "--engine.calibration", str(pictures), "--engine.opt-shape", "1", *map(str, SIZE), *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16", "calibration": None}, "precision: expected int8 with openvino, .*got 'bf16'"),
        ({"calibration": None}, "calibration: expected a folder of images, got None"),
        ({"max_shape": (1, 9, 9)}, "max_shape: expected nothing: openvino does not have this option"),
        ({"calibration_method": "max"}, "calibration_method: expected nothing"),
        ({"targets": ("sm_89",)}, "targets: expected nothing"),
        ({"mask_dtype": "float16"}, "mask_dtype: expected nothing"),
    ],
)
def test_options_of_tensorrt_alone_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        EngineConfig(**{"api": "openvino", "precision": "int8", "calibration": "pictures", **options})


def test_a_failure_leaves_the_bundle_as_it_was(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tail_bundle(tmp_path / "bundle")
    few = tmp_path / "few"
    few.mkdir()
    for case, error, message in (
        (tmp_path / "nowhere", FileNotFoundError, "calibration: expected a folder of images"),
        (few, FileNotFoundError, "calibration: no image in"),
        (pictures, ModuleNotFoundError, r"needs openvino and nncf \(pip install maskformer_fast\[quantize-openvino\]"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "nncf", None)
            with pytest.raises(error, match=message) as caught:
                export.main(command(bundle, case))
        assert "\n" not in str(caught.value)
    assert Bundle.open(bundle.folder).digest == bundle.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "few"]


def attention_graph(stem: int, blocks: int, lateral: int) -> Any:
    """A model with convolutions, then attention of pixels to pixels, then convolutions, whose result are the masks."""
    op = openvino.opset13
    images = op.parameter([1, 3, 8, 8], np.float32)
    x: Any = op.convolution(images, np.ones((4, 3, 1, 1), np.float32), [1, 1], [0, 0], [0, 0], [1, 1])
    weight = np.ones((4, 4, 1, 1), np.float32)
    for _ in range(stem - 1):
        x = op.relu(op.convolution(x, weight, [1, 1], [0, 0], [0, 0], [1, 1]))
    for _ in range(blocks):
        tokens = op.reshape(x, np.array([1, 4, 64]), False)
        scores = op.softmax(op.matmul(tokens, tokens, True, False), 2)
        x = op.add(x, op.reshape(op.matmul(tokens, scores, False, False), np.array([1, 4, 8, 8]), False))
    for _ in range(lateral):
        x = op.relu(op.convolution(x, weight, [1, 1], [0, 0], [0, 0], [1, 1]))
    x.output(0).get_tensor().set_names({"mask_logits"})
    return openvino.Model([x], [images])


@pytest.mark.parametrize(
    ("stem", "blocks", "lateral", "wanted"),
    [(1, 12, 8, True), (1, 2, 9, True), (4, 1, 3, False), (2, 30, 3, False), (4, 0, 3, False)],
)
def test_the_preset_for_transformers_is_for_backbones_of_attention(
    stem: int, blocks: int, lateral: int, wanted: bool
) -> None:
    assert is_transformer(attention_graph(stem, blocks, lateral), None) == wanted


def test_attention_of_queries_is_not_a_backbone() -> None:
    for graph in (tail_graph(), raw_graph().SerializeToString()):
        model = shared_core().read_model(graph)
        assert not is_transformer(model, find_mask_tail(model))


@pytest.mark.slow
def test_a_small_swin_keeps_its_residual_sums_and_a_resnet_with_an_encoder_does_not(
    tmp_path: Path, pictures: Path
) -> None:
    recipe = load_recipe("demo").model
    swin = replace(
        recipe.backbone, name="swin_tiny", embed_dim=32, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16),
        res2_channels=None,
    )  # fmt: skip
    for backbone, wanted in ((swin, True), (recipe.backbone, False)):
        network = build_model(replace(recipe, num_classes=5, backbone=backbone)).eval()
        model = shared_core().read_model(export_graphs(network, ["raw"], None)["raw"][0])
        tail = find_mask_tail(model)
        assert tail is not None and is_transformer(model, tail) == wanted
        files = sorted(pictures.glob("[0-9].png"))
        int8 = quantise_model(model, files[:2], 1, (64, 64), wanted, tail.names, progress=False)
        readers = {
            port.get_node().get_type_name() for node in int8.get_ops() if node.get_type_name() == "FakeQuantize"
            for port in node.output(0).get_target_inputs()
        }  # fmt: skip
        assert {"MatMul", "Convolution"} <= readers and bool(readers & {"MVN", "Add"}) != wanted


def test_what_nncf_raises_is_one_line_and_the_bundle_stays(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nncf

    def refuse(*arguments: object, **options: object) -> None:
        print("a library that talks")
        raise nncf.UnsupportedModelError("no such operator:\n  Foo\n  Bar")

    monkeypatch.setattr(nncf, "quantize", refuse)
    bundle = tail_bundle(tmp_path / "bundle")
    with pytest.raises(ValueError, match="graphs.raw: expected a graph that NNCF quantises, got .*Foo Bar") as caught:
        export.main(command(bundle, pictures))
    assert "\n" not in str(caught.value) and "UnsupportedModelError" in str(caught.value)

    def run_out(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(nncf, "quantize", run_out)
    with pytest.raises(MemoryError):
        export.main(command(bundle, pictures))
    assert Bundle.open(bundle.folder).digest == bundle.digest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("options", "lacking", "message"),
    [
        (("--precision", "bf16"), "bfloat16", "precision: expected fp32 or int8, as this processor has no bfloat16"),
        (("--precision", "int8"), "", "engines: expected one of openvino in int8, got none; build it with: .*"),
        (("--backend", "onnxruntime", "--precision", "bf16"), "", "precision: expected fp32 with the backend onnxrunt"),
        (("--backend", "openvino"), "openvino", r"openvino is needed .*maskformer_fast\[openvino\]"),
    ],
)
def test_what_cannot_run_here_is_one_line_and_nothing_is_written(
    tmp_path: Path, options: tuple[str, ...], lacking: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tail_bundle(tmp_path / "bundle")
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "picture.png")
    if lacking == "bfloat16":
        monkeypatch.setattr(openvino_session, "has_bfloat16", lambda: False)
    elif lacking:
        monkeypatch.setitem(sys.modules, lacking, None)
        monkeypatch.setattr(openvino_session, "shared_core", shared_core.__wrapped__)
    line = [str(bundle.folder), str(tmp_path / "picture.png"), "-o", str(tmp_path / "results"), "--device", "cpu"]
    with pytest.raises((ValueError, ModuleNotFoundError), match=message) as caught:
        predict.main([*line, *(options if "--backend" in options else ("--backend", "openvino", *options))])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_too_few_pictures_are_refused(tmp_path: Path, pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = tail_bundle(tmp_path / "bundle")
    limit = str(LEAST_IMAGES - 1)
    with pytest.raises(ValueError, match=f"calibration: expected at least {LEAST_IMAGES} pictures .* got [67]"):
        export.main(command(bundle, pictures, "--engine.calibration-images", limit))
    assert Bundle.open(bundle.folder).digest == bundle.digest


@pytest.mark.slow
def test_an_engine_is_added_and_used_without_torch_and_nncf(
    tmp_path: Path, pictures: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tail_bundle(tmp_path / "bundle")
    assert export.main(command(bundle, pictures)) == 0
    assert "damaged.png" in caplog.text and FILE in capsys.readouterr().out
    made = Bundle.open(bundle.folder)
    (engine,) = made.manifest.engines
    assert (engine.api, engine.precision, engine.targets) == ("openvino", "int8", ())
    assert engine.options["images"] == LEAST_IMAGES and engine.profile.optimum == Shape(1, *SIZE)
    assert {engine.file, engine.weights} <= made.manifest.files.keys()
    text = made.read(engine.file).decode()
    assert "FakeQuantize" in text and [spec.name for spec in engine.outputs] == ["class_logits", "mask_logits"]
    model = shared_core().read_model(made.read(engine.file), made.read(engine.weights or ""))
    assert find_mask_tail(model) is not None, "the operators of the masks are not quantised"

    frames = [np.random.default_rng(n).integers(0, 256, (*SIZE, 3), dtype=np.uint8) for n in range(3)]
    with load(made) as runtime, load(made, precision="fp32") as exact:
        assert (runtime.precision, exact.precision) == ("int8", "fp32")
        for got, wanted in zip(runtime.predict(frames), exact.predict(frames), strict=True):
            assert np.mean(got.labels == wanted.labels) > 0.8
    program = f"""
import sys
for name in ("torch", "triton", "onnx", "onnxruntime", "PIL", "tyro", "nncf"):
    sys.modules[name] = None
import numpy as np
from maskformer_fast.deploy.runtime import load
with load({str(bundle.folder)!r}) as runtime:
    print(runtime.precision, runtime.predict(np.zeros({(*SIZE, 3)}, np.uint8)).labels.shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == f"int8 {SIZE}", done.stderr

    assert export.main(command(bundle, pictures)) == 0
    assert len(Bundle.open(bundle.folder).manifest.engines) == 1, "it is replaced"
    weights = bundle.folder / str(engine.weights)
    weights.unlink()
    weights.write_bytes(b"0" * made.manifest.files[str(engine.weights)].bytes)
    with pytest.raises(BundleError, match="openvino_int8.bin"):
        load(bundle.folder)
