"""Oracle of panoptic and instance inference in float64, which leaves out what rounding may change."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskformer_fast.core.metadata import VOID
from maskformer_fast.inference_config import PanopticRule
from maskformer_fast.ops.segments import PanopticSegments
from maskformer_fast.structures import unpack_masks
from tests.support.oracles import resampled

MARGIN = 1e-5
"""Difference of two scores below which either may be the larger one."""
SLACK = 1e-6
"""Distance of a probability from 0.5 below which a pixel may be counted or not."""


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -80, 80)))


class Scene(NamedTuple):
    logits: Tensor  # [B, N, h, w]
    scores: Tensor
    categories: Tensor
    is_thing: Tensor
    extent: tuple[float, float]
    size: tuple[int, int]
    threshold: float
    rule: PanopticRule


class Expected(NamedTuple):
    """Result for one image in float64; rounding may change pixels that are not "sure"."""

    slots: np.ndarray  # [H, W] query whose segment the pixel is, N for none's
    sure: np.ndarray  # [H, W]
    areas: tuple[np.ndarray, np.ndarray]  # [N] least and most
    kept: tuple[np.ndarray, np.ndarray]  # [N] certainly, and possibly


def expect(scene: Scene, image: int) -> Expected:
    masks = sigmoid(resampled(scene.logits[image], scene.extent, scene.size).numpy())
    count, present = len(masks), (scene.categories[image] >= 0).numpy()
    values = scene.scores[image].double().numpy()[:, None, None] * masks
    ranked = np.where(present[:, None, None], values, -1.0)
    winner = ranked.argmax(0)
    top = np.sort(np.concatenate([ranked, np.full((1, *scene.size), -1.0)]), 0)[-2:]
    won_surely = top[1] - top[0] > MARGIN
    contending = ranked >= top[1] - MARGIN  # [N, H, W]
    claim = values if scene.rule == "huggingface" else masks
    owned = [(claim >= 0.5 + shift) & present[:, None, None] for shift in (SLACK, -SLACK)]
    is_winner = winner == np.arange(count)[:, None, None]
    won = [is_winner & won_surely, contending & present[:, None, None]]
    if scene.rule == "mask2former":
        segments = [won[0] & owned[0], won[1] & owned[1]]
        inside = [np.take_along_axis(own, winner[None], 0)[0] for own in owned]
        slots, sure = np.where(inside[1], winner, count), won_surely & (inside[0] == inside[1])
    else:
        segments, slots, sure = won, winner, won_surely
    numbers = [[m.sum((1, 2)).astype(float) for m in pair] for pair in (won, owned, segments)]
    (won_least, won_most), (owned_least, owned_most), (least, most) = numbers
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = won_least / owned_most, won_most / owned_least
    above = np.greater if scene.rule == "huggingface" else np.greater_equal
    surely = (least > 0) & (owned_least > 0) & above(low, scene.threshold)
    possibly = (most > 0) & (owned_most > 0) & ~(high < scene.threshold)
    return Expected(slots, sure, (least, most), (surely, possibly))


def numbered(kept: np.ndarray, categories: list[int], is_thing: list[bool]) -> list[int]:
    ids, stuff, count = [], {}, 0
    for keep, category in zip(kept, categories, strict=True):
        if keep and (is_thing[category] or category not in stuff):
            count += 1
            stuff[category] = count
        ids.append((count if is_thing[category] else stuff[category]) if keep else VOID)
    return ids


def assert_panoptic(actual: PanopticSegments, scene: Scene) -> int:
    """Compare all results of a scene -> number of pixels compared."""
    compared = 0
    for image in range(len(scene.logits)):
        ids, areas = actual.ids[image].tolist(), actual.areas[image].numpy()
        if not ids or not (scene.categories[image] >= 0).any():
            assert (actual.id_map[image] == VOID).all() and set(ids) <= {VOID} and not areas.any()
            continue
        expected = expect(scene, image)
        assert (areas >= expected.areas[0]).all() and (areas <= expected.areas[1]).all()
        kept = np.array(ids) != VOID
        assert (kept >= expected.kept[0]).all() and (kept <= expected.kept[1]).all()
        assert ids == numbered(kept, scene.categories[image].tolist(), scene.is_thing.tolist())
        assert (actual.id_map[image].numpy() == np.array([*ids, VOID])[expected.slots])[expected.sure].all()
        for number in set(ids) - {VOID}:
            assert (actual.id_map[image] == number).sum() == areas[np.array(ids) == number].sum()
        compared += int(expected.sure.sum())
    return compared


def assert_instances(actual: Any, scene: Scene, slack: float = SLACK, tolerance: float = 1e-6) -> None:
    logits = resampled(scene.logits, scene.extent, scene.size).numpy()
    probabilities, masks = sigmoid(logits), unpack_masks(actual.masks, scene.size[1]).numpy()
    least, most = probabilities > 0.5 + slack, probabilities >= 0.5 - slack
    assert (masks >= least).all() and (masks <= most).all()
    areas = masks.sum((2, 3))
    np.testing.assert_array_equal(actual.areas.numpy(), areas)
    scores = (probabilities * masks).sum((2, 3)) / (areas + 1e-6)
    np.testing.assert_allclose(actual.scores.numpy(), scores, atol=tolerance)
    for mask, box in zip(masks.reshape(-1, *scene.size), actual.boxes.reshape(-1, 4).tolist(), strict=True):
        y, x = np.nonzero(mask)
        assert box == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0])
    if scene.size[1] % 8 and actual.masks.numel():
        assert (actual.masks[..., -1] >> (scene.size[1] % 8) == 0).all()  # padding bits


def large_scene(rule: PanopticRule = "maskformer") -> Scene:
    generator = torch.Generator().manual_seed(1)
    coarse = 9 * torch.randn(2, 30, 7, 9, generator=generator)
    logits = torch.nn.functional.interpolate(coarse, (60, 75), mode="bicubic")
    return Scene(
        logits, torch.rand(2, 30, generator=generator), torch.randint(-1, 6, (2, 30), generator=generator),
        torch.tensor([True, False] * 3), (58.5, 74.2), (237, 301), 0.3, rule,
    )  # fmt: skip
