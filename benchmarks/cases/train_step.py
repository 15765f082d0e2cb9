"""A training step beside Hugging Face's: same network, weights, batch, losses, optimiser and dtype.

Forward, six supervised decoder layers matched and compared, backward, clipping, fused AdamW. Both networks train their
BatchNorm and have no dropout; the peer reads images that are normalised already, and float masks. On the CPU in
float32, on a GPU in bfloat16, eager and compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.inputs import Size, random_targets
from benchmarks.cases.matching_cost import float_masks
from benchmarks.cases.network import huggingface_model, network_work
from benchmarks.harness.case import Bound, Case, Work, beside
from maskformer_fast.config import BackboneConfig, DecoderConfig, LossConfig, ModelConfig
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.compile import compile_single_graph
from maskformer_fast.structures import Targets
from maskformer_fast.training.criterion import Criterion

CLASSES, TARGETS, CLIP = 150, 14, 0.01
CUDA_BATCH = 16
CUDA_PARAMETERS = {"resnet50": 41e6, "swin_base": 102e6}
HUGGINGFACE = "Hugging Face MaskFormer"
MEMORY_GOAL, CUDA_MEMORY_GOAL = 0.65, 0.6
EXTRA_SECONDS = 300.0
"""A step takes several seconds, and on one slow core many."""

Step = Callable[..., Tensor]


def model_of(backbone: str) -> ModelConfig:
    if "resnet" in backbone:
        config = BackboneConfig(backbone, norm="batch")
    else:
        config = BackboneConfig(backbone, drop_path_rate=0.0)
    return ModelConfig(num_classes=CLASSES, backbone=config, decoder=DecoderConfig(dropout=0.0))


def setup(
    device: torch.device, backbone: str, batch: int, size: Size, dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Work:  # fmt: skip
    model = model_of(backbone)
    network = build_model(model).train().to(device)
    peer = huggingface_model(network, model, training=True).to(device)

    def draw(seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8).to(device)
        targets = random_targets(batch, TARGETS, CLASSES, size).to(device)
        return images, targets, network.normalize(images, targets.valid_sizes), *float_masks(targets)

    ours, theirs = our_step(network, dtype, compiled), their_step(peer, dtype, compiled)
    return Work(lambda *inputs: ours(*inputs[:2]), {HUGGINGFACE: lambda *inputs: theirs(*inputs[2:])}, draw)


def our_step(network: nn.Module, dtype: torch.dtype, compiled: bool) -> Step:
    """A step on images and targets."""
    device = next(network.parameters()).device
    forward: Any = network
    criterion: Any = Criterion(CLASSES, LossConfig(padding="include")).to(device)  # padding counts, as for the peer
    if compiled:
        forward, criterion = compile_single_graph(forward), compile_single_graph(criterion)

    def loss(images: Tensor, targets: Targets) -> Tensor:
        total: Tensor = criterion(forward(images, targets.valid_sizes), targets).total
        return total

    return optimizer_step(network, loss, device, dtype)


def their_step(peer: Any, dtype: torch.dtype, compiled: bool) -> Step:
    """A step on normalised images, float masks and labels."""
    forward = torch.compile(peer) if compiled else peer

    def loss(images: Tensor, masks: list[Tensor], labels: list[Tensor]) -> Tensor:
        total: Tensor = forward(
            images, mask_labels=masks, class_labels=labels, output_hidden_states=True, output_auxiliary_logits=True
        ).loss
        return total

    return optimizer_step(peer, loss, next(peer.parameters()).device, dtype)


def optimizer_step(
    network: nn.Module, loss: Callable[..., Tensor], device: torch.device, dtype: torch.dtype
) -> Step:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)

    def step(*batch: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss(*batch)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def bound(backbone: str, batch: int, size: Size) -> Bound:
    """The optimiser's traffic: weights, gradients and two moments read, all but the gradients written. The network's
    forward pass, and twice that backward; matching and losses not counted.
    """
    parameters, operations = network_work(model_of(backbone), size, training=True)
    return Bound(28 * parameters, 3 * batch * operations)


def cases(device: str) -> list[Case]:
    return cpu_cases() if device == "cpu" else cuda_cases()


def cpu_cases() -> list[Case]:
    size = (512, 512)
    return [
        Case(f"training step {backbone}, 2x3x512x512, 6 layers, float32", HUGGINGFACE, goal,
             partial(setup, backbone=backbone, batch=2, size=size), bound=partial(bound, backbone, 2, size),
             memory_goal=MEMORY_GOAL, extra_seconds=EXTRA_SECONDS, rank=rank)
        # two minutes each: the second where time is left
        for backbone, goal, rank in (("resnet50", 1.9, 0), ("swin_tiny", 2.0, 2))
    ]  # fmt: skip


def cuda_cases() -> list[Case]:
    """Cases whose bound is the optimiser's traffic alone."""
    rows = []
    for compiled in (False, True):
        for backbone, parameters in CUDA_PARAMETERS.items():
            for side in (512, 640):
                rows += beside(
                    f"training step {backbone}{' compiled' * compiled}, {CUDA_BATCH}x3x{side}x{side}, bf16",
                    {HUGGINGFACE: 1.5 if compiled else 2.0},
                    partial(setup, backbone=backbone, batch=CUDA_BATCH, size=(side, side), dtype=torch.bfloat16,
                            compiled=compiled),
                    memory_goal=CUDA_MEMORY_GOAL, bound=Bound(28 * parameters), captured=False, peer_captured=False,
                    rank=2 if compiled or side == 640 else 1,
                )  # fmt: skip
    return rows
