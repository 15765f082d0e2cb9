"""The studies, the pictures and the recorded results."""

from __future__ import annotations

import json
import math
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import linregress

from benchmarks import plots
from benchmarks.cases import end_to_end as files_to_labels
from benchmarks.cases.engines import INDUCTOR, PACKAGES, is_installed
from benchmarks.harness.report import NUMBERS, markdown
from benchmarks.harness.runner import plan
from benchmarks.studies import (
    class_count,
    cpu_bundle,
    end_to_end,
    image_to_labels,
    precision_metrics,
    scaling,
    throughput,
)
from maskformer_fast.benchmark.runners import draw_frame
from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.data import build_dataset
from maskformer_fast.deploy.build.quantize import LEAST_IMAGES
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import save_weights
from maskformer_fast.recipes import load_recipe
from tests.support.paths import ROOT, TINY_RECIPE
from tests.support.tail_graph import tail_bundle, tail_graph

RESULTS = ROOT / "benchmarks" / "results"


@settings(max_examples=60, deadline=None)
@given(xs=st.lists(st.integers(1, 10**7), min_size=3, max_size=9, unique=True), data=st.data())
def test_fit_is_scipys_of_the_upper_half(xs: list[int], data: st.DataObject) -> None:
    times = data.draw(st.lists(st.floats(1e-3, 1e3), min_size=len(xs), max_size=len(xs)))
    points = list(zip(xs, times, strict=True))
    fit = scaling.fit_exponent(data.draw(st.permutations(points)))
    upper = sorted(points)[-max(3, (len(points) + 1) // 2) :]
    assume(math.log(upper[-1][0] / upper[0][0]) > 1e-2)
    assume(len({time for _, time in upper}) > 1)  # SciPy's error of a constant is not a number
    oracle = linregress(*np.log(np.array(upper)).T)
    assert fit is not None and (fit.low, fit.high) == (upper[0][0], upper[-1][0])
    assert fit.exponent == pytest.approx(oracle.slope, rel=1e-6, abs=1e-6)
    assert fit.error == pytest.approx(oracle.stderr, rel=1e-4, abs=1e-5)


def test_fits_name_their_points_and_need_three() -> None:
    times = [(1, 8.0, 1.0), (2, 8.0, 4.0), (4, 16.0, 16.0), (8, 32.0, 64.0), (16, 64.0, None)]
    row = scaling.fits([{"x": x, "ours_ms": ours, "peer_ms": peer} for x, ours, peer in times])
    assert (row["ours_exponent"], row["peer_exponent"]) == pytest.approx((1.0, 2.0))
    assert row["fit"] == "log-log least squares over points 4..16; peer: points 2..8"
    assert scaling.fit_exponent([(3, 1.0), (3, 2.0), (3, 4.0)]) is None


def test_curves_are_those_of_the_record() -> None:
    curves = {curve.name: curve for curve in scaling.curves()}
    todo = plan([scaling.MODULE], "cpu")
    recorded = json.loads((RESULTS / "scaling.json").read_text())["curves"]
    assert [row["name"] for row in recorded] == list(curves)
    for row in recorded:
        written = scaling.curve_row(curves[row["name"]], todo, {}, {})
        assert written.keys() == row.keys() and (written["axis"], written["peer"]) == (row["axis"], row["peer"])
        assert [(p["x"], p["label"]) for p in written["points"]] == [(p["x"], p["label"]) for p in row["points"]]
        assert all(written["points"][0].keys() <= point.keys() for point in row["points"])
        assert scaling.fits(row["points"]).items() <= row.items(), "the exponents are of the points"


@pytest.mark.slow
@pytest.mark.no_cover
def test_files_become_the_labels_of_hugging_face(tmp_path: Path) -> None:
    files = files_to_labels.prepare_images(None, 1, tmp_path / "images")
    files_to_labels.write_network(tmp_path / "network", 19, "confident", files)
    threads = torch.get_num_threads()
    engine_of = {name: name.split(", ")[0] for name in files_to_labels.IMPLEMENTATIONS}
    names = [name for name, engine in engine_of.items() if is_installed(engine) and engine != INDUCTOR]  # that is slow
    torch.set_num_threads(1)  # the processor's time of several is their sum
    try:
        measured = end_to_end.measure(tmp_path / "network", files, tmp_path / "labels", names, time.process_time)
    finally:
        torch.set_num_threads(threads)
    ours, theirs = measured["ours, float32"], measured[files_to_labels.HUGGINGFACE]
    assert theirs["identical_labels"] == 1 and ours["identical_labels_in_their_order"] > 0.999
    assert ours["identical_labels"] > 0.8, "classes meet at other pixels, as ours resize once"
    labels = np.array(Image.open(tmp_path / "labels" / "ours, float32" / "semantic" / "000.png"))
    assert labels.shape == (512, 512) and len(np.unique(labels)) > 3
    assert sum(ours["stages_ms"].values()) == pytest.approx(ours["milliseconds"], rel=0.2)
    for name in names[4:]:
        assert measured[name]["identical_labels"] > 0.8
    peaks = dict.fromkeys(measured, 600.0) | dict(zip(measured, (500.0, 900.0, 800.0, 700.0), strict=False))
    for figures, milliseconds in zip(measured.values(), (400.0, 250.0, 800.0, 600.0), strict=False):
        figures["milliseconds"] = milliseconds
    row = end_to_end.build_row(150, "random", measured, peaks)["implementations"]
    goals = [goal for figures in row.values() for goal in figures["goals"]]
    assert [(goal["measured"], goal["reached"]) for goal in goals] == [(2.0, True), (3.2, False)], "memory counts too"
    recorded = json.loads((RESULTS / "end_to_end.json").read_text())["rows"][0]["implementations"]
    assert all(list(row[name]) == list(figures) for name, figures in recorded.items())


def test_class_count_gives_both_models_the_same_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs: list[tuple[str, int, int]] = []

    def train(folder: Path, model: str, classes: int, steps: int, images: int = 512) -> class_count.Run:
        runs.append((model, classes, steps))
        step = classes * 0.01
        return class_count.Run(0.5 + classes / 1000 if model == "maskformer" else 0.5, 3.0 + step * steps, step)

    monkeypatch.setattr(class_count, "train", train)
    output = tmp_path / "out.json"
    assert class_count.main(["--minutes", "4", "--classes", "5", "20", "--output", str(output)]) == 0
    for classes, expected in ((5, 1140), (20, 285)):  # 120 s less two starts, by two steps; the trials took no time
        steps = {number for _, k, number in runs if k == classes and number != class_count.TRIAL_STEPS}
        assert len(steps) == 1 and abs(steps.pop() - expected) < 5
    rows = json.loads(output.read_text())["rows"]
    assert [(row["classes"], round(row["gain"], 3)) for row in rows] == [(5, 0.005), (20, 0.02)]
    assert rows[0].keys() == json.loads((RESULTS / "class_count.json").read_text())["rows"][0].keys()


def test_recorded_pages_are_written_from_their_figures() -> None:
    for path in RESULTS.glob("cpu*.json"):
        content = json.loads(path.read_text())
        assert path.with_suffix(".md").read_text() == markdown(content)
        assert all(set(NUMBERS) | {"name", "subject", "peer", "threads", "goals", "command"} <= set(row)
                   <= set(NUMBERS) | {"name", "subject", "peer", "threads", "goals", "command", "absent", "not_run",
                                     "shares"}
                   for row in content["rows"])  # fmt: skip


def test_every_recorded_file_is_linked() -> None:
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    files = [path.relative_to(ROOT).as_posix() for path in RESULTS.rglob("*") if path.is_file()]
    assert not [file for file in files if file not in pages]


def test_pictures_are_drawn_from_the_record_with_text_as_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "scaling.json").write_text((RESULTS / "scaling.json").read_text())
    drawn = plots.draw_all(tmp_path, tmp_path / "plots")
    assert {path.stem for path in drawn} == set(plots.PICTURES["scaling.json"])
    for path in drawn:
        root = ElementTree.parse(path).getroot()
        texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
        assert any("ours" in text for text in texts if text)
        assert 780 <= float(root.attrib["width"].removesuffix("pt")) / 0.75 <= 820, "as wide as a page, in pixels"


def test_bundles_on_the_cpu_are_compared_with_their_complete_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    bundle = tail_bundle(tmp_path / "bundle")
    assert cpu_bundle.sides_of(bundle) == [
        "openvino, fp32", "openvino, bf16", "onnxruntime, fp32", "complete graph, fp32", "complete graph, bf16",
    ]  # fmt: skip
    frame = draw_frame(np.random.default_rng(0), (40, 56))
    ours, other = (cpu_bundle.open_side(side, bundle)(frame) for side in ("openvino, fp32", "onnxruntime, fp32"))
    assert np.mean(ours == other) > 0.999
    assert cpu_bundle.main([str(bundle.folder), "--size", "40x56", "--alone", "openvino, fp32"]) == 0
    assert float(capsys.readouterr().out) > 20


@pytest.mark.slow
def test_the_complete_graph_of_a_bundle_is_quantised_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nncf")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "graph.onnx").write_bytes(tail_graph())  # logits in place of labels
    graph = SimpleNamespace(file="graph.onnx")
    manifest = SimpleNamespace(graphs={"raw": graph, "complete": graph}, engines=())
    monkeypatch.setattr(cpu_bundle.Bundle, "open", lambda _: SimpleNamespace(folder=tmp_path, manifest=manifest))
    monkeypatch.setattr(cpu_bundle, "CPU_PRECISIONS", {})
    alone: list[str] = []

    def run_alone(command: list[str], **options: object) -> SimpleNamespace:
        alone.append(command[-1])
        if "@" in command[-1] and "int8" in command[-1]:
            assert 'type="FakeQuantize"' in Path(command[-1].partition("@")[2]).read_text()
        return SimpleNamespace(stdout="42.0\n")

    monkeypatch.setattr(cpu_bundle.subprocess, "run", run_alone)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(LEAST_IMAGES):
        Image.fromarray(draw_frame(np.random.default_rng(number), (40, 56))).save(pictures / f"{number}.png")
    options = [str(tmp_path), "--size", "40x56", "--calibration", str(pictures), "--rounds", "1"]
    assert cpu_bundle.main(options) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    names = [f"complete graph, {precision}" for precision in ("fp32", "bf16", "int8")]
    assert [row[0] for row in rows] == [f"| {name}" for name in names]
    assert [row[2:4] for row in rows] == [["1.00x", "42"]] * 3
    assert [side.partition("@")[0] for side in alone] == names


def test_sides_of_image_to_labels_agree(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = load_recipe(str(TINY_RECIPE)).model
    image = draw_frame(np.random.default_rng(0), (64, 96))
    image_to_labels.write_sides(tmp_path, replace(model, num_classes=5), image)
    ours, theirs = (image_to_labels.open_side(side, tmp_path)(image) for side in ("ours, float32", "OpenVINO, float32"))
    assert ours.shape == (64, 96) and np.mean(ours == theirs) > 0.99


@pytest.mark.slow
def test_sides_of_throughput_agree_and_keep_the_order(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    files = files_to_labels.prepare_images(None, 3, tmp_path / "images")
    for file in files:
        Image.open(file).resize((96, 64)).save(file)
    model = replace(load_recipe(str(TINY_RECIPE)).model, num_classes=5)
    throughput.write_networks(tmp_path, model, np.asarray(Image.open(files[0])))
    ours, bundle, theirs = (
        throughput.open_side(side, tmp_path, 2)(files)
        for side in ("checkpoint, float32, 2 in flight", "bundle, float32, 2 in flight", "OpenVINO, float32")
    )
    for one, two, three in zip(ours, bundle, theirs, strict=True):
        assert one.shape == (64, 96) and np.mean(one == three) > 0.99 and np.mean(two == three) > 0.99


def test_throughput_has_a_line_for_each_side_and_the_goal() -> None:
    options = throughput.ThroughputOptions(dtypes=("float32",), in_flight=(2, 1))
    checkpoint, faster, *bundles, peer = options.sides()
    assert (checkpoint, faster, peer) == (
        "checkpoint, float32, 1 in flight", "checkpoint, float32, 2 in flight", "OpenVINO, float32"
    )  # fmt: skip
    assert len(bundles) == 2
    seconds = {checkpoint: [(8.0, 6.0)] * 3, faster: [(4.0, 6.0), (5.0, 8.0), (1.0, 1.0)], peer: [(6.0, 12.0)] * 3}
    labels = {side: np.eye(4) for side in seconds} | {faster: np.ones((4, 4))}
    lines = throughput.format_table(options.sides(), seconds, labels, count=2)
    assert lines[2:] == [
        "| checkpoint, float32, 1 in flight | 0.25 | 0.75x | 3000 | 2.00x | 100.00 % |",
        "| checkpoint, float32, 2 in flight | 0.50 | 1.50x | 3000 | 2.00x | 25.00 % |",
        *(f"| {bundle} | not installed | | | | |" for bundle in bundles),
        "| OpenVINO, float32 | 0.33 | 1.00x | 6000 | 1.00x | 100.00 % |",
        "float32: the best of ours is checkpoint, float32, 2 in flight, 1.50x OpenVINO's rate; goal 1.2, met",
    ]
    del seconds[peer]
    assert throughput.format_table([checkpoint], seconds, labels, 2)[2:] == [
        "| checkpoint, float32, 1 in flight | 0.25 | - | 3000 | - | - |"
    ]
    for wrong, message in (({"count": 0}, "count: expected > 0"), ({"in_flight": (0,)}, "in_flight: expected numbers")):
        with pytest.raises(ValueError, match=message):
            throughput.ThroughputOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.99), ("bfloat16", 0.8)])
