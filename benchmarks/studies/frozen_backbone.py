"""Processor time and peak memory of a training step with a trained and with a frozen backbone.

    python -m benchmarks.studies.frozen_backbone [--size 512] [--images 2] [--steps 3] [--output FOLDER]

MaskFormer with a ResNet-50 on one thread of the CPU, random images and ten random targets each. Each variant has a
process of its own; times are the processor's, the least of the steps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import torch

from benchmarks.__main__ import OUTPUT
from benchmarks.harness.runner import ROOT, environment
from maskformer_fast.config import BackboneConfig, Config, ModelConfig, SolverConfig
from maskformer_fast.core.files import write_json
from maskformer_fast.core.machine import describe_machine, keep_freed_memory, peak_resident_bytes
from maskformer_fast.structures import Batch, Targets, pack_masks
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.freezing import freeze, set_training
from maskformer_fast.training.initial_network import initial_network
from maskformer_fast.training.optimizer import build_optimizer
from maskformer_fast.training.train_step import TrainStep

VARIANTS: dict[str, tuple[str, ...]] = {
    "trained backbone": (),
    "frozen stem and res2": ("backbone.stem", "backbone.res2"),
    "frozen backbone": ("backbone",),
}
CLASSES, TARGETS = 150, 10


def measure(parts: tuple[str, ...], size: int, images: int, steps: int) -> dict[str, float]:
    """Processor time of a step in seconds, and peak memory of this process in bytes."""
    torch.set_num_threads(1)
    keep_freed_memory()
    model = ModelConfig(num_classes=CLASSES, backbone=BackboneConfig("resnet50", norm="frozen"))
    config = Config(model=model, device="cpu")
    config = replace(config, solver=SolverConfig(batch_size=images, freeze=parts))
    device = torch.device("cpu")
    network = initial_network(config, None, device)
    set_training(network, freeze(network, parts))
    criterion = Criterion(CLASSES, config.loss)
    step = TrainStep(network, criterion, build_optimizer(network, config.solver), config, device)
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, size, size), generator=rng, dtype=torch.uint8)
    masks = pack_masks(torch.rand(images, TARGETS, size, size, generator=rng) < 0.2)
    sizes = torch.full((images, 2), size, dtype=torch.int64)
    counts = torch.full((images,), TARGETS, dtype=torch.int64)
    labels = torch.randint(CLASSES, (images, TARGETS), generator=rng)
    batch = Batch(pixels, Targets(labels, counts, masks, sizes, (size, size)), [0] * images, [""] * images, [])
    batches = repeat(batch)
    step.run(batches)  # the first one allocates
    seconds = []
    for _ in range(steps):
        started = time.process_time()
        step.run(batches)
        seconds.append(time.process_time() - started)
    return {"seconds": min(seconds), "peak_bytes": peak_resident_bytes()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="sides of the images in pixels")
    parser.add_argument("--images", type=int, default=2, help="images of a step")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each turn")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help=f"by default {OUTPUT.name}/")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.variant is not None:
        print(json.dumps(measure(VARIANTS[options.variant], options.size, options.images, options.steps)))
        return 0
    rows = {}
    for name in VARIANTS:
        command = [sys.executable, "-m", "benchmarks.studies.frozen_backbone", "--variant", name]
        command += ["--size", str(options.size), "--images", str(options.images), "--steps", str(options.steps)]
        printed = subprocess.run(command, cwd=ROOT, env=environment("time", 1), stdout=subprocess.PIPE, text=True,
                                 check=True).stdout
        rows[name] = row = json.loads(printed.splitlines()[-1])
        print(f"{name}: {row['seconds']:.2f} s, {row['peak_bytes'] / 2**30:.2f} GiB", flush=True)
    setting = {"network": "MaskFormer, ResNet-50", "size": options.size, "images": options.images}
    write_json(options.output / "frozen_backbone.json", {"machine": describe_machine(), **setting, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
