"""The compiled panoptic and instance inference against formulas in float64, on every instruction set."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskformer_fast.core import extension
from maskformer_fast.core.metadata import VOID
from maskformer_fast.inference_config import PanopticRule
from maskformer_fast.ops.rle import _Arguments as _RleArguments
from maskformer_fast.ops.rle import _instance_rle_cuda
from maskformer_fast.ops.segments import (
    PanopticSegments,
    _instance_inference_cuda,
    _InstanceArguments,
    _panoptic_inference_cuda,
    _PanopticArguments,
    instance_inference,
    instance_inference_eager,
    panoptic_inference,
    panoptic_inference_eager,
)
from maskformer_fast.structures import unpack_masks
from tests.support.instruction_sets import INSTRUCTION_SETS, instruction_set
from tests.support.missing_modules import hide_triton
from tests.support.segments_oracle import Scene, assert_instances, assert_panoptic, large_scene

RULES = get_args(PanopticRule)


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def each_isa(run: Any) -> Iterator[Any]:
    """Result of a function with each instruction set."""
    for isa in INSTRUCTION_SETS:
        with instruction_set(isa):
            result = run()
        yield result


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


@settings(max_examples=250, deadline=None)
@given(scenes())
def test_panoptic_equals_float64(scene: Scene) -> None:
    for actual in each_isa(lambda: panoptic_inference(*scene)):
        assert_panoptic(actual, scene)


@settings(max_examples=40, deadline=None)
@given(scenes())
def test_eager_panoptic_equals_float64(scene: Scene) -> None:
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


@settings(max_examples=150, deadline=None)
@given(scenes(most_queries=6))
def test_instances_equal_float64(scene: Scene) -> None:
    for actual in each_isa(lambda: instance_inference(scene.logits, scene.extent, scene.size)):
        assert_instances(actual, scene)


@settings(max_examples=25, deadline=None)
@given(scenes(most_queries=6))
def test_eager_instances_equal_float64(scene: Scene) -> None:
    # the eager twin places columns in float32: an error of about 1e-5 of a logit's pixel on wide maps
    assert_instances(instance_inference_eager(scene.logits, scene.extent, scene.size), scene, 1e-3, 1e-3)


def test_of_equal_queries_the_first_wins() -> None:
    logits = 3 * torch.randn(1, 1, 9, 14).expand(1, 4, 9, 14)
    for actual in each_isa(
        lambda: panoptic_inference(
            logits, torch.tensor([[0.4, 0.9, 0.9, 0.9]]), torch.tensor([[0, VOID, 1, 2]]), torch.ones(3).bool(),
            (9, 14), (36, 56), 0.0,
        )
    ):
        assert actual.areas.tolist() == [[0, 0, 36 * 56, 0]] and (actual.id_map == 1).all()


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
def test_random_bits_give_consistent_results(seed: int, rule: PanopticRule) -> None:
    """Logits and scores of random bits: NaN, infinities, denormals, and numbers of any size."""
    generator = torch.Generator().manual_seed(seed)

    def bits(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32).view(torch.float32)

    logits, scores, categories = bits(2, 5, 6, 21), bits(2, 5), torch.randint(-1, 3, (2, 5), generator=generator)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    logits[:, :, ::2] = special[torch.randint(0, 4, logits[:, :, ::2].shape, generator=generator)]
    for actual in each_isa(
        lambda: panoptic_inference(
            logits, scores, categories, torch.tensor([True, False, True]), (6, 21), (24, 84), 0.5, rule
        )
    ):
        assert actual.id_map.min() >= VOID and actual.id_map.max() <= actual.ids.max()
        assert actual.areas.min() >= 0 and (actual.areas.sum(1) <= 24 * 84).all()
    for actual in each_isa(lambda: instance_inference(logits, (6, 21), (24, 84))):
        assert actual.scores.isfinite().all() and (actual.scores >= 0).all() and (actual.scores <= 1 + 1e-6).all()
        assert torch.equal(actual.areas, unpack_masks(actual.masks, 84).sum((2, 3)))


def test_nan_covers_nothing_and_infinity_all() -> None:
    logits = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])[None, :, None, None].expand(1, 4, 3, 3)
    for actual in each_isa(lambda: instance_inference(logits, (3, 3), (20, 70))):
        assert actual.areas.tolist() == [[0, 1400, 0, 1400]]
        assert actual.scores.tolist() == [[0, 1, 0, pytest.approx(0.7310586, abs=1e-6)]]
    arguments = (torch.tensor([[9.0, 0.4, 0.9, float("nan")]]), torch.arange(4)[None], torch.ones(4).bool())
    for actual in each_isa(lambda: panoptic_inference(logits, *arguments, (3, 3), (20, 70), 0.5)):
        assert actual.ids.tolist() == [[VOID, 1, VOID, VOID]] and (actual.id_map == 1).all()


def test_categories_are_checked() -> None:
    with pytest.raises(ValueError, match=r"categories: expected below 2 .*, got 7"):
        panoptic_inference(
            torch.zeros(1, 2, 4, 4), torch.ones(1, 2), torch.tensor([[0, 7]]), torch.ones(2).bool(), (4, 4), (8, 8), 0.8
        )


@pytest.mark.parametrize("batch, queries", [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_do(batch: int, queries: int) -> None:
    logits = torch.zeros(batch, queries, 4, 5)
    actual = panoptic_inference(
        logits, torch.zeros(batch, queries), torch.zeros(batch, queries, dtype=torch.int64), torch.ones(1).bool(),
        (4, 5), (9, 7), 0.8,
    )  # fmt: skip
    assert actual.id_map.shape == (batch, 9, 7) and (actual.id_map == VOID).all()
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
def test_compiles_in_one_graph() -> None:
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


def test_missing_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_triton(monkeypatch)
    logits, window = torch.zeros(1, 2, 3, 3), ((3, 3), (5, 5))
    flags = (torch.zeros(1, 2, dtype=torch.int64), torch.ones(1).bool())
    panoptic = _PanopticArguments(logits, torch.ones(1, 2), *flags, *window, 0.8, "maskformer")
    for implementation, arguments in (
        (_panoptic_inference_cuda, panoptic),
        (_instance_inference_cuda, _InstanceArguments(logits, *window)),
        (_instance_rle_cuda, _RleArguments(logits, *window, 9)),
    ):
        with pytest.raises(ImportError, match=r"No module named 'triton'.*pip install triton"):
            implementation(arguments)


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