def test_inductor_gives_the_labels_of_the_network_and_of_hugging_face(
    dtype: str, least: float, tmp_path: Path
) -> None:
    model = ModelConfig(
        num_classes=5, backbone=BackboneConfig("resnet50", norm="batch", depths=(1, 1, 1, 1)),
        pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=32),
        decoder=DecoderConfig(layers=1, hidden_dim=32, num_heads=4, ffn_dim=32, num_queries=20),
    )  # fmt: skip
    image = draw_frame(np.random.default_rng(0), (64, 96))
    image_to_labels.write_checkpoint(tmp_path, model, image)
    sides = [image_to_labels.open_side(f"{who}, {dtype}", tmp_path) for who in ("ours", "Inductor", "Hugging Face")]
    ours, inductor, theirs = (segment(image) for segment in sides)
    assert ours.shape == inductor.shape == theirs.shape == (64, 96)
    assert np.mean(ours == inductor) > least and np.mean(ours == theirs) > 0.8


def test_a_side_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = {"ours, float32": np.zeros((2, 2)), "OpenVINO, float32": np.eye(2)}
    times, limits, peaks = {side: [1e3, 2e3, 3e3] for side in labels}, {"float32": 7.0}, dict.fromkeys(labels, 5.0)
    times["OpenVINO, float32"] = [2e3, 2e3, 9e3]
    row = image_to_labels.format_row("ours, float32", times, limits, peaks, labels)
    assert row == "| ours, float32 | 2000 | 2.00x | 7 | 5 | 50.00 % |"
    row = image_to_labels.format_row("onnxruntime, float32", times, limits, peaks, labels)
    assert row == "| onnxruntime, float32 | not installed | | | | |"
    del times["OpenVINO, float32"], labels["OpenVINO, float32"]
    row = image_to_labels.format_row("ours, float32", times, limits, {}, labels)
    assert row == "| ours, float32 | 2000 | - | 7 | - | - |"
    monkeypatch.setitem(PACKAGES, "OpenVINO", "no_such_package")
    assert not is_installed("OpenVINO") and is_installed("ours") and is_installed("Inductor")
    with pytest.raises(ValueError, match="sides: expected one of 'ours, float32'"):
        image_to_labels.ImageToLabelsOptions(sides=("theirs, float32",))


