"""Drop-in functions beside the methods of transformers' image processors, matchers and losses that they replace.

Peaky outputs are those of a trained network: the regions of 20 live queries tile the image, and the others are no
objects. Random outputs are noise, of which nothing can be left out; where queries need a probability their classes are
decided, so that most of them take part. Outputs of 12 megapixels have fewer queries and classes, for which transformers
takes less than 6 GB and not more than 10 GB.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.inputs import share_equal
from benchmarks.harness.case import Bound, Case, Inputs, Work
from maskformer_fast.core.metadata import SegmentInfo
from maskformer_fast.core.results import PanopticResult
from maskformer_fast.drop_in import equip, equip_loss, equip_model, mask2former, maskformer

PEER = "transformers"
QUERIES, CLASSES, LIVE = 100, 150, 20
FEWER_QUERIES, FEWER_CLASSES = 24, 80
"""Queries and classes at 12 megapixels."""
TARGETS = {"0.3 MP": (480, 640), "2 MP": (1224, 1632), "12 MP": (3000, 4000)}
MAPS = {
    "MaskFormer": (128, 171), "Mask2Former": (128, 171), "OneFormer": (128, 171), "Eomt": (160, 160),
    "EomtDinov3": (320, 320),
}  # fmt: skip
"""Height and width of mask logits. EoMT-DINOv3 has EoMT's processor, here with an input of 1280x1280."""
TASKS = ("semantic", "panoptic", "instance", "instance as RLE")
GOALS = {"semantic": 20.0, "panoptic": 15.0, "instance as RLE": 30.0}
MEMORY_GOAL = 1 / 20
LEAST_EQUAL = 0.999
"""Least share of pixels with equal labels: the others are ties."""


def outputs(peaky: bool, size: tuple[int, int], counts: tuple[int, int], decided: bool) -> SimpleNamespace:
    """Logits under transformers' names, of one image with so many queries and classes."""
    generator = torch.Generator().manual_seed(0)
    queries, num_classes = counts
    classes = torch.randn(1, queries, num_classes + 1, generator=generator)
    masks = torch.randn(1, queries, *size, generator=generator)
    if not peaky and decided:
        classes *= 6
    if peaky:
        order = torch.randperm(queries, generator=generator)[:LIVE]
        classes[..., -1] += 12
        classes[0, order, -1] -= 16
        classes[0, order, torch.randint(num_classes, (LIVE,), generator=generator)] += 10
        y, x = torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij")
        seed = torch.rand(LIVE, 2, 1, 1, generator=generator) * torch.tensor(size).view(2, 1, 1)
        distance = ((y - seed[:, 0]) ** 2 + (x - seed[:, 1]) ** 2).sqrt()
        near, next_near = distance.topk(2, 0, largest=False).values
        regions = (torch.where(distance == near, next_near, near) - distance) * 3
        blobs = 4 * torch.randn(1, queries, size[0] // 8, size[1] // 8, generator=generator) - 4
        smooth = F.interpolate(blobs, size, mode="bicubic", align_corners=False)[0]
        smooth[order] = regions.clamp(-10, 10)
        masks = smooth[None] + 0.1 * masks
    return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks, patch_offsets=None)


def processor(family: str) -> Any:
    """transformers' own image processor that needs no torchvision."""
    name = "eomt" if family == "EomtDinov3" else family.lower()
    module: Any = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    if family == "OneFormer":
        module.tvF = SimpleNamespace(resize=_resize, InterpolationMode=SimpleNamespace(BILINEAR="bilinear"))
    if family == "EomtDinov3":
        return module.EomtImageProcessorPil(size={"shortest_edge": 1280, "longest_edge": 1280})
    made = getattr(module, f"{family}ImageProcessorPil")()
    if family == "OneFormer":
        made.class_info_file = ""  # which it would download; instances read only whether it is ADE20K's
    return made


def _resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """torchvision's function of this name, which OneFormer's processor calls and which may be missing."""
    return F.interpolate(image, size=size, mode=interpolation, align_corners=False, antialias=True)


