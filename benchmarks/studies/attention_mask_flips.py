"""Pixels of Mask2Former's attention masks that differ between resized pixel embeddings and masks of full size.

    python -m benchmarks.studies.attention_mask_flips mask2former/ade20k_semantic_r50 --scales 1 30
    python -m benchmarks.studies.attention_mask_flips runs/demo_mask2former --images 16

A recipe is untrained, and is given drawn scenes of 512x512; a checkpoint the validation images of its data set. A scale
multiplies the mask embeddings, which makes masks peaky. For every layer both ways start from the same queries. Also
counted: pixels of semantic labels that differ where each way decides all masks of its own network.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from maskformer_fast.benchmark.runners import draw_frame
from maskformer_fast.cli import parse, run_command
from maskformer_fast.core.checks import check
from maskformer_fast.data import build_dataset
from maskformer_fast.inference.load import load_network
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.modeling.deformable_encoder import LEVELS
from maskformer_fast.modeling.mask2former import Mask2Former
from maskformer_fast.modeling.masked_decoder import LevelMasks

SIDE = 512


@dataclass(frozen=True)
class FlipOptions:
    """Count flips of attention masks, resized embeddings against masks of full size."""

    model: tyro.conf.Positional[str]
    """A checkpoint, or the name of a recipe, which is untrained."""
    images: int = 4
    """Number of images."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of the mask embeddings."""


class LayerMasks(NamedTuple):
    """One layer's masks of both ways, [B, Q, N] bool, and mask logits in float64 [B, Q, N]."""

    resized: Tensor
    direct: Tensor
    logits: Tensor


@torch.no_grad()
def masks_of_layers(
    network: Mask2Former,
    images: Tensor,  # [B, 3, H, W] uint8
) -> Iterator[LayerMasks]:
    """Visible pixels of every layer by both ways, from the queries that the network has there."""
    sizes = torch.tensor([images.shape[2:]] * len(images))
    features, levels = network.pixel_decoder.fuse(network.backbone(network.normalize(images, sizes)))
    shapes = [(level.shape[2], level.shape[3]) for level in levels]
    projection = network.pixel_decoder.projection
    resized, direct = (LevelMasks(features, projection, shapes, direct) for direct in (False, True))
    states = network.predictor.decode(features, projection, levels, all_layers=True)
    exact = type(projection)(projection.weight.double(), projection.bias.double())
    pixels = LevelMasks(features.double(), exact, shapes, direct=True).embeddings[0]
    for layer, queries in enumerate(network.predictor.mask_embed(states)[:-1]):
        level = layer % LEVELS
        masks = torch.einsum("bqd,bdhw->bqhw", queries.double(), pixels)
        logits = torch.nn.functional.interpolate(masks, shapes[level], mode="bilinear").flatten(2)
        yield LayerMasks(resized.visible(queries, level), direct.visible(queries, level), logits)


def scale_masks(network: Mask2Former, factor: float) -> None:
    """Multiply the mask embeddings, in place."""
    last: Any = network.predictor.mask_embed.layers[-1]
    with torch.no_grad():
        last.weight.mul_(factor), last.bias.mul_(factor)


def pictures(predictor: Predictor, count: int) -> Iterator[np.ndarray]:
    """Validation images of a checkpoint's data set, or drawn scenes for a recipe."""
    if predictor.config.data.dataset == "shapes" or predictor.config.data.root is not None:
        dataset = build_dataset(predictor.config.data, "val")
        for index in range(min(count, len(dataset))):
            yield np.asarray(dataset[index].image)
    else:
        for index in range(count):
            yield draw_frame(np.random.default_rng(index), (SIDE, SIDE))


def count(options: FlipOptions, scale: float) -> str:
    """One row of the report."""
    torch.manual_seed(0)
    predictor = load_network(options.model, "cpu")
    network: Any = predictor.network
    check(isinstance(network, Mask2Former), "model", "a Mask2Former", predictor.config.model.type)
    scale_masks(network, scale)
    pixels = flips = labels = different = 0
    largest = 0.0
    for image in pictures(predictor, options.images):
        results = []
        for direct in (False, True):
            network.predictor.direct_masks = direct
            results.append(predictor.infer([image], ("semantic",))["semantic"][0])
        network.predictor.direct_masks = False
        labels += results[0].labels.numel()  # type: ignore[union-attr]
        different += int((results[0].labels != results[1].labels).sum())  # type: ignore[union-attr]
        for masks in masks_of_layers(network, torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()):
            flipped = masks.resized != masks.direct
            pixels, flips = pixels + flipped.numel(), flips + int(flipped.sum())
            if flipped.any():
                largest = max(largest, float(masks.logits.abs()[flipped].max() / masks.logits.abs().max()))
    return (f"scale {scale:g}: {flips} of {pixels:,} pixels of attention masks flip, where |logit| is at most "
            f"{largest:.1e} of the layer's largest; {different} of {labels:,} labels differ")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = parse(FlipOptions, arguments, prog="python -m benchmarks.studies.attention_mask_flips")
    check(options.images > 0, "images", "a positive number", options.images)
    print(f"{Path(options.model)}, {options.images} images")
    for scale in options.scales:
        print(count(options, scale), flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