def test_image_to_labels_refuses_sizes_and_counts() -> None:
    with pytest.raises(ValueError, match="rounds: expected > 0"):
        image_to_labels.ImageToLabelsOptions(rounds=0)


def test_losses_of_a_precision_are_points_beside_its_goal() -> None:
    exact = precision_metrics.Row("PyTorch", "fp32", {"miou": 0.5, "pq": 0.4, "ap": 0.3})
    low = precision_metrics.Row("openvino", "int8", {"miou": 0.4901, "pq": 0.405, "ap": 0.1})
    assert precision_metrics.format_row(low, exact) == (
        "| openvino, int8 | 49.01 (-0.99) | 40.50 (+0.50) | 10.00 (-20.00) | 1.0 met |"
    )
    low.metrics["pq"] = 0.3899
    assert precision_metrics.format_row(low, exact).endswith("| 1.0 missed |")
    assert precision_metrics.format_row(low._replace(precision="bf16"), exact).endswith("| 0.3 missed |")


def test_precision_metrics_refuses_what_it_cannot_measure() -> None:
    for options, message in (
        ({"calibration": 7}, "calibration: expected >= 8, got 7"), ({"precisions": ("fp16",)}, "precisions: expected"),
        ({"precisions": ()}, "precisions: expected some of fp32, bf16, int8"), ({"task": ()}, "task: expected"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            precision_metrics.PrecisionMetricsOptions("run", **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.no_cover
def test_every_library_and_precision_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    config = load_recipe(str(TINY_RECIPE))
    metadata = build_dataset(config.data, "val").metadata
    config = replace(config, model=replace(config.model, num_classes=metadata.num_classes))
    save_weights(tmp_path / "w.safetensors", build_model(config.model), config, metadata, 0)
    arguments = [str(tmp_path / "w.safetensors"), "--precisions", "fp32", "int8", "--calibration", "8"]
    assert precision_metrics.main(arguments) == 0
    header, rule, *lines = capsys.readouterr().out.splitlines()
    assert header == "| library, precision | mIoU | PQ | goal, points |" and rule == "| --- | --- | --- | --- |"
    sides = [line.split(" | ")[0] for line in lines]
    assert sides == ["| PyTorch, fp32", "| openvino, fp32", "| openvino, int8", "| onnxruntime, fp32"]
    assert all("(+0.00)" in cell for cell in lines[0].split(" | ")[1:3])
    miou = [float(line.split(" | ")[1].split()[0]) for line in lines]
    assert [miou[1], miou[3]] == pytest.approx([miou[0]] * 2, abs=0.5)
