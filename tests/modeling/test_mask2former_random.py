"""Mask2Formers of random configurations: the fused network beside the eager one, and `transformers` where it has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from maskformer_fast.config import BackboneConfig, Config, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.interop.huggingface import write_folder
from maskformer_fast.modeling import Mask2Former, build_model
from maskformer_fast.modeling.backbone import is_swin, resolve_backbone
from maskformer_fast.modeling.fuse_for_cpu import convolves_bfloat16, fuse_for_cpu
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import Predictions
from tests.modeling.test_mask2former import randomize

TOLERANCE = 2e-4
"""Largest difference over the largest value, in float32."""
HALF_TOLERANCE = 0.06
"""Norm of the difference over the norm, in bfloat16."""
AMPLIFICATION = 10
"""More is allowed where rounding alone moves the eager network: a norm over the few values of a tiny map divides by
next to nothing. So many times its own distance to float64, or in bfloat16 to float32."""


def random_model(rng: np.random.Generator) -> ModelConfig:
    """A small network; half of the ones with a Swin Transformer are such as `transformers` has."""

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    depths = tuple(int(depth) for depth in rng.integers(1, 3, 4))
    if rng.random() < 0.6:
        head = pick(1, 2, 3)
        backbone = BackboneConfig(
            "swin_tiny", depths=depths, embed_dim=head * pick(4, 8, 12), num_heads=(head, 2 * head, 4 * head, 8 * head),
            window_size=pick(2, 3, 5, 7, 12), drop_path_rate=0.0,
        )  # fmt: skip
    else:
        backbone = BackboneConfig(
            "resnet_micro", depths=depths, stem=pick("basic", "deep"), stem_channels=pick(4, 6, 16),
            bottleneck_channels=pick(3, 8, 16), res2_channels=pick(8, 20, 32), multi_grid=False,
            norm=pick("batch", "frozen"),
        )  # fmt: skip
    heads = pick(1, 2, 4)
    pixel_decoder = PixelDecoderConfig(
        conv_dim=pick(64, 96), mask_dim=pick(3, 16, 40), encoder_layers=pick(1, 2, 3), encoder_heads=heads,
        encoder_ffn_dim=pick(7, 48, 100), encoder_dropout=0.0,
    )  # fmt: skip
    decoder = DecoderConfig(
        layers=pick(1, 2, 3, 5, 9), hidden_dim=pick(32, pixel_decoder.conv_dim), num_heads=heads if rng.random() < 0.5
        else pick(1, 2, 8), ffn_dim=pick(5, 64), dropout=0.0, num_queries=pick(1, 2, 7, 33),
        attention_masks=pick("resized", "resized", "direct"),
    )  # fmt: skip
    classes = pick(1, 2, 19, 150)
    return ModelConfig(
        type="mask2former", num_classes=classes, backbone=backbone, pixel_decoder=pixel_decoder, decoder=decoder,
        padding=pick("mean", "black"),
    )


def random_batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images [B, 3, H, W] of tiny, odd and even sizes, and their valid sizes."""
    batch = int(rng.integers(1, 4))
    low, high = ((1, 9), (20, 70), (60, 150))[rng.integers(3)]
    height, width = (int(side) for side in rng.integers(low, high, 2))
    images = torch.from_numpy(rng.integers(0, 256, (batch, 3, height, width), dtype=np.uint8))
    valid = np.stack([rng.integers(1, height + 1, batch), rng.integers(1, width + 1, batch)], 1)
    valid[0] = height, width
    return images, torch.from_numpy(valid)


def outputs_of(predictions: Predictions) -> list[Tensor]:
    return [predictions.pixel_embeddings, predictions.class_logits, layer_mask_logits(predictions)]


def distance(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape and torch.isfinite(got).all()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


def assert_near(got: list[Tensor], expected: list[Tensor], exact: Callable[[], list[Tensor]]) -> None:
    distances = list(map(distance, got, expected))
    if max(distances) >= TOLERANCE:
        own = list(map(distance, expected, exact()))
        assert all(d < max(TOLERANCE, AMPLIFICATION * o) for d, o in zip(distances, own, strict=True)), (distances, own)


def check_one(seed: int, folder: Path) -> str:
    """Compare the networks of one seed -> what was compared."""
    rng = np.random.default_rng(seed)
    config = random_model(rng)
    images, valid = random_batch(rng)
    network = build_model(config).eval()
    assert isinstance(network, Mask2Former)
    randomize(network, seed)
    with torch.no_grad():
        expected = network(images, valid)
        fused = build_model(config)
        fused.load_state_dict(network.state_dict())
        fuse_for_cpu(fused)

        def exact() -> list[Tensor]:
            double = build_model(config).eval()
            double.load_state_dict(network.state_dict())
            return outputs_of(double.double()(images, valid))

        assert_near(outputs_of(fused(images, valid)), outputs_of(expected), exact)
        compared = ["fused"]
        if convolves_bfloat16():
            half = build_model(config)
            half.load_state_dict(network.state_dict())
            fuse_for_cpu(half, torch.bfloat16)
            with torch.autocast("cpu", torch.bfloat16):
                low, eager = half(images, valid), network(images, valid)
            assert all(torch.isfinite(tensor).all() for tensor in low[:3])
            got, own = (
                float((each.pixel_embeddings.float() - expected.pixel_embeddings).norm()) for each in (low, eager)
            )
            assert got < max(HALF_TOLERANCE * float(expected.pixel_embeddings.norm()), AMPLIFICATION * own)
            compared.append("bfloat16")
        same_heads = config.pixel_decoder.encoder_heads == config.decoder.num_heads
        if is_swin(resolve_backbone(config.backbone)) and same_heads:
            transformers = pytest.importorskip("transformers")
            transformers.utils.logging.disable_progress_bar()
            names = tuple(f"c{index}" for index in range(config.num_classes))
            metadata = Metadata("x", names, (False,) * len(names), tuple(range(len(names))), ((0, 0, 0),) * len(names))
            write_folder(folder, network.state_dict(), Config(model=config), metadata)
            theirs = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(folder).eval()
            direct = build_model(replace(config, decoder=replace(config.decoder, attention_masks="direct"))).eval()
            direct.load_state_dict(network.state_dict())
            ours, outputs = direct(images, valid), theirs(network.normalize(images, valid))
            got_logits = [ours.class_logits[-1], layer_mask_logits(ours)]
            their_logits = [outputs.class_queries_logits, outputs.masks_queries_logits]
            assert_near(got_logits, their_logits, lambda: [exact()[1][-1], exact()[2]])
            compared.append("transformers")
    return ", ".join(compared)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You'd better set embed_dim:UserWarning")
@pytest.mark.parametrize("seed", range(24))
def test_random_configurations(seed: int, tmp_path: Path) -> None:
    assert check_one(seed, tmp_path / "theirs").startswith("fused")
