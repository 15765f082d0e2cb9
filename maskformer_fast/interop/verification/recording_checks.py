"""Checks of the layout of recorded outputs: every part that `verify` reads has the expected type and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskformer_fast.core.checks import check

TRAINING_KEYS = ("match", "losses", "losses64", "grad_norm", "no_grad_params")
"""Keys of a case that need its targets."""
EVALUATION_KEYS = ("eval", "eval_loose")
MAX_PADDED = 16384
"""Largest height or width of a padded batch, which limits the memory that a file can demand."""


class Checker:
    """Checks whose errors have the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def expect(self, condition: bool, name: str, expected: str, got: object) -> None:
        check(condition, f"{self.path}: {name}", expected, got)

    def keys(self, content: Any, name: str, required: tuple[str, ...]) -> None:
        """``content`` is a dictionary of texts with all required keys."""
        self.expect(isinstance(content, Mapping), name or "content", "a dictionary", type(content).__name__)
        self.expect(all(isinstance(key, str) for key in content), name or "content", "names as keys", list(content))
        missing = [f"{name}.{key}" if name else key for key in required if key not in content]
        if missing:
            raise ValueError(f"{self.path}: not a recording of the official implementation: lacks {', '.join(missing)}")

    def sequence(self, value: Any, name: str, length: int | None = None) -> None:
        fits = isinstance(value, (list, tuple)) and length in (None, len(value))
        self.expect(fits, name, "a list" if length is None else f"a list of {length}", value)

    def list_of(self, kind: type, value: Any, name: str) -> None:
        self.sequence(value, name)
        self.expect(all(isinstance(entry, kind) for entry in value), name, f"a list of {kind.__name__}", value)

    def size(self, value: Any, name: str) -> None:
        self.sequence(value, name, 2)
        self.expect(all(isinstance(v, int) and v > 0 for v in value), name, "a height and a width", value)

    def tensor(self, value: Any, name: str, dtype: torch.dtype | None, shape: tuple[int | None, ...]) -> None:
        """``None`` in the shape stands for any size, ``None`` as dtype for any floating-point type."""
        self.expect(isinstance(value, Tensor), name, "a tensor", type(value).__name__)
        has_type = value.is_floating_point() if dtype is None else value.dtype == dtype
        has_shape = value.ndim == len(shape) and all(
            size in (None, got) for size, got in zip(shape, value.shape, strict=True)
        )
        expected = f"{dtype or 'a floating type'} of shape {list(shape)} (None: any)"
        self.expect(has_type and has_shape, name, expected, f"{value.dtype} {list(value.shape)}")

    def targets(self, value: Any, name: str, batch: int, size: tuple[int, int] | None, classes: int) -> None:
        """Labels and masks of every image. ``size`` is that of the masks; ``None`` takes it from the first image."""
        self.sequence(value, name, batch)
        for image, target in enumerate(value):
            where = f"{name}.{image}"
            self.keys(target, where, ("labels", "masks"))
            self.tensor(target["labels"], f"{where}.labels", torch.int64, (None,))
            self.tensor(target["masks"], f"{where}.masks", torch.bool, (len(target["labels"]), *(size or (None, None))))
            size = size or tuple(target["masks"].shape[1:])
            are_classes = bool(((target["labels"] >= 0) & (target["labels"] < classes)).all())
            self.expect(are_classes, f"{where}.labels", f"classes in 0..{classes - 1}", target["labels"].tolist())

    def match(self, value: Any, name: str, batch: int) -> None:
        self.sequence(value, name, batch)
        for image, pairs in enumerate(value):
            self.keys(pairs, f"{name}.{image}", ("C", "i", "j"))
            self.tensor(pairs["C"], f"{name}.{image}.C", None, (None, None))
            self.tensor(pairs["i"], f"{name}.{image}.i", torch.int64, (None,))
            self.tensor(pairs["j"], f"{name}.{image}.j", torch.int64, (len(pairs["i"]),))

    def segments(self, value: Any, name: str) -> None:
        self.sequence(value, name)
        for index, segment in enumerate(value):
            self.keys(segment, f"{name}.{index}", ("id", "category_id", "isthing"))

    def numbers(self, value: Any, name: str) -> None:
        self.keys(value, name, ())
        for key, number in value.items():
            scalar = isinstance(number, (int, float)) or (isinstance(number, Tensor) and number.numel() == 1)
            self.expect(scalar, f"{name}.{key}", "a number", type(number).__name__)

    def thresholds(self, value: Any, name: str) -> None:
        self.sequence(value, name, 2)
        inside = all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in value)
        self.expect(inside, name, "two numbers in 0..1", value)




