"""The last three programs of docs/drop_in.md beside the code that they replace: others' heads, results, matchers.

Masks are blobs with noise, of which many overlap. PyTorch's code resizes the logits of the best pairs, compares them
with 0 and reads scores and boxes from masks of full size; pycocotools is given the same masks unpacked.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.assignment import SCIPY, random_costs
from benchmarks.cases.inputs import share_equal
from benchmarks.harness.case import Bound, Case, Inputs, Work
from maskformer_fast.core.results import InstanceResult
from maskformer_fast.ops import assign_pairs, instances_from_scores, linear_sum_assignment

PYTORCH, PYCOCOTOOLS = "PyTorch", "pycocotools"
QUERIES, CLASSES, TOP, MAP, SIZE = 200, 80, 100, (108, 108), (720, 1280)
PROBLEMS = (32, 300, 100)
"""Problems, queries and targets."""


def head_outputs(seed: int) -> tuple[Tensor, Tensor]:
    """Scores [1, Q, C] of each query and class, and mask logits [1, Q, h, w]."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, QUERIES, CLASSES, generator=generator).sigmoid()
    blobs = torch.randn(1, QUERIES, 6, 6, generator=generator) * 5 - 2
    masks = F.interpolate(blobs, MAP, mode="bicubic", align_corners=False)
    return scores, masks + 0.3 * torch.randn(masks.shape, generator=generator)


def fast_instances(scores: Tensor, masks: Tensor) -> InstanceResult[Tensor]:
    return instances_from_scores(scores, masks, [SIZE], TOP, mask_score=True)[0]


def plain_instances(scores: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels, scores, masks [N, H, W] and boxes, best first, as MaskDINO's code makes them."""
    best, pairs = scores[0].flatten().topk(TOP)
    logits = F.interpolate(masks[:, pairs // CLASSES], SIZE, mode="bilinear", align_corners=False)[0]
    inside = logits > 0
    share = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    values, order = (best * share).sort(descending=True, stable=True)
    inside = inside[order]
    rows, columns = inside.any(2), inside.any(1)
    boxes = torch.zeros(TOP, 4)
    for axis, line in ((0, columns), (1, rows)):
        steps = torch.arange(line.shape[1])
        boxes[:, axis] = torch.where(line, steps, line.shape[1]).amin(1).float()
        boxes[:, axis + 2] = torch.where(line, steps + 1, 0).amax(1).float()
    return (pairs % CLASSES)[order], values, inside, boxes


def same_instances(ours: InstanceResult[Tensor], theirs: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """Share of equal pixels; 0 where labels or scores differ."""
    labels, scores, masks, _ = theirs
    close = torch.equal(ours.labels, labels) and torch.allclose(ours.scores, scores, atol=1e-4)
    unpacked = np.unpackbits(ours.masks.numpy(), axis=2, count=SIZE[1], bitorder="little")
    return share_equal(torch.from_numpy(unpacked).bool(), masks) if close else 0.0


def scores_setup(device: torch.device) -> Work:
    return Work(fast_instances, {PYTORCH: plain_instances}, head_outputs, same_instances, {PYTORCH: 0.9999})


def results_setup(device: torch.device) -> Work:
    """COCO's annotations of masks that are packed, or unpacked [N, H, W] bool for pycocotools."""

    def draw(seed: int) -> Inputs:
        result = fast_instances(*head_outputs(seed))
        unpacked = np.unpackbits(result.masks.numpy(), axis=2, count=SIZE[1], bitorder="little")
        return result, unpacked

    def plain(_: InstanceResult[Tensor], unpacked: np.ndarray) -> list[bytes]:
        from pycocotools import mask as tools

        return [tools.encode(np.asfortranarray(mask))["counts"] for mask in unpacked]

    def fast(result: InstanceResult[Tensor], _: np.ndarray) -> list[bytes]:
        return [annotation["segmentation"]["counts"].encode() for annotation in result.to_coco()]

    return Work(fast, {PYCOCOTOOLS: plain}, draw, lambda ours, theirs: float(ours == theirs), {PYCOCOTOOLS: 1.0})


def matcher_setup(device: torch.device, padded: bool) -> Work:
    """Assignments of matrices of one size, each with SciPy, or all at once."""
    costs = random_costs("uniform", PROBLEMS)
    counts = torch.full((len(costs),), costs.shape[2])

    def draw(seed: int) -> Inputs:
        return (costs.roll((seed, seed), (0, 1)).contiguous(),)

    def plain(drawn: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
        from scipy.optimize import linear_sum_assignment as solve

        return [solve(cost) for cost in drawn.numpy()]

    def fast(drawn: Tensor) -> Any:
        return linear_sum_assignment(drawn, counts) if padded else assign_pairs(list(drawn))

    def agreement(ours: Any, theirs: list[tuple[np.ndarray, np.ndarray]]) -> float:
        """1 where the best costs are the same; uniform costs have one optimum."""
        if isinstance(ours, Tensor):
            expected = torch.stack([torch.from_numpy(rows[columns.argsort()]) for rows, columns in theirs])
            return float(torch.equal(ours.long(), expected))
        same = [np.array_equal(a, b) for mine, other in zip(ours, theirs, strict=True)
                for a, b in zip(mine, other, strict=True)]  # fmt: skip
        return float(all(same))

    return Work(fast, {SCIPY: plain}, draw, agreement, {SCIPY: 1.0})


def cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    count, queries, targets = PROBLEMS
    pixels = TOP * SIZE[0] * SIZE[1] / 8
    rows: list[Case] = []
    for name, peer, setup, size in (
        (f"instances from scores, {TOP} of {QUERIES} masks, {SIZE[0]}x{SIZE[1]}, mask scores", PYTORCH, scores_setup,
         4.0 * QUERIES * (MAP[0] * MAP[1] + CLASSES) + pixels),
        (f"run lengths of {TOP} masks, {SIZE[0]}x{SIZE[1]}", PYCOCOTOOLS, results_setup, pixels),
    ):  # fmt: skip
        rows.append(Case(f"{name}, vs {peer}", peer, None, setup, threads=1, rank=1, bound=Bound(size)))
    for padded, name in ((False, "assign_pairs"), (True, "padded linear_sum_assignment")):
        rows.append(Case(
            f"{name}, {count} x {queries}x{targets}, vs {SCIPY}", SCIPY, None,
            partial(matcher_setup, padded=padded), threads=1, rank=1,
            bound=Bound(4.0 * count * queries * targets),
        ))  # fmt: skip
    return rows
