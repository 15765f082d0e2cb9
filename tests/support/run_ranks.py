"""Program of each rank of `test_distributed`: ``python run_ranks.py FOLDER``, as rank 0 and as rank 1."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maskformer_fast import distributed, evaluate, train
from maskformer_fast.config import BackboneConfig, Config, TestConfig
from maskformer_fast.data import build_dataset
from maskformer_fast.evaluation import build_evaluator
from maskformer_fast.evaluation.measure import measure
from maskformer_fast.inference.load import load
from maskformer_fast.modeling.compile import compile_single_graph
from maskformer_fast.recipes import load_recipe
from maskformer_fast.training import trainer
from maskformer_fast.training.criterion import Criterion, Losses
from maskformer_fast.training.trainer import Trainer
from tests.support.paths import TINY_RECIPE

TINY = load_recipe(TINY_RECIPE)
EXACT = {
    # No dropout, and no BatchNorm: everything else in a step must not depend on the number of processes.
    "maskformer": {"model": {"decoder": replace(TINY.model.decoder, dropout=0.0)}, "solver": {"ema_decay": 0.5}},
    "shallow": {"model": {"decoder": replace(TINY.model.decoder, dropout=0.0),
                          "backbone": BackboneConfig("swin_micro")}, "loss": {"deep_supervision": False}},
    "per_pixel": {"model": {"type": "per_pixel"}, "data": {"task": "semantic"},
                  "solver": {"freeze": ("backbone.stem",)}},
    "per_pixel_plus": {"model": {"type": "per_pixel_plus", "decoder": replace(TINY.model.decoder, dropout=0.0)},
                       # With one token of memory all queries are equal, and gradients consist of rounding errors.
                       "data": {"task": "semantic",
                                "augment": replace(TINY.data.augment, short_edge=(64,), crop_size=(64, 64))},
                       # The last bias changes all classes equally: its gradients are rounding errors, which AdamW
                       # turns into steps.
                       "solver": {"lr": 1e-4}},
    "mask2former": {"model": {"type": "mask2former", "decoder": replace(TINY.model.decoder, dropout=0.0),
                              "pixel_decoder": replace(TINY.model.pixel_decoder, encoder_layers=1, encoder_heads=2,
                                                       encoder_ffn_dim=32, encoder_dropout=0.0)},
                    "loss": {"mask_loss": "bce", "points": 64}},
    # Attention of every query is masked: which of them are not would be drawn by each process.
    "eomt": {"model": {"type": "eomt", "backbone": BackboneConfig("vit_micro"), "size_divisibility": 8},
             "loss": {"mask_loss": "bce", "points": 64}},
}  # fmt: skip
PARALLEL = {
    "maskformer": ("ddp", "fsdp"), "shallow": ("fsdp",), "per_pixel": ("ddp", "fsdp"), "per_pixel_plus": ("ddp",),
    "mask2former": ("ddp",), "eomt": ("ddp", "fsdp"),
}  # fmt: skip


def tiny(folder: Path, **sections: dict[str, Any]) -> Config:
    """The tiny recipe in a folder, with some fields of its sections replaced."""
    changed = {name: replace(getattr(TINY, name), **fields) for name, fields in sections.items()}
    return replace(TINY, output=str(folder), **changed)


def exact(name: str, folder: Path, parallel: str = "ddp", **solver: Any) -> Config:
    """Run of four steps, with checkpoints at 2 and 4, whose numbers do not depend on the number of processes."""
    solver = {"max_steps": 4, "warmup_steps": 0, "parallel": parallel, **EXACT[name].get("solver", {}), **solver}
    config = tiny(folder, **{**EXACT[name], "solver": solver})
    backbone = config.model.backbone
    if backbone.name == "resnet_micro":
        config = replace(config, model=replace(config.model, backbone=replace(backbone, norm="frozen")))
    return replace(config, metrics=()) if config.data.task == "semantic" else config


def rank_dependent(folder: Path) -> Config:
    """Run with dropout and BatchNorm, whose numbers depend on the rank and on its images."""
    return tiny(folder, log={"checkpoint_every": 1}, solver={"ema_decay": 0.5})


def measured(network: Path, images: int, batch_size: int) -> dict[str, Any]:
    """Metrics of a run's network on the first ``images`` of the validation split."""
    predictor = load(network, "cpu", TestConfig(short_edge=None, batch_size=batch_size))
    dataset = build_dataset(replace(TINY.data, shapes=replace(TINY.data.shapes, val_images=images)), "val")
    return measure(predictor, dataset, ("semantic", "panoptic", "instance"), workers=0, pictures=2)[0]


def make_nan(losses: Losses) -> Losses:
    return losses._replace(total=losses.total * torch.nan)


