"""A whole training step beside Hugging Face's: same network, weights, batch, losses, optimiser and dtype.

    python -m benchmarks.train_step [--only TEXT] [--minutes MINUTES] [--output FILE]

Forward, six supervised decoder layers matched and compared, backward, clipping, fused AdamW. Both networks train their
BatchNorm and have no dropout; the peer reads images that are normalised already, and float masks. By itself
the command writes benchmarks/results/train_step.json. Those are the CPU's rows; a GPU's are in
`benchmarks.gpu_train_step`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bounds import Bound, network_work
from benchmarks.cpu import BenchmarkOptions, measure
from benchmarks.harness import Case, Operation
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import BackboneConfig, Config, DecoderConfig, LossConfig, ModelConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.interop.huggingface import write_folder
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.compile import compile_single_graph
from maskformer_fast.structures import Targets, pack_masks
from maskformer_fast.training.criterion import Criterion

RESULTS = Path(__file__).parent / "results" / "train_step.json"
CLASSES, TARGETS, CLIP = 150, 14, 0.01
MAX_MEMORY = 0.65
"""Goal for our peak memory over the peer's."""
PATIENCE = 300.0
"""Seconds: a step takes several, and on one slow core many."""

Step = Callable[..., Tensor]


@dataclass(frozen=True)
class TrainStepOptions(BenchmarkOptions):
    """The training step of python -m benchmarks.cpu by itself; its file is benchmarks/results/train_step.json."""


def cases() -> list[Case]:
    """The CPU's."""
    return [
        Case(f"training step {name}, 2x3x512x512, 6 layers, float32", "Hugging Face MaskFormer", 1.35,
             partial(cpu_steps, name, 2, (512, 512)), bound=partial(step_bound, name, 2, (512, 512)),
             memory_goal=MAX_MEMORY, patience=PATIENCE, rank=rank)
        for name, rank in (("resnet50", 0), ("swin_tiny", 2))  # two minutes each: the second where time is left
    ]


def cpu_steps(name: str, batch: int, size: tuple[int, int]) -> tuple[Operation, Operation]:
    network, peer = networks(name)
    images, targets, masks, labels = random_batch(batch, size)
    normalized = network.normalize(images, targets.valid_sizes)
    return partial(our_step(network), images, targets), partial(their_step(peer), normalized, masks, labels)


def step_bound(name: str, batch: int, size: tuple[int, int]) -> Bound:
    """The optimiser's traffic: weights, gradients and two moments read, all but the gradients written. The network's
    forward pass, and twice that backward; matching and losses not counted.
    """
    parameters, operations = network_work(model_config(name), size, training=True)
    return Bound(28 * parameters, 3 * batch * operations, "fp32")


def model_config(name: str) -> ModelConfig:
    backbone = BackboneConfig(name, norm="batch") if "resnet" in name else BackboneConfig(name, drop_path_rate=0.0)
    return ModelConfig(num_classes=CLASSES, backbone=backbone, decoder=DecoderConfig(dropout=0.0))


def networks(name: str) -> tuple[Any, Any]:
    """Our network and theirs, with the same weights, in training mode."""
    model = model_config(name)
    network = build_model(model).train()
    return network, huggingface_model(network, model)


def our_step(network: nn.Module, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Step:
    """Of images and targets."""
    device = next(network.parameters()).device
    forward: Any = network
    criterion: Any = Criterion(CLASSES, LossConfig(padding="include")).to(device)  # padding counts, as for the peer
    if compiled:
        forward, criterion = compile_single_graph(forward), compile_single_graph(criterion)

    def loss(images: Tensor, targets: Targets) -> Tensor:
        total: Tensor = criterion(forward(images, targets.valid_sizes), targets).total
        return total

    return optimizer_step(network, loss, device, dtype)


def their_step(peer: Any, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Step:
    """Of normalised images, float masks and labels."""
    forward = torch.compile(peer) if compiled else peer

    def loss(images: Tensor, masks: list[Tensor], labels: list[Tensor]) -> Tensor:
        found = forward(
            images, mask_labels=masks, class_labels=labels, output_hidden_states=True, output_auxiliary_logits=True
        )
        total: Tensor = found.loss
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


def huggingface_model(network: nn.Module, model: ModelConfig, training: bool = True) -> Any:
    """Their model with the weights of ours: in training mode with their auxiliary losses, or for inference."""
    import transformers

    metadata = class_metadata(model.num_classes)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "model", network.state_dict(), Config(model=model), metadata)
        theirs = transformers.MaskFormerForInstanceSegmentation.from_pretrained(
            Path(folder) / "model", use_auxiliary_loss=training
        )
    return theirs.train(training)


def class_metadata(count: int) -> Metadata:
    """Of `count` classes, all things, of different colours as far as these go."""
    colors = tuple((k * 37 % 256, k * 91 % 256, k * 151 % 256) for k in range(count))
    names = tuple(f"class {k}" for k in range(count))
    return Metadata("benchmark", names, (True,) * count, tuple(range(count)), colors)


def random_batch(batch: int, size: tuple[int, int]) -> tuple[Tensor, Targets, list[Tensor], list[Tensor]]:
    """Images, our targets, their float masks and labels; the targets tile each image like a panoptic map's."""
    cells = (size[0] // 64, size[1] // 64)
    ids = torch.randint(TARGETS, (batch, *cells)).repeat_interleave(64, 1).repeat_interleave(64, 2)
    masks = ids.unsqueeze(1) == torch.arange(TARGETS)[:, None, None]
    labels = torch.randint(CLASSES, (batch, TARGETS))
    images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
    sizes = torch.tensor([size] * batch)
    targets = Targets(labels, torch.full((batch,), TARGETS), pack_masks(masks), sizes, size)
    return images, targets, [mask.float() for mask in masks], list(labels)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(TrainStepOptions, sys.argv[1:] if argv is None else argv, prog="python -m benchmarks.train_step")
    return measure(("train_step",), options, RESULTS)


if __name__ == "__main__":
    run_command(main)
