"""Pruned semantic inference against float64 with all queries."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.ops import semantic_pruned
from maskformer_fast.ops.mask_product import mask_product
from maskformer_fast.ops.semantic import semantic_inference
from maskformer_fast.ops.semantic_pruned import pruned_semantic_inference
from maskformer_fast.structures import Projection
from tests.support.oracles import semantic_scores


class Scene(NamedTuple):
    embeddings: Tensor  # [Q, D]
    features: Tensor  # [1, C, h, w]
    projection: Projection
    class_logits: Tensor  # [Q, K+1]


def random_scene(
    seed: int, queries: int = 40, live: int = 8, classes: int = 7, size: tuple[int, int] = (24, 32), dead: float = 8.0
) -> Scene:
    """``live`` queries with a class each, the rest with "no object" by about ``dead``; smooth masks of a few units."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    coarse = normal(1, 5, -(-size[0] // 6) + 1, -(-size[1] // 6) + 1)
    features = F.interpolate(coarse, size=size, mode="bilinear") + 0.1 * normal(1, 5, *size)
    class_logits = normal(queries, classes + 1)
    order = torch.randperm(queries, generator=generator)
    class_logits[order[:live], torch.randint(classes, (live,), generator=generator)] += 9.0
    class_logits[order[live:], classes] += dead + normal(queries - live).abs()
    return Scene(2 * normal(queries, 9), features, Projection(normal(9, 5, 3, 3) / 3, normal(9)), class_logits)


def oracle(scene: Scene, extent: tuple[float, float], output_size: tuple[int, int]) -> Tensor:
    """Scores of all queries in float64 -> [K, H, W]."""
    embeddings, features, (weight, bias), class_logits = scene
    pixels = F.conv2d(features.double(), weight.double(), bias.double(), padding=1)[0]
    logits = torch.einsum("qd,dhw->qhw", embeddings.double(), pixels)
    return semantic_scores(logits[None], class_logits[None], extent, output_size)[0]


def assert_right(labels: Tensor, scores: Tensor) -> None:
    lead = scores.amax(0) - scores.gather(0, labels.long()[None])[0]
    assert (lead <= 1e-5).all(), f"a label's score is {lead.max()} below the best"


def lift_limits(patch: pytest.MonkeyPatch) -> None:
    """Prune so much that many pixels are not proven by the kept queries."""
    for name, value in (("MAX_MISSING", 0.5), ("MAX_KEPT", 0.9), ("MAX_PIXELS", 1e9), ("MAX_TAPS", 1.0)):
        patch.setattr(semantic_pruned, name, value)


@pytest.mark.parametrize("classes", [1, 2, 19, 150, 847, 3000])
def test_peaky_predictions_are_pruned_and_right(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic_pruned, "MAX_TAPS", 0.3)  # edges take a larger share of small maps
    scene = random_scene(classes, classes=classes, dead=14.0)
    labels = pruned_semantic_inference(*scene, (24.0, 32.0), (96, 128))
    assert labels is not None and labels.shape == (96, 128)
    assert labels.dtype == (torch.uint8 if classes <= 255 else torch.int16)
    assert_right(labels, oracle(scene, (24.0, 32.0), (96, 128)))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(2, 40),
    share=st.floats(0.05, 0.5),
    classes=st.sampled_from([1, 2, 5, 30, 300]),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    crop=st.tuples(st.floats(0.3, 1.0), st.floats(0.3, 1.0)),
    output_size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dead=st.sampled_from([0.0, 3.0, 6.0]),
)
def test_unproven_pixels_are_done_again(
    seed: int, queries: int, share: float, classes: int, size: tuple[int, int], crop: tuple[float, float],
    output_size: tuple[int, int], dead: float,
) -> None:
    scene = random_scene(seed, queries, max(1, int(queries * share)), classes, size, dead)
    extent = (size[0] * crop[0], size[1] * crop[1])
    with pytest.MonkeyPatch.context() as patch:
        lift_limits(patch)
        labels = pruned_semantic_inference(*scene, extent, output_size)
    if labels is not None:
        assert_right(labels, oracle(scene, extent, output_size))


