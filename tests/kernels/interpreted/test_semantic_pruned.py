"""Pruned labels against those of all queries and against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from maskformer_fast.kernels import semantic, semantic_pruned
from maskformer_fast.kernels.class_probabilities import class_probabilities
from maskformer_fast.kernels.semantic import semantic_from_embeddings, semantic_from_logits
from maskformer_fast.kernels.semantic_tile import TILE_H, TILE_W, plan_tiles
from maskformer_fast.ops.semantic import _Arguments, _semantic_inference_cuda
from tests.support.oracles import semantic_scores

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3}
Size = tuple[int, int]


def predictions(kind: str, batch: int, queries: int, classes: int, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of masks and classes.

    Peaky: blobs with sharp edges, a fifth of the queries sure of a class, the others of "no object". Medium: the same
    but less sure, with noise.
    """
    generator = torch.Generator().manual_seed(queries)
    noise = torch.randn(batch, queries, *size, generator=generator)
    logits = torch.randn(batch, queries, classes + 1, generator=generator)
    if kind == "random":
        return 4 * noise, 3 * logits
    y, x = (torch.linspace(-1, 1, n) for n in size)
    center = 2 * torch.rand(batch, queries, 2, 1, 1, generator=generator) - 1
    center[:, 0] = -1  # so that there is a mask even where the map has one pixel
    distance = ((y[:, None] - center[:, :, 0]) ** 2 + (x - center[:, :, 1]) ** 2).sqrt()
    masks = 9 * torch.tanh(6 * (0.6 - distance)) + (0.3 if kind == "peaky" else 2) * noise
    chosen = torch.randint(classes, (batch, queries, 1), generator=generator)
    chosen[:, queries // 5 + 1 :] = classes
    odds = F.one_hot(chosen[..., 0], classes + 1) * (9 if kind == "peaky" else 6)
    return masks, logits + odds


def pruned_labels(masks, logits, extent, size: Size) -> tuple[torch.Tensor, set[int], int]:
    """Labels, indices of the tiles that took all queries, number of tiles."""
    labels = torch.full((len(masks), *size), 99, dtype=torch.uint8 if logits.shape[2] <= 256 else torch.int16)
    tiling = plan_tiles(masks, masks.shape[2:], extent, labels)
    count, *rest = semantic_pruned.semantic_pruned(masks, logits, tiling, labels).tolist()
    assert len(rest) == tiling.tiles and len(set(rest[:count])) == count and not any(rest[count:])
    return labels, set(rest[:count]), tiling.tiles


def dense_labels(masks, logits, extent, size: Size) -> torch.Tensor:
    labels = torch.full((len(masks), *size), 99, dtype=torch.uint8 if logits.shape[2] <= 256 else torch.int16)
    semantic_from_logits(masks, logits, extent, labels, path="dense")
    return labels


def check(masks, logits, extent, size: Size) -> tuple[int, int]:
    """Compare pruned labels with dense ones and the definition -> tiles that took all queries, and other tiles."""
    labels, unproven, tiles = pruned_labels(masks, logits, extent, size)
    assert torch.equal(labels, dense_labels(masks, logits, extent, size))
    scores = semantic_scores(masks, logits, extent, size)
    best = scores.topk(min(2, scores.shape[1]), dim=1).values
    clear = best[:, 0] - (best[:, 1] if scores.shape[1] > 1 else -1) > 2 * TOLERANCES[masks.dtype] * best[:, 0].clamp(1)
    assert clear.any() and torch.equal(labels[clear].long(), scores.argmax(1)[clear])
    return len(unproven), tiles - len(unproven)


SHAPES = [
    # batch, queries, classes, map, extent, output
    (2, 40, 19, (3, 4), (3.0, 4.0), (9, 13)),  # about scale 4: one round of taps
    (1, 90, 259, (4, 4), (3.9, 3.1), (6, 9)),  # labels of 16 bits
    (1, 70, 33, (9, 14), (8.7, 13.2), (4, 6)),  # downwards
    (1, 33, 1, (6, 5), (6.0, 5.0), (6, 6)),
    (1, 1, 5, (1, 1), (0.4, 1.0), (3, 9)),
    (1, 129, 2, (3, 3), (3.0, 3.0), (7, 5)),
]


@pytest.mark.parametrize("kind, dtype, case", [
    ("peaky", torch.float32, 0), ("medium", torch.float16, 1), ("random", torch.float32, 2),
    ("medium", torch.float32, 3), ("peaky", torch.float32, 4), ("peaky", torch.float16, 5),
])  # fmt: skip
def test_labels_are_those_of_all_queries(kind: str, dtype: torch.dtype, case: int) -> None:
    batch, queries, classes, size, extent, output = SHAPES[case]
    masks, logits = predictions(kind, batch, queries, classes, size)
    _, proven = check(masks.to(dtype), logits, extent, output)
    if kind == "random" and queries > 2 * semantic_pruned.LIVE.value:
        assert proven == 0 or classes == 1


def test_queries_innermost() -> None:
    masks, logits = predictions("peaky", 1, 40, 7, (5, 6))  # 9 queries are sure
    masks = masks.half().contiguous(memory_format=torch.channels_last)
    _, proven = check(masks, logits, (5.0, 6.0), (8, 14))
    assert proven


def weak_against_strong(strongest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One query of class 0, one of class 1 (0.4), and 60 that give class 1 another 0.132 together; full masks."""
    chances = torch.full((62, 3), 1e-9, dtype=torch.float64)
    chances[0, 0], chances[1, 1], chances[2:, 1] = strongest, 0.4, 0.0022
    chances[:, 2] = 1 - chances[:, :2].sum(1)
    return torch.full((1, 62, 4, 5), 20.0), chances.log().float()[None]


class NoKernel:
    """A launch that does nothing."""

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments, **constants: None


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tiles_whose_winner_could_change_take_all_queries(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 0 scores 0.5 with any queries; class 1 scores 0.4 with the live queries and 0.532 with all."""
    masks, logits = weak_against_strong(0.5)
    case = (masks.to(dtype), logits, (4.0, 5.0), (8, 10))
    labels, unproven, tiles = pruned_labels(*case)
    assert (labels == 1).all() and len(unproven) == tiles
    monkeypatch.setattr(semantic_pruned, "_unproven_kernel", NoKernel())
    labels, unproven, tiles = pruned_labels(*case)
    assert (labels == 0).all() and len(unproven) == tiles  # wrong, but listed as unproven


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_proven_tiles_are_not_done_again_and_read_live_queries_only(dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in any row of the probabilities that a tile reads would leave it unproven."""
    masks, logits = weak_against_strong(0.7)
    case = (masks.to(dtype), logits, (4.0, 5.0), (8, 10))
    monkeypatch.setattr(semantic_pruned, "_unproven_kernel", NoKernel())
    for poisoned, proven in ((slice(2, 62), True), (slice(1, 2), False)):

        def poison(*arguments, rows: slice = poisoned) -> torch.Tensor:
            chances = class_probabilities(*arguments)
            chances[:, :, rows] = math.nan
            return chances

        monkeypatch.setattr(semantic_pruned, "class_probabilities", poison)
        labels, unproven, tiles = pruned_labels(*case)
        assert (labels == 0).all() and len(unproven) == (0 if proven else tiles)


def test_every_tile_outside_the_list_is_right_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, logits = predictions("peaky", 1, 64, 9, (8, 10))
    case = (masks.half(), logits, (8.0, 10.0), (32, 40))
    expected = dense_labels(*case)
    monkeypatch.setattr(semantic_pruned, "_unproven_kernel", NoKernel())
    labels, unproven, tiles = pruned_labels(*case)
    top, left = 2, 2  # the tiles' offset at scale 4
    columns = -(-(40 + left) // TILE_W)
    tile = (torch.arange(32)[:, None] + top) // TILE_H * columns + (torch.arange(40) + left) // TILE_W
    assert int(tile.max()) + 1 == tiles
    proven = ~torch.isin(tile, torch.tensor(sorted(unproven)))[None]
    assert proven.any() and not proven.all()
    assert torch.equal(labels[proven], expected[proven]) and not torch.equal(labels, expected)


@pytest.mark.parametrize("query, value, name", [  # of the live, and of those that would be dropped
    (0, math.nan, "pixel"), (30, math.nan, "pixel"), (0, math.inf, "class"), (30, math.nan, "class"),
])  # fmt: skip
def test_nan_is_label_0(query: int, value: float, name: str) -> None:
    masks, logits = predictions("peaky", 1, 32, 7, (6, 7))
    (masks[0, query] if name == "pixel" else logits[0, query]).view(-1)[-1 if name == "class" else 24] = value
    case = (masks, logits, (6.0, 7.0), (8, 13))
    labels, unproven, _ = pruned_labels(*case)
    assert torch.equal(labels, dense_labels(*case)) and unproven
    assert (labels == 0).all() if name == "class" else (labels != 0).any()


def test_infinite_masks() -> None:
    masks, logits = predictions("peaky", 1, 32, 7, (6, 7))
    masks = torch.where(masks.abs() > 6, masks.sign() * math.inf, masks)
    labels, _, _ = pruned_labels(masks, logits, (6.0, 7.0), (8, 13))
    assert torch.equal(labels, dense_labels(masks, logits, (6.0, 7.0), (8, 13)))
    masks, logits = weak_against_strong(0.7)
    masks = torch.where(torch.arange(5) < 2, masks, math.inf)
    masks[0, 40:] = -math.inf
    labels, unproven, _ = pruned_labels(masks, logits, (4.0, 5.0), (8, 10))
    assert (labels == 0).all() and not unproven


def test_equal_scores_are_never_proven_and_give_the_lowest_class() -> None:
    logits = torch.zeros(1, 3, 71)
    logits[..., 0] = -5.0
    labels, unproven, tiles = pruned_labels(torch.randn(1, 3, 4, 4), logits, (4.0, 4.0), (8, 8))
    assert (labels == 1).all() and len(unproven) == tiles
    labels, _, _ = pruned_labels(torch.full((1, 3, 4, 4), -math.inf), logits, (4.0, 4.0), (8, 8))
    assert (labels == 0).all()  # no mask is anywhere


@pytest.mark.parametrize("classes", [1, 40, 2100])
def test_largest_probability_of_each_query(classes: int) -> None:
    logits = 3 * torch.randn(2, 5, classes + 1)
    logits[1, 2, 0], logits[0, 1, -1] = math.nan, 30.0
    largest = torch.full((2, 16), -1.0)
    class_probabilities(logits, 16, 32, True, largest)
    torch.testing.assert_close(largest[:, :5], logits.softmax(-1)[..., :-1].amax(-1), equal_nan=True)
    assert (largest[:, 5:] == 0).all()


@pytest.mark.parametrize("batch, queries", [(0, 5), (2, 0)])
def test_nothing_to_do(batch: int, queries: int) -> None:
    labels = torch.full((batch, 9, 9), 99, dtype=torch.uint8)
    logits = torch.zeros(batch, queries, 7)
    semantic_from_logits(torch.zeros(batch, queries, 4, 4), logits, (4.0, 4.0), labels, path="pruned")
    assert (labels == 0).all()


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls = []

    def pruned(*arguments) -> torch.Tensor:
        calls.append(1)
        return semantic_pruned.semantic_pruned(*arguments)

    monkeypatch.setattr(semantic, "semantic_pruned", pruned)
    return calls


def test_operator_passes_the_path_on(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, logits = predictions("peaky", 1, 14, 8, (3, 4))
    calls = count_calls(monkeypatch)
    labels = {}
    for path, expected in (("auto", 0), ("dense", 0), ("pruned", 1)):
        labels[path] = _semantic_inference_cuda(_Arguments(masks, logits, (2.5, 4.0), (7, 9), path=path))[0]
        assert len(calls) == expected
    assert torch.equal(labels["pruned"], labels["dense"])
    valued = [
        _semantic_inference_cuda(_Arguments(masks, logits, (2.5, 4.0), (7, 9), True, True, path))
        for path in semantic.PATHS
    ]
    assert len(calls) == 1  # values take all queries
    assert all(torch.equal(a, b) for other in valued[1:] for a, b in zip(valued[0], other, strict=True))
    monkeypatch.setattr(semantic, "pruning_pays", lambda tiles, queries, classes: (queries, classes) == (14, 8))
    _semantic_inference_cuda(_Arguments(masks, logits, (2.5, 4.0), (7, 9)))
    assert len(calls) == 2


def test_embeddings_are_multiplied_for_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, logits = predictions("peaky", 1, 14, 8, (3, 4))
    pixels = masks[:, :12].contiguous()  # twelve channels
    embeddings = torch.randn(1, 14, 12)
    calls = count_calls(monkeypatch)
    labels = torch.zeros(4, 1, 7, 9, dtype=torch.uint8)
    semantic_from_embeddings(embeddings, pixels, logits, (3.0, 4.0), labels[0], path="pruned")
    assert len(calls) == 1
    semantic_from_embeddings(embeddings, pixels, logits, (3.0, 4.0), labels[1], path="dense")
    monkeypatch.setattr(semantic, "pruning_pays", lambda *shapes: True)
    semantic_from_embeddings(embeddings, pixels, logits, (3.0, 4.0), labels[2], fused=True)
    assert len(calls) == 1
    semantic_from_embeddings(embeddings, pixels, logits, (3.0, 4.0), labels[3])
    assert len(calls) == 2 and (labels == labels[0]).all()
    with pytest.raises(ValueError, match="path: expected dense or auto where the kernel computes the logits"):
        semantic_from_embeddings(embeddings, pixels, logits, (3.0, 4.0), labels[0], fused=True, path="pruned")


def test_shapes_alone_decide_and_unknown_paths_are_named() -> None:
    tiles = {size: -(-(size[0] + 2) // TILE_H) * -(-(size[1] + 2) // TILE_W) for size in ((512, 512), (1024, 2048))}
    assert not semantic_pruned.pruning_pays(tiles[512, 512], 100, 150)
    assert semantic_pruned.pruning_pays(8 * tiles[512, 512], 100, 150)
    assert semantic_pruned.pruning_pays(tiles[1024, 2048], 100, 19)
    assert not semantic_pruned.pruning_pays(8 * tiles[1024, 2048], 64, 1000)
    with pytest.raises(ValueError, match="path: expected one of auto, dense, pruned, got 'fast'"):
        semantic_from_logits(
            torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4), (2.0, 2.0), torch.zeros(1, 4, 4), path="fast"
        )
