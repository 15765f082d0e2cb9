"""From logits to labels, segments and instances, beside the official formula and Hugging Face's functions."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cpu_segments, sides
from benchmarks.conftest import Measure
from benchmarks.sides import HUGGINGFACE, OFFICIAL, OURS

NAMES = {OURS: "ours", HUGGINGFACE: "huggingface", OFFICIAL: "official"}


@pytest.mark.parametrize(
    ("classes", "side"),
    [(19, OURS), (19, HUGGINGFACE), (19, OFFICIAL), (150, OURS), (150, HUGGINGFACE), (150, OFFICIAL), (847, OURS),
     (847, HUGGINGFACE)],  # the official formula needs 2 s and 1 GB for 847 classes
    ids=lambda value: NAMES.get(value, f"K{value}"),
)  # fmt: skip
def test_semantic(measure: Measure, device: str, classes: int, side: str) -> None:
    operations = sides.semantic("peaky", classes, device=device)
    found = measure(f"semantic 512x512, Q=100, K={classes}", operations[side])
    expected = operations[OURS]().labels
    labels = found.labels if side == OURS else found[0] if side == HUGGINGFACE else found
    # Hugging Face resizes scores and not logits, which moves labels along the edges
    assert (labels.squeeze() == expected.squeeze()).float().mean() > (0.9 if side == HUGGINGFACE else 0.999)


@pytest.mark.parametrize("side", NAMES, ids=NAMES.get)
def test_panoptic(measure: Measure, device: str, side: str) -> None:
    found = measure("panoptic 512x512, 25 of 100 queries kept", sides.panoptic(device=device)[side])
    id_map = found[0]["segmentation"] if side == HUGGINGFACE else found[0]
    assert len(id_map.unique()) > 10, "segments share the image"


@pytest.mark.parametrize("side", [OURS, HUGGINGFACE], ids=NAMES.get)
def test_instances(measure: Measure, side: str) -> None:
    ours, theirs, *_ = cpu_segments.instance()
    measure("instance 640x960, 100 results as RLE", ours if side == OURS else theirs)


def test_overhead_of_a_call(measure: Measure) -> None:
    """What a call of an operator costs before it works: one of the smallest size."""
    operation = sides.semantic("peaky", 2, 2, (8, 8))[OURS]
    found = measure("semantic 8x8, Q=2, K=2", operation)
    assert found.labels.shape == (1, 8, 8) and found.labels.dtype == torch.uint8
