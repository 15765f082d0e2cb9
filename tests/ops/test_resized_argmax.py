"""Argmax of resized maps on the CPU, against `F.interpolate` and plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.ops import resized_semantic
from maskformer_fast.ops.live_queries import find_live_queries
from maskformer_fast.ops.resized_argmax import (
    resized_argmax,
    resized_argmax_eager,
    resized_rows,
    resized_winners,
    resized_winners_eager,
    twice_resized_winners,
    twice_resized_winners_eager,
)
from maskformer_fast.ops.resized_semantic import (
    grid_semantic_inference,
    windowed_scores,
    windowed_semantic_eager,
    windowed_semantic_inference,
)

SIDES = st.integers(1, 30)
TIE = 1e-5
"""Lead of a winner below which another label is no error."""


def check_labels(labels: torch.Tensor, scores: torch.Tensor, allowed: float = 0.01) -> None:
    """Labels are the largest scores' but for ties, which are few."""
    chosen = scores.gather(0, labels[None])[0]
    assert (scores.amax(0) - chosen).max() <= TIE
    assert (labels != scores.argmax(0)).sum() <= allowed * labels.numel()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 70), SIDES, SIDES, st.integers(1, 90), SIDES)
def test_labels_equal_interpolation(seed: int, channels: int, h: int, w: int, height: int, width: int) -> None:
    maps = torch.randn(channels, h, w, generator=torch.Generator().manual_seed(seed))
    if seed % 2:
        maps = F.avg_pool2d(maps, 5, 1, 2)
    expected = F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0]
    check_labels(resized_argmax(maps, (height, width)), expected)
    check_labels(resized_argmax_eager(maps, (height, width)), expected)
    part = slice(height // 3, height // 3 + 1 + height // 2)
    torch.testing.assert_close(resized_rows(maps, (height, width), part), expected[:, part], atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 40), SIDES, SIDES, st.integers(1, 90), SIDES, st.booleans())
def test_counts(seed: int, channels: int, h: int, w: int, height: int, width: int, scaled: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = 2 * torch.randn(channels, h, w, generator=generator)
    own = torch.randn(channels, generator=generator)
    scale = torch.rand(channels, generator=generator) + 0.1 if scaled else None
    got = resized_winners(maps, own, scale, (height, width))
    expected = resized_winners_eager(maps, own, scale, (height, width))
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        assert (ours - theirs).abs().sum() <= 2 + 0.01 * height * width
    assert got.won.sum() == height * width
    inside = (got.labels < 0).sum()
    assert inside == (height * width - got.both.sum() if scaled else 0)
    assert got.labels.dtype == (torch.int64 if scaled else torch.int32)
    assert (got.labels != expected.labels).sum() <= 1 + 0.01 * height * width


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 40), SIDES, SIDES, st.integers(1, 90), st.integers(1, 90), st.booleans())
def test_winners_of_maps_that_are_resized_twice(
    seed: int, channels: int, h: int, w: int, height: int, width: int, sigmoids: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = F.avg_pool2d(6 * torch.randn(channels, h, w, generator=generator), 5, 1, 2)  # some cells have one winner
    grid = (h * (1 + seed % 5), w + seed % 7)
    window = (max(1, grid[0] - seed % 3), max(1, grid[1] - seed % 4))
    scale = torch.rand(channels, generator=generator) + 0.1
    own = torch.randn(channels, generator=generator) if sigmoids else torch.full((channels,), 0.3 + seed % 3 / 10)
    arguments = (maps, own, scale, sigmoids, grid, window, (height, width))
    got, expected = twice_resized_winners(*arguments), twice_resized_winners_eager(*arguments)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        assert (ours - theirs).abs().sum() <= 2 + 0.01 * height * width
    assert got.won.sum() == height * width and got.labels.dtype == expected.labels.dtype
    assert (got.labels != expected.labels).sum() <= 1 + 0.01 * height * width


@pytest.mark.parametrize("value", [20.0, -20.0])
def test_one_winner_owns_all_or_nothing_of_maps_that_are_resized_twice(value: float) -> None:
    maps = torch.full((3, 4, 5), -30.0)
    maps[1] = value
    won = twice_resized_winners(maps, torch.zeros(3), torch.ones(3), True, (16, 20), (16, 17), (30, 40))
    assert won.won.tolist() == [0, 1200, 0] and won.both.tolist() == won.owned.tolist() == [0, 1200 * (value > 0), 0]
    assert (won.labels == (1 if value > 0 else -1)).all()


def test_every_instruction_set_and_thread_gives_the_same(isa: str) -> None:
    maps = torch.randn(50, 13, 11)
    expected = F.interpolate(maps[None], (64, 70), mode="bilinear", align_corners=False)[0]
    check_labels(resized_argmax(maps, (64, 70)), expected)
    winners = resized_winners(maps, torch.zeros(50), None, (64, 70))
    assert (winners.owned - (expected >= 0).sum((1, 2))).abs().max() <= 1
    twice = (maps, torch.zeros(50), torch.rand(50) + 0.1, True, (26, 33), (26, 30), (64, 70))
    first = twice_resized_winners(*twice)
    assert (first.labels != twice_resized_winners_eager(*twice).labels).sum() <= 45
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    again = resized_winners(maps, torch.zeros(50), None, (64, 70))
    second = twice_resized_winners(*twice)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip((*winners, *first), (*again, *second), strict=True))


