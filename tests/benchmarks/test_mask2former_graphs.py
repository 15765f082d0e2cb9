"""The study of Mask2Former's graphs at tiny size: both exports, every side, and its table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.studies import mask2former_graphs as study
from maskformer_fast.recipes import load_recipe

SIZE = 64


def tiny_other() -> Any:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=7,
                                       out_features=[f"stage{number}" for number in range(1, 5)])  # fmt: skip
    return transformers.Mask2FormerConfig(
        backbone_config=backbone, num_labels=6, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=3, num_attention_heads=4,
        num_queries=7,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.no_cover
def test_every_side_runs_and_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("openvino", "onnxruntime", "onnx"):
        pytest.importorskip(name)
    monkeypatch.setattr(study, "own_config", lambda: replace(load_recipe("demo_mask2former").model, num_classes=6))
    monkeypatch.setattr(study, "other_config", tiny_other)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert study.main([str(tmp_path), "--size", str(SIZE), "--rounds", "1", "--precisions", "f32"]) == 0
    table = capsys.readouterr().out
    names = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    graphs = [f"{library} f32, {side}" for library in ("OpenVINO", "onnxruntime")
              for side in ("this package", "Hugging Face")]  # fmt: skip
    assert names == [*graphs, *(f"{name}, labels" for name in graphs)]
    sides = study.open_sides(tmp_path / "maskformer_fast.onnx", tmp_path / "huggingface.onnx", ["f32"], SIZE)
    for side in ("this package", "Hugging Face"):
        one, other = (sides[f"{library} f32, {side}, labels"]() for library in ("OpenVINO", "onnxruntime"))
        assert one.shape == other.shape == (SIZE, SIZE) and np.mean(one == other) > 0.99


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="rounds: expected > 0"):
        study.Mask2FormerGraphsOptions(Path("graphs"), rounds=0)
    with pytest.raises(ValueError, match="size: expected > 0"):
        study.Mask2FormerGraphsOptions(Path("graphs"), size=0)
