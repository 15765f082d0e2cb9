"""Identities across frames: simple motions with known answers, and moving scenes with a network's mistakes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from maskformer_fast.core.metadata import SegmentInfo
from maskformer_fast.core.results import InstanceResult, PanopticResult
from maskformer_fast.video.tracker import Tracker, assign_by_category, track
from tests.support.moving_scene import THINGS, Mistakes, MovingScene, as_instances, perturbed
from tests.support.tracking_metrics import Labels, idf1, vpq

SIZE = (40, 60)


def panoptic(boxes: Sequence[tuple[int, int, int, int] | None], kinds: Sequence[int] | None = None) -> PanopticResult:
    """Boxes y, x, height, width over stuff of class 9; those that are None are not seen."""
    id_map = np.ones(SIZE, np.int32)
    segments = [SegmentInfo(1, 9, is_thing=False)]
    for number, box in enumerate(boxes):
        if box is not None:
            y, x, height, width = box
            id_map[max(y, 0) : y + height, max(x, 0) : x + width] = number + 2
            segments.append(SegmentInfo(number + 2, kinds[number] if kinds else 0))
    return PanopticResult(torch.from_numpy(id_map), segments)


def labels(result: PanopticResult, ids: Sequence[int]) -> Labels:
    table = np.zeros(max((segment.id for segment in result.segments), default=0) + 1, np.int64)
    for segment, number in zip(result.segments, ids, strict=True):
        table[segment.id] = number
    kinds = {number: segment.category for segment, number in zip(result.segments, ids, strict=True)}
    return table[np.maximum(result.id_map.numpy(), 0)], kinds


def test_objects_keep_their_ids_whatever_the_order_of_segments() -> None:
    ids = track(panoptic([(5 + t, 5 + 2 * t, 9, 9), (25, 50 - 2 * t, 9, 9)][:: 1 if t % 2 else -1]) for t in range(12))
    assert ids[0] == [1, 2, 3]
    for t, frame in enumerate(ids):
        assert frame == ([1, 3, 2] if t % 2 else [1, 2, 3])


def test_objects_that_cross_go_on_in_their_directions() -> None:
    """Two of one class pass through the same place; in the middle one hides the other completely."""
    frames = []
    for t in range(27):
        front, behind = (15, 2 + 2 * t, 10, 10), (15, 2 + 2 * (26 - t), 10, 10)
        hidden = abs(front[1] - behind[1]) < 4
        frames.append(panoptic([None if hidden else behind, front]))
    ids = track(frames)
    assert ids[-1][1:] == ids[0][1:] and max(max(frame) for frame in ids) == 3


def test_births_gaps_and_deaths() -> None:
    seen = [True] * 5 + [False] * 4 + [True] * 2 + [False] * 5 + [True]
    frames = [panoptic([(5, 5, 9, 9), (20, 20 + t, 9, 9) if visible else None]) for t, visible in enumerate(seen)]
    ids = track(frames, gap=4)
    assert {frame[1] for frame in ids} == {2}
    assert [frame[2] for frame in ids if len(frame) > 2] == [3] * 7 + [4]
    assert [frame[2] for frame in track(frames, gap=5) if len(frame) > 2] == [3] * 8
    with pytest.raises(ValueError, match="gap: expected >= 0"):
        Tracker(-1)


def test_a_class_has_ids_of_its_own() -> None:
    first, second = panoptic([(5, 5, 9, 9)], [0]), panoptic([(5, 5, 9, 9)], [1])
    assert track([first, second, first]) == [[1, 2], [1, 3], [1, 2]]


def test_frames_without_segments_and_of_other_sizes() -> None:
    empty = InstanceResult(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, 8, 2, dtype=torch.uint8),
                           torch.zeros(0, 4), (8, 16))  # fmt: skip
    nothing = PanopticResult(torch.full(SIZE, -1, dtype=torch.int32), [])
    assert track([empty, empty]) == [[], []]
    box = panoptic([(5, 5, 9, 9)])
    assert track([nothing, box, nothing, box]) == [[], [1, 2], [], [1, 2]]
    assert track([box, empty, box]) == [[1, 2], [], [1, 3]], "another size ends objects"


def test_instances_are_followed_as_segments_are() -> None:
    scene = MovingScene(3, 25)
    make = np.random.default_rng(0)
    results = [perturbed(scene.truth(t), Mistakes(), make) for t in range(25)]
    by_segment = track(results)
    instances = track(map(as_instances, results))
    # Ids differ, as stuff has some, but the same objects have the same ones.
    pairs = set()
    for result, ids, others in zip(results, by_segment, instances, strict=True):
        things = [(s.score, n) for s, n in zip(result.segments, ids, strict=True) if s.is_thing]
        pairs |= set(zip((n for _, n in sorted(things, reverse=True)), others, strict=True))
    assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}) > 5


def test_large_frames_are_compared_on_a_grid() -> None:
    def large(t: int) -> InstanceResult:
        masks = np.zeros((2, 900, 1301), bool)
        masks[0, 100 + t : 300, 200 : 400 + 3 * t], masks[1, 500:700, 900 - 3 * t : 1301] = True, True
        packed = torch.from_numpy(np.packbits(masks[:: 1 if t % 2 else -1], axis=-1, bitorder="little").copy())
        return InstanceResult(torch.zeros(2, dtype=torch.int64), torch.ones(2), packed, torch.zeros(2, 4), (900, 1301))

    assert track(map(large, range(4))) == [[1, 2], [2, 1], [1, 2], [2, 1]]


def test_the_assignment_is_the_best_of_each_category() -> None:
    make = np.random.default_rng(2)
    for _ in range(30):
        rows, columns = make.integers(0, 9, 2)
        tracks, segments = make.integers(0, 4, rows), make.integers(0, 4, columns)
        affinity = make.random((rows, columns)) * (make.random((rows, columns)) < 0.7)
        found = assign_by_category(affinity, tracks, segments)
        total = sum(affinity[row, column] for column, row in enumerate(found.tolist()) if row >= 0)
        used = [row for row in found.tolist() if row >= 0]
        assert len(used) == len(set(used))
        assert all(tracks[row] == segments[column] and affinity[row, column] > 0
                   for column, row in enumerate(found.tolist()) if row >= 0)
        allowed = affinity * (tracks[:, None] == segments)
        assert total == pytest.approx(allowed[linear_sum_assignment(allowed, maximize=True)].sum())


def test_the_metrics_know_a_swap_from_a_mistake() -> None:
    """By hand: two objects of 10 frames whose identities are swapped after 6."""
    one, two = np.zeros((4, 8), np.int64), np.zeros((4, 8), np.int64)
    one[:, :4], one[:, 4:] = 1, 2
    two[:, :4], two[:, 4:] = 2, 1
    kinds = {1: 0, 2: 0}
    truth: list[Labels] = [(one, kinds)] * 10
    assert idf1(truth, truth, 1) == 1 and vpq(truth, truth, 5) == 1
    swapped: list[Labels] = [(one, kinds)] * 6 + [(two, kinds)] * 4
    assert idf1(truth, swapped, 1) == pytest.approx(12 / 20)
    assert vpq(truth, swapped, 1) == 1
    # Windows of 5 frames begin at 0 to 5: two do not see the swap, of the others one has 4 of 5 frames right and so on.
    right = [1, 1, 4 / 6, 3 / 7]  # intersections over unions; 3/7 is no match
    expected = (2 * sum(right[:3]) + 2 * (4 / 6)) / (2 * 6)
    assert vpq(truth, swapped, 5) == pytest.approx(expected)


def idf1_of_motmetrics(truth: Sequence[Labels], results: Sequence[Labels]) -> float:
    """IDF1 by the package `motmetrics`; identities of other classes, or with an IoU below 0.5, cannot be matched."""
    motmetrics = pytest.importorskip("motmetrics")
    accumulator = motmetrics.MOTAccumulator(auto_id=True)
    for sides in zip(truth, results, strict=True):
        ones, others = ([number for number, kind in kinds.items() if kind < THINGS] for _, kinds in sides)
        distances = np.full((len(ones), len(others)), np.nan)
        for row, one in enumerate(ones):
            for column, other in enumerate(others):
                a, b = sides[0][0] == one, sides[1][0] == other
                share = (a & b).sum() / (a | b).sum()
                if sides[0][1][one] == sides[1][1][other] and share >= 0.5:
                    distances[row, column] = 1 - share
        accumulator.update(ones, others, distances)
    return float(motmetrics.metrics.create().compute(accumulator, metrics=["idf1"])["idf1"].iloc[0])


@pytest.mark.parametrize("seed", range(4))
def test_idf1_equals_that_of_motmetrics(seed: int) -> None:
    """Ids by the tracker, by a tracker that often forgets, and in random order; some frames are empty."""
    scene, make = MovingScene(seed, 30), np.random.default_rng(seed)
    truth: list[Labels] = []
    sides: list[list[Labels]] = [[], [], []]
    trackers = Tracker(), Tracker(gap=0)
    for time in range(scene.frames):
        frame = scene.truth(time)
        truth.append((frame.id_map, frame.categories))
        result = perturbed(frame, Mistakes(), make)
        if time % 11 == 5:
            result = PanopticResult(torch.full(scene.size, -1, dtype=torch.int32), [])
        shuffled = (make.permutation(len(result.segments)) + 1).tolist()
        for side, ids in zip(sides, (*(tracker.update(result) for tracker in trackers), shuffled), strict=True):
            side.append(labels(result, ids))
    ours = [idf1(truth, side, THINGS) for side in sides]
    assert ours == pytest.approx([idf1_of_motmetrics(truth, side) for side in sides], abs=1e-12)
    assert 0.1 < ours[2] < ours[0] < 1 and len(set(ours)) == 3


GOALS = {"idf1": 0.855, 1: 0.855, 5: 0.81, 10: 0.79, 15: 0.77}
"""Lower bounds of IDF1 and of VPQ by window, on scenes that the tracker's constants were not chosen on. Identities
without a mistake give 0.90, and 0.86, 0.82, 0.82, 0.82."""


@pytest.mark.slow
@pytest.mark.no_cover
def test_identities_on_perturbed_scenes_reach_the_goals() -> None:
    scores: dict[str | int, list[float]] = {key: [] for key in GOALS}
    for seed in range(6):
        scene, make, tracker = MovingScene(seed), np.random.default_rng(seed + 1000), Tracker()
        truth: list[Labels] = []
        results: list[Labels] = []
        for time in range(scene.frames):
            frame = scene.truth(time)
            truth.append((frame.id_map, frame.categories))
            result = perturbed(frame, Mistakes(), make)
            results.append(labels(result, tracker.update(result)))
        scores["idf1"].append(idf1(truth, results, THINGS))
        for window in (1, 5, 10, 15):
            scores[window].append(vpq(truth, results, window))
    means = {key: float(np.mean(values)) for key, values in scores.items()}
    print(means)
    assert not {key: value for key, value in means.items() if value < GOALS[key]}
