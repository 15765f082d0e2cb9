"""Mask2Former: equality with `transformers`, and what holds of every network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.studies.attention_mask_flips import masks_of_layers, scale_masks
from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.interop.huggingface import read_folder
from maskformer_fast.interop.official import model_to_ours
from maskformer_fast.modeling import Mask2Former, build_model, fused_mask2former
from maskformer_fast.modeling.fuse_for_cpu import convolves_bfloat16, fuse_for_cpu
from maskformer_fast.modeling.fused_mask2former import (
    FusedDeformableEncoderLayer,
    FusedFeedForward,
    FusedInputProjection,
)
from maskformer_fast.modeling.masked_decoder import LevelMasks
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import Predictions
from tests.support.paths import ORACLES

SWIN = BackboneConfig(
    "swin_tiny", depths=(1, 1, 2, 1), embed_dim=8, num_heads=(1, 2, 4, 8), window_size=5, drop_path_rate=0.0
)
RESNET = BackboneConfig("resnet_micro")
PIXEL = PixelDecoderConfig(
    conv_dim=64, mask_dim=48, encoder_layers=2, encoder_heads=4, encoder_ffn_dim=48, encoder_dropout=0.0
)
DECODER = DecoderConfig(layers=4, hidden_dim=32, num_heads=4, ffn_dim=96, num_queries=7, dropout=0.0)


def model_config(backbone: BackboneConfig = RESNET, **changes: Any) -> ModelConfig:
    defaults: dict[str, Any] = {"num_classes": 5, "pixel_decoder": PIXEL, "decoder": DECODER}
    return ModelConfig(type="mask2former", backbone=backbone, **(defaults | changes))


def randomize(network: nn.Module, seed: int = 0) -> None:
    """Random weights and biases everywhere, large enough that masks have edges and heads look elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.named_parameters():
        random = torch.randn(value.shape, generator=generator)
        with torch.no_grad():
            if value.ndim == 1 and name.endswith("weight"):  # of norms
                value.copy_(1 + 0.2 * random)
            elif name.endswith("bias"):
                value.copy_(0.5 * random)
            elif "embed" in name or "queries" in name:
                value.copy_(random)
            else:
                value.copy_(random / value[0].numel() ** 0.5)
                if "mask_features" in name or "mask_projection" in name:
                    # Features are positive: without this, a mask's logits would hardly change over the image.
                    value.sub_(value.mean(1, keepdim=True))


def made(config: ModelConfig, seed: int = 0) -> Mask2Former:
    network = build_model(config).eval()
    randomize(network, seed)
    assert isinstance(network, Mask2Former)
    return network


def random_images(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def their_network(layout: dict[str, Any], sizes: dict[str, Any], folder: Path) -> Any:
    """Their network with random weights, saved in the folder."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    swin = transformers.SwinConfig(out_features=["stage1", "stage2", "stage3", "stage4"], drop_path_rate=0.0, **layout)
    config = transformers.Mask2FormerConfig(backbone_config=swin, num_labels=5, **sizes)
    theirs = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    randomize(theirs)
    theirs.save_pretrained(folder)
    return theirs


def assert_equal_to_theirs(theirs: Any, folder: Path, height: int, width: int) -> None:
    """Compare all layers' logits, and the attention masks of every layer but for logits that nearly tie."""
    got = read_folder(folder)
    config = replace(got.config.model, decoder=replace(got.config.model.decoder, attention_masks="direct"))
    network = build_model(config).eval()
    network.load_state_dict(got.weights)
    images = random_images(2, 3, height, width)
    visible: list[Tensor] = []
    for layer in network.predictor.transformer_cross_attention_layers:
        layer.register_forward_pre_hook(lambda _, arguments: visible.append(arguments[4]))
    hidden: list[Tensor] = []
    for layer in theirs.model.transformer_module.decoder.layers:
        layer.cross_attn.register_forward_pre_hook(
            lambda _, __, keywords: hidden.append(keywords["attn_mask"]), with_kwargs=True
        )
    with torch.no_grad():
        ours = network(images, all_layers=True)
        expected = theirs(
            network.normalize(images, torch.tensor([[height, width]] * 2)), output_auxiliary_logits=True
        )
    layers = [*expected.auxiliary_logits, expected]
    assert len(layers) == len(ours.class_logits) == config.decoder.layers + 1
    for layer, them in enumerate(layers):
        classes, masks = them["class_queries_logits"], them["masks_queries_logits"]
        ours_masks = layer_mask_logits(ours, layer)
        assert (ours.class_logits[layer] - classes).abs().max() < 1e-4 * classes.abs().max()
        assert ours_masks.shape == masks.shape and (ours_masks - masks).abs().max() < 1e-4 * masks.abs().max()
    assert len(visible) == len(hidden) == config.decoder.layers
    for ours_see, they_hide in zip(visible, hidden, strict=True):
        they_hide = they_hide.bool().unflatten(0, (2, config.decoder.num_heads))
        assert torch.equal(~ours_see.unsqueeze(1).expand_as(they_hide), they_hide)
    shares = [float(mask.float().mean()) for mask in visible]
    assert sum(0.02 < share < 0.98 for share in shares) >= 3, f"masks without edges: {shares}"


def test_all_layers_and_attention_masks_equal_those_of_transformers(tmp_path: Path) -> None:
    layout = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 5}
    sizes = {
        "feature_size": 64, "mask_feature_size": 48, "hidden_dim": 32, "encoder_feedforward_dim": 48,
        "encoder_layers": 2, "decoder_layers": 5, "num_attention_heads": 4, "dim_feedforward": 96, "num_queries": 7,
    }  # fmt: skip
    assert_equal_to_theirs(their_network(layout, sizes, tmp_path), tmp_path, 107, 75)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny", "swin_base"])
