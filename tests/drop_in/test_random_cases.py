"""Random outputs, sizes, options, types and memory layouts: equipped processors give what transformers' own give."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from maskformer_fast.drop_in import mask2former, maskformer
from maskformer_fast.structures import unpack_masks
from tests.drop_in.comparison import check_segments, twins
from tests.support.peaky import model_outputs

pytest.importorskip("transformers")
FAMILIES = ["MaskFormer", "Mask2Former", "OneFormer", "Eomt"]
TIE = 2e-5
"""Largest difference of two scores that rounding can exchange."""


class Draw:
    """One random case: outputs of one family, and target sizes."""

    def __init__(self, family: str, seed: int) -> None:
        self.dice = random.Random(f"{family} {seed}")
        self.family = family
        self.images = self.dice.randint(1, 3)
        queries, self.classes = self.dice.randint(1, 24), self.dice.choice([1, 2, 5, 19, 40])
        grid = (self.dice.randint(2, 40), self.dice.randint(2, 40))
        self.logits = model_outputs(
            self.dice.random() < 0.75, self.images, queries, self.classes, grid, self.dice.randint(1, queries),
            self.dice.randrange(10**6),
        )  # fmt: skip
        for name in ("class_queries_logits", "masks_queries_logits"):
            setattr(self.logits, name, self.layout(getattr(self.logits, name)))
        least = 8 if family == "Eomt" else 1  # an image much longer than wide has no pixels in its input
        sizes = [(self.dice.randint(least, 160), self.dice.randint(least, 160)) for _ in range(self.images)]
        self.sizes = None if family != "Eomt" and self.dice.random() < 0.2 else sizes

    def layout(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in other memory, or of an autograd graph."""
        kind = self.dice.randrange(4)
        if kind == 0:
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == 1:
            return torch.stack([tensor, -tensor], -1)[..., 0]
        if kind == 2:
            return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]
        return tensor

    def threshold(self) -> float:
        return self.dice.choice([0.0, 0.01, 0.3, 0.5, 0.8, 1.0])

    def given(self, sizes: list[tuple[int, int]] | None) -> Any:
        """The target sizes as a user may write them."""
        kind = self.dice.randrange(3)
        if sizes is None or kind == 0:
            return sizes
        return [list(size) for size in sizes] if kind == 1 else torch.tensor(sizes)


def check_labels(ours: torch.Tensor, theirs: Any) -> None:
    """Labels are equal but where the scores of both differ by rounding."""
    scores = theirs.segmentation_scores
    assert ours.dtype == theirs.segmentation.dtype and ours.shape == theirs.segmentation.shape
    differ = ours != theirs.segmentation
    chosen = scores.gather(0, ours[None])[0]
    assert (scores.amax(0) - chosen)[differ].le(TIE).all()