def scene(peaky: bool, queries: int = 40, classes: int = 30, size: tuple[int, int] = (24, 31)) -> tuple:
    """Mask and class logits: round masks, of which few have a class, or noise."""
    class_logits = torch.randn(queries, classes + 1)
    if not peaky:
        return torch.randn(queries, *size), class_logits.softmax(-1)[:, :-1]
    class_logits[:, -1] += 12
    live = torch.randperm(queries)[:8]
    class_logits[live, -1] -= 16
    class_logits[live, torch.randint(classes, (8,))] += 10
    y, x = torch.meshgrid(*(torch.linspace(0, 1, n) for n in size), indexing="ij")
    place = torch.rand(queries, 3, 1, 1)
    distance = ((y - place[:, 0]) ** 2 + (x - place[:, 1]) ** 2).sqrt()
    masks = (0.1 + 0.3 * place[:, 2] - distance) * 40 + 0.3 * torch.randn(queries, *size)
    return masks, class_logits.softmax(-1)[:, :-1]


@pytest.mark.parametrize("peaky", [True, False])
@pytest.mark.parametrize(("grid", "window"), [((24, 31), (24, 31)), ((60, 60), (60, 60)), ((50, 64), (41, 64))])
@pytest.mark.parametrize("band_values", [1, 1 << 21])
def test_semantic_labels(
    peaky: bool, grid: tuple[int, int], window: tuple[int, int], band_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resized_semantic, "BAND_VALUES", band_values)
    for output_size in ((200, 170), (33, 40)):
        masks, probabilities = scene(peaky)
        assert (find_live_queries([probabilities]) is not None) == peaky
        values = F.interpolate(masks[None], grid, mode="bilinear", align_corners=False)[0].sigmoid()
        scores = torch.einsum("qk,qhw->khw", probabilities, values)[:, : window[0], : window[1]]
        torch.testing.assert_close(resized_semantic.grid_scores(masks, probabilities, grid, window), scores)
        resized = F.interpolate(scores[None], output_size, mode="bilinear", align_corners=False)[0]
        check_labels(grid_semantic_inference(masks, probabilities, grid, window, output_size), resized)


WINDOWS = {  # origins, window, grid, output size
    "along a row": ([(0, 0), (0, 17), (0, 34)], (24, 31), (24, 65), (24, 65)),
    "resized": ([(0, 0), (30, 0)], (41, 37), (71, 37), (150, 90)),
    "both ways, cut off": ([(0, 0), (0, 20), (13, 0), (13, 20)], (24, 31), (30, 45), (50, 51)),
    "points without a window": ([(2, 5), (2, 60)], (24, 31), (40, 100), (33, 120)),
    "one": ([(0, 0)], (24, 31), (24, 31), (60, 60)),
}


def merged_scores(masks, probabilities, origins, window, grid) -> torch.Tensor:
    """Sums and counts of complete windows, as sliding-window inference is described."""
    scores, counts = torch.zeros(probabilities.shape[2], *grid), torch.zeros(grid)
    for logits, classes, (top, left) in zip(masks, probabilities, origins, strict=True):
        values = F.interpolate(logits[None], window, mode="bilinear", align_corners=False)[0].sigmoid()
        values = torch.einsum("qk,qhw->khw", classes, values)[:, : grid[0] - top, : grid[1] - left]
        scores[:, top : top + window[0], left : left + window[1]] += values
        counts[top : top + window[0], left : left + window[1]] += 1
    return scores / counts.clamp(min=1)