def setup(device: torch.device, family: str, task: str, peaky: bool, target: str) -> Work:
    """One image of one family, task and size."""
    counts = (FEWER_QUERIES, FEWER_CLASSES) if target == "12 MP" else (QUERIES, CLASSES)
    found, size = outputs(peaky, MAPS[family], counts, task != "semantic"), TARGETS[target]
    plain, fast = processor(family), equip(processor(family))

    def draw(seed: int) -> Inputs:
        shifted = SimpleNamespace(**vars(found))
        logits = found.class_queries_logits
        shifted.class_queries_logits = torch.cat([logits[..., :-1].roll(seed, 2), logits[..., -1:]], 2)
        return (shifted,)

    options: dict[str, Any] = {"target_sizes": [size]}
    if task == "panoptic":
        options |= {} if family.startswith("Eomt") else {"label_ids_to_fuse": set()}
        options |= {} if peaky else {"threshold": 0.5, "overlap_mask_area_threshold": 0.002}
    elif task != "semantic" and not peaky:
        options |= {"threshold": 0.4} | ({"overlap_mask_area_threshold": 0.002} if family == "OneFormer" else {})
    method = f"post_process_{task.split()[0]}_segmentation"

    def call(owner: Any, given: Any) -> Any:
        return getattr(owner, method)(given, **options)[0]

    if task == "instance as RLE":
        if family in ("MaskFormer", "Mask2Former"):
            ours = partial(run_lengths_of_masks, family, options)
            theirs = partial(coco_masks, plain, options)
        else:
            ours = partial(run_lengths_of_map, partial(call, fast))
            theirs = partial(coco_map, partial(call, plain))
        same = partial(equal_pixels, size=size)
        return Work(ours, {PEER: theirs}, draw, same, {PEER: LEAST_EQUAL})

    def agreement(ours: Any, theirs: Any) -> float:
        if isinstance(ours, Tensor):
            return share_equal(ours, theirs)
        keys = ("id", "label_id", "was_fused")
        mine, others = ([[s.get(key) for key in keys] for s in r["segments_info"]] for r in (ours, theirs))
        same = len(mine) > 0 and mine == others
        return share_equal(ours["segmentation"], theirs["segmentation"]) if same else 0.0

    return Work(partial(call, fast), {PEER: partial(call, plain)}, draw, agreement, {PEER: LEAST_EQUAL})


def run_lengths_of_masks(family: str, options: dict[str, Any], given: Any) -> list[bytes]:
    """COCO's run lengths of packed masks."""
    (result,) = {"MaskFormer": maskformer, "Mask2Former": mask2former}[family].instance_results(given, **options)
    return [annotation["segmentation"]["counts"].encode() for annotation in result.to_coco()]


def coco_masks(plain: Any, options: dict[str, Any], given: Any) -> list[bytes]:
    """Run lengths of transformers' binary maps by pycocotools."""
    from pycocotools import mask as tools

    (result,) = plain.post_process_instance_segmentation(given, **options, return_binary_maps=True)
    return [tools.encode(m.numpy().astype("uint8", order="F"))["counts"] for m in result["segmentation"]]


def run_lengths_of_map(call: Callable[[Any], dict[str, Any]], given: Any) -> list[bytes]:
    """COCO's run lengths of the instances of a map, ids from 0 or 1."""
    result = call(given)
    segments = [SegmentInfo(s["id"], s["label_id"], score=s["score"]) for s in result["segments_info"]]
    found = PanopticResult(result["segmentation"], segments)
    return [annotation["segmentation"]["counts"].encode() for annotation in found.to_coco()]


def equal_pixels(ours: list[bytes], theirs: list[bytes], size: tuple[int, int]) -> float:
    """1 where all run lengths are equal, byte for byte; else the share of equal pixels, of the mask with the fewest."""
    from pycocotools import mask as tools

    if not ours or len(ours) != len(theirs):
        return 0.0
    pairs = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
    masks = [[tools.decode({"size": size, "counts": counts}) for counts in pair] for pair in pairs]
    return min((float((a == b).mean()) for a, b in masks), default=1.0)


def coco_map(call: Callable[[Any], dict[str, Any]], given: Any) -> list[bytes]:
    """The same by pycocotools."""
    from pycocotools import mask as tools

    result = call(given)
    id_map, ids = result["segmentation"].numpy(), [segment["id"] for segment in result["segments_info"]]
    return [tools.encode((id_map == i).astype("uint8", order="F"))["counts"] for i in ids]


def criterion(family: str) -> Any:
    """transformers' criterion with its published settings."""
    import transformers

    module = importlib.import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    if family == "MaskFormer":
        return module.MaskFormerLoss(CLASSES, module.MaskFormerHungarianMatcher(1.0, 20.0, 1.0), {}, 0.1)
    return getattr(module, f"{family}Loss")(getattr(transformers, f"{family}Config")(num_labels=CLASSES), {})


def loss_setup(device: torch.device, family: str, part: str) -> Work:
    """Matcher, or mask losses with their gradient, of two images with 12 targets of 512x512."""
    plain, fast = criterion(family), equip_loss(criterion(family))
    torch.manual_seed(0)
    ids = torch.randint(12, (2, 8, 8)).repeat_interleave(64, 1).repeat_interleave(64, 2)
    targets = [(image == torch.arange(12)[:, None, None]).float() for image in ids]
    classes, labels = torch.randn(2, QUERIES, CLASSES + 1), [torch.randint(CLASSES, (12,)) for _ in range(2)]

    def draw(seed: int) -> Inputs:
        return (torch.randn(2, QUERIES, 128, 128, generator=torch.Generator().manual_seed(seed)),)

    indices = fast.matcher(*draw(0), classes, targets, labels)

    def call(loss: Any, masks: Tensor) -> Any:
        torch.default_generator.manual_seed(0)  # the same points; torch.manual_seed takes 1 ms
        if part == "matcher":
            return [column for pair in loss.matcher(masks, classes, targets, labels) for column in pair]
        masks = masks.clone().requires_grad_()
        found = loss.loss_masks(masks, targets, indices, torch.tensor(24.0))
        (found["loss_mask"] + found["loss_dice"]).backward()
        return [found["loss_mask"].detach(), found["loss_dice"].detach(), masks.grad]

    def agreement(ours: list[Tensor], theirs: list[Tensor]) -> float:
        return float(all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, theirs, strict=True)))

    return Work(partial(call, fast), {PEER: partial(call, plain)}, draw, agreement, {PEER: 1.0})