def check_case(checker: Checker, case: dict[str, Any], num_classes: int) -> None:
    """Check every part of a case that `verify` reads, except shapes that it compares."""
    training = [key for key in TRAINING_KEYS if key in case]
    evaluation = [key for key in EVALUATION_KEYS if case.get(key)]
    required = ["images", "image_sizes", "padded_size", "f32"]
    required += ["targets"] if training else []
    required += ["sizes"] if evaluation else []
    checker.keys(case, "", tuple(required))

    checker.sequence(case["images"], "images")
    batch = len(case["images"])
    checker.expect(batch > 0, "images", "at least one", batch)
    checker.sequence(case["image_sizes"], "image_sizes", batch)
    checker.size(case["padded_size"], "padded_size")
    height, width = case["padded_size"]
    checker.expect(max(height, width) <= MAX_PADDED, "padded_size", f"at most {MAX_PADDED}", (height, width))
    for image, (pixels, size) in enumerate(zip(case["images"], case["image_sizes"], strict=True)):
        checker.size(size, f"image_sizes.{image}")
        checker.tensor(pixels, f"images.{image}", torch.uint8, (3, *size))
        fits = size[0] <= height and size[1] <= width
        checker.expect(fits, "padded_size", f"one that holds image {image} of {tuple(size)}", (height, width))

    checker.keys(case["f32"], "f32", ())
    for name, value in case["f32"].items():
        checker.expect(isinstance(value, Tensor), f"f32.{name}", "a tensor", type(value).__name__)
    if "pred_logits" in case["f32"]:
        _check_classes(checker, case["f32"]["pred_logits"], "f32.pred_logits", num_classes)

    if evaluation:
        checker.sequence(case["sizes"], "sizes", batch)
        for image, size in enumerate(case["sizes"]):
            checker.size(size, f"sizes.{image}")
    for key in evaluation:
        thresholds = key.replace("eval", "thresholds")
        checker.keys(case[key], key, ())
        if any(name.startswith("panoptic") for name in case[key]):
            checker.keys(case, "", (thresholds,))
            checker.thresholds(case[thresholds], thresholds)
        for name, value in case[key].items():
            known = re.fullmatch(r"(labels|margin|sem_seg_small|panoptic|panoptic_info)\.(\d+)", name)
            if known is None:
                continue
            where = f"{key}.{name}"
            checker.expect(int(known[2]) < batch, where, f"one of {batch} images", known[2])
            size = tuple(case["sizes"][int(known[2])])
            match known[1]:
                case "labels":
                    checker.tensor(value, where, torch.int16, size)
                    checker.keys(case[key], key, (f"margin.{known[2]}",))
                case "margin":
                    checker.tensor(value, where, None, size)
                case "sem_seg_small":
                    checker.tensor(value, where, None, (num_classes, None, None))
                case "panoptic":
                    checker.tensor(value, where, torch.int32, size)
                case "panoptic_info":
                    checker.segments(value, where)
    checker.list_of(int, case.get("thing_ids", []), "thing_ids")
    checker.list_of(int, case.get("n_kept", []), "n_kept")

    if training:
        checker.targets(case["targets"], "targets", batch, (height, width), num_classes)
    checker.list_of(str, case.get("no_grad_params", []), "no_grad_params")
    checker.keys(case.get("match", {}), "match", ())
    for layer, pairs in case.get("match", {}).items():
        checker.match(pairs, f"match.{layer}", batch)
    for key in ("losses", "losses64", "grad_norm"):
        checker.numbers(case.get(key, {}), key)


def check_synth(checker: Checker, synth: dict[str, Any], num_classes: int) -> None:
    for key in ("post", "criterion"):
        checker.sequence(synth.get(key, []), key)
    for index, post in enumerate(synth.get("post", [])):
        where = f"post.{index}"
        checker.keys(post, where, ("mask_cls", "mask_pred", "size"))
        checker.size(post["size"], f"{where}.size")
        checker.tensor(post["mask_cls"], f"{where}.mask_cls", torch.float32, (None, None))
        _check_classes(checker, post["mask_cls"], f"{where}.mask_cls", num_classes)
        queries = len(post["mask_cls"])
        checker.tensor(post["mask_pred"], f"{where}.mask_pred", torch.float32, (queries, None, None))
        checker.expect(post["mask_pred"].numel() > 0, f"{where}.mask_pred", "masks", list(post["mask_pred"].shape))
        for name, value in post.items():
            if name == "labels":
                checker.tensor(value, f"{where}.labels", torch.int16, tuple(post["size"]))
                checker.keys(post, where, ("margin",))
                checker.tensor(post["margin"], f"{where}.margin", None, tuple(post["size"]))
            if name.startswith("panoptic@"):
                checker.sequence(value, f"{where}.{name}", 2)
                checker.tensor(value[0], f"{where}.{name}.0", torch.int32, tuple(post["size"]))
                checker.segments(value[1], f"{where}.{name}.1")
                checker.thresholds(synth_thresholds(name), f"{where}.{name}")
    for index, case in enumerate(synth.get("criterion", [])):
        where = f"criterion.{index}"
        checker.keys(case, where, ("pred_logits", "pred_masks", "targets"))
        checker.tensor(case["pred_logits"], f"{where}.pred_logits", torch.float32, (None, None, None))
        _check_classes(checker, case["pred_logits"], f"{where}.pred_logits", num_classes)
        batch, queries = case["pred_logits"].shape[:2]
        checker.tensor(case["pred_masks"], f"{where}.pred_masks", torch.float32, (batch, queries, None, None))
        checker.expect(case["pred_masks"].numel() > 0, f"{where}.pred_masks", "masks", list(case["pred_masks"].shape))
        checker.targets(case["targets"], f"{where}.targets", batch, None, num_classes)
        if "match" in case:
            checker.match(case["match"], f"{where}.match", batch)
        checker.numbers(case.get("unweighted_losses", {}), f"{where}.unweighted_losses")
        for name in ("grad_logits", "grad_masks"):
            if name in case:
                checker.tensor(case[name], f"{where}.{name}", None, tuple(case[name.replace("grad", "pred")].shape))


def synth_thresholds(name: str) -> tuple[float, ...]:
    """``panoptic@0.8,0.5`` -> object mask threshold, overlap threshold; empty where they are no numbers."""
    try:
        return tuple(float(number) for number in name.partition("@")[2].split(","))
    except ValueError:
        return ()


def _check_classes(checker: Checker, logits: Tensor, name: str, num_classes: int) -> None:
    got = logits.shape[-1] - 1 if logits.ndim else 0
    checker.expect(got == num_classes, name, f"the network's {num_classes} classes and no-object", f"{got} classes")