@pytest.mark.parametrize("peaky", [True, False])
@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("band_values", [1, 1 << 21])
def test_labels_of_windows_are_those_of_the_mean_of_their_scores(
    case: str, peaky: bool, band_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resized_semantic, "BAND_VALUES", band_values)
    origins, window, grid, output_size = WINDOWS[case]
    scenes = [scene(peaky) for _ in origins]
    masks, probabilities = (torch.stack(part) for part in zip(*scenes, strict=True))
    arguments = (masks, probabilities, origins, window, grid)
    scores = merged_scores(*arguments)
    torch.testing.assert_close(windowed_scores(*arguments), scores)
    resized = F.interpolate(scores[None], output_size, mode="bilinear", align_corners=False)[0]
    for labels in (windowed_semantic_inference, windowed_semantic_eager):
        check_labels(labels(*arguments, output_size), resized)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("classes", "peaky"), [(30, True), (30, False), (300, True)])
def test_labels_of_windows_without_resizing(dtype: torch.dtype, classes: int, peaky: bool, isa: str) -> None:
    origins, window, grid, _ = WINDOWS["both ways, cut off"]
    scenes = [scene(peaky, classes=classes, size=(9, 13)) for _ in origins]
    masks, probabilities = (torch.stack(part) for part in zip(*scenes, strict=True))
    masks = masks.to(dtype).transpose(2, 3).contiguous().transpose(2, 3)  # any strides
    scores = merged_scores(masks.float(), probabilities, origins, window, grid)
    check_labels(windowed_semantic_inference(masks, probabilities, origins, window, grid, grid), scores)


def test_a_probability_that_is_nan_spoils_no_pixel_outside_of_its_window() -> None:
    masks, probabilities = (torch.stack(part) for part in zip(scene(True), scene(True), strict=True))
    origins, window, grid = [(0, 0), (0, 20)], (24, 31), (24, 51)
    expected = windowed_semantic_inference(masks, probabilities, origins, window, grid, grid)
    probabilities[1, 3, 4] = torch.nan
    got = windowed_semantic_inference(masks, probabilities, origins, window, grid, grid)
    assert torch.equal(got[:, :20], expected[:, :20])


def test_windows_of_the_whole_picture_twice_are_as_one() -> None:
    masks, probabilities = scene(True)
    once = grid_semantic_inference(masks, probabilities, (60, 60), (60, 60), (80, 90))
    twice = windowed_semantic_inference(
        masks.expand(2, -1, -1, -1), probabilities.expand(2, -1, -1), [(0, 0)] * 2, (60, 60), (60, 60), (80, 90)
    )
    assert (once != twice).sum() <= 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"origins": [(0, 0)]}, "origins: expected 2 of them, got 1"),
        ({"origins": [(0, 0), (0, 9)]}, r"origins: expected rows and columns of the grid \(8, 9\), got \(0, 9\)"),
        ({"origins": [(0, -1), (0, 0)]}, "origins: expected rows"),
        ({"probabilities": torch.zeros(2, 4, 3)}, r"probabilities: expected \[2, 5, K\]"),
        ({"mask_logits": torch.zeros(5, 6, 7)}, r"mask_logits: expected \[W, Q, h, w\]"),
        ({"window": (0, 3)}, "window: expected positive"),
        ({"output_size": (0, 3)}, "output_size: expected positive"),
    ],
)
def test_errors_of_windows_name_the_argument(changed: dict, message: str) -> None:
    arguments = {"mask_logits": torch.zeros(2, 5, 6, 7), "probabilities": torch.zeros(2, 5, 3),
                 "origins": [(0, 0), (0, 4)], "window": (8, 5), "grid": (8, 9), "output_size": (8, 9)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        windowed_semantic_inference(**(arguments | changed))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"maps: expected \[N, h, w\]"):
        resized_argmax(torch.zeros(2, 3), (4, 4))
    with pytest.raises(ValueError, match="output_size: expected positive"):
        resized_argmax(torch.zeros(2, 3, 3), (0, 4))
    with pytest.raises(ValueError, match=r"own_value: expected \[2\]"):
        resized_winners(torch.zeros(2, 3, 3), torch.zeros(3), None, (4, 4))
    with pytest.raises(ValueError, match=r"probabilities: expected \[2, K\]"):
        grid_semantic_inference(torch.zeros(2, 3, 3), torch.zeros(3, 1), (3, 3), (3, 3), (4, 4))
    with pytest.raises(ValueError, match="window: expected within"):
        grid_semantic_inference(torch.zeros(2, 3, 3), torch.zeros(2, 1), (3, 3), (4, 3), (4, 4))


def test_opcheck() -> None:
    maps = torch.randn(5, 6, 7)
    torch.library.opcheck(torch.ops.maskformer_fast.resized_argmax.default, (maps, [9, 11]))
    for scale in (None, torch.rand(5)):
        operator = torch.ops.maskformer_fast.resized_winners.default
        torch.library.opcheck(operator, (maps, torch.zeros(5), scale, [9, 11]))