def train_setup(device: torch.device, part: str, equipped: Callable[[Any], Any]) -> Work:
    """Criterion of 10 layers, or a training step of Mask2Former with Swin-T, with gradients: 2x512x512, 15 targets."""
    import transformers

    torch.manual_seed(0)
    count = 15
    ids = torch.randint(count, (2, 8, 8)).repeat_interleave(64, 1).repeat_interleave(64, 2)
    masks = [(image == torch.arange(count)[:, None, None]).float() for image in ids]
    labels = [torch.randint(CLASSES, (count,)) for _ in range(2)]
    if part == "criterion":
        plain = criterion("Mask2Former")
        classes = torch.randn(10, 2, QUERIES, CLASSES + 1)
    else:
        backbone = transformers.SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
        config = transformers.Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES)
        plain = transformers.Mask2FormerForUniversalSegmentation(config).train()
        plain.zero_grad()
    fast = equipped(copy.deepcopy(plain))

    def draw(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        shape = (10, 2, QUERIES, 128, 128) if part == "criterion" else (2, 3, 512, 512)
        return (torch.randn(shape, generator=generator),)

    def call(owner: Any, given: Tensor) -> list[Tensor]:
        torch.default_generator.manual_seed(0)  # the same points and dropped paths; torch.manual_seed takes 1 ms
        if part == "training step":
            owner.zero_grad()
            loss = owner(pixel_values=given, mask_labels=masks, class_labels=labels).loss
            loss.backward()
            norms = [parameter.grad.norm() for parameter in owner.parameters() if parameter.grad is not None]
            return [loss.detach(), torch.stack(norms).norm()]
        logits = [layer.clone().requires_grad_() for layer in given]
        others = [
            {"masks_queries_logits": logits[layer], "class_queries_logits": classes[layer]} for layer in range(9)
        ]
        losses = owner(logits[9], classes[9], masks, labels, others)
        torch.stack([value for name, value in losses.items() if "cross" not in name]).sum().backward()
        return [*losses.values(), *[layer.grad for layer in logits]]

    def agreement(ours: list[Tensor], theirs: list[Tensor]) -> float:
        close = (torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(ours, theirs, strict=True))
        return float(all(close))

    return Work(partial(call, fast), {PEER: partial(call, plain)}, draw, agreement, {PEER: 1.0})


def bound(size: tuple[int, int], pixels: int) -> Bound:
    """Logits of one image read, 4 bytes a pixel written."""
    return Bound(4.0 * QUERIES * (size[0] * size[1] + CLASSES + 1) + 4.0 * pixels)


def cases(device: str) -> list[Case]:
    return cpu_cases() if device == "cpu" else []


def cpu_cases() -> list[Case]:
    rows = []
    for family, task, target, peaky in itertools.product(MAPS, TASKS, TARGETS, (True, False)):
        if task == "instance" and target != "2 MP":
            continue  # the rows with run lengths measure the same call
        goal = GOALS.get(task) if peaky and target == "2 MP" else None
        goal = 5.0 if goal and task == "semantic" and family == "Mask2Former" else goal
        rows.append(Case(
            f"drop_in {family} {task}, {'peaky' if peaky else 'random'}, {target}, vs {PEER}", PEER, goal,
            partial(setup, family=family, task=task, peaky=peaky, target=target), threads=1,
            rank=0 if goal else 1 if target == "2 MP" else 2, memory_goal=MEMORY_GOAL if goal else None,
            extra_seconds=60.0, bound=bound(MAPS[family], TARGETS[target][0] * TARGETS[target][1]),
        ))  # fmt: skip
    for family in ("MaskFormer", "Mask2Former", "Eomt"):
        for part in ("matcher", "mask losses"):
            rows.append(Case(
                f"drop_in {family} {part}, vs {PEER}", PEER, 5.0 if part == "matcher" else None,
                partial(loss_setup, family=family, part=part), threads=1, rank=0 if part == "matcher" else 1,
                bound=Bound(4.0 * 2 * (QUERIES * 128 * 128 + 12 * 512 * 512)),
            ))  # fmt: skip
    for part, equipped, goal in (
        ("criterion", equip_loss, None), ("training step", equip_loss, None), ("training step", equip_model, 1.15),
    ):  # fmt: skip
        rows.append(Case(
            f"drop_in Mask2Former {part}, {equipped.__name__}, vs {PEER}", PEER, goal,
            partial(train_setup, part=part, equipped=equipped), threads=1, rank=1 if part == "criterion" else 2,
            extra_seconds=180.0,
            bound=Bound(2 * 4.0 * 10 * 2 * QUERIES * 128 * 128),  # mask logits read, gradients written
        ))  # fmt: skip
    return rows
