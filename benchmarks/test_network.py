"""The demo's network, a training example, and whole images through `Predictor.predict`."""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Measure
from maskformer_fast.config import TASKS, AugmentConfig, DataConfig, ShapesConfig, Task
from maskformer_fast.data import build_dataset
from maskformer_fast.data.loader import collate
from maskformer_fast.data.transforms import Sample, TrainTransform
from maskformer_fast.inference.load import load
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import Example, pack_masks, unpack_masks

SIZE = (480, 640)
CROP = (512, 512)


@lru_cache(maxsize=1)
def predictor(device: str) -> Predictor:
    """The demo's, untrained: no mask can be left out, as it could be after training."""
    torch.manual_seed(0)
    found = load("demo", device)
    assert isinstance(found, Predictor)
    return found


@lru_cache(maxsize=1)
def example() -> Example:
    return build_dataset(DataConfig(shapes=ShapesConfig(size=SIZE, train_images=1, num_stuff=8)), "train")[0]


@pytest.mark.parametrize("batch", [1, 4], ids="B{}".format)
def test_network_forward(measure: Measure, device: str, batch: int) -> None:
    """Images to class and mask logits."""
    network = predictor(device).network
    images = torch.randint(256, (batch, 3, 256, 256), dtype=torch.uint8).to(device)

    @torch.no_grad()
    def forward() -> tuple[Tensor, Tensor]:
        found = network(images)
        return found.class_logits[-1], layer_mask_logits(found)

    classes, masks = measure(f"network of the demo, {batch} x 256x256", forward)
    assert classes.shape[:2] == masks.shape[:2] == (batch, 20) and masks.shape[2:] == (64, 64)


@pytest.mark.parametrize("task", TASKS)
def test_predict(measure: Measure, device: str, task: Task) -> None:
    """A photograph-sized image to a result of its size."""
    image = example().image
    found = measure(f"predict {task} 480x640, network of the demo", partial(predictor(device).predict, image, task))
    size = {"semantic": lambda: found.labels.shape, "panoptic": lambda: found.id_map.shape,
            "instance": lambda: found.size}[task]()  # fmt: skip
    assert tuple(size) == SIZE


def test_loader_item(measure: Measure) -> None:
    """A training example that is read already: resizing, crop, colour jitter, flip, packed masks."""
    augment = AugmentConfig(short_edge=(512,), crop_size=CROP, color_jitter=True)
    dataset = build_dataset(DataConfig(shapes=ShapesConfig(size=SIZE, train_images=1, num_stuff=8)), "train")
    transform = TrainTransform(augment, "panoptic", dataset.metadata)
    found = measure("loader: one example 512x512", lambda: transform(example(), np.random.default_rng(0)))
    assert tuple(found.image.shape) == (3, *CROP)


@pytest.mark.parametrize("masks", ["packed", "float"])
def test_loader_batch(measure: Measure, masks: str) -> None:
    """Four examples to a batch: bit-packed targets as ours are, or float masks as other loaders give them."""
    packed = (torch.rand(20, *CROP) > 0.9).cumsum(0) == 1
    sample = Sample(torch.zeros(3, *CROP, dtype=torch.uint8), torch.arange(20), pack_masks(packed), image_id=0, path="")
    batch = [sample] * 4
    floats = [unpack_masks(sample.masks, CROP[1]).float()] * 4
    images = [sample.image] * 4

    def dense() -> tuple[Tensor, Tensor]:
        return torch.stack(images), torch.stack(floats)

    found = measure("loader: batch of 4 x 20 masks 512x512", dense if masks == "float" else partial(collate, batch, 32))
    assert len(found[0]) == 4
