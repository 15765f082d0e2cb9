"""Cases for tests of the training step: tiny networks, endless batches, and steps with non-finite numbers."""

from __future__ import annotations

from dataclasses import replace

import torch

from maskformer_fast.config import BackboneConfig
from maskformer_fast.modeling import build_model
from maskformer_fast.recipes import load_recipe
from maskformer_fast.structures import Batch, Targets, pack_masks
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.optimizer import build_optimizer
from maskformer_fast.training.per_pixel_criterion import PerPixelCriterion
from maskformer_fast.training.train_step import TrainStep
from tests.support.paths import TINY_RECIPE

TINY = load_recipe(TINY_RECIPE)
CLASSES = 4
SIZE = (40, 48)
SWIN = BackboneConfig("swin_micro")
COUNTS = [3, 0, 1, 11, 2, 5, 1, 0]  # targets of each image; one image has more than the 8 queries


def config_of(kind="maskformer", backbone=None, loss=None, **solver):
    """Tiny recipe with 8 images a step, without dropout and BatchNorm, so that images do not affect each other."""
    model = replace(
        TINY.model,
        type=kind,
        num_classes=CLASSES,
        backbone=backbone or replace(TINY.model.backbone, norm="frozen"),
        decoder=replace(TINY.model.decoder, dropout=0.0),
    )
    if kind == "mask2former":
        encoder = {"encoder_layers": 1, "encoder_heads": 2, "encoder_ffn_dim": 32, "encoder_dropout": 0.0}
        model = replace(model, pixel_decoder=replace(model.pixel_decoder, **encoder))
    fields = {"batch_size": 8, "warmup_steps": 0, "clip_norm": 0.01} | solver
    return replace(TINY, model=model, solver=replace(TINY.solver, **fields), loss=replace(TINY.loss, **(loss or {})))


def step_of(config, device="cpu"):
    torch.manual_seed(3)
    network = build_model(config.model).to(device).train()
    criterion = (Criterion if config.model.classifies_masks else PerPixelCriterion)(CLASSES, config.loss).to(device)
    return TrainStep(network, criterion, build_optimizer(network, config.solver), config, torch.device(device))


def batches(parts, seed=0, pin=False):
    """Endless batches of random images, 8 a step, in ``parts`` micro-batches with as many target slots as needed."""
    rng = torch.Generator().manual_seed(seed)
    counts = torch.tensor(COUNTS)
    while True:
        images = torch.randint(256, (8, 3, *SIZE), generator=rng, dtype=torch.uint8)
        present = torch.arange(max(COUNTS)) < counts[:, None]
        masks = pack_masks((torch.rand(8, max(COUNTS), *SIZE, generator=rng) < 0.3) & present[..., None, None])
        labels = torch.randint(CLASSES, present.shape, generator=rng) * present
        valid = torch.tensor([[SIZE[0] - 3 * b, SIZE[1]] for b in range(8)])
        for part in torch.arange(8).chunk(parts):
            slots = max(1, int(counts[part].max()))
            targets = Targets(labels[part, :slots], counts[part], masks[part, :slots].contiguous(), valid[part], SIZE)
            tensors = [images[part], *targets[:4]]
            moved = [tensor.pin_memory() for tensor in tensors] if pin else tensors
            names = [f"image{number}" for number in part.tolist()]
            yield Batch(moved[0], Targets(*moved[1:], SIZE), names, [f"{name}.jpg" for name in names], [])


def spoil(step, where):
    """Make numbers of the next steps non-finite in one place -> function that undoes it."""
    forward, losses_of, calls = step.forward, step.criterion.forward, []
    if where == "cost":
        def spoiled(images, sizes):
            for buffer in step.network.buffers():
                buffer.data.copy_(torch.full_like(buffer, 7) if not buffer.is_floating_point() else buffer * torch.nan)
            predictions = forward(images, sizes)
            return predictions._replace(mask_embeddings=predictions.mask_embeddings * torch.nan)
        step.forward = spoiled
    elif where == "cost of one image":  # nothing is matched with it, so the losses stay finite
        def spoiled(images, sizes):
            predictions = forward(images, sizes)
            embeddings = predictions.mask_embeddings.clone()
            calls.append(1)
            if len(calls) == 2:
                embeddings[0, -2, 0] = torch.nan
            return predictions._replace(mask_embeddings=embeddings.detach())
        step.forward = spoiled
    elif where == "loss":
        def spoiled(*arguments):
            losses = losses_of(*arguments)
            bad = {next(iter(losses.terms)): losses.total * torch.inf}
            return losses._replace(total=losses.total * torch.inf, terms=losses.terms | bad)
        step.criterion.forward = spoiled
    else:
        weight = step.network.get_parameter("predictor.class_embed.weight")
        handle = weight.register_hook(lambda gradient: gradient * torch.inf)
        return handle.remove

    def undo():
        step.forward, step.criterion.forward = forward, losses_of

    return undo
