"""Raw calls of ``torch.ops.maskformer_fast.*``: they refuse what the public functions refuse, and never read beyond."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import maskformer_fast.ops  # noqa: F401  (registers the operators)

OPERATORS = torch.ops.maskformer_fast
MASKS = torch.zeros(2, 9, 5, 6)
CLASSES = torch.zeros(2, 9, 4)
WINDOW = ([5.0, 6.0], [10, 12])
QUERIES = (torch.zeros(2, 9), torch.zeros(2, 9, dtype=torch.int64), torch.ones(4, dtype=torch.bool))
COST = (torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 9, 8), torch.zeros(2, 8, 5, 6), torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3, 10, 2, dtype=torch.uint8),
        torch.ones(2, 2, dtype=torch.int64), [10, 12], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0])  # fmt: skip
PAIRS = (torch.zeros(7, 5, 6), torch.zeros(4, 10, 2, dtype=torch.uint8), torch.zeros(7, dtype=torch.int64),
         torch.ones(4, 2, dtype=torch.int64), 12, [1.0, 1.0, 0.0])  # fmt: skip
CONVOLUTION = (torch.zeros(1, 16, 5, 6), torch.zeros(36, 2, 16, 16), torch.zeros(20), 20, False)
ATTENTION = (torch.zeros(2, 6, 3, 8), [2, 2, 1, 2], torch.zeros(2, 5, 2, 2), torch.zeros(2, 5, 3, 2, 4, 2),
             torch.zeros(2, 5, 3, 2, 4))  # fmt: skip
POINTS = (torch.zeros(7, 5, 6), torch.zeros(7, dtype=torch.int64), torch.zeros(7, 9, 2), torch.zeros(7, 9),
          [1.0, 1.0, 0.0])  # fmt: skip
AT_POINTS = (torch.zeros(1, 2, 9, 4), torch.zeros(1, 2, 9, 5, 6), torch.zeros(1, 2, 11, 2), torch.zeros(1, 2, 3, 11),
             torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), [1.0, 1.0, 1.0],
             [1.0, 1.0, 0.0])  # fmt: skip
GROUPS = torch.zeros(7, dtype=torch.int64)
FRAMES = [torch.zeros(1, 5, 6, 3, dtype=torch.uint8)]

CALLS: dict[str, tuple[Any, ...]] = {
    "linear_sum_assignment": (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)),
    "semantic_inference": (MASKS, CLASSES, *WINDOW),
    "panoptic_inference": (MASKS, *QUERIES, *WINDOW, 0.8, "maskformer"),
    "instance_inference": (MASKS, *WINDOW),
    "instance_rle": (MASKS, *WINDOW, 1000),
    "matching_cost": COST,
    "mask_sums": PAIRS,
    "mask_sums_backward": (torch.zeros(7, 4), *PAIRS),
    "conv3x3_winograd": CONVOLUTION,
    "deformable_attention": ATTENTION,
    "deformable_attention_backward": (torch.zeros(2, 5, 24), *ATTENTION),
    "sample_masks": (torch.zeros(2, 5, 1, dtype=torch.uint8), 6, GROUPS, torch.zeros(3, 9, 2), GROUPS, [5, 6]),
    "nearest_masks": (torch.zeros(2, 5, 1, dtype=torch.uint8), 6, [10, 12]),
    "point_cost": AT_POINTS,
    "choose_points": (torch.zeros(7, 5, 6), GROUPS, torch.zeros(3, 9, 2), torch.zeros(3, 4, 2), 5),
    "point_sums": POINTS,
    "point_sums_backward": (torch.zeros(7, 4), *POINTS),
    "resize_images": (FRAMES, [4, 4], [4, 4], False),
}
WRONG: list[tuple[str, int, Any]] = [
    ("nearest_masks", 0, torch.zeros(2, 5, 1)),
    ("nearest_masks", 1, 9),
    ("nearest_masks", 2, [10, 0]),
    ("linear_sum_assignment", 0, torch.zeros(4)),
    ("linear_sum_assignment", 0, torch.zeros(2, 3, 4, dtype=torch.float16)),
    ("linear_sum_assignment", 1, torch.zeros(1, dtype=torch.int64)),
    ("linear_sum_assignment", 1, torch.zeros(2, dtype=torch.int32)),
    ("semantic_inference", 0, torch.zeros(2, 9, 30)),
    ("semantic_inference", 1, torch.zeros(1, 9, 4)),
    ("semantic_inference", 1, torch.zeros(2, 8, 4)),
    ("semantic_inference", 1, torch.zeros(2, 9, 1)),
    ("semantic_inference", 1, torch.zeros(2, 9, 4, dtype=torch.int64)),
    ("semantic_inference", 2, [50.0, 6.0]),
    ("semantic_inference", 2, [5.0]),
    ("semantic_inference", 3, [0, 12]),
    ("semantic_inference", 3, [10, 12, 1]),
    ("panoptic_inference", 0, torch.zeros(2, 10, 5, 6)),
    ("panoptic_inference", 1, torch.zeros(2, 8)),
    ("panoptic_inference", 2, torch.zeros(2, 8, dtype=torch.int64)),
    ("panoptic_inference", 2, torch.zeros(2, 9, dtype=torch.int32)),
    ("panoptic_inference", 3, torch.ones(4, dtype=torch.uint8)),
    ("panoptic_inference", 3, torch.ones(4, 1, dtype=torch.bool)),
    ("panoptic_inference", 4, [5.0, 7.0]),
    ("panoptic_inference", 7, "other"),
    ("instance_inference", 0, torch.zeros(9, 5, 6)),
    ("instance_inference", 1, [0.0, 6.0]),
    ("instance_inference", 2, [-1, 12]),
    ("instance_rle", 0, torch.zeros(9, 5, 6)),
    ("instance_rle", 2, [1 << 16, 1 << 16]),
    ("instance_rle", 3, -1),
    ("matching_cost", 0, torch.zeros(1, 2, 8, 4)),
    ("matching_cost", 0, torch.zeros(1, 2, 9, 4, dtype=torch.float16)),
    ("matching_cost", 1, torch.zeros(1, 2, 9, 7)),
    ("matching_cost", 1, torch.zeros(1, 2, 9, 8, dtype=torch.float64)),
    ("matching_cost", 2, torch.zeros(1, 8, 5, 6)),
    ("matching_cost", 2, None),
    ("matching_cost", 3, torch.zeros(2, 4, dtype=torch.int64)),
    ("matching_cost", 3, torch.zeros((), dtype=torch.int64)),
    ("matching_cost", 4, torch.zeros(3, dtype=torch.int64)),
    ("matching_cost", 5, torch.zeros(2, 3, 9, 2, dtype=torch.uint8)),
    ("matching_cost", 6, torch.ones(2, 2)),
    ("matching_cost", 7, [100, 12]),
    ("matching_cost", 7, [10]),
    ("matching_cost", 8, [1.0]),
    ("mask_sums", 0, torch.zeros(6, 5, 6)),
    ("mask_sums", 1, torch.zeros(4, 10, 1, dtype=torch.uint8)),
    ("mask_sums", 2, torch.zeros((), dtype=torch.int64)),
    ("mask_sums", 3, torch.ones(3, 2, dtype=torch.int64)),
    ("mask_sums", 4, 40),
    ("mask_sums", 5, [1.0]),
    ("mask_sums_backward", 0, torch.zeros(7, 3)),
    ("mask_sums_backward", 1, torch.zeros(6, 5, 6)),
    ("conv3x3_winograd", 0, torch.zeros(1, 32, 5, 6)),
    ("conv3x3_winograd", 0, torch.zeros(1, 16, 5, 6, dtype=torch.float16)),
    ("conv3x3_winograd", 1, torch.zeros(36, 1, 16, 16)),
    ("conv3x3_winograd", 1, torch.zeros(36, 2, 16, 16, dtype=torch.bfloat16)),
    ("conv3x3_winograd", 2, torch.zeros(16)),
    ("conv3x3_winograd", 3, 40),
    ("deformable_attention", 0, torch.zeros(2, 7, 3, 8)),
    ("deformable_attention", 0, torch.zeros(2, 6, 3, 8, dtype=torch.int64)),
    ("deformable_attention", 1, [2, 2, 1]),
    ("deformable_attention", 1, [2, 2, 1, -2]),
    ("deformable_attention", 2, torch.zeros(2, 5, 3, 2)),
    ("deformable_attention", 3, torch.zeros(2, 5, 3, 2, 3, 2)),
    ("deformable_attention", 4, torch.zeros(2, 5, 3, 8)),
    ("deformable_attention_backward", 0, torch.zeros(2, 5, 3, 8)),
    ("deformable_attention_backward", 2, [2, 2, 1, 3]),
    ("sample_masks", 0, torch.zeros(2, 5, 2, dtype=torch.uint8)),
    ("sample_masks", 0, torch.zeros(2, 5, 6, dtype=torch.int32)),
    ("sample_masks", 1, 60),
    ("sample_masks", 2, torch.zeros(6, dtype=torch.int64)),
    ("sample_masks", 3, torch.zeros(3, 9, 2, dtype=torch.float16)),
    ("sample_masks", 4, torch.zeros(7)),
    ("sample_masks", 5, [5]),
    ("point_cost", 0, torch.zeros(1, 2, 9)),
    ("point_cost", 1, torch.zeros(1, 2, 8, 5, 6)),
    ("point_cost", 1, torch.zeros(1, 2, 9, 5, 6, dtype=torch.float16)),
    ("point_cost", 2, torch.zeros(1, 2, 10, 2)),
    ("point_cost", 3, torch.zeros(2, 2, 3, 11)),
    ("point_cost", 4, torch.zeros(2, 4, dtype=torch.int64)),
    ("point_cost", 5, torch.zeros(2)),
    ("point_cost", 6, [1.0]),
    ("choose_points", 0, torch.zeros(7, 30)),
    ("choose_points", 0, torch.zeros(7, 5, 6, dtype=torch.float16)),
    ("choose_points", 1, torch.zeros(6, dtype=torch.int64)),
    ("choose_points", 2, torch.zeros(3, 9, 3)),
    ("choose_points", 3, torch.zeros(2, 4, 2)),
    ("choose_points", 4, 10),
    ("point_sums", 0, torch.zeros(7, 5, 6, dtype=torch.float16)),
    ("point_sums", 1, torch.zeros(7)),
    ("point_sums", 2, torch.zeros(6, 9, 2)),
    ("point_sums", 3, torch.zeros(7, 8)),
    ("point_sums", 4, [1.0]),
    ("point_sums_backward", 0, torch.zeros(7, 3)),
    ("point_sums_backward", 3, torch.zeros(7, 9, 3)),
    ("resize_images", 0, [torch.zeros(1, 5, 6, 1, dtype=torch.uint8)]),
    ("resize_images", 0, [torch.zeros(1, 5, 6, 3)]),
    ("resize_images", 1, [4]),
    ("resize_images", 1, [4, 0]),
    ("resize_images", 2, [3, 4]),
    ("resize_images", 2, [4]),
]


@pytest.mark.parametrize("name", CALLS)
def test_the_right_arguments_are_taken(name: str) -> None:
    getattr(OPERATORS, name)(*CALLS[name])


@pytest.mark.parametrize(("name", "place", "value"), WRONG)
def test_an_argument_that_does_not_fit_is_refused(name: str, place: int, value: Any) -> None:
    arguments = list(CALLS[name])
    arguments[place] = value
    with pytest.raises((ValueError, TypeError), match=r"^[a-z_ ,]+: expected .*, got "):
        getattr(OPERATORS, name)(*arguments)


@pytest.mark.parametrize("name", [name for name, arguments in CALLS.items() if len(arguments) > 1])
def test_tensors_on_two_devices_are_refused(name: str) -> None:
    places = [place for place, value in enumerate(CALLS[name]) if isinstance(value, torch.Tensor)]
    for place in places[1:]:
        arguments = list(CALLS[name])
        arguments[place] = arguments[place].to("meta")
        with pytest.raises(ValueError, match=r"expected .*on .*, got"):
            getattr(OPERATORS, name)(*arguments)