def test_what_is_done_again_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept queries alone give other labels, and only pixels whose lead is small are touched."""
    scene = random_scene(3, dead=3.0)
    lift_limits(monkeypatch)
    labels = pruned_semantic_inference(*scene, (24.0, 32.0), (96, 128))
    probabilities = scene.class_logits.softmax(-1)[:, :-1]
    order = probabilities.amax(1).argsort()
    dropped = int((probabilities[order].cumsum(0).amax(1) <= 0.5).sum())
    assert labels is not None and 0 < dropped < 40
    embeddings, class_logits = (t[order[dropped:]] for t in (scene.embeddings, scene.class_logits))
    few = oracle(scene._replace(embeddings=embeddings, class_logits=class_logits), (24.0, 32.0), (96, 128))
    changed = labels.long() != few.argmax(0)
    assert 0 < changed.sum() < 0.2 * changed.numel()
    top = few.topk(2, 0).values
    assert (top[0] - top[1])[changed].max() <= 0.5
    assert_right(labels, oracle(scene, (24.0, 32.0), (96, 128)))


def test_nothing_is_pruned_where_it_does_not_pay() -> None:
    arguments = ((24.0, 32.0), (48, 64))
    assert pruned_semantic_inference(*random_scene(4, live=30, dead=14.0), *arguments) is None  # too many kept
    assert pruned_semantic_inference(*random_scene(4, live=8, dead=0.0), *arguments) is None  # too much mass left out
    assert pruned_semantic_inference(*random_scene(4, live=0, dead=14.0), *arguments) is None  # nothing to prove with
    small = random_scene(4, live=8, dead=14.0)
    assert pruned_semantic_inference(*small, (24.0, 32.0), (192, 256)) is None  # 64 output pixels to a map's


@pytest.mark.parametrize("sampled", [True, False], ids=["the sample shows it", "all pixels show it"])
def test_masks_are_computed_once_where_too_few_pixels_are_proven(
    sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semantic_pruned, "MAX_TAPS", 0.001)
    if not sampled:
        monkeypatch.setattr(semantic_pruned, "_share_unproven", lambda *_: 0.0)
    counts: list[int] = []

    def counted(embeddings: Tensor, *others: object) -> Tensor:
        counts.append(embeddings.shape[1])
        return mask_product(embeddings, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(semantic_pruned, "mask_product", counted)
    for seed in range(3):
        scene = random_scene(seed, classes=5, dead=9.0, size=(25, 33))
        labels = pruned_semantic_inference(*scene, (24.5, 33.0), (50, 70))
        assert labels is not None and labels.dtype == torch.uint8
        assert_right(labels, oracle(scene, (24.5, 33.0), (50, 70)))
    assert [sum(pair) for pair in zip(counts[::2], counts[1::2], strict=True)] == [40] * 3, "each mask once"
    tied = random_scene(4, live=2, dead=14.0, classes=2)
    tied.class_logits[:, 1] = tied.class_logits[:, 0]
    labels = pruned_semantic_inference(*tied, (24.0, 32.0), (48, 64))
    assert labels is not None and not labels.any(), "of equal scores the lower class stays"


def test_infinite_logits_count_as_finite_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the output reads an infinite neighbour with weight 0."""
    lift_limits(monkeypatch)
    scene = random_scene(6, dead=3.0)
    live = scene.class_logits[:, :-1].amax(1) > 5
    scene.features[0, 1, 10:12, 10:12] = torch.inf
    scene = scene._replace(
        embeddings=scene.embeddings.abs(), projection=Projection(scene.projection.weight.abs(), scene.projection.bias)
    )
    assert live.any() and not live.all()
    labels = pruned_semantic_inference(*scene, (24.0, 32.0), (72, 96))  # every third pixel reads one tap
    masks = mask_product(scene.embeddings[None], scene.features, scene.projection)
    assert masks.isinf().any() and not masks.isnan().any()
    expected = semantic_inference(masks, scene.class_logits[None], (24.0, 32.0), (72, 96), with_margins=True)
    assert labels is not None and expected.margins is not None
    assert torch.equal(labels[expected.margins[0] > 1e-3], expected.labels[0][expected.margins[0] > 1e-3])


def test_nan_is_never_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic_pruned, "MAX_TAPS", 1.0)
    scene = random_scene(5, dead=14.0)
    scene.features[0, 2, 3, 4] = torch.nan
    labels = pruned_semantic_inference(*scene, (24.0, 32.0), (96, 128))
    masks = mask_product(scene.embeddings[None], scene.features, scene.projection)
    expected = semantic_inference(masks, scene.class_logits[None], (24.0, 32.0), (96, 128), with_margins=True)
    assert labels is not None and expected.margins is not None and expected.margins.isnan().any()
    wrong = labels != expected.labels[0]
    assert not wrong[~(expected.margins[0] < 1e-4)].any()