def send_sigterm(losses: Losses) -> Losses:
    os.kill(os.getpid(), signal.SIGTERM)
    return losses


@contextmanager
def disturbed(step: int, disturb: Callable[[Losses], Losses]) -> Iterator[None]:
    """Apply a function to the losses of rank 1 in one step."""
    forward, calls = Criterion.forward, iter(range(100))

    def disturbed_forward(self: Criterion, *arguments: Any) -> Any:
        losses = forward(self, *arguments)
        return disturb(losses) if next(calls) == step and distributed.rank() == 1 else losses

    Criterion.forward = disturbed_forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Criterion.forward = forward  # type: ignore[method-assign]


@contextmanager
def compiled_eagerly() -> Iterator[None]:
    """Trace networks as single graphs but generate no code, which would take minutes."""
    trainer.compile_single_graph = partial(compile_single_graph, backend="eager")
    try:
        yield
    finally:
        trainer.compile_single_graph = compile_single_graph


def attempt(function: Any, *arguments: Any) -> str:
    """Exception that a call raises, as text."""
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def fail() -> None:
    raise OSError("disk")


def run(folder: Path) -> dict[str, Any]:
    """Run everything that the tests check in one group -> results of this rank by name."""
    rank = distributed.rank()
    synchronised = BackboneConfig("resnet_micro", norm="sync")
    results: dict[str, Any] = {
        "gathered": distributed.gather_objects({"rank": rank}),
        "gathered on main": distributed.gather_on_main(rank),
        "delayed flag": [flag(rank == 1 and call == 1) for flag in [distributed.DelayedFlag()] for call in range(4)],
        "tensors": (
            distributed.mean_over_ranks(torch.tensor(float(rank))).item(),
            distributed.max_over_ranks(torch.tensor([rank, 2.0 - rank])).tolist(),
            distributed.gather_ranks(torch.tensor([rank, 7 + rank])).tolist(),
        ),
        "on main": distributed.on_main(lambda: distributed.rank() + 7),
        "failure": attempt(distributed.on_main, fail),
        "sync": attempt(Trainer, tiny(folder / "sync", model={"backbone": synchronised})),
        "batch": attempt(lambda: Trainer(tiny(folder / "batch", solver={"batch_size": 3}))),
    }
    for name, kinds in PARALLEL.items():
        for parallel in kinds:
            results[f"{name} {parallel}"] = Trainer(exact(name, folder / f"{name}_{parallel}", parallel)).run()
    for parallel in ("ddp", "fsdp"):
        Trainer(exact("maskformer", folder / f"accumulated_{parallel}", parallel, accumulate=2)).run()
    with compiled_eagerly():
        Trainer(exact("maskformer", folder / "accumulated_compiled", accumulate=2, compile=True)).run()
    Trainer(exact("maskformer", folder / "from_single", "fsdp"), resume=True).run()
    results["metrics"] = [measured(folder / "single", *sizes) for sizes in ((7, 2), (1, 1), (4, 3))]
    options = evaluate.EvaluateOptions(
        str(folder / "single"), output=str(folder / "metrics.json"), predictions=str(folder / "predictions"),
        report=str(folder / "report"),
        task=("panoptic", "instance"), device="cpu", data=TINY.data, test=TINY.test,
    )
    evaluate.evaluate(options)
    with disturbed(1, make_nan):
        spoiled = Trainer(tiny(folder / "spoiled", solver={"max_steps": 3}))
        spoiled.run()
    results["spoiled"] = spoiled.skipped, {name: t.clone() for name, t in spoiled.network.state_dict().items()}
    with disturbed(1, send_sigterm):
        stopped = Trainer(tiny(folder / "stopped", log={"checkpoint_every": 100}))
        results["stopped"] = stopped.run(), stopped.stopped, stopped.step
    Trainer(rank_dependent(folder / "uninterrupted")).run()
    return results


def die_once() -> None:
    """Kill rank 1 in its fourth step, unless torchrun has restarted the ranks."""
    forward, calls = Criterion.forward, iter(range(100))

    def killing_forward(self: Criterion, *arguments: Any) -> Any:
        if next(calls) == 3 and distributed.rank() == 1 and not distributed.restarted():
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *arguments)

    Criterion.forward = killing_forward  # type: ignore[method-assign]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    build_evaluator("instance", build_dataset(TINY.data, "val").metadata)  # raises now if pycocotools is missing
    if sys.argv[2:] == ["restarted"]:
        die_once()
        with distributed.process_group("cpu"):
            train.train(rank_dependent(target), resume=False, profile=False)
    else:
        with distributed.process_group("cpu"):
            torch.save(run(target), target / f"rank_{distributed.rank()}.pt")