def check_map(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    assert (ours != theirs).sum() <= 2 + 1e-3 * theirs.numel()


def check_pair(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        check_segments(mine["segments_info"], other["segments_info"])
        check_map(mine["segmentation"], other["segmentation"])


def semantic(draw: Draw, theirs: Any, ours: Any) -> None:
    extra = {"size": eomt_size(draw)} if draw.family == "Eomt" else {}
    call = "post_process_semantic_segmentation"
    expected = getattr(theirs, call)(draw.logits, draw.sizes, return_segmentation_scores=True, **extra)
    for mine, other in zip(getattr(ours, call)(draw.logits, draw.given(draw.sizes), **extra), expected, strict=True):
        check_labels(mine, other)
    scored = getattr(ours, call)(draw.logits, draw.given(draw.sizes), return_segmentation_scores=True, **extra)
    for mine, other in zip(scored, expected, strict=True):
        torch.testing.assert_close(mine.segmentation_scores, other.segmentation_scores, atol=1e-5, rtol=1e-5)


def eomt_size(draw: Draw) -> dict[str, int | None]:
    short = draw.dice.randint(20, 90)
    return {"shortest_edge": short, "longest_edge": draw.dice.choice([None, short, short + 30])}


def panoptic(draw: Draw, theirs: Any, ours: Any) -> None:
    options: dict[str, Any] = {
        "threshold": draw.threshold(),
        "mask_threshold": draw.dice.choice([0.2, 0.5, 0.7]),
        "overlap_mask_area_threshold": draw.dice.choice([0.0, 0.33, 0.8, 0.95]),
    }
    chosen = [label for label in range(draw.classes) if draw.dice.random() < 0.5]
    classes = draw.dice.choice([None, chosen, set(chosen), frozenset(chosen)])
    options["stuff_classes" if draw.family == "Eomt" else "label_ids_to_fuse"] = classes
    if draw.family == "Eomt":
        options["size"] = eomt_size(draw)
    call = "post_process_panoptic_segmentation"
    expected = getattr(theirs, call)(draw.logits, target_sizes=draw.sizes, **options)
    check_pair(getattr(ours, call)(draw.logits, target_sizes=draw.given(draw.sizes), **options), expected)


def instance(draw: Draw, theirs: Any, ours: Any) -> None:
    options: dict[str, Any] = {"threshold": draw.threshold()}
    if draw.family == "Eomt":
        options["size"] = eomt_size(draw)
    if draw.family == "OneFormer":
        options |= {
            "task_type": "instance", "is_demo": draw.dice.random() < 0.5,
            "mask_threshold": draw.dice.choice([0.1, 0.5, 2.0]),
            "overlap_mask_area_threshold": draw.dice.choice([0.0, 0.33, 0.8]),
        }  # fmt: skip
    call = "post_process_instance_segmentation"
    expected = getattr(theirs, call)(draw.logits, target_sizes=draw.sizes, **options)
    given = draw.given(draw.sizes)
    check_pair(getattr(ours, call)(draw.logits, target_sizes=given, **options), expected)
    if draw.family in ("MaskFormer", "Mask2Former"):
        for name in ("return_binary_maps", "return_coco_annotation"):
            extra = {**options, name: True}
            maps = getattr(theirs, call)(draw.logits, target_sizes=draw.sizes, **extra)
            mine = getattr(ours, call)(draw.logits, target_sizes=given, **extra)
            if name == "return_binary_maps":
                check_pair(mine, maps)
                check_run_lengths(draw, given, options["threshold"], maps)
            else:
                assert [result["segmentation"] for result in mine] == [result["segmentation"] for result in maps]


def check_run_lengths(draw: Draw, given: Any, threshold: float, maps: list[dict[str, Any]]) -> None:
    """Packed masks are the binary maps, and their run lengths those of pycocotools byte for byte."""
    tools = pytest.importorskip("pycocotools.mask")
    module = {"MaskFormer": maskformer, "Mask2Former": mask2former}[draw.family]
    for result, other in zip(module.instance_results(draw.logits, threshold, given), maps, strict=True):
        if not other["segments_info"]:
            assert len(result.labels) == 0
            continue
        assert torch.equal(unpack_masks(result.masks, result.size[1]), other["segmentation"] == 1)
        for annotation, mask in zip(result.to_coco(), other["segmentation"], strict=True):
            expected = tools.encode(mask.numpy().astype("uint8", order="F"))
            assert annotation["segmentation"]["counts"].encode() == expected["counts"]
            assert annotation["area"] == tools.area(expected) and annotation["bbox"] == list(tools.toBbox(expected))


TASKS = {"semantic": semantic, "panoptic": panoptic, "instance": instance}


def compare(family: str, task: str, seeds: range) -> None:
    theirs, ours = twins(family)
    for owner in (theirs, ours):
        owner.class_info_file = ""  # of OneFormer: labels of instances stay classes
    for seed in seeds:
        draw = Draw(family, seed)
        try:
            with torch.no_grad():
                TASKS[task](draw, theirs, ours)
        except AssertionError as error:
            shape = tuple(draw.logits.masks_queries_logits.shape)
            raise AssertionError(f"{family}, {task}, seed {seed}, masks {shape}, sizes {draw.sizes}") from error


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
def test_a_few_random_cases(family: str, task: str) -> None:
    compare(family, task, range(4))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
def test_random_cases(family: str, task: str) -> None:
    compare(family, task, range(100, 160))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
def test_half_precision_logits_give_the_results_of_their_float32_values(
    family: str, task: str, dtype: torch.dtype
) -> None:
    _, ours = twins(family)
    outputs = model_outputs(True, images=2, queries=12, size=(20, 27))
    half = {name: value.to(dtype) for name, value in vars(outputs).items() if value is not None}
    given = {name: value.float().requires_grad_() for name, value in half.items()}
    call = getattr(ours, f"post_process_{task}_segmentation")
    results = [
        call(SimpleNamespace(**logits, patch_offsets=None), target_sizes=[(30, 50), (61, 40)])
        for logits in (half, given)
    ]
    for mine, expected in zip(*results, strict=True):
        if task == "semantic":
            assert (mine != expected).float().mean() < 1e-3
        else:
            check_segments(mine["segments_info"], expected["segments_info"])
            check_map(mine["segmentation"], expected["segmentation"])
