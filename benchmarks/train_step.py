"""A whole training step beside Hugging Face's: same network, weights, batch, losses, optimiser and dtype.

    python -m benchmarks.train_step [--only TEXT] [--output FILE]

Forward, six supervised decoder layers matched and compared, backward, clipping, fused AdamW. Both networks train their
BatchNorm and have no dropout; the peer reads images that are normalised already, and float masks.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Operation
from maskformer_fast.config import BackboneConfig, Config, DecoderConfig, LossConfig, ModelConfig
from maskformer_fast.criterion import Criterion
from maskformer_fast.interop.huggingface import write_folder
from maskformer_fast.modeling import build_model
from maskformer_fast.structures import Metadata, Targets, pack_masks

CLASSES, TARGETS = 150, 14
CLIP = 0.01


def cases() -> list[Case]:
    """The CPU's."""
    return [
        Case(f"training step {name}, 2x3x512x512, 6 layers, float32", "Hugging Face MaskFormer", 1.35,
             partial(training_steps, name, 2, (512, 512)))
        for name in ("resnet50", "swin_tiny")
    ]


def training_steps(
    name: str,
    batch: int,
    size: tuple[int, int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> tuple[Operation, Operation]:
    """Our step and the peer's, each with a network and an optimiser of its own; checks that they start alike."""
    backbone = BackboneConfig(name, norm="batch") if "resnet" in name else BackboneConfig(name, drop_path_rate=0.0)
    model = ModelConfig(num_classes=CLASSES, backbone=backbone, decoder=DecoderConfig(dropout=0.0))
    network = build_model(model).train()
    peer = huggingface_model(network, model)
    images, targets, masks, labels = random_batch(batch, size)
    normalized = network.normalize(images, targets.valid_sizes).to(device)
    network, peer = network.to(device), peer.to(device)
    images, targets = images.to(device), targets.to(device)
    masks, labels = [m.to(device) for m in masks], [c.to(device) for c in labels]
    loss = LossConfig(padding="include")
    criterion = Criterion(CLASSES, loss).to(device)
    autocast = partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)

    def our_loss() -> Tensor:
        with autocast():
            return criterion(network(images, targets.valid_sizes), targets).total

    def their_loss() -> Tensor:
        with autocast():
            found = peer(
                normalized, mask_labels=masks, class_labels=labels, output_hidden_states=True,
                output_auxiliary_logits=True,
            )
        return found.loss

    return optimizer_step(network, our_loss, compiled), optimizer_step(peer, their_loss, compiled)


def optimizer_step(network: nn.Module, loss: Any, compiled: bool) -> Operation:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    loss = torch.compile(loss) if compiled else loss

    def step() -> Tensor:
        value: Tensor = loss()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def huggingface_model(network: nn.Module, model: ModelConfig) -> Any:
    """Their model with the weights of ours, in training mode, with their auxiliary losses."""
    import transformers

    metadata = Metadata(
        "benchmark", tuple(f"class {k}" for k in range(CLASSES)), (True,) * CLASSES, tuple(range(CLASSES)),
        ((0, 0, 0),) * CLASSES,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "model", network.state_dict(), Config(model=model), metadata)
        theirs = transformers.MaskFormerForInstanceSegmentation.from_pretrained(
            Path(folder) / "model", use_auxiliary_loss=True
        )
    return theirs.train()


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
