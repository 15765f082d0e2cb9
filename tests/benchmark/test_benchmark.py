"""The benchmark command: its report, and the options that it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskformer_fast.benchmark import __main__ as benchmark
from maskformer_fast.benchmark import report as report_module
from maskformer_fast.benchmark.__main__ import BenchmarkOptions
from maskformer_fast.benchmark.measure import MIN_CALLS
from maskformer_fast.config import TestConfig
from maskformer_fast.data import dataset_metadata
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.inference.load import with_classes
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import save_weights
from maskformer_fast.recipes import load_recipe
from tests.support.paths import TINY_RECIPE
from tests.support.tiny_bundle import tiny_bundle


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle, str]:
    """The command on a tiny bundle and a checkpoint of other weights; its folder, the bundle, and what it printed."""
    folder = tmp_path_factory.mktemp("benchmark")
    bundle, _ = tiny_bundle(folder / "bundle", TestConfig(short_edge=None))
    recipe = load_recipe(TINY_RECIPE)
    metadata = dataset_metadata(recipe.data)
    config = with_classes(recipe, metadata)
    save_weights(folder / "model.safetensors", build_model(config.model), config, metadata, 0)
    command = [
        sys.executable, "-m", "maskformer_fast.benchmark", bundle.folder, "--checkpoint", folder / "model.safetensors",
        "--against", "eager", "--batches", "1", "3", "--size", "40x56", "--seconds", "0.05",
        "--output", folder / "report",
    ]  # fmt: skip
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder / "report", bundle, result.stdout


@pytest.mark.slow
def test_the_command_writes_every_figure_of_every_runner(report: tuple[Path, Bundle, str]) -> None:
    folder, bundle, printed = report
    assert sorted(path.name for path in folder.iterdir()) == ["benchmark.json", "benchmark.md", "benchmark.png"]
    content = json.loads((folder / "benchmark.json").read_text())
    assert content["bundle"]["digest"] == bundle.digest and content["options"]["batches"] == [1, 3]
    assert content["machine"]["numpy"] == np.__version__ and content["machine"]["cores"] >= 1
    names = [(row["runner"], row["batch"], row["backend"]) for row in content["rows"]]
    library = "openvino" if find_spec("openvino") else "onnxruntime"
    assert names == [
        ("bundle", 1, library), ("PyTorch eager", 1, "cpu"), ("bundle", 3, library), ("PyTorch eager", 3, "cpu"),
    ]  # fmt: skip
    for row in content["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["calls"] >= MIN_CALLS
        assert row["images_per_s"] > 0 and ("frames_per_s" in row) == (row["batch"] == 1)
        assert sum(report_module.shares(row)) == pytest.approx(1)
        assert row["labels_equal"] == 1 if row["runner"] == "PyTorch eager" else row["labels_equal"] < 1
    bundle_row, eager_row = content["rows"][:2]
    if bundle_row["peak_rss_mib"] is not None:
        assert bundle_row["peak_rss_mib"] < eager_row["peak_rss_mib"], "torch takes more than the library alone"
    page = (folder / "benchmark.md").read_text()
    assert printed.strip() == page.strip() and page.startswith("# tiny: semantic, frames of 40x56\n")
    speed = eager_row["p50_ms"] / bundle_row["p50_ms"]
    assert f"| {speed:.2f}x |" in page and "1.00x" in page
    with Image.open(folder / "benchmark.png") as picture:
        assert picture.format == "PNG" and picture.width > 800


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batches": (1, 0)}, "batches: expected positive"), ({"batches": ()}, "batches: expected positive"),
        ({"seconds": 0.0}, "seconds: expected > 0"), ({"in_flight": 0}, "in_flight: expected > 0"),
        ({"size": "512"}, "expected HEIGHTxWIDTH"), ({"size": "2x512x512"}, "size: expected HEIGHTxWIDTH"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_by_name(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchmarkOptions("bundle", **more)


def test_the_report_does_not_go_into_the_bundle(tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "bundle", TestConfig(short_edge=None))[0].folder
    with pytest.raises(ValueError, match="output: expected a folder outside of the bundle"):
        benchmark.main([str(folder), "--output", str(folder / "benchmark")])
    Bundle.open(folder)


def test_missing_matplotlib_is_an_error_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install maskformer_fast\[deploy\]"):
        benchmark.main(["bundle"])
