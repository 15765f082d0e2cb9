"""What the tests of the demo share: a quick, sure network, pictures, and how a page's HTML is read."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskformer_fast.config import Task, TestConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult
from maskformer_fast.inference.predictor import Predictor
from tests.support.tiny_bundle import metadata_of, tiny_bundle

TEST = TestConfig(short_edge=None, object_mask_threshold=0.3, overlap_threshold=0.3, top_k=6)
EVIL = "</td><script>alert('x')</script>{{this}}${1}\"&amp;"
"""A class's name that tries to become a part of the page."""


def tiny_predictor(folder: Path, seed: int = 0, metadata: Metadata | None = None) -> tuple[Path, Predictor]:
    """A bundle's folder, and a predictor with the same weights; segments and instances are sure."""
    metadata = metadata or metadata_of(5)
    names = (EVIL, *metadata.class_names[1:])
    metadata = Metadata("tiny", names, metadata.is_thing, metadata.category_ids, metadata.colors)
    bundle, predictor = tiny_bundle(folder, TEST, metadata=metadata, seed=seed)
    return bundle.folder, predictor


def photo(seed: int = 0, height: int = 60, width: int = 84) -> np.ndarray:
    """Blocks of colour, so that masks have shapes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 12), -(-width // 12), 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((12, 12, 1), np.uint8))[:height, :width]


def expected_at(result: Result, y: int, x: int) -> tuple[int | None, float | None]:
    """Class and score of a pixel, straight from a result: the best drawn instance of those that cover the pixel."""
    if isinstance(result, SemanticResult):
        return int(result.labels[y, x]), None if result.scores is None else float(result.scores[y, x])
    if isinstance(result, PanopticResult):
        found = [segment for segment in result.segments if segment.id == int(result.id_map[y, x])]
        return (found[0].category, found[0].score) if found else (None, None)
    assert isinstance(result, InstanceResult)
    for label, score, mask in zip(result.labels, result.scores, result.masks, strict=True):  # the best first
        if float(score) >= 0.5 and int(mask[y, x // 8]) >> x % 8 & 1:
            return int(label), float(score)
    return None, None


class Shown:
    """What a page's HTML says of every pixel, as its script reads it."""

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
        red, green, blue = (int(value) for value in self.map[y, x])
        row = red + 256 * green - 1
        if row < 0:
            return None, None
        segment = self.facts["segments"][row]
        unit = self.facts["unit"]
        return segment["name"], segment["score"] if unit is None else blue * unit / 255
