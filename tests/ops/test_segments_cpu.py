"""The compiled panoptic and instance inference against formulas in float64, on every instruction set."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskformer_fast.config import PanopticRule
from maskformer_fast.core import extension
from maskformer_fast.core.extension import load_extension
from maskformer_fast.core.metadata import VOID
from maskformer_fast.ops.segments import (
    PanopticSegments,
    instance_inference,
    instance_inference_eager,
    panoptic_inference,
    panoptic_inference_eager,
)
from maskformer_fast.structures import unpack_masks

ISAS = load_extension().available_isas()
RULES = get_args(PanopticRule)
MARGIN = 1e-5  # of scores: closer ones may come in either order
SLACK = 1e-6  # of probabilities: closer to 0.5 a pixel may be counted or not


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    load_extension().use_isa("auto")


def each_isa(run: Any) -> Iterator[Any]:
    for isa in ISAS:
        load_extension().use_isa(isa)
        yield run()


def interpolation(extent: float, size: int, source: int) -> np.ndarray:
    """Weights of every map row in every output row, from the formula -> [size, source] float64."""
    at = np.clip((np.arange(size) + 0.5) * extent / size - 0.5, 0, source - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(source)))


def resampled(logits: Tensor, extent: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
    """[..., h, w] -> [..., H, W] float64."""
    rows, columns = (interpolation(e, s, n) for e, s, n in zip(extent, size, logits.shape[-2:], strict=True))
    return rows @ logits.double().numpy() @ columns.T


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


@st.composite
def scenes(draw: st.DrawFn, most_queries: int = 12) -> Scene:
    """Maps of noise, of smooth blobs that settle whole tiles, of few values with many ties, or all alike."""
    small, tall, wide = (draw(st.integers(1, n)) for n in (24, 70, 210))
    h, w = draw(st.sampled_from([(small, small + 1), (small, 40), (50, small), (1, 1), (90, 130)]))
    size = draw(st.sampled_from([(tall, wide), (small, wide), (4 * min(h, 20), 4 * min(w, 40)), (h, w)]))
    queries, classes, batch = draw(st.integers(0, most_queries)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    seed, kind = draw(st.integers(0, 9999)), draw(st.sampled_from(["noise", "blobs", "steps", "constant"]))
    generator = torch.Generator().manual_seed(seed)
    if kind == "blobs":
        coarse = torch.randn(batch * queries, 1, 3, 3, generator=generator)
        logits = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear") if queries else coarse
        logits = 12 * logits.reshape(batch, queries, h, w) + draw(st.sampled_from([0.0, -2.0, 2.0]))
    else:
        cells = (1, 1) if kind == "constant" else (h, w)
        logits = 4 * torch.randn(batch, queries, *cells, generator=generator) - draw(st.sampled_from([0.0, 3.0]))
        logits = (logits.round() if kind == "steps" else logits).expand(batch, queries, h, w)
    scores = torch.rand(batch, queries, generator=generator)
    if draw(st.booleans()):
        scores = 0.7 + 0.3 * scores
    if draw(st.booleans()):
        scores = scores.mul(4).round().div(4)  # 0, 0.5 and 1 among them
    categories = torch.randint(draw(st.sampled_from([-1, 0])), classes, (batch, queries), generator=generator)
    is_thing = torch.rand(classes, generator=generator) < 0.5
    extent = (h * draw(st.sampled_from([1.0, 0.731, 0.05])), w * draw(st.sampled_from([1.0, 0.893])))
    return Scene(logits, scores, categories, is_thing, extent, size, draw(st.sampled_from([0.0, 0.3, 0.8])),
                 draw(st.sampled_from(RULES)))  # fmt: skip


class Expected(NamedTuple):
    """One image in float64; "sure" leaves out what rounding may turn."""

    slots: np.ndarray  # [H, W] query whose segment the pixel is, N for none's
    sure: np.ndarray  # [H, W]
    areas: tuple[np.ndarray, np.ndarray]  # [N] least and most
    kept: tuple[np.ndarray, np.ndarray]  # [N] certainly, and possibly


def expect(scene: Scene, image: int) -> Expected:
    masks = sigmoid(resampled(scene.logits[image], scene.extent, scene.size))
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


def assert_panoptic(found: PanopticSegments, scene: Scene) -> int:
    """Returns the number of pixels compared."""
    compared = 0
    for image in range(len(scene.logits)):
        ids, areas = found.ids[image].tolist(), found.areas[image].numpy()
        if not ids or not (scene.categories[image] >= 0).any():
            assert (found.id_map[image] == VOID).all() and set(ids) <= {VOID} and not areas.any()
            continue
        expected = expect(scene, image)
        assert (areas >= expected.areas[0]).all() and (areas <= expected.areas[1]).all()
        kept = np.array(ids) != VOID
        assert (kept >= expected.kept[0]).all() and (kept <= expected.kept[1]).all()
        assert ids == numbered(kept, scene.categories[image].tolist(), scene.is_thing.tolist())
        assert (found.id_map[image].numpy() == np.array([*ids, VOID])[expected.slots])[expected.sure].all()
        for number in set(ids) - {VOID}:
            assert (found.id_map[image] == number).sum() == areas[np.array(ids) == number].sum()
        compared += int(expected.sure.sum())
    return compared


@settings(max_examples=250, deadline=None)
@given(scenes())
def test_panoptic_equals_float64(scene: Scene) -> None:
    for found in each_isa(lambda: panoptic_inference(*scene)):
        assert_panoptic(found, scene)


@settings(max_examples=40, deadline=None)
@given(scenes())
def test_eager_panoptic_is_held_to_the_same(scene: Scene) -> None:
    assert_panoptic(panoptic_inference_eager(*scene), scene)


def test_nearly_every_pixel_is_compared() -> None:
    generator = torch.Generator().manual_seed(0)
    for rule in RULES:
        for queries in (1, 12, 200):
            scene = Scene(
                3 * torch.randn(2, queries, 20, 33, generator=generator), torch.rand(2, queries, generator=generator),
                torch.randint(-1, 5, (2, queries), generator=generator), torch.rand(5) < 0.5,
                (18.3, 31.1), (77, 131), 0.2, rule,
            )  # fmt: skip
            scene.categories[:, 0] = 1
            assert assert_panoptic(panoptic_inference(*scene), scene) > 0.98 * 2 * 77 * 131


def assert_instances(found: Any, scene: Scene, slack: float = SLACK, tolerance: float = 1e-6) -> None:
    logits = resampled(scene.logits, scene.extent, scene.size)
    probabilities, masks = sigmoid(logits), unpack_masks(found.masks, scene.size[1]).numpy()
    least, most = probabilities > 0.5 + slack, probabilities >= 0.5 - slack
    assert (masks >= least).all() and (masks <= most).all()
    areas = masks.sum((2, 3))
    np.testing.assert_array_equal(found.areas.numpy(), areas)
    scores = (probabilities * masks).sum((2, 3)) / (areas + 1e-6)
    np.testing.assert_allclose(found.scores.numpy(), scores, atol=tolerance)
    for mask, box in zip(masks.reshape(-1, *scene.size), found.boxes.reshape(-1, 4).tolist(), strict=True):
        y, x = np.nonzero(mask)
        assert box == ([x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0])
    if scene.size[1] % 8 and found.masks.numel():
        assert (found.masks[..., -1] >> (scene.size[1] % 8) == 0).all()  # padding bits


@settings(max_examples=150, deadline=None)
@given(scenes(most_queries=6))
def test_instances_equal_float64(scene: Scene) -> None:
    for found in each_isa(lambda: instance_inference(scene.logits, scene.extent, scene.size)):
        assert_instances(found, scene)


@settings(max_examples=25, deadline=None)
@given(scenes(most_queries=6))
def test_eager_instances_are_held_to_the_same(scene: Scene) -> None:
    # its columns are placed in float32: some 1e-5 of a logit pixel on wide maps
    assert_instances(instance_inference_eager(scene.logits, scene.extent, scene.size), scene, 1e-3, 1e-3)


def test_of_equal_queries_the_first_wins() -> None:
    logits = 3 * torch.randn(1, 1, 9, 14).expand(1, 4, 9, 14)
    for found in each_isa(
        lambda: panoptic_inference(
            logits, torch.tensor([[0.4, 0.9, 0.9, 0.9]]), torch.tensor([[0, VOID, 1, 2]]), torch.ones(3).bool(),
            (9, 14), (36, 56), 0.0,
        )
    ):
        assert found.areas.tolist() == [[0, 0, 36 * 56, 0]] and (found.id_map == 1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(2, 5, 8, 9)).to(dtype)
    scores, categories = torch.rand(2, 5).to(dtype), torch.randint(0, 2, (2, 5))
    rest = (categories, torch.tensor([True, False]), (8, 9), (32, 36), 0.3)
    for got, want in zip(
        [*panoptic_inference(logits, scores, *rest), *instance_inference(logits, (8, 9), (32, 36))],
        [*panoptic_inference(logits.float(), scores.float(), *rest),
         *instance_inference(logits.float(), (8, 9), (32, 36))],
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got, want)


@pytest.mark.parametrize("view", ["transposed", "flipped queries", "sliced", "expanded"])
def test_any_strides(view: str) -> None:
    base = 3 * torch.randn(3, 6, 10, 12)
    logits = {
        "transposed": base.transpose(2, 3), "flipped queries": base.permute(1, 0, 2, 3),
        "sliced": base[::2, 1:4, 2:9, 3:11], "expanded": base[:1].expand(4, -1, -1, -1),
    }[view]  # fmt: skip
    extent, size = tuple(float(side) for side in logits.shape[2:]), (33, 41)
    shape = logits.shape[:2]
    scores, categories = torch.rand(shape[::-1]).T, torch.randint(-1, 3, shape[::-1]).T
    rest = (torch.tensor([True, False] * 3)[::2], extent, size, 0.3)
    dense = logits.contiguous()
    pairs = zip(
        [*panoptic_inference(logits, scores, categories, *rest), *instance_inference(logits, extent, size)],
        [*panoptic_inference(dense, scores.contiguous(), categories.contiguous(), *rest),
         *instance_inference(dense, extent, size)],
        strict=True,
    )  # fmt: skip
    assert all(torch.equal(got, want) for got, want in pairs)


def large_scene(rule: PanopticRule = "maskformer") -> Scene:
    generator = torch.Generator().manual_seed(1)
    coarse = 9 * torch.randn(2, 30, 7, 9, generator=generator)
    logits = torch.nn.functional.interpolate(coarse, (60, 75), mode="bicubic")
    return Scene(
        logits, torch.rand(2, 30, generator=generator), torch.randint(-1, 6, (2, 30), generator=generator),
        torch.tensor([True, False] * 3), (58.5, 74.2), (237, 301), 0.3, rule,
    )  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_threads_change_nothing(rule: PanopticRule) -> None:
    scene, results = large_scene(rule), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([*panoptic_inference(*scene), *instance_inference(scene.logits, scene.extent, scene.size)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert_panoptic(PanopticSegments(*results[0][:3]), scene)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.sampled_from(RULES))
def test_any_bits_give_sound_results(seed: int, rule: PanopticRule) -> None:
    """Logits and scores of random bits: NaN, infinities, denormals, and numbers of any size."""
    generator = torch.Generator().manual_seed(seed)

    def bits(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)

    logits, scores, categories = bits(2, 5, 6, 21), bits(2, 5), torch.randint(-1, 3, (2, 5), generator=generator)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    logits[:, :, ::2] = special[torch.randint(0, 4, logits[:, :, ::2].shape, generator=generator)]
    for found in each_isa(
        lambda: panoptic_inference(
            logits, scores, categories, torch.tensor([True, False, True]), (6, 21), (24, 84), 0.5, rule
        )
    ):
        assert found.id_map.min() >= VOID and found.id_map.max() <= found.ids.max()
        assert found.areas.min() >= 0 and (found.areas.sum(1) <= 24 * 84).all()
    for found in each_isa(lambda: instance_inference(logits, (6, 21), (24, 84))):
        assert found.scores.isfinite().all() and (found.scores >= 0).all() and (found.scores <= 1 + 1e-6).all()
        assert torch.equal(found.areas, unpack_masks(found.masks, 84).sum((2, 3)))


def test_nan_covers_nothing_and_infinity_all() -> None:
    logits = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])[None, :, None, None].expand(1, 4, 3, 3)
    for found in each_isa(lambda: instance_inference(logits, (3, 3), (20, 70))):
        assert found.areas.tolist() == [[0, 1400, 0, 1400]]
        assert found.scores.tolist() == [[0, 1, 0, pytest.approx(0.7310586, abs=1e-6)]]
    arguments = (torch.tensor([[9.0, 0.4, 0.9, float("nan")]]), torch.arange(4)[None], torch.ones(4).bool())
    for found in each_isa(lambda: panoptic_inference(logits, *arguments, (3, 3), (20, 70), 0.5)):
        assert found.ids.tolist() == [[VOID, 1, VOID, VOID]] and (found.id_map == 1).all()


def test_categories_are_checked() -> None:
    with pytest.raises(ValueError, match=r"categories: expected below 2 .*, got 7"):
        panoptic_inference(
            torch.zeros(1, 2, 4, 4), torch.ones(1, 2), torch.tensor([[0, 7]]), torch.ones(2).bool(), (4, 4), (8, 8), 0.8
        )


@pytest.mark.parametrize("batch, queries", [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_do(batch: int, queries: int) -> None:
    logits = torch.zeros(batch, queries, 4, 5)
    found = panoptic_inference(
        logits, torch.zeros(batch, queries), torch.zeros(batch, queries, dtype=torch.int64), torch.ones(1).bool(),
        (4, 5), (9, 7), 0.8,
    )  # fmt: skip
    assert found.id_map.shape == (batch, 9, 7) and (found.id_map == VOID).all()
    assert instance_inference(logits, (4, 5), (9, 7)).masks.shape == (batch, queries, 9, 1)


def test_opcheck() -> None:
    scene = large_scene()
    for logits in (scene.logits, scene.logits.transpose(2, 3).half()):
        extent = tuple(float(side) for side in logits.shape[2:])
        torch.library.opcheck(
            torch.ops.maskformer_fast.panoptic_inference.default,
            (logits, *scene[1:4], extent, (30, 41), 0.3, "maskformer"),
        )
        torch.library.opcheck(torch.ops.maskformer_fast.instance_inference.default, (logits, extent, (30, 41)))


@pytest.mark.no_cover
def test_compiles_without_graph_break() -> None:
    things = torch.tensor([True, False])

    def both(logits: Tensor, scores: Tensor, categories: Tensor, extent: tuple[float, float]) -> tuple[Tensor, ...]:
        size = (4 * logits.shape[2], 4 * logits.shape[3])
        segments = panoptic_inference(logits * 2, scores, categories, things, extent, size, 0.3)
        return *segments, *instance_inference(logits * 2, extent, size)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, queries, h, w in ((2, 5, 7, 8), (3, 4, 9, 6)):
        arguments = (torch.randn(batch, queries, h, w), torch.rand(batch, queries),
                     torch.randint(-1, 2, (batch, queries)), (4.5, 5.5))  # fmt: skip
        for got, want in zip(compiled(*arguments), both(*arguments), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
def test_cuda_equals_cpu(rule: PanopticRule) -> None:
    scene = large_scene(rule)
    found = panoptic_inference(*(value.cuda() if isinstance(value, Tensor) else value for value in scene))
    assert found.id_map.is_cuda
    assert_panoptic(PanopticSegments(*(tensor.cpu() for tensor in found)), scene)
    instances = instance_inference(scene.logits.cuda(), scene.extent, scene.size)
    assert_instances(type(instances)(*(tensor.cpu() for tensor in instances)), scene)


def test_missing_extension_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = large_scene()
    extension.load_extension.cache_clear()
    monkeypatch.setitem(sys.modules, "maskformer_fast._C", None)
    with pytest.raises(ImportError, match=r"cannot be loaded: .*Build it .* pip install -e \."):
        panoptic_inference(*scene)
    with pytest.raises(ImportError, match=r"cannot be loaded"):
        instance_inference(scene.logits, scene.extent, scene.size)
    monkeypatch.undo()
    assert len(instance_inference(scene.logits, scene.extent, (1, 1)).areas) == 2
