"""A whole training step in bfloat16 beside Hugging Face's, eager and compiled: see `benchmarks.train_step`.

The bound counts the optimiser's traffic alone: weights, gradients and two moments read, all but the gradients written.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.gpu_harness import OURS, Bound, Case, Peer, Work
from benchmarks.train_step import networks, our_step, random_batch, their_step

EAGER, COMPILED = "Hugging Face", "Hugging Face by torch.compile"
BATCH = 16
PARAMETERS = {"resnet50": 41e6, "swin_base": 102e6}


def setup(
    device: torch.device, name: str, size: tuple[int, int], compiled: bool, batch: int = BATCH,
    dtype: torch.dtype = torch.bfloat16,
) -> Work:  # fmt: skip
    network, peer = (one.to(device) for one in networks(name))

    def draw(seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        images, targets, masks, labels = random_batch(batch, size)
        images, targets = images.to(device), targets.to(device)
        normalized = network.normalize(images, targets.valid_sizes)
        return images, targets, normalized, [m.to(device) for m in masks], [c.to(device) for c in labels]

    ours = our_step(network, dtype, compiled)
    theirs = their_step(peer, dtype, compiled)
    side = COMPILED if compiled else EAGER
    return Work(draw, {OURS: lambda *batch: ours(*batch[:2]), side: lambda *batch: theirs(*batch[2:])})


def cases() -> list[Case]:
    found = []
    for compiled in (False, True):
        for name, parameters in PARAMETERS.items():
            for side in (512, 640):
                peer = Peer(COMPILED, 1.5, 1 / 0.6, graph=False) if compiled else Peer(EAGER, 2.0, 1 / 0.6, graph=False)
                found.append(Case(
                    f"training step {name}{' compiled' * compiled}, {BATCH}x3x{side}x{side}, bf16",
                    partial(setup, name=name, size=(side, side), compiled=compiled), (peer,),
                    Bound(28 * parameters), graph=False, rank=2 if compiled or side == 640 else 1,
                ))  # fmt: skip
    return found
