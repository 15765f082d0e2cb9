"""Behaviour of the built networks: inputs, layers, padding, gradients, precision, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.modeling import build_model
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import PixelPredictions, Predictions

BACKBONES = ("resnet_micro", "swin_micro")
TYPES = ("maskformer", "per_pixel", "per_pixel_plus")
QUERIES, CLASSES, LAYERS, CONV_DIM, MASK_DIM = 7, 5, 3, 32, 16


def config(
    backbone: str | BackboneConfig = "resnet_micro", kind: Any = "maskformer", layers: int = LAYERS, **encoder: Any
) -> ModelConfig:
    return ModelConfig(
        type=kind,
        num_classes=CLASSES,
        backbone=BackboneConfig(backbone) if isinstance(backbone, str) else backbone,
        pixel_decoder=PixelDecoderConfig(
            conv_dim=CONV_DIM, mask_dim=MASK_DIM, norm_groups=8, encoder_heads=4, encoder_ffn_dim=48, **encoder
        ),
        decoder=DecoderConfig(layers=layers, hidden_dim=32, num_heads=4, ffn_dim=48, num_queries=QUERIES),
    )


def build(model_config: ModelConfig) -> nn.Module:
    torch.manual_seed(0)
    return build_model(model_config).eval()


def random_images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("size", [(64, 96), (61, 47), (1, 1), (5, 130)])
def test_images_of_any_size_give_masks_at_a_quarter_of_it(backbone: str, size: tuple[int, int]) -> None:
    height, width = size
    predictions = build(config(backbone))(random_images(2, height, width))
    assert isinstance(predictions, Predictions)
    assert predictions.class_logits.shape == (1, 2, QUERIES, CLASSES + 1)
    assert predictions.mask_embeddings.shape == (1, 2, QUERIES, MASK_DIM)
    assert predictions.pixel_features.shape == (2, CONV_DIM, -(-height // 4), -(-width // 4))
    assert predictions.pixel_embeddings.shape == (2, MASK_DIM, -(-height // 4), -(-width // 4))
    assert predictions.valid_sizes.tolist() == [[height, width]] * 2
    assert predictions.input_size == size
    assert all(torch.isfinite(tensor).all() for tensor in predictions[:3])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kind", TYPES[1:])
def test_per_pixel_baselines_give_class_scores(backbone: str, kind: str) -> None:
    model = build(config(backbone, kind))
    predictions = model(random_images(2, 45, 64), all_layers=True)
    assert isinstance(predictions, PixelPredictions)
    layers = LAYERS if kind == "per_pixel_plus" else 1
    assert predictions.logits.shape == (layers, 2, CLASSES, 12, 16)
    last = model(random_images(2, 45, 64))
    torch.testing.assert_close(last.logits, predictions.logits[-1:])
    assert not any("class_embed" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["maskformer", "per_pixel_plus"])
def test_predictions_have_the_layers_of_the_mode_or_the_argument(kind: str) -> None:
    model = build(config(kind=kind))
    images = random_images(2, 64, 64)
    assert model(images)[0].shape[0] == 1
    assert model(images, all_layers=True)[0].shape[0] == LAYERS
    model.train()
    assert model(images)[0].shape[0] == LAYERS
    assert model(images, all_layers=False)[0].shape[0] == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_predictions_without_the_last_convolution_equal_projected_ones(batch: int) -> None:
    model = build(config(encoder_layers=1))
    with torch.no_grad():
        model.pixel_decoder.mask_features.bias.normal_()
    images, sizes = random_images(batch, 70, 96), torch.tensor([[70, 90]] * batch)
    deferred, projected = model(images, sizes), model(images, sizes, project=True)
    assert deferred.projection is not None and projected.projection is None
    assert deferred.pixel_features.shape[1] == CONV_DIM and projected.pixel_features.shape[1] == MASK_DIM
    torch.testing.assert_close(deferred.pixel_embeddings, projected.pixel_embeddings, rtol=1e-5, atol=1e-5)
    for a, b in zip(deferred[:2], projected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(layer_mask_logits(deferred), layer_mask_logits(projected), rtol=1e-4, atol=1e-5)

    every = model(images, sizes, all_layers=True)
    assert every.projection is None
    torch.testing.assert_close(layer_mask_logits(every), layer_mask_logits(projected), rtol=1e-5, atol=1e-5)
    model.train()
    assert model(images, sizes).projection is None
    assert model(images, sizes, project=False).projection is not None


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.no_cover
def test_networks_export_as_one_graph(project: bool) -> None:
    model = build(config(layers=1))
    images, other = random_images(2, 64, 64), random_images(2, 64, 64, seed=1)
    exported = torch.export.export(model, (images,), {"project": project})
    got, expected = exported.module()(other, project=project), model(other, project=project)
    assert isinstance(got, Predictions)
    torch.testing.assert_close(got.class_logits, expected.class_logits)
    torch.testing.assert_close(layer_mask_logits(got), layer_mask_logits(expected))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_pixels_in_the_padding_have_no_effect(backbone: str) -> None:
    model = build(config(backbone))
    valid_sizes = torch.tensor([[64, 50], [33, 64]])
    images, other = random_images(2, 64, 64), random_images(2, 64, 64, seed=1)
    for image, changed, (height, width) in zip(images, other, valid_sizes.tolist(), strict=True):
        changed[:, :height, :width] = image[:, :height, :width]
    assert not torch.equal(images, other)
    for a, b in zip(model(images, valid_sizes)[:3], model(other, valid_sizes)[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)

    normalized = model.normalize(images, valid_sizes)
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.config.pixel_mean, model.config.pixel_std))
    torch.testing.assert_close(normalized[0, :, :64, :50], (images[0, :, :64, :50].float() - mean) / std)
    assert normalized[0, :, :, 50:].count_nonzero() == 0
    assert normalized[1, :, 33:].count_nonzero() == 0


def test_inputs_of_a_wrong_dtype_or_shape_are_refused_by_name() -> None:
    model = build(config())
    images = random_images(2, 32, 32)
    with pytest.raises(TypeError, match=r"images: expected torch\.uint8.*float32"):
        model(images.float())
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, H, W\], got \[3, 32, 32\]"):
        model(images[0])
    with pytest.raises(TypeError, match=r"valid_sizes: expected torch\.int64"):
        model(images, torch.tensor([[32.0, 32.0]] * 2))
    with pytest.raises(ValueError, match=r"valid_sizes: expected shape \[2, 2\], got \[1, 2\]"):
        model(images, torch.tensor([[32, 32]]))
    with pytest.raises(ValueError, match=r"model\.num_classes: expected at least 1, got 0"):
        build_model(ModelConfig())


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kind", TYPES)
def test_every_parameter_gets_a_finite_gradient(backbone: str, kind: str) -> None:
    model = build(config(backbone, kind, encoder_layers=1)).train()
    with torch.no_grad():  # zero biases would hide gradients behind the decoder's zero states
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    predictions = model(random_images(2, 64, 75))
    outputs = (
        [predictions.class_logits, *(layer_mask_logits(predictions, layer) for layer in range(LAYERS))]
        if isinstance(predictions, Predictions)
        else [predictions.logits]
    )
    # A weighted sum: in a plain sum, normalisations would make some gradients zero.
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    unused = {name for name, parameter in model.named_parameters() if parameter.grad.count_nonzero() == 0}
    # The first self-attention gets zero states, so all of its values are the bias and its weights have no effect.
    assert unused <= {"predictor.transformer.decoder.layers.0.self_attn.in_proj_weight"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_channels_last_and_bfloat16_predictions_are_close_to_float32(backbone: str) -> None:
    model = build(config(backbone, encoder_layers=1))
    images = random_images(2, 61, 96)
    with torch.no_grad():
        expected = model(images)
        model = model.to(memory_format=torch.channels_last)
        channels_last = model(images.contiguous(memory_format=torch.channels_last))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(images)
    for a, b, c in zip(expected[:3], channels_last[:3], half[:3], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        assert c.dtype == torch.bfloat16
        assert torch.isfinite(c).all()
        assert (c - a).norm() < 0.1 * a.norm()
    masks = layer_mask_logits(half)
    assert (masks - layer_mask_logits(expected)).norm() < 0.1 * layer_mask_logits(expected).norm()


# Only one shifted block and one transformer encoder, as tracing symbolic sizes takes long.
@pytest.mark.parametrize(
    "model_config",
    [
        pytest.param(config(layers=1, encoder_layers=1), id="resnet_micro"),
        pytest.param(
            config(BackboneConfig("swin_micro", depths=(1, 2, 1, 1)), layers=1), id="swin_micro", marks=pytest.mark.slow
        ),
    ],
)
@pytest.mark.no_cover
def test_networks_compile_as_one_graph_for_all_sizes(model_config: ModelConfig) -> None:
    model = build(model_config)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for index, (height, width) in enumerate([(192, 160), (160, 256), (225, 131)]):
        images = random_images(2, height, width, seed=index)
        valid_sizes = torch.tensor([[height, width], [height - 9, width - 30]])
        if index == 0:
            torch._dynamo.mark_dynamic(images, (2, 3))
        with torch.no_grad():
            got, expected = compiled(images, valid_sizes), model(images, valid_sizes)
        for a, b in zip(got[:3], expected[:3], strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(layer_mask_logits(got), layer_mask_logits(expected))
        assert got.input_size == (height, width)
    assert counter.frame_count == 1
