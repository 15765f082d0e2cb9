"""Semantic inference by windows along the longer side."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maskformer_fast.config import TestConfig
from maskformer_fast.data.transforms import resize_image
from maskformer_fast.inference.load import load_network
from maskformer_fast.inference.windows import window_origins
from maskformer_fast.ops.mask_product import layer_mask_logits

IMAGES = [(70, 150), (140, 61), (64, 64), (50, 320)]


@pytest.mark.parametrize("size", [(64, 64), (64, 65), (64, 128), (64, 129), (200, 64), (1024, 2048), (512, 683)])
def test_windows_cover_the_longer_side_evenly(size):
    origins, side = window_origins(*size)
    longer = max(size)
    assert side == min(size) and len(origins) == math.ceil(longer / side)
    starts = [max(origin) for origin in origins]
    assert starts[0] == 0 and abs(starts[-1] + side - longer) <= 1
    assert all(0 < b - a <= side for a, b in pairwise(starts))
    assert all(origin[0 if size[0] <= size[1] else 1] == 0 for origin in origins)


def reference(model, image: np.ndarray) -> torch.Tensor:
    """Mean scores at the resized image's pixels, resized to the image -> [K, H, W]."""
    resized = resize_image(image, 64, 4096)
    total, count = torch.zeros(1), torch.zeros(resized.shape[1:])
    for top, left in window_origins(*resized.shape[1:])[0]:
        part = resized[:, top : top + 64, left : left + 64]
        sizes = torch.tensor([part.shape[1:]])
        with torch.no_grad():
            predictions = model.network(part[None], sizes)
            masks = F.interpolate(layer_mask_logits(predictions), (64, 64), mode="bilinear", align_corners=False)
            probabilities = predictions.class_logits[-1].softmax(-1)[..., :-1]
            scores = torch.einsum("bqk,bqhw->bkhw", probabilities, masks.sigmoid())[0]
        if total.ndim == 1:
            total = torch.zeros(len(scores), *resized.shape[1:])
        total[:, top : top + 64, left : left + 64] += scores
        count[top : top + 64, left : left + 64] += 1
    return F.interpolate((total / count)[None], image.shape[:2], mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("size", IMAGES)
def test_labels_are_of_the_mean_scores_of_all_windows(size):
    torch.manual_seed(0)
    model = load_network("demo", "cpu", test=TestConfig(short_edge=64, max_size=4096, windows=True))
    model.network.eval()
    image = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), np.uint8)
    scores = reference(model, image)
    lead = torch.diff(scores.topk(2, dim=0).values, dim=0)[0].abs()
    labels = model.predict(image).labels
    assert labels.dtype == torch.uint8 and tuple(labels.shape) == size
    assert (labels == scores.argmax(0))[lead > 1e-4].all() and (lead > 1e-4).float().mean() > 0.95


def test_windows_need_a_short_edge_and_a_size_that_is_not_padded():
    with pytest.raises(ValueError, match=r"test\.windows"):
        TestConfig(short_edge=None, windows=True)
    model = load_network("demo", "cpu", test=TestConfig(short_edge=50, windows=True))
    with pytest.raises(ValueError, match="size_divisibility"):
        model.predict(np.zeros((60, 90, 3), np.uint8))
