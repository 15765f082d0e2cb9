"""The network and its parts on one image of 512x512 beside Hugging Face's with the same weights, eager and compiled.

bfloat16 is by autocast on both sides, as `Predictor` and most others do it. Parts get the same input on both sides,
which is our own part's before. Ours is prepared as `Predictor` does it, and leaves the last convolution of the pixel
decoder for the wanted masks, so the whole network's rows are of mask logits of all queries.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.bounds import Bound, count_operations, network_work
from benchmarks.harness import Case, Sides
from benchmarks.train_step import huggingface_model
from maskformer_fast.config import BackboneConfig, ModelConfig
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.fuse_for_cpu import fuse_for_cpu
from maskformer_fast.ops.mask_product import layer_mask_logits

CLASSES, SIZE = 150, (512, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RATES = {"float32": "fp32", "bfloat16": "bf16"}
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.15}
"""Of the difference, over the largest value. Halves of eight bits differ by chance, and more in every layer: at random
weights each side's mask logits are up to 0.08 from those in float32."""
PARTS = ("network", "backbone", "pixel decoder", "transformer decoder")
COMPILE_SECONDS = 400.0


class Pair(NamedTuple):
    """Ours and theirs, of one input each, and these."""

    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any]
    our_input: Any
    their_input: Any
    weights: nn.Module  # ours, for their bytes


@cache
def networks(name: str) -> tuple[Any, Any]:
    """Our network and theirs, with the same weights, for inference."""
    torch.manual_seed(0)
    model = ModelConfig(num_classes=CLASSES, backbone=BackboneConfig(name))
    network = build_model(model).eval()
    for module in network.modules():  # statistics and biases by chance: zeros and ones would hide a mistake
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.normal_(module.bias, std=0.1)
    return network, huggingface_model(network, model, training=False)


@cache
def prepared(name: str, dtype: str) -> Any:
    """Our network as `Predictor` runs it."""
    network = copy.deepcopy(networks(name)[0])
    fuse_for_cpu(network, DTYPES[dtype])
    return network


@torch.no_grad()
def pair(name: str, part: str, size: tuple[int, int] = SIZE, dtype: str | None = None) -> Pair:
    """The sides of one part; ours prepared for inference in `dtype`, or as it is. Inputs are float32."""
    plain, peer = networks(name)
    network = plain if dtype is None else prepared(name, dtype)
    pixel_level, decoder = peer.model.pixel_level_module, peer.model.transformer_module
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = network.normalize(images, torch.tensor([size]))
    if part == "network":

        def ours(images: Tensor) -> tuple[Tensor, Tensor]:
            found = network(images)
            return found.class_logits[-1], layer_mask_logits(found)

        def theirs(pixels: Tensor) -> tuple[Tensor, Tensor]:
            found = peer(pixels, output_auxiliary_logits=False)
            return found.class_queries_logits, found.masks_queries_logits

        return Pair(ours, theirs, images, pixels, network)
    if part == "backbone":
        return Pair(network.backbone, lambda x: pixel_level.encoder(x).feature_maps, pixels, pixels, network.backbone)
    features = plain.backbone(pixels)
    if part == "pixel decoder":
        return Pair(
            lambda x: network.pixel_decoder(x)[0], lambda x: pixel_level.decoder(x).last_hidden_state,
            features, features, network.pixel_decoder,
        )  # fmt: skip

    def their_queries(memory: Tensor) -> tuple[Tensor, Tensor]:
        states = decoder(memory).last_hidden_state
        return peer.class_predictor(states), peer.mask_embedder(states)

    def our_queries(memory: Tensor) -> tuple[Tensor, Tensor]:
        classes, embeddings = network.predictor(memory, False)
        return classes[-1], embeddings[-1]

    return Pair(our_queries, their_queries, features[-1], features[-1], network.predictor)


def setup(name: str, part: str, dtype: str, compiled: bool, size: tuple[int, int] = SIZE) -> Sides:
    both = pair(name, part, size, dtype)
    theirs = torch.compile(both.theirs) if compiled else both.theirs

    def call(run: Callable[[Any], Any], given: Any) -> Any:
        low = dtype == "bfloat16"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
            return run(given)

    check = partial(check_results, tolerance=TOLERANCES[dtype])
    return Sides(partial(call, both.ours, both.our_input), partial(call, theirs, both.their_input), check)


def check_results(ours: Any, theirs: Any, tolerance: float) -> None:
    for index, (a, b) in enumerate(zip(tensors(ours), tensors(theirs), strict=True)):
        error = ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        if not error <= tolerance:
            raise RuntimeError(f"result {index}: ours and the peer's differ by {error:.2g} of the largest value")


def tensors(value: Any) -> Iterator[Tensor]:
    """One tensor, or those of a sequence."""
    yield from [value] if isinstance(value, Tensor) else value


@cache
@torch.no_grad()
def least_work(name: str, part: str, size: tuple[int, int] = SIZE) -> tuple[int, float]:
    """Numbers that are read and written, multiplications and additions; by the network as it is.

    Winograd's convolutions take fewer, so ours may go below the limit.
    """
    both = pair(name, part, size)
    results: list[Tensor] = []
    operations = count_operations(lambda: results.extend(tensors(both.ours(both.our_input))))
    if part == "network":  # our own operators are not counted, what they replace is
        _, operations = network_work(ModelConfig(num_classes=CLASSES, backbone=BackboneConfig(name)), size)
    moved = [*both.weights.parameters(), *tensors(both.our_input), *results]
    return sum(tensor.numel() for tensor in moved), operations


def bound(name: str, part: str, dtype: str, size: tuple[int, int] = SIZE) -> Bound:
    """Weights and inputs read, results written; convolutions and matrix products."""
    numbers, operations = least_work(name, part, size)
    return Bound(numbers * DTYPES[dtype].itemsize, operations, RATES[dtype])


def cases() -> list[Case]:
    """Rows of the table."""
    rows = []
    for name in ("resnet50", "swin_tiny"):
        for dtype in DTYPES:
            for part in PARTS:
                whole = part == "network"
                compiles = whole and name == "resnet50" and dtype == "float32"  # it takes a minute
                for compiled in (False, True) if compiles else (False,):
                    peer = "Hugging Face" + " by torch.compile" * compiled
                    rows.append(Case(
                        f"{part} {name} 512x512, B=1, {dtype}, vs {peer}", peer, None,
                        partial(setup, name, part, dtype, compiled), rank=3 if compiled else 1 if whole else 2,
                        bound=partial(bound, name, part, dtype), memory=whole and not compiled,
                        patience=COMPILE_SECONDS if compiled else 0.0,
                    ))  # fmt: skip
    return rows
