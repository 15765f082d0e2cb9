"""Verification of Mask2Formers: the official recording, errors that it must find, and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from maskformer_fast.config import (
    BackboneConfig,
    DecoderConfig,
    LossConfig,
    ModelConfig,
    PixelDecoderConfig,
    SolverConfig,
)
from maskformer_fast.interop.files import read_weights
from maskformer_fast.interop.official import model_to_ours
from maskformer_fast.interop.verification.mask2former import boolean_masks, read_mask2former, verify_mask2former
from maskformer_fast.modeling import MaskFormer, build_model
from maskformer_fast.recipes import load_recipe
from maskformer_fast.training.optimizer import learning_rate_factor, parameter_groups
from tests.support.paths import ORACLES

RECORDING = ORACLES / "m2f_r50_coco_tiny"
THINGS = (True,) * 80 + (False,) * 53
LOSS = LossConfig(2.0, 5.0, 5.0)
needs_recording = pytest.mark.skipif(not RECORDING.is_dir(), reason="no recordings of the official code")
TINY = ModelConfig(
    type="mask2former",
    num_classes=3,
    backbone=BackboneConfig("resnet_micro"),
    pixel_decoder=PixelDecoderConfig(
        conv_dim=32, mask_dim=16, norm_groups=8, encoder_layers=1, encoder_heads=4, encoder_ffn_dim=32
    ),
    decoder=DecoderConfig(layers=2, hidden_dim=32, num_heads=4, ffn_dim=32, num_queries=5),
)


def official_network() -> torch.nn.Module:
    weights, config = model_to_ours(read_weights(RECORDING / "model.pkl"), RECORDING)
    network = build_model(config).eval()
    network.load_state_dict(weights)
    return network


@needs_recording
def test_the_official_recording_is_reproduced() -> None:
    report = verify_mask2former(official_network(), THINGS, RECORDING, LOSS)
    wrong = {name: quantity for name, quantity in report.quantities.items() if quantity.ok is not True}
    assert wrong == {} and report.ok and len(report.quantities) > 280
    parts = {name.split(".")[0].split("@")[0] for name in report.quantities}
    assert parts >= {"features", "encoder", "hs", "aux", "attn_mask", "eval", "match", "losses", "losses64", "grads",
                     "grad_norm", "post", "f64", "empty_second", "many_first", "n_kept", "thing_ids"}


@needs_recording
@pytest.mark.parametrize(
    ("parameter", "wrong"),
    [
        ("pixel_decoder.transformer.level_embed", {"encoder.0", "mask_features", "hs.1"}),
        ("predictor.level_embed.weight", {"hs.1", "pred_logits", "grad_norm"}),
        ("predictor.query_embed.weight", {"hs.1", "pred_masks"}),
        ("predictor.mask_embed.layers.2.bias", {"aux.0.pred_masks", "attn_mask.0"}),
        ("predictor.class_embed.weight", {"aux.0.pred_logits", "losses.loss_ce"}),
    ],
)
def test_a_wrong_weight_is_found(parameter: str, wrong: set[str]) -> None:
    network = official_network()
    with torch.no_grad():
        network.get_parameter(parameter).mul_(1.05)
    report = verify_mask2former(network, THINGS, RECORDING / "case.pt", LOSS)
    found = {name for name, quantity in report.quantities.items() if quantity.ok is False}
    assert not report.ok and found >= wrong
    assert not any(name.startswith("features") for name in found)


@needs_recording
def test_other_weights_of_the_loss_and_other_things_are_found() -> None:
    report = verify_mask2former(official_network(), (True,) * 133, RECORDING / "case.pt", LossConfig(2.0, 5.0, 1.0))
    found = {name for name, quantity in report.quantities.items() if quantity.ok is False}
    assert {"losses.loss_dice", "thing_ids", "match.final.0.C"} <= found


@needs_recording
def test_groups_and_schedule_of_the_optimiser_are_the_official_ones() -> None:
    optim = torch.load(RECORDING / "case.pt", weights_only=True)["optim"]
    solver = load_recipe("mask2former/coco_panoptic_r50").solver
    network = official_network()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    ours = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(network, solver)
        for parameter in group["params"]  # type: ignore[attr-defined]
    }
    assert ours.keys() == {name.removeprefix("sem_seg_head.") for name in optim["groups"]}
    for name, expected in optim["groups"].items():
        assert ours[name.removeprefix("sem_seg_head.")] == pytest.approx(expected), name
    assert (solver.milestones, solver.max_steps) == (tuple(optim["steps"]), optim["max_iter"])
    schedule = optim["schedule_100_iters"]
    short = SolverConfig(max_steps=100, schedule="step", milestones=tuple(schedule["steps"]), warmup_steps=10)
    for step, factor in schedule["factor_at"].items():
        assert learning_rate_factor(int(step), short) == pytest.approx(factor)


def test_packed_masks_are_unpacked_from_the_highest_bit() -> None:
    got = boolean_masks({"bits": torch.tensor([0b10100000, 0b01000000], dtype=torch.uint8), "shape": [2, 5]})
    assert got.tolist() == [[True, False, True, False, False], [False, False, False, False, True]]


def minimal(**changes: Any) -> dict[str, Any]:
    content = {
        "images": [torch.zeros(3, 32, 32, dtype=torch.uint8)], "image_sizes": [(32, 32)], "padded_size": (32, 32),
        "f32": {"pred_logits": torch.zeros(1, 5, 4)},
    }  # fmt: skip
    return content | changes


def test_a_recording_of_outputs_alone_is_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_model(TINY).eval()
    with torch.no_grad():
        predictions = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), all_layers=True)
    outputs = {"pred_logits": predictions.class_logits[-1], "aux.0.pred_logits": predictions.class_logits[0]}
    torch.save(minimal(f32=outputs), tmp_path / "case.pt")
    report = verify_mask2former(network, (True, False, False), tmp_path)
    assert report.ok and set(report.quantities) == set(outputs)
    torch.save(minimal(f32=outputs | {"hs.9": torch.zeros(1)}), tmp_path / "case.pt")
    assert not verify_mask2former(network, (True, False, False), tmp_path).ok


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (minimal(f32={"pred_logits": torch.zeros(1, 5, 9)}), "expected the network's 3 classes and no-object"),
        ({"images": []}, "expected a recording with images, image_sizes, padded_size and f32"),
        (minimal(attn_mask={"0": 3}), "not a recording of this Mask2Former"),
    ],
)
def test_files_that_are_no_recording_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "case.pt")
    with pytest.raises(ValueError, match=message):
        verify_mask2former(build_model(TINY), (True, False, False), tmp_path / "case.pt")


def test_missing_files_and_other_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a recording"):
        read_mask2former(tmp_path, 3)
    (tmp_path / "case.pt").write_bytes(b"no recording")
    with pytest.raises(ValueError, match="not a recording of tensors"):
        read_mask2former(tmp_path, 3)
    other = MaskFormer(ModelConfig(num_classes=3, backbone=BackboneConfig("resnet_micro")))
    with pytest.raises(ValueError, match="network: expected Mask2Former, got MaskFormer"):
        verify_mask2former(other, (True, False, False), tmp_path)
