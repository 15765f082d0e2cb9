"""Drop-in functions beside the methods of transformers' image processors, matchers and losses that they replace.

Peaky outputs are those of a trained network: the regions of 20 live queries tile the image, and the others are no
objects. Random outputs are noise, of which nothing can be left out. Panoptic results of noise have no candidates.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.inputs import share_equal
from benchmarks.harness.case import Bound, Case, Inputs, Work
from maskformer_fast.drop_in import equip, equip_loss, equip_model, mask2former, maskformer

PEER = "transformers"
QUERIES, CLASSES, LIVE = 100, 150, 20
TARGETS = {"0.3 MP": (480, 640), "2 MP": (1224, 1632), "12 MP": (3000, 4000)}
MAPS = {"MaskFormer": (128, 171), "Mask2Former": (128, 171), "OneFormer": (128, 171), "Eomt": (160, 160)}
GOALS = {"semantic": 20.0, "panoptic": 15.0, "instance as RLE": 30.0}
MEMORY_GOAL = 1 / 20
LEAST_EQUAL = 0.999
"""Least share of pixels with equal labels: the others are ties."""


def outputs(peaky: bool, size: tuple[int, int]) -> SimpleNamespace:
    """Logits under transformers' names, of one image."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(1, QUERIES, CLASSES + 1, generator=generator)
    masks = torch.randn(1, QUERIES, *size, generator=generator)
    if peaky:
        order = torch.randperm(QUERIES, generator=generator)[:LIVE]
        classes[..., -1] += 12
        classes[0, order, -1] -= 16
        classes[0, order, torch.randint(CLASSES, (LIVE,), generator=generator)] += 10
        y, x = torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij")
        seed = torch.rand(LIVE, 2, 1, 1, generator=generator) * torch.tensor(size).view(2, 1, 1)
        distance = ((y - seed[:, 0]) ** 2 + (x - seed[:, 1]) ** 2).sqrt()
        near, next_near = distance.topk(2, 0, largest=False).values
        regions = (torch.where(distance == near, next_near, near) - distance) * 3
        blobs = 4 * torch.randn(1, QUERIES, size[0] // 8, size[1] // 8, generator=generator) - 4
        smooth = F.interpolate(blobs, size, mode="bicubic", align_corners=False)[0]
        smooth[order] = regions.clamp(-10, 10)
        masks = smooth[None] + 0.1 * masks
    return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks, patch_offsets=None)


def processor(family: str) -> Any:
    """transformers' own image processor that needs no torchvision."""
    name = family.lower()
    module = importlib.import_module(f"transformers.models.{name}.image_processing_pil_{name}")
    if family == "OneFormer":
        module.tvF = SimpleNamespace(resize=_resize, InterpolationMode=SimpleNamespace(BILINEAR="bilinear"))
    return getattr(module, f"{family}ImageProcessorPil")()


def _resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """torchvision's function of this name, which OneFormer's processor calls and which may be missing."""
    return F.interpolate(image, size=size, mode=interpolation, align_corners=False, antialias=True)


def coco_masks(family: str, result: dict[str, Any]) -> list[bytes]:
    """Run lengths of a result's binary maps by pycocotools."""
    from pycocotools import mask as tools

    return [tools.encode(m.numpy().astype("uint8", order="F"))["counts"] for m in result["segmentation"]]


def setup(device: torch.device, family: str, task: str, peaky: bool, target: str) -> Work:
    """One image of one family, task and size."""
    found, size = outputs(peaky, MAPS[family]), TARGETS[target]
    plain, fast = processor(family), equip(processor(family))

    def draw(seed: int) -> Inputs:
        shifted = SimpleNamespace(**vars(found))
        shifted.class_queries_logits = found.class_queries_logits.roll(seed, 2)
        if seed:
            shifted.class_queries_logits = shifted.class_queries_logits.clone()
            shifted.class_queries_logits[..., :-1] = found.class_queries_logits[..., :-1].roll(seed, 2)
            shifted.class_queries_logits[..., -1] = found.class_queries_logits[..., -1]
        return (shifted,)

    if task == "instance as RLE":
        return _rle_work(family, plain, size, draw)
    method = f"post_process_{task}_segmentation"

    def call(owner: Any, given: Any) -> Any:
        extra = {"label_ids_to_fuse": set()} if task == "panoptic" and family != "Eomt" else {}
        return getattr(owner, method)(given, target_sizes=[size], **extra)[0]

    def agreement(ours: Any, theirs: Any) -> float:
        if isinstance(ours, Tensor):
            return share_equal(ours, theirs)
        same = [[info[key] for key in ("id", "label_id")] for info in ours["segments_info"]] == [
            [info[key] for key in ("id", "label_id")] for info in theirs["segments_info"]
        ]
        return share_equal(ours["segmentation"], theirs["segmentation"]) if same else 0.0

    peers = {PEER: partial(call, plain)}
    return Work(partial(call, fast), peers, draw, agreement, {PEER: LEAST_EQUAL})


def _rle_work(family: str, plain: Any, size: tuple[int, int], draw: Callable[[int], Inputs]) -> Work:
    """COCO's run lengths of all instances: of packed masks, and by pycocotools of transformers' binary maps."""
    module = {"MaskFormer": maskformer, "Mask2Former": mask2former}[family]

    def ours(given: Any) -> list[bytes]:
        (result,) = module.instance_results(given, target_sizes=[size])
        return [annotation["segmentation"]["counts"].encode() for annotation in result.to_coco()]

    def theirs(given: Any) -> list[bytes]:
        call = plain.post_process_instance_segmentation
        return coco_masks(family, call(given, target_sizes=[size], return_binary_maps=True)[0])

    return Work(ours, {PEER: theirs}, draw, lambda a, b: float(a == b), {PEER: 1.0})


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
        torch.manual_seed(0)  # the same points
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
        torch.manual_seed(0)  # the same points and dropped paths
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
    for family in MAPS:
        tasks = ["semantic", "panoptic", "instance"]
        tasks += ["instance as RLE"] if family in ("MaskFormer", "Mask2Former") else []
        for task in tasks:
            for target in TARGETS:
                for peaky in (True, False):
                    huge = family == "Eomt" and task == "instance" and target == "12 MP"
                    if huge or (task != "semantic" and not peaky):
                        continue  # theirs takes 20 GB; noise has no candidates
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
            partial(train_setup, part=part, equipped=equipped), threads=1, rank=0 if goal else 1, extra_seconds=180.0,
            bound=Bound(2 * 4.0 * 10 * 2 * QUERIES * 128 * 128),  # mask logits read, gradients written
        ))  # fmt: skip
    return rows
