"""What a GPU does in `Predictor` and post-processing: no wait of the host before the last launch, half-precision masks.

On CPU tensors, where the same functions run that run on a GPU's. The tests marked ``gpu`` are on one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from maskformer_fast.inference import postprocess
from maskformer_fast.inference.load import load
from maskformer_fast.structures import Predictions
from tests.support.host_reads import NoHostRead
from tests.support.images import photo
from tests.support.postprocess_cases import INPUT_SIZE, OUTPUT_SIZES, all_results, random_predictions

IS_THING = (True, False, True, False, True, False, True)
TASKS: dict[str, Callable[[Predictions], list[Any]]] = {
    "semantic": lambda predictions: postprocess.semantic(predictions, OUTPUT_SIZES),
    "semantic with scores": lambda predictions: postprocess.semantic(predictions, OUTPUT_SIZES, True),
    "panoptic": lambda predictions: postprocess.panoptic(predictions, OUTPUT_SIZES, IS_THING, 0.4, 0.3),
    "instance": lambda predictions: postprocess.instances(predictions, OUTPUT_SIZES, IS_THING, 10),
}


class Events(NoHostRead):
    """Records the launches of our operators; `read` records that of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "maskformer_fast":
            self.names.append("launch")
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocess, "_on_gpu", lambda tensor: True)


@pytest.mark.parametrize(("task", "reads"), [("semantic", 0), ("semantic with scores", 0), ("panoptic", 1),
                                             ("instance", 1)])  # fmt: skip
@pytest.mark.usefixtures("on_gpu")
def test_values_are_read_once_and_after_the_last_launch(
    task: str, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions = random_predictions()
    TASKS[task](predictions)  # tensors of flags are copied to the device once
    events = Events()
    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__contains__"):
        original = getattr(torch.Tensor, name)

        def recorded(self: Any, *arguments: Any, original: Any = original) -> Any:
            if self is not predictions.valid_sizes:  # on the host, as `Predictor` leaves them
                events.names.append("read")
            return original(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, recorded)
    with events:
        TASKS[task](predictions)
    monkeypatch.undo()
    launches = len(events.names) - reads
    assert launches >= 3 and events.names == ["launch"] * launches + ["read"] * reads


def test_results_equal_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = random_predictions(queries=30)
    wanted = all_results(predictions, OUTPUT_SIZES)
    monkeypatch.setattr(postprocess, "_on_gpu", lambda tensor: True)
    for ours, theirs in zip(all_results(predictions, OUTPUT_SIZES), wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(a, torch.Tensor):
                assert a.shape == b.shape and a.dtype == b.dtype
                assert (a == b).float().mean() > 0.999 if not a.is_floating_point() else torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("on_gpu")
def test_masks_have_the_precision_of_the_network(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = random_predictions()
    predictions = predictions._replace(mask_embeddings=predictions.mask_embeddings.to(dtype))  # features: as of a norm
    seen = []
    for name in ("panoptic_inference", "instance_inference", "semantic_inference"):
        original = getattr(postprocess, name)

        def recorded(logits: torch.Tensor, *arguments: Any, original: Any = original) -> Any:
            seen.append(logits.dtype)
            return original(logits, *arguments)

        monkeypatch.setattr(postprocess, name, recorded)
    for task in TASKS.values():
        task(predictions)
    assert len(seen) >= 9 and set(seen) == {dtype}


def test_valid_sizes_of_a_predictors_predictions_are_the_hosts() -> None:
    predictor: Any = load("demo", "cpu")
    given = []
    predictor.network.register_forward_pre_hook(lambda module, inputs: given.append(inputs[1]))
    upload = predictor._upload
    predictor._upload = lambda tensor: upload(tensor).clone()  # as a copy on another device
    predictions = predictor.run_network([photo(height=60, width=84)])
    assert predictions.valid_sizes is not given[0] and torch.equal(predictions.valid_sizes, given[0])


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_nothing_waits_for_the_gpu_but_the_last_transfer(amp: Any) -> None:
    predictor: Any = load("demo", "cuda", amp=amp)
    predictor.config = replace(predictor.config, test=replace(predictor.config.test, short_edge=64))
    images = [np.ascontiguousarray(photo(seed, 96, 130)) for seed in range(2)]
    sizes = [image.shape[:2] for image in images]
    predictor.infer(images, ("semantic", "panoptic", "instance"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        predictions = predictor.run_network(images)
        labels = predictor.postprocess(predictions, sizes, ("semantic",))["semantic"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert labels[0].labels.shape == sizes[0]


@pytest.mark.gpu
def test_a_gpus_results_are_the_cpus() -> None:
    predictions = random_predictions(queries=30)
    moved = Predictions(*(value.cuda() if isinstance(value, torch.Tensor) else value for value in predictions))
    moved = moved._replace(valid_sizes=predictions.valid_sizes, input_size=INPUT_SIZE)
    for name, task in TASKS.items():
        for ours, theirs in zip(task(moved), task(predictions), strict=True):
            a, b = (getattr(result, "id_map" if name == "panoptic" else "labels") for result in (ours, theirs))
            assert a.shape == b.shape and (a.cpu() == b).float().mean() > 0.99
