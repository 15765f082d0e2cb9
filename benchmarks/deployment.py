"""A bundle on the CPU, by onnxruntime and our post-processing, beside PyTorch, eager and compiled, and Hugging Face.

R50 with 150 classes and weights by chance in float32, which is exported here; a frame of 512x512 becomes a map of
labels. The rows of a GPU are in `benchmarks.gpu_deploy`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.bounds import Bound, network_work
from benchmarks.gpu_deploy import (
    CLASSES,
    COMPILED,
    EAGER,
    HUGGING_FACE,
    MODEL,
    SIZE,
    by_hugging_face,
    write_bundle,
    write_checkpoint,
)
from benchmarks.harness import Case, Sides, shared
from maskformer_fast.benchmark.runners import BundleRunner, Setting, TorchRunner, draw_frame
from maskformer_fast.config import ModelConfig

CPU = torch.device("cpu")
LEAST_EQUAL = {EAGER: 0.999, COMPILED: 0.999, HUGGING_FACE: 0.8}
"""Share of the pixels with one label; Hugging Face resizes in another order, which moves the labels at edges."""
PATIENCE_SECONDS = 400.0
"""For the export, or a compiler."""

Size = tuple[int, int]


def export(folder: Path, model: ModelConfig, size: Size) -> None:
    """A checkpoint and its bundle for frames of this size."""
    folder.mkdir()
    write_checkpoint(folder / "checkpoint.safetensors", model)
    write_bundle(folder / "checkpoint.safetensors", folder / "bundle", f"1x{size[0]}x{size[1]}", CPU)


def setup(peer: str, model: ModelConfig = MODEL, size: Size = SIZE) -> Sides:
    folder = shared(f"deployment_{size[0]}x{size[1]}", partial(export, model=model, size=size))
    checkpoint = folder / "checkpoint.safetensors"
    frames = [draw_frame(np.random.default_rng(0), size)]
    ours = BundleRunner(Setting("bundle", str(folder / "bundle"), 1, size, "semantic", "onnxruntime", 0, 1, "off"))
    theirs: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    if peer == HUGGING_FACE:
        theirs = partial(by_hugging_face, path=checkpoint, device=CPU)
    else:
        kind = "eager" if peer == EAGER else "compile"
        runner = TorchRunner(Setting(kind, str(checkpoint), 1, size, "semantic", "cpu", 0, 1, "off"))
        theirs = partial(labels, runner)
    return Sides(lambda: labels(ours, frames), lambda: theirs(frames), partial(check_labels, least=LEAST_EQUAL[peer]))


def bound(model: ModelConfig = MODEL, size: Size = SIZE) -> Bound:
    """The network's: weights and a frame read, labels written."""
    parameters, operations = network_work(model, size)
    return Bound(4 * parameters + 4 * size[0] * size[1], operations, "fp32")


def labels(runner: BundleRunner | TorchRunner, frames: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [result.labels for result in runner.predict(frames)]


def check_labels(ours: list[np.ndarray], theirs: list[np.ndarray], least: float) -> None:
    equal = float(np.mean(np.stack(ours) == np.stack(theirs)))
    if equal < least:
        raise RuntimeError(f"labels: expected {least:g} of them equal at least, got {equal:.4f}")


def cases() -> list[Case]:
    """Rows of the table."""
    return [
        Case(f"bundle resnet50 {SIZE[0]}x{SIZE[1]}, K={CLASSES}, B=1, float32, vs {peer}", peer, None,
             partial(setup, peer), rank=rank, bound=bound, patience=PATIENCE_SECONDS)
        for peer, rank in ((EAGER, 1), (HUGGING_FACE, 1), (COMPILED, 2))
    ]  # fmt: skip
