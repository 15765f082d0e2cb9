"""Semantic labels at a grid on the CPU by bounds, against scores by plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.core.extension import load_extension
from maskformer_fast.ops.live_queries import MAX_MISSING, ROUNDING, find_live_queries
from maskformer_fast.ops.resized_semantic import grid_semantic_inference, windowed_semantic_eager

TIE = 1e-5
"""Lead of a winner below which another label is no error."""


def peaky(generator: torch.Generator, queries: int, classes: int, size: tuple[int, int], live: int) -> tuple:
    """Mask logits whose regions tile the map with sharp borders and noise, and probabilities of few queries."""
    probabilities = torch.rand(queries, classes, generator=generator) * (MAX_MISSING / queries)
    for query in range(live):
        probabilities[query, int(torch.randint(classes, (), generator=generator))] = 0.97
    coarse = torch.randn(1, queries, 3, 4, generator=generator)
    masks = 15 * F.interpolate(coarse, size, mode="bicubic", align_corners=False)[0]
    masks += torch.randn(queries, *size, generator=generator)
    order = torch.randperm(queries, generator=generator)
    return masks[order], probabilities[order]


def expected_scores(masks, probabilities, grid, window, output_size) -> torch.Tensor:
    values = F.interpolate(masks[None].double(), grid, mode="bilinear", align_corners=False)[0].sigmoid()
    scores = torch.einsum("qk,qhw->khw", probabilities.double(), values[:, : window[0], : window[1]])
    return F.interpolate(scores[None], output_size, mode="bilinear", align_corners=False)[0]


def check_labels(labels: torch.Tensor, scores: torch.Tensor) -> None:
    assert labels.dtype == torch.int64 and labels.shape == scores.shape[1:]
    chosen = scores.gather(0, labels[None])[0]
    assert (scores.amax(0) - chosen).max() <= TIE
    assert (labels != scores.argmax(0)).sum() <= 0.01 * labels.numel()


SIDES = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_labels_of_few_live_queries_at_any_sizes(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9999)))
    size, output_size = (data.draw(SIDES), data.draw(SIDES)), (data.draw(st.integers(1, 90)), data.draw(SIDES))
    grid = (data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70)))  # finer or coarser, at any ratio
    window = (data.draw(st.integers(1, grid[0])), data.draw(st.integers(1, grid[1])))
    queries, classes = data.draw(st.integers(2, 40)), data.draw(st.integers(1, 40))
    live = data.draw(st.integers(1, max(1, queries // 3)))
    masks, probabilities = peaky(generator, queries, classes, size, live)
    scores = expected_scores(masks, probabilities, grid, window, output_size)
    check_labels(grid_semantic_inference(masks, probabilities, grid, window, output_size), scores)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 30), st.integers(1, 30), SIDES, SIDES, st.integers(1, 60))
def test_labels_of_noise(seed: int, queries: int, classes: int, h: int, w: int, side: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = 3 * torch.randn(queries, h, w, generator=generator)
    probabilities = torch.randn(queries, classes, generator=generator).softmax(1)
    grid, output_size = (side, side + 3), (side + 7, 2 * side)
    scores = expected_scores(masks, probabilities, grid, grid, output_size)
    check_labels(grid_semantic_inference(masks, probabilities, grid, grid, output_size), scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_instruction_set_type_and_number_of_threads(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    masks, probabilities = peaky(generator, 50, 30, (33, 47), 12)
    masks = masks.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)  # any strides
    sizes = ((120, 150), (101, 150), (230, 310))
    labels = grid_semantic_inference(masks, probabilities, *sizes)
    check_labels(labels, expected_scores(masks, probabilities, *sizes))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = grid_semantic_inference(masks, probabilities, *sizes)
    torch.set_num_threads(threads)
    assert torch.equal(labels, again)
    eager = windowed_semantic_eager(masks[None].float(), probabilities[None], [(0, 0)], sizes[0], sizes[1], sizes[2])
    assert (labels != eager).float().mean() < 0.001


def test_a_class_without_a_live_query_wins_where_no_live_one_does() -> None:
    masks = torch.full((20, 8, 8), -30.0)
    masks[:, :, 4:] = 30.0
    masks[0] = -masks[0]  # the live query is on at the left, the others at the right
    probabilities = torch.zeros(20, 5)
    probabilities[0, 2], probabilities[1:, 3] = 0.9, MAX_MISSING / 21
    assert find_live_queries([probabilities]) is not None
    labels = grid_semantic_inference(masks, probabilities, (16, 16), (16, 16), (40, 40))
    assert (labels[:, :15] == 2).all() and (labels[:, 25:] == 3).all()


def test_bounds_of_queries_that_are_left_out() -> None:
    probabilities = torch.rand(30, 8) * 1e-4
    probabilities[4, 1] = probabilities[9, 6] = 0.9
    found = find_live_queries([probabilities])
    assert found is not None and found.kept == [2] and sorted(found.orders[0][:2].tolist()) == [4, 9]
    assert found.classes.tolist() == [1, 6] and sorted(found.orders[0].tolist()) == list(range(30))
    rest = probabilities[[query for query in range(30) if query not in (4, 9)]].sum(0)
    torch.testing.assert_close(found.slack, rest[[1, 6]] + ROUNDING)
    others = probabilities.sum(0)[[0, 2, 3, 4, 5, 7]].max().item()
    assert found.others == pytest.approx(others + ROUNDING)
    assert find_live_queries([torch.rand(10, 8)]) is None


def test_the_extension_refuses_sizes_that_do_not_fit() -> None:
    numbers = torch.zeros(64, dtype=torch.float32)
    places, address = torch.zeros(64, dtype=torch.int32), numbers.data_ptr()

    def call(sizes=(1, 2, 2), classes=(3, 16), kept=0, window=(2, 2), live=(0, 0)) -> None:
        labels = torch.zeros(4, dtype=torch.int64)
        load_extension().grid_semantic(
            address, sizes, places.data_ptr(), address, classes, kept, address, address, places.data_ptr(), live, 0.0,
            (2, 2), window, labels.data_ptr(), (2, 2), 1,
        )  # fmt: skip

    call()
    for changed in ({"sizes": (0, 2, 2)}, {"classes": (3, 8)}, {"kept": 2}, {"window": (3, 2)}, {"kept": 1}):
        with pytest.raises(ValueError, match=r"expected"):
            call(**changed)
