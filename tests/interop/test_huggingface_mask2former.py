"""Folders of Hugging Face's Mask2Former: `transformers` loads the written ones, and wrong ones are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maskformer_fast.config import (
    BackboneConfig,
    Config,
    DecoderConfig,
    LossConfig,
    ModelConfig,
    PixelDecoderConfig,
    TestConfig,
)
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.interop.huggingface import read_folder, write_folder
from maskformer_fast.interop.names import ConvertError
from maskformer_fast.modeling import build_model, resolve_backbone
from maskformer_fast.ops.mask_product import layer_mask_logits

METADATA = Metadata("mine", ("road", "sky", "cat"), (False, False, True), (0, 1, 2), ((1, 2, 3),) * 3)
SWIN = BackboneConfig("swin_tiny", depths=(1, 1, 2, 1), embed_dim=8, num_heads=(1, 2, 4, 8), window_size=5)
MODEL = ModelConfig(
    type="mask2former",
    num_classes=3,
    backbone=SWIN,
    pixel_decoder=PixelDecoderConfig(
        conv_dim=64, mask_dim=32, encoder_layers=2, encoder_heads=4, encoder_ffn_dim=48, encoder_dropout=0.0
    ),
    decoder=DecoderConfig(layers=3, hidden_dim=32, num_heads=4, ffn_dim=96, dropout=0.0, num_queries=7),
    pixel_mean=(1.5, 20.25, 100.0),
)
CONFIG = Config(
    model=MODEL,
    loss=LossConfig(1.5, 4.0, 3.0, no_object_weight=0.2, mask_loss="bce", points=321, oversample=2.0, importance=0.5),
    test=TestConfig(short_edge=640, max_size=2560, panoptic_rule="mask2former"),
)


def random_weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    network = build_model(model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return network.state_dict()


@pytest.mark.parametrize("hidden_dim", [32, 64], ids=["projected", "equal widths"])
def test_a_written_folder_is_read_back_and_loaded_by_transformers(hidden_dim: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(CONFIG, model=replace(MODEL, decoder=replace(MODEL.decoder, hidden_dim=hidden_dim)))
    weights = random_weights(config.model)
    write_folder(tmp_path / "model", weights, config, METADATA)
    got = read_folder(tmp_path / "model")
    assert got.weights.keys() == weights.keys()
    assert all(torch.equal(got.weights[name], tensor) for name, tensor in weights.items())
    assert replace(got.config, model=replace(got.config.model, backbone=SWIN)) == config
    assert resolve_backbone(got.config.model.backbone) == resolve_backbone(SWIN)
    assert got.class_names == METADATA.class_names

    theirs, info = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(info.values()), info
    network = build_model(config.model).eval()
    network.load_state_dict(weights)
    images = torch.randint(0, 256, (1, 3, 75, 101), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, expected = network(images), theirs.eval()(network.normalize(images, torch.tensor([[75, 101]])))
    for a, b in (
        (ours.class_logits[-1], expected.class_queries_logits),
        (layer_mask_logits(ours), expected.masks_queries_logits),
    ):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-4 * b.abs().max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": BackboneConfig("resnet_micro")}, r"backbone\.name: expected a Swin Transformer, got"),
        ({"decoder": replace(MODEL.decoder, num_heads=2)}, r"encoder_heads: expected decoder\.num_heads=2"),
        ({"decoder": replace(MODEL.decoder, dropout=0.1)}, r"encoder_dropout: expected decoder\.dropout=0\.1"),
    ],
)
def test_networks_that_they_cannot_express_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = replace(CONFIG, model=replace(MODEL, **changes))
    with pytest.raises(ConvertError, match=message):
        write_folder(tmp_path / "model", random_weights(config.model), config, METADATA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pre_norm", True, "pre_norm: expected False, got true"),
        ("enforce_input_projection", True, "enforce_input_projection: expected False"),
        ("num_queries", "many", "num_queries: expected a value such as 100"),
    ],
)
def test_computations_that_ours_has_not_are_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "model", random_weights(MODEL), CONFIG, METADATA)
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ConvertError, match=message):
        read_folder(tmp_path / "model")
