"""For the tests of the demo: small networks, the expected class of a pixel, and a reader of the page's HTML."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from maskformer_fast.config import BackboneConfig, Task, TestConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult
from maskformer_fast.data.datasets.shapes import ShapesDataset
from maskformer_fast.inference.load import with_classes
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.modeling import build_model
from maskformer_fast.recipes import load_recipe
from tests.support.paths import TINY_RECIPE
from tests.support.tiny_bundle import metadata_of, tiny_bundle

TEST = TestConfig(short_edge=None, object_mask_threshold=0.3, overlap_threshold=0.3, top_k=6)
EVIL = "</td><script>alert('x')</script>{{this}}${1}\"&amp;"
"""Name of a class that would change the page if it were not escaped."""


def tiny_predictor(folder: Path, seed: int = 0, metadata: Metadata | None = None) -> tuple[Path, Predictor]:
    """A bundle's folder and a predictor with the same weights, whose segments and instances have high scores."""
    metadata = metadata or metadata_of(5)
    names = (EVIL, *metadata.class_names[1:])
    metadata = Metadata("tiny", names, metadata.is_thing, metadata.category_ids, metadata.colors)
    bundle, predictor = tiny_bundle(folder, TEST, metadata=metadata, seed=seed)
    return bundle.folder, predictor


def scene_predictor(kind: str = "maskformer") -> Predictor:
    """A predictor for synthetic scenes with random weights, of a model type."""
    config = load_recipe(TINY_RECIPE)
    model = replace(config.model, type=kind)  # type: ignore[arg-type]
    if kind == "mask2former":
        encoder = {"encoder_layers": 1, "encoder_heads": 2, "encoder_ffn_dim": 32, "encoder_dropout": 0.0}
        model = replace(model, pixel_decoder=replace(model.pixel_decoder, **encoder))  # type: ignore[arg-type]
    elif kind == "eomt":
        model = replace(model, backbone=BackboneConfig("vit_micro"), size_divisibility=8)
    config = replace(config, model=model)
    metadata = ShapesDataset(config.data.shapes, "val").metadata
    config = with_classes(config, metadata)
    torch.manual_seed(0)
    return Predictor(build_model(config.model).eval(), config, metadata, "cpu")


def expected_at(result: Result, y: int, x: int) -> tuple[int | None, float | None]:
    """Class and score of a pixel in a result; in instances, those of the best drawn one that covers the pixel."""
    if isinstance(result, SemanticResult):
        return int(result.labels[y, x]), None if result.scores is None else float(result.scores[y, x])
    if isinstance(result, PanopticResult):
        covering = [segment for segment in result.segments if segment.id == int(result.id_map[y, x])]
        return (covering[0].category, covering[0].score) if covering else (None, None)
    assert isinstance(result, InstanceResult)
    for label, score, mask in zip(result.labels, result.scores, result.masks, strict=True):  # the best first
        if float(score) >= 0.5 and int(mask[y, x // 8]) >> x % 8 & 1:
            return int(label), float(score)
    return None, None


class Shown:
    """The result in a page's HTML, read as the page's script does."""

    def __init__(self, page: str) -> None:
        task = re.search(r'class="mf-view" data-task="(\w+)"', page)
        assert task, page[:500]
        self.task: Task = task[1]  # type: ignore[assignment]
        facts = re.search(r'data-facts="([^"]*)"', page)
        assert facts
        self.facts: dict[str, Any] = json.loads(html.unescape(facts[1]))
        pictures = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', page)
        assert [kind for kind, _ in pictures] == ["jpeg", "png"]
        self.picture, self.map = (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for _, data in pictures)
        self.stages = {
            html.unescape(name): (float(took), kind == "mf-kept")
            for kind, name, took in re.findall(
                r'<tr class="(mf-\w+)" data-stage="([^"]+)"><td>[^<]*</td><td class="mf-number">([\d.]+)</td>', page
            )
        }

    def at(self, y: int, x: int) -> tuple[str | None, float | None]:
        """Name of the class and score that the page shows for a pixel."""
        red, green, blue = (int(value) for value in self.map[y, x])
        row = red + 256 * green - 1
        if row < 0:
            return None, None
        segment = self.facts["segments"][row]
        unit = self.facts["unit"]
        return segment["name"], segment["score"] if unit is None else blue * unit / 255
