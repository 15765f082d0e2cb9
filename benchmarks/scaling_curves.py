"""The curves of `benchmarks.scaling`: for each, what grows, at which points, and both sides at one point.

Predictions are like those of trained networks unless a name says random: a fifth of the queries are sure of a class.
That share stays where queries grow; a network that finds no more objects with more queries costs us less. Images fill
their padded input, and outputs have four times the mask logits' sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from benchmarks import sides
from benchmarks.cpu_matching import assignment
from benchmarks.harness import Operation
from benchmarks.sides import CLASSES, HUGGINGFACE, OFFICIAL, OURS, SIDE, Operations, Size
from benchmarks.train_step import huggingface_model
from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.fuse_for_cpu import fuse_for_cpu
from maskformer_fast.ops.mask_product import layer_mask_logits

Sides = tuple[Operation, Operation]

AXES = ("classes", "queries", "targets", "pixels", "batch")


@dataclass(frozen=True)
class Curve:
    """One operation whose cost is followed while one number grows."""

    name: str  # unique
    subject: str  # operators, network or end_to_end
    axis: str  # one of `AXES`
    unit: str  # of the points on that axis
    peer: str
    points: tuple[int, ...]  # ascending
    setup: Callable[[int], Sides]  # (ours, theirs) at one point
    weight: float  # its share of the time beside that of others: seconds on two quiet cores
    memory: bool = False  # whether peaks are measured too
    labels: dict[int, str] = field(default_factory=dict)  # of points that a number says badly


SIZES = {h * w: (h, w) for h, w in ((256, 256), (512, 512), (512, 1024), (1024, 1024), (1024, 2048))}
NETWORK_SIZES = {side * side: (side, side) for side in (256, 384, 512, 640, 768)}


def curves() -> list[Curve]:
    """All of them, the most telling first."""
    ks, qs, batches = (19, 50, 150, 400, 847), (25, 50, 100, 200, 400), (1, 2, 4, 8)
    sizes, network_sizes = tuple(SIZES), tuple(NETWORK_SIZES)
    texts, network_texts = ({n: f"{h}x{w}" for n, (h, w) in s.items()} for s in (SIZES, NETWORK_SIZES))
    semantic = "semantic inference"
    return [
        Curve("whole image, R50, by classes", "end_to_end", "classes", "classes", HUGGINGFACE, (19, 150, 847),
              whole_image, 24, memory=True),
        Curve("network R50 by resolution", "network", "pixels", "pixels of the image", HUGGINGFACE, network_sizes,
              lambda n: network(1, NETWORK_SIZES[n]), 32, memory=True, labels=network_texts),
        Curve("network R50 by batch, 384x384", "network", "batch", "images", HUGGINGFACE, (1, 2, 4),
              lambda b: network(b, (384, 384)), 18),
        Curve(f"{semantic} by classes", "operators", "classes", "classes", HUGGINGFACE, ks,
              lambda k: pair(sides.semantic("peaky", classes=k)), 15, memory=True),
        Curve(f"{semantic} by classes, official", "operators", "classes", "classes", OFFICIAL, (19, 150, 847),
              lambda k: pair(sides.semantic("peaky", classes=k), OFFICIAL), 12, memory=True),
        Curve(f"{semantic} by classes, random", "operators", "classes", "classes", HUGGINGFACE, (19, 150, 847),
              lambda k: pair(sides.semantic("random", classes=k)), 10),
        Curve(f"{semantic} by resolution", "operators", "pixels", "pixels of the result", HUGGINGFACE, sizes,
              lambda n: pair(sides.semantic("peaky", size=SIZES[n])), 20, memory=True, labels=texts),
        Curve("panoptic inference by resolution", "operators", "pixels", "pixels of the result", HUGGINGFACE, sizes,
              lambda n: pair(sides.panoptic(size=SIZES[n])), 13, memory=True, labels=texts),
        Curve(f"{semantic} by batch", "operators", "batch", "images", HUGGINGFACE, batches,
              lambda b: pair(sides.semantic("peaky", batch=b)), 17),
        Curve("matching by batch", "operators", "batch", "images", HUGGINGFACE, batches,
              lambda b: pair(sides.matching(batch=b)), 6, memory=True),
        Curve(f"{semantic} by queries", "operators", "queries", "queries", HUGGINGFACE, qs,
              lambda q: pair(sides.semantic("peaky", queries=q)), 9),
        Curve("panoptic inference by queries", "operators", "queries", "queries", HUGGINGFACE, qs,
              lambda q: pair(sides.panoptic(q)), 9),
        Curve("matching by queries", "operators", "queries", "queries", HUGGINGFACE, qs,
              lambda q: pair(sides.matching(queries=q)), 8),
        Curve("assignment, queries = targets", "operators", "queries", "queries", "SciPy",
              (50, 100, 200, 400, 800), square_assignment, 6),
        Curve("matching by targets", "operators", "targets", "targets an image", HUGGINGFACE, (5, 10, 20, 40, 80),
              lambda t: pair(sides.matching(targets=t)), 7),
    ]  # fmt: skip


def pair(operations: Operations, peer: str = HUGGINGFACE) -> Sides:
    """Ours and one peer of the operations of `benchmarks.sides`."""
    return operations[OURS], operations[peer]


def square_assignment(queries: int) -> Sides:
    """One problem of as many targets as queries."""
    ours, theirs, *_ = assignment("matcher-like", (1, queries, queries))
    return ours, theirs


@lru_cache(maxsize=1)
def networks() -> tuple[nn.Module, Any]:
    """Ours with ResNet-50 and Hugging Face's with the same weights, both to infer with the last layer alone."""
    model = ModelConfig(
        num_classes=CLASSES, backbone=BackboneConfig("resnet50", norm="batch"), decoder=DecoderConfig(dropout=0.0)
    )
    ours = build_model(model)
    theirs = huggingface_model(ours, model, training=False)
    fuse_for_cpu(ours)  # as `maskformer_fast.load` does it
    return ours, theirs


def network(batch: int, size: Size) -> Sides:
    """Images to class and mask logits."""
    ours, theirs = networks()
    images = torch.randint(256, (batch, 3, *size), dtype=torch.uint8)
    normalized = ours.normalize(images, torch.tensor([size] * batch))

    @torch.no_grad()
    def our_call() -> object:
        found = ours(images)
        return found.class_logits, layer_mask_logits(found)

    @torch.no_grad()
    def their_call() -> object:
        return theirs(normalized)

    return our_call, their_call


def whole_image(classes: int) -> Sides:
    """Network and labels of a 512x512 image. Weights are random, so that labels are of trained-like stand-ins.

    The networks have 150 classes: the class head is no measurable part of either.
    """
    run_ours, run_theirs = network(1, (SIDE, SIDE))
    label_ours, label_theirs = pair(sides.semantic("peaky", classes=classes))
    return lambda: (run_ours(), label_ours()), lambda: (run_theirs(), label_theirs())
