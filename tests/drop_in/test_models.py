"""Models with an equipped criterion and deformable attention give the losses and gradients of transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from maskformer_fast.drop_in import equip_loss, equip_model, unequip_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")
CLASSES, QUERIES = 7, 11


def mask2former(head: bool = True) -> Any:
    backbone = transformers.SwinConfig(
        image_size=64, embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, num_labels=CLASSES, num_queries=QUERIES, feature_size=32, mask_feature_size=32,
        hidden_dim=32, num_attention_heads=4, encoder_layers=2, decoder_layers=3, dim_feedforward=32,
        encoder_feedforward_dim=32, train_num_points=400, dropout=0.0, use_auxiliary_loss=True,
    )  # fmt: skip
    torch.manual_seed(0)
    made = transformers.Mask2FormerForUniversalSegmentation if head else transformers.Mask2FormerModel
    return randomised(made(config))


def randomised(model: nn.Module) -> nn.Module:
    """Random offsets and weights of the attention, which are constant in a new model."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and the gradient of every parameter."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, 64, 96, generator=generator)
    padding = torch.ones(2, 64, 96, dtype=torch.long)
    padding[1, :, 70:] = 0
    masks = [(torch.rand(count, 64, 96, generator=generator) < 0.3).float() for count in (3, 5)]
    labels = [torch.randint(CLASSES, (count,), generator=generator) for count in (3, 5)]
    model.train()
    torch.manual_seed(4)
    loss = model(pixel_values=pixels, pixel_mask=padding, mask_labels=masks, class_labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("equip", [equip_model, equip_loss])
def test_loss_and_gradients_of_a_training_step(equip: Any) -> None:
    plain = mask2former()
    fast = equip(copy.deepcopy(plain))
    expected_loss, expected = step(plain)
    loss, gradients = step(fast)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected.keys() and any("sampling_offsets" in name for name in expected)
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_copies_keep_the_parts_and_unequip_removes_them() -> None:
    plain = mask2former()
    names = [type(module).forward for module in plain.modules()]
    state = list(plain.state_dict())
    fast = equip_model(plain)
    changed = [type(module).forward is not name for module, name in zip(fast.modules(), names, strict=True)]
    assert fast is plain and list(fast.state_dict()) == state
    assert sum(changed) == 4  # two layers of the pixel decoder, the criterion and its matcher
    twin = copy.deepcopy(equip_model(fast))
    assert [type(m).forward is not n for m, n in zip(twin.modules(), names, strict=True)] == changed
    assert [type(module).forward for module in unequip_model(twin).modules()] == names


def test_a_model_without_a_head_has_equal_outputs_and_attention_weights() -> None:
    plain = mask2former(head=False).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = plain(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
        got = equip_model(plain)(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
    for theirs, ours in zip(expected.masks_queries_logits, got.masks_queries_logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for theirs, ours in zip(expected.attentions, got.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["mask2former", "oneformer"])
def test_the_attention_of_each_family_and_precision(family: str, dtype: torch.dtype) -> None:
    name = {"mask2former": "Mask2Former", "oneformer": "OneFormer"}[family]
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=[""])
    torch.manual_seed(0)
    plain = getattr(module, f"{name}PixelDecoderEncoderMultiscaleDeformableAttention")(32, 4, 3, 4)
    plain = randomised(plain).to(dtype)
    sizes = [(6, 8), (3, 4), (2, 2)]
    cells = sum(h * w for h, w in sizes)
    state, position = (torch.randn(2, cells, 32).to(dtype) for _ in range(2))
    arguments: dict[str, Any] = {
        "attention_mask": torch.rand(2, cells) < 0.2, "encoder_hidden_states": state, "position_embeddings": position,
        "reference_points": torch.rand(2, cells, 3, 2).to(dtype), "spatial_shapes_list": sizes,
    }  # fmt: skip
    if family == "oneformer":
        arguments["spatial_shapes"] = torch.tensor(sizes)
    holder = nn.Sequential(plain)
    expected, expected_weights = plain(state, **arguments)
    got, weights = equip_model(holder)[0](state, output_attentions=True, **arguments)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}.get(dtype, 6e-2)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights, expected_weights, rtol=tolerance, atol=tolerance)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="model: expected a model for segmentation of MaskFormer"):
        equip_model(nn.Linear(2, 2))
