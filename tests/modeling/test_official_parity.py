"""Names and shapes of parameters against full-size official models; for their outputs see tests/interop."""

from __future__ import annotations

import json

import pytest
import torch

from maskformer_fast.config import BackboneConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.modeling import build_model
from tests.support.paths import ORACLES

pytestmark = pytest.mark.skipif(not ORACLES.is_dir(), reason="no recorded outputs of the official implementation here")

FULL = {
    "r50_ade": ModelConfig(num_classes=150),
    "swint_ade": ModelConfig(num_classes=150, backbone=BackboneConfig("swin_tiny")),
    "r50_coco_panoptic": ModelConfig(
        num_classes=133,
        backbone=BackboneConfig("resnet50", norm="frozen"),
        pixel_decoder=PixelDecoderConfig(encoder_layers=6),
    ),
}


def our_name(official: str) -> str | None:
    """Name in this package of an official parameter; None if it is not one of the network."""
    if official == "criterion.empty_weight" or official.endswith("relative_position_index"):
        return None
    return official.removeprefix("sem_seg_head.")


@pytest.mark.parametrize("name", FULL)
def test_full_size_models_have_the_official_parameters(name: str) -> None:
    official = json.loads((ORACLES / "state_dict_keys.json").read_text())[name]
    expected = {our_name(key): tuple(shape) for key, shape in official.items() if our_name(key)}
    with torch.device("meta"):
        model = build_model(FULL[name])
    ours = {
        key: tuple(value.shape) for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")
    }
    assert ours == expected
