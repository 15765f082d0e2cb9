"""The benchmark of half precision's labels runs from a checkpoint to its table."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.paths import TINY_RECIPE

pytest.importorskip("onnxruntime")

from benchmarks import half_labels
from maskformer_fast.data import dataset_metadata
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import save_weights
from maskformer_fast.recipes import load_recipe
from tests.support.graphs import raw_graph


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    graph = raw_graph(seed=3).SerializeToString()  # an export takes twenty seconds, and has tests of its own
    monkeypatch.setattr(half_labels, "export_graphs", lambda network, flavours: {"raw": (graph, None)})
    config = load_recipe(TINY_RECIPE)
    metadata = dataset_metadata(config.data)
    config = replace(config, model=replace(config.model, num_classes=metadata.num_classes))
    torch.manual_seed(0)
    path = tmp_path / "checkpoint.safetensors"
    save_weights(path, build_model(config.model), config, metadata, 0)
    assert half_labels.main([str(path), "--images", "2"]) == 0
    table = capsys.readouterr().out
    assert "2 images of 48x40" in table
    kept = [float(share) for share in re.findall(r"\| ([\d.]+) % \|", table)]
    assert len(kept) == 6 and min(kept) > 90
