"""The network against recorded outputs and parameter shapes of the official implementation."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.modeling import build_model

ORACLES = Path(__file__).resolve().parents[2].parent / "shared/oracles/official"

pytestmark = pytest.mark.skipif(not ORACLES.is_dir(), reason="no recorded outputs of the official implementation here")

TINY_BACKBONE = BackboneConfig("resnet50", stem_channels=16, bottleneck_channels=8, res2_channels=32)
TINY_DECODER = DecoderConfig(layers=3, hidden_dim=64, num_heads=4, ffn_dim=96, dropout=0.0, num_queries=24)
TINY = {
    "r50_ade_tiny": ModelConfig(
        num_classes=13,
        backbone=TINY_BACKBONE,
        pixel_decoder=PixelDecoderConfig(conv_dim=64, mask_dim=32),
        decoder=TINY_DECODER,
    ),
    "r50_coco_panoptic_tiny": ModelConfig(
        num_classes=133,
        backbone=TINY_BACKBONE,
        pixel_decoder=PixelDecoderConfig(
            conv_dim=64, mask_dim=32, encoder_layers=2, encoder_heads=4, encoder_ffn_dim=96, encoder_dropout=0.0
        ),
        decoder=TINY_DECODER,
    ),
}
FULL = {
    "r50_ade": ModelConfig(num_classes=150),
    "swint_ade": ModelConfig(num_classes=150, backbone=BackboneConfig("swin_tiny")),
    "r50_coco_panoptic": ModelConfig(
        num_classes=133,
        backbone=BackboneConfig("resnet50", norm="frozen"),
        pixel_decoder=PixelDecoderConfig(encoder_layers=6),
    ),
}


class NumpyUnpickler(pickle.Unpickler):
    """Admits numpy arrays in plain containers and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "numpy":
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def our_name(official: str) -> str | None:
    """Name of an official parameter here; None where it is no parameter of the network."""
    if official == "criterion.empty_weight" or official.endswith("relative_position_index"):
        return None
    return official.removeprefix("sem_seg_head.")


def assert_close(name: str, got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape, name
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"{name}: differs by {error:.2e} of the largest magnitude"


@pytest.mark.parametrize("name", TINY)
def test_intermediates_equal_the_recorded_ones(name: str) -> None:
    model = build_model(TINY[name]).eval()
    with (ORACLES / name / "model.pkl").open("rb") as file:
        weights = NumpyUnpickler(file).load()["model"]
    state = {our_name(key): torch.from_numpy(value) for key, value in weights.items() if our_name(key)}
    model.load_state_dict(state)

    case = torch.load(ORACLES / name / "case.pt", weights_only=True)
    expected = case["f32"]
    height, width = case["padded_size"]
    # Whatever lies in the padding must not be seen.
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    for padded, image in zip(images, case["images"], strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    valid_sizes = torch.tensor(case["image_sizes"])

    with torch.no_grad():
        features = model.backbone(model.normalize(images, valid_sizes))
        pixel_embeddings, memory = model.pixel_decoder(features)
        states = model.predictor.decode(memory, all_layers=True)
        every = model(images, valid_sizes, all_layers=True)
        last = model(images, valid_sizes)

    for index, feature in enumerate(features):
        assert_close(f"res{index + 2}", feature, expected[f"features.res{index + 2}"])
    assert_close("mask_features", pixel_embeddings, expected["mask_features"])
    if "transformer_encoder" in expected:
        assert_close("transformer_encoder", memory, expected["transformer_encoder"])
    assert ("transformer_encoder" in expected) == (TINY[name].pixel_decoder.encoder_layers > 0)
    assert_close("hs", states, expected["hs"])
    assert len(every.class_logits) == len(every.mask_embeddings) == 3
    for index, prefix in enumerate(("aux.0.", "aux.1.", "")):
        assert_close(f"pred_logits of layer {index}", every.class_logits[index], expected[f"{prefix}pred_logits"])
        assert_close(f"pred_masks of layer {index}", every.mask_logits(index), expected[f"{prefix}pred_masks"])
    assert last.class_logits.shape[0] == last.mask_embeddings.shape[0] == 1
    assert_close("pred_logits, last layer alone", last.class_logits[0], expected["pred_logits"])
    assert_close("pred_masks, last layer alone", last.mask_logits(), expected["pred_masks"])


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