def test_published_layouts_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    layout: dict[str, Any] = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    if name == "swin_base":
        layout = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12}
    assert_equal_to_theirs(their_network(layout, {}, tmp_path), tmp_path, 192, 256)


@pytest.mark.parametrize("backbone", [RESNET, SWIN], ids=["resnet", "swin"])
@pytest.mark.parametrize("size", [(64, 96), (61, 47), (1, 1), (5, 130)])
@torch.no_grad()
def test_images_of_any_size_give_masks_at_a_quarter_of_it(backbone: BackboneConfig, size: tuple[int, int]) -> None:
    network = made(model_config(backbone))
    predictions = network(random_images(2, 3, *size))
    assert predictions.class_logits.shape == (1, 2, 7, 6) and predictions.mask_embeddings.shape == (1, 2, 7, 48)
    assert predictions.pixel_features.shape == (2, 64, -(-size[0] // 4), -(-size[1] // 4))
    assert predictions.pixel_embeddings.shape[1] == 48 and predictions.input_size == size
    assert all(torch.isfinite(tensor).all() for tensor in predictions[:3])
    every = network(random_images(2, 3, *size), all_layers=True)
    assert every.class_logits.shape[0] == DECODER.layers + 1 and every.projection is None
    torch.testing.assert_close(every.class_logits[-1:], predictions.class_logits, rtol=0, atol=0)
    masks = layer_mask_logits(predictions)
    assert (layer_mask_logits(every) - masks).abs().max() < 1e-5 * masks.abs().max()


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["random", "peaky"])
@torch.no_grad()
def test_resized_embeddings_flip_only_pixels_whose_logit_is_rounding(scale: float) -> None:
    network = made(model_config())
    scale_masks(network, scale)
    layers = list(masks_of_layers(network, random_images(2, 3, 133, 171)))
    assert len(layers) == DECODER.layers
    flips = 0
    for a, b, logits in layers:
        different = a != b
        flips += int(different.sum())
        # The two ways add the same products in another order: they differ by roundings of the logit's magnitude.
        assert not different.any() or logits.abs()[different].max() < 1e-5 * logits.abs().max()
        hidden = logits < 0
        expected = ~hidden | hidden.all(-1, keepdim=True)
        assert ((a != expected) & (logits.abs() > 1e-5 * logits.abs().max())).sum() == 0
    assert flips <= 2, f"{flips} of {sum(a.numel() for a, _, _ in layers)} pixels differ"


@torch.no_grad()
def test_a_query_with_an_empty_mask_sees_everything_and_nan_hides_nothing() -> None:
    pixels = torch.ones(1, 2, 8, 8)
    pixels[:, 1] = torch.linspace(-1, 1, 64).view(8, 8)
    identity = made(model_config()).pixel_decoder.projection._replace(
        weight=torch.eye(2)[:, :, None, None], bias=torch.zeros(2)
    )
    embeddings = torch.tensor([[[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [float("nan"), 0.0]]])
    for direct in (False, True):
        visible = LevelMasks(pixels, identity, [(2, 2), (4, 4), (8, 8)], direct).visible(embeddings, 1)
        assert visible.shape == (1, 4, 16)
        assert visible[0, 0].all() and visible[0, 1].all() and visible[0, 3].all()
        assert visible[0, 2].sum() == 8


@torch.no_grad()
def test_pixels_in_the_padding_have_no_effect() -> None:
    network = made(model_config(SWIN))
    valid_sizes = torch.tensor([[64, 50], [33, 64]])
    images, other = random_images(2, 3, 64, 64), random_images(2, 3, 64, 64, seed=1)
    for image, changed, (height, width) in zip(images, other, valid_sizes.tolist(), strict=True):
        changed[:, :height, :width] = image[:, :height, :width]
    assert not torch.equal(images, other)
    for a, b in zip(network(images, valid_sizes)[:3], network(other, valid_sizes)[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_every_parameter_gets_a_finite_gradient() -> None:
    network = made(model_config(SWIN)).train()
    predictions: Predictions = network(random_images(2, 3, 64, 75))
    outputs = [predictions.class_logits, *(layer_mask_logits(predictions, layer) for layer in range(5))]
    generator = torch.Generator().manual_seed(0)
    sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()
    without = [name for name, parameter in network.named_parameters() if not parameter.grad.count_nonzero()]
    assert without == []
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


@torch.no_grad()
def test_bfloat16_and_fused_predictions_are_close_to_float32() -> None:
    for backbone in (RESNET, SWIN):
        network = made(model_config(backbone))
        images, sizes = random_images(2, 3, 61, 96), torch.tensor([[61, 96], [50, 70]])
        expected = network(images, sizes)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(images, sizes)
        assert all(torch.isfinite(tensor).all() for tensor in half[:3])
        # Pixels on the edge of a mask flip in half precision, which moves single queries.
        assert (half.pixel_embeddings - expected.pixel_embeddings).norm() < 0.05 * expected.pixel_embeddings.norm()
        fuse_for_cpu(network)
        fused = network(images, sizes)
        assert (fused.class_logits - expected.class_logits).abs().max() < 1e-4 * expected.class_logits.abs().max()
        masks = layer_mask_logits(expected)
        assert (layer_mask_logits(fused) - masks).abs().max() < 1e-4 * masks.abs().max()


@pytest.mark.parametrize("block", [1, 100, 10_000])
@torch.no_grad()
def test_blocks_of_pixels_of_the_fused_encoder_do_not_change_results(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = made(model_config())
    images = random_images(2, 3, 64, 80)
    expected = network.pixel_decoder(network.backbone(network.normalize(images, torch.tensor([[64, 80]] * 2))))
    fuse_for_cpu(network)
    kinds = {type(module) for module in network.modules()}
    assert {FusedDeformableEncoderLayer, FusedFeedForward, FusedInputProjection} <= kinds and nn.Linear not in kinds
    monkeypatch.setattr(fused_mask2former, "_BLOCK", block)
    got = network.pixel_decoder(network.backbone(network.normalize(images, torch.tensor([[64, 80]] * 2))))
    for a, b in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        assert (a - b).abs().max() < 2e-5 * b.abs().max()


@pytest.mark.skipif(not convolves_bfloat16(), reason="this processor has no bfloat16 convolutions")
@torch.no_grad()
def test_fused_bfloat16_pixel_embeddings_are_close_to_float32() -> None:
    network = made(model_config(SWIN))
    images = random_images(1, 3, 64, 96)
    expected = network(images).pixel_embeddings
    fuse_for_cpu(network, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = network(images).pixel_embeddings.float()
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.no_cover
@torch.no_grad()
def test_the_network_compiles_as_one_graph_for_all_sizes() -> None:
    network = made(model_config(decoder=replace(DECODER, layers=2), pixel_decoder=replace(PIXEL, encoder_layers=1)))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    for index, (height, width) in enumerate([(192, 160), (160, 256), (225, 131)]):
        images = random_images(2, 3, height, width, seed=index)
        if index == 0:
            torch._dynamo.mark_dynamic(images, (2, 3))
        got, expected = compiled(images), network(images)
        for a, b in zip(got[:3], expected[:3], strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_settings_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"pixel_decoder\.encoder_layers: expected at least 1 for mask2former"):
        build_model(model_config(pixel_decoder=PixelDecoderConfig()))
    with pytest.raises(ValueError, match=r"decoder\.attention_masks"):
        DecoderConfig(attention_masks="exact")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["m2f_r50_coco_panoptic", "m2f_swint_ade_semantic", "m2f_swinl_coco_panoptic"])
def test_full_size_models_have_the_official_parameters(name: str) -> None:
    path = ORACLES / "state_dict_keys_mask2former.json"
    if not path.is_file():
        pytest.skip("no recordings of the official code")
    shapes = json.loads(path.read_text())[name]
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    constant = torch.ones(shapes["criterion.empty_weight"])
    constant[-1] = 0.1
    converted, config = model_to_ours(weights | {"criterion.empty_weight": constant}, name)
    assert config.type == "mask2former" and config.decoder.num_queries == (200 if "swinl" in name else 100)
    assert (config.decoder.layers, config.pixel_decoder.encoder_layers, config.pixel_decoder.encoder_heads) == (9, 6, 8)
    assert config.backbone.name == {"r50": "resnet50", "swint": "swin_tiny", "swinl": "swin_large"}[name.split("_")[1]]
    with torch.device("meta"):
        assert build_model(config).state_dict().keys() == converted.keys()
