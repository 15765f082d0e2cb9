"""Processors of transformers, equipped ones beside them, and checks that their results are equal."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from maskformer_fast.drop_in import equip
from tests.support.peaky import model_outputs

TIES = 2e-3
"""Share of pixels that may have another label: those where two values differ by rounding."""


def _antialiased(image: torch.Tensor, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    return F.interpolate(image, size=tuple(size), mode=interpolation, align_corners=False, antialias=True)


def processor(family: str, tmp_path: Path | None = None) -> Any:
    """An image processor of transformers that needs no torchvision."""
    module: Any = importlib.import_module(f"transformers.models.{family.lower()}.image_processing_pil_{family.lower()}")
    if family == "OneFormer" and not hasattr(module, "tvF"):  # torchvision's resize, which antialiases
        module.tvF = SimpleNamespace(resize=_antialiased, InterpolationMode=SimpleNamespace(BILINEAR="bilinear"))
    made = getattr(module, f"{family}ImageProcessorPil")
    if tmp_path is None:
        return made()
    info = {str(k): {"name": f"class {k}", "isthing": k % 2} for k in range(40)}
    (tmp_path / "ade20k.json").write_text(json.dumps(info))
    return made(repo_path=str(tmp_path), class_info_file="ade20k.json")


def two_images(family: str, peaky: bool, live: int = 12, classes: int = 40) -> SimpleNamespace:
    """Outputs with fewer queries where transformers resizes all masks to 384x384, which takes long."""
    queries = 8 if family == "Mask2Former" else 50
    return model_outputs(peaky, images=2, queries=queries, live=min(live, queries), classes=classes)


def twins(family: str, tmp_path: Path | None = None) -> tuple[Any, Any]:
    """Their processor and an equipped one."""
    return processor(family, tmp_path), equip(processor(family, tmp_path))


def both(processors: tuple[Any, Any], task: str, *arguments: Any, **keywords: Any) -> Any:
    """Call one method of both processors."""
    return [getattr(p, f"post_process_{task}_segmentation")(*arguments, **keywords) for p in processors]


def check_maps(ours: torch.Tensor, theirs: torch.Tensor, ties: float = TIES) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours != theirs).sum() <= ties * theirs.numel()


def check_segments(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], score: float = 2e-6) -> None:
    assert [list(info) for info in ours] == [list(info) for info in theirs]
    for key in ("id", "label_id", "was_fused"):
        assert [info.get(key) for info in ours] == [info.get(key) for info in theirs]
    assert [info["score"] for info in ours] == pytest.approx([info["score"] for info in theirs], abs=score)


def check_results(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> int:
    """Compare results of all images, and return their number of segments."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        check_segments(mine["segments_info"], other["segments_info"])
        check_maps(mine["segmentation"], other["segmentation"])
    return sum(len(result["segments_info"]) for result in ours)
