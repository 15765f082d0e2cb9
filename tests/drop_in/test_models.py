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


def tiny(family: str) -> tuple[Any, dict[str, Any]]:
    """A model of another family, without dropout, and its inputs beside targets."""
    inputs: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 64, 64)}
    if family in ("Eomt", "EomtDinov3"):
        config = getattr(transformers, f"{family}Config")(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16, num_queries=6,
            num_blocks=1, num_labels=CLASSES, train_num_points=200, num_upscale_blocks=1, intermediate_size=64,
        )  # fmt: skip
        made = getattr(transformers, f"{family}ForUniversalSegmentation")(config)
    elif family == "MaskFormer":
        backbone = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        decoder = transformers.DetrConfig(
            d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32, num_queries=6
        )
        made = transformers.MaskFormerForInstanceSegmentation(transformers.MaskFormerConfig(
            backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32,
            num_labels=CLASSES, use_auxiliary_loss=True,
        ))  # fmt: skip
        inputs["output_hidden_states"] = True  # of which its auxiliary losses are made
    else:
        backbone = transformers.SwinConfig(
            image_size=64, embed_dim=12, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        made = transformers.OneFormerForUniversalSegmentation(transformers.OneFormerConfig(
            backbone_config=backbone, num_labels=CLASSES, num_queries=12, hidden_dim=64, mask_dim=64, conv_dim=64,
            encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32,
            is_training=True, text_encoder_width=64, text_encoder_context_length=8, text_encoder_num_layers=1,
            text_encoder_vocab_size=50, text_encoder_n_ctx=4, task_seq_len=8, train_num_points=200,
        ))  # fmt: skip
        inputs |= {"task_inputs": torch.randint(50, (2, 8)), "text_inputs": torch.randint(50, (2, 8, 8))}
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return randomised(made).train(), inputs


@pytest.mark.slow
@pytest.mark.parametrize(("family", "parts"), [("Eomt", 2), ("EomtDinov3", 2), ("MaskFormer", 2), ("OneFormer", 3)])
def test_a_training_step_of_each_family(family: str, parts: int) -> None:
    torch.manual_seed(0)
    plain, inputs = tiny(family)
    inputs["mask_labels"] = [(torch.rand(count, 64, 64) < 0.3).float() for count in (3, 4)]
    inputs["class_labels"] = [torch.randint(CLASSES, (count,)) for count in (3, 4)]
    losses, gradients = [], []
    for model in (copy.deepcopy(plain), fast := equip_model(copy.deepcopy(plain))):
        torch.manual_seed(1)  # the same points
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    scale = max(gradient.abs().max().item() for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * scale)
    modules = zip(fast.modules(), plain.modules(), strict=True)
    assert sum(type(a) is not type(b) for a, b in modules) == parts
    assert [type(module) for module in unequip_model(fast).modules()] == [type(module) for module in plain.modules()]


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
