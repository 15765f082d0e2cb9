"""Modules of the networks against independent formulations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.config import BackboneConfig
from maskformer_fast.modeling import BACKBONES, resolve_backbone
from maskformer_fast.modeling.attention import MultiHeadAttention
from maskformer_fast.modeling.backbone import build_backbone
from maskformer_fast.modeling.conv import ConvNorm, FrozenBatchNorm2d
from maskformer_fast.modeling.position import sine_positions
from maskformer_fast.modeling.swin import (
    DropPath,
    PatchMerging,
    SwinBlock,
    SwinTransformer,
    from_windows,
    shifted_window_mask,
    to_windows,
)
from maskformer_fast.modeling.transformer import TransformerDecoder, TransformerEncoder


def randomize(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def test_attention_equals_torch() -> None:
    torch.manual_seed(0)
    ours = randomize(MultiHeadAttention(24, 3, dropout=0.0))
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value)[0])


def test_encoder_and_decoder_equal_torch_with_zero_positions() -> None:
    torch.manual_seed(0)
    encoder = randomize(TransformerEncoder(2, 24, 3, 40, dropout=0.0))
    their_encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 3, 40, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    their_encoder.load_state_dict(encoder.state_dict())
    x, zero = torch.randn(2, 9, 24), torch.zeros(1, 1, 24)
    torch.testing.assert_close(encoder(x, zero), their_encoder(x))

    decoder = randomize(TransformerDecoder(2, 24, 3, 40, dropout=0.0))
    their_decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(24, 3, 40, dropout=0.0, batch_first=True), 2, norm=nn.LayerNorm(24)
    )
    their_decoder.load_state_dict(decoder.state_dict())
    queries = torch.zeros(4, 24)
    states = decoder(queries, x, zero, all_layers=True)
    torch.testing.assert_close(states[-1], their_decoder(torch.zeros(2, 4, 24), x))
    torch.testing.assert_close(decoder(queries, x, zero, all_layers=False), states[-1:])
    assert not torch.allclose(states[0], states[1], atol=1e-2)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([4, 8, 12]))
@settings(max_examples=20, deadline=None)
def test_sine_positions_equal_their_formula(height: int, width: int, channels: int) -> None:
    got = sine_positions(height, width, channels, torch.device("cpu"))
    half = channels // 2
    expected = torch.zeros(height, width, channels)
    for y in range(height):
        for x in range(width):
            for axis, (index, size) in enumerate(((y, height), (x, width))):
                for i in range(half):
                    angle = (index + 1) / (size + 1e-6) * 2 * math.pi / 10_000 ** (2 * (i // 2) / half)
                    expected[y, x, axis * half + i] = math.cos(angle) if i % 2 else math.sin(angle)
    torch.testing.assert_close(got, expected.reshape(1, -1, channels), rtol=0, atol=1e-5)


def test_frozen_batch_norm_equals_eval_mode_and_has_no_parameters() -> None:
    torch.manual_seed(0)
    reference = nn.BatchNorm2d(6).eval()
    for value in reference.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 2.0)
    frozen = FrozenBatchNorm2d(6).train()
    frozen.load_state_dict({k: v for k, v in reference.state_dict().items() if k != "num_batches_tracked"})
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(frozen(x), reference(x))
    assert not list(frozen.parameters())
    torch.testing.assert_close(frozen.running_mean, reference.running_mean)


def attend_by_hand(block: SwinBlock, x: Tensor) -> Tensor:
    """Shifted-window attention computed token by token, without rolls, masks or partitions."""
    _, height, width, channels = x.shape
    window, shift, heads = block.window, block.shift, block.attn.num_heads
    padded = [size + -size % window for size in (height, width)]
    x = F.pad(x, (0, 0, 0, padded[1] - width, 0, padded[0] - height))
    qkv = block.attn.qkv(x)[0].reshape(*padded, 3, heads, channels // heads)
    table = block.attn.relative_position_bias_table
    places = torch.cartesian_prod(torch.arange(padded[0]), torch.arange(padded[1]))
    output = torch.zeros(*padded, channels)
    for y, x_ in places.tolist():
        # Shifting by s puts the window borders at s, s + window, ...; the strip before s is a separate window.
        seen = (places - shift).div(window, rounding_mode="floor") == (torch.tensor([y, x_]) - shift) // window
        rows = places[seen.all(1)]
        query, keys, values = qkv[y, x_, 0], qkv[rows[:, 0], rows[:, 1], 1], qkv[rows[:, 0], rows[:, 1], 2]
        offset = torch.tensor([y, x_]) - rows + window - 1
        bias = table[offset[:, 0] * (2 * window - 1) + offset[:, 1]]
        weights = ((query * keys).sum(-1) / math.sqrt(channels // heads) + bias).softmax(0)
        output[y, x_] = (weights[..., None] * values).sum(0).flatten()
    return block.attn.proj(output)[None, :height, :width]


@pytest.mark.parametrize("size", [(6, 9), (4, 7), (2, 2), (3, 8)])
@pytest.mark.parametrize("shift", [0, 1])
def test_window_attention_equals_attention_token_by_token(size: tuple[int, int], shift: int) -> None:
    torch.manual_seed(0)
    block = randomize(SwinBlock(8, 2, window=3, shift=shift, drop_path=0.0))
    nn.init.normal_(block.attn.relative_position_bias_table)
    nn.init.normal_(block.attn.qkv.weight)
    x = torch.randn(1, *size, 8)
    with torch.no_grad():
        got = block.attend(x, shifted_window_mask(x, 3))
        torch.testing.assert_close(got, attend_by_hand(block, x), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_joining_windows_inverts_splitting_into_windows(batch: int, rows: int, columns: int, window: int) -> None:
    x = torch.randn(batch, rows * window, columns * window, 2)
    windows = to_windows(x, window)
    assert windows.shape == (batch, rows * columns, window * window, 2)
    torch.testing.assert_close(windows[:, -1].unflatten(1, (window, window)), x[:, -window:, -window:])
    torch.testing.assert_close(from_windows(windows, window, rows * window, columns * window), x)


def test_patch_merging_takes_columns_of_rows_and_pads_odd_sizes() -> None:
    torch.manual_seed(0)
    merging = randomize(PatchMerging(3))
    x = torch.randn(2, 5, 3, 3)
    padded = F.pad(x, (0, 0, 0, 1, 0, 1))
    parts = [padded[:, dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]
    torch.testing.assert_close(merging(x, 3, 2), merging.reduction(merging.norm(torch.cat(parts, -1))))


def test_drop_path_drops_samples_as_a_unit_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    kept = drop(x)
    assert kept.unique().tolist() == pytest.approx([0.0, 1.0 / 0.75])
    assert torch.equal(kept.amin((1, 2)), kept.amax((1, 2)))
    assert abs(kept.mean() - 1) < 0.05
    assert torch.equal(drop.eval()(x), x)


def test_drop_path_rises_linearly_over_all_blocks() -> None:
    backbone = build_backbone(BackboneConfig("swin_micro", depths=(1, 2, 3, 1), drop_path_rate=0.3))
    rates = [block.drop_path.rate for stage in backbone.layers for block in stage.blocks]
    assert rates == pytest.approx([0.05 * index for index in range(7)])


@pytest.mark.parametrize("name", [name for name in BACKBONES if not name.startswith("vit")])
def test_presets_are_complete_and_give_strides_4_to_32(name: str) -> None:
    config = resolve_backbone(BackboneConfig(name))
    assert config == BACKBONES[name]
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig(name))
        features = backbone(torch.empty(1, 3, 70, 101))
    assert [tuple(feature.shape[1:]) for feature in features] == [
        (channels, -(-70 // stride), -(-101 // stride))
        for channels, stride in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]


def test_only_resnet101c_dilates_and_only_in_res5() -> None:
    for name, expected in (("resnet101c", [1, 2, 4]), ("resnet101", [1, 1, 1])):
        with torch.device("meta"):
            backbone = build_backbone(BackboneConfig(name))
        assert [block.conv2.dilation[0] for block in backbone.res5] == expected
        assert [block.conv2.stride[0] for block in backbone.res5] == [2, 1, 1]
        assert all(block.conv2.dilation == (1, 1) for block in [*backbone.res2, *backbone.res3, *backbone.res4])


def test_given_settings_replace_those_of_a_preset() -> None:
    config = resolve_backbone(BackboneConfig("resnet101", weights="w.safetensors", norm="frozen", res2_channels=128))
    assert (config.weights, config.norm, config.res2_channels) == ("w.safetensors", "frozen", 128)
    assert (config.depths, config.stem, config.stem_channels) == ((3, 4, 23, 3), "basic", 64)


@pytest.mark.parametrize(
    ("norm", "kind"), [("batch", nn.BatchNorm2d), ("frozen", FrozenBatchNorm2d), ("sync", nn.SyncBatchNorm)]
)
def test_all_norms_of_a_backbone_are_of_the_given_kind(norm: Any, kind: type[nn.Module]) -> None:
    backbone = build_backbone(BackboneConfig("resnet_micro", norm=norm))
    assert all(type(m.norm) is kind for m in backbone.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BackboneConfig("resnet18"), r"backbone\.name: expected one of resnet50, resnet101, .*, got 'resnet18'"),
        (BackboneConfig("resnet50", window_size=7), r"backbone\.window_size: .*resnet50, got 7"),
        (BackboneConfig("swin_tiny", norm="batch"), r"backbone\.norm: .*swin_tiny, got 'batch'"),
        (BackboneConfig("swin_tiny", embed_dim=50), r"backbone\.num_heads: expected divisors"),
        (BackboneConfig("resnet50", depths=(1, 1, 0, 1)), r"backbone\.depths: expected four positive"),
        (BackboneConfig("resnet101c", stem_channels=65), r"backbone\.stem_channels: expected an even"),
    ],
)
def test_backbones_that_cannot_be_built_are_refused_by_field(config: BackboneConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_backbone(config)


def test_activation_checkpointing_of_swin_keeps_results_and_saves_memory() -> None:
    torch.manual_seed(0)
    arguments = {"depths": (1, 2, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8), "window_size": 4}
    plain = SwinTransformer(**arguments, drop_path_rate=0.3).train()
    thrifty = SwinTransformer(**arguments, drop_path_rate=0.3, checkpointing=True).train()
    thrifty.load_state_dict(plain.state_dict())
    image = torch.randn(2, 3, 90, 70)
    kept, gradients = [], []
    for network in (plain, thrifty):
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)  # for stochastic depth
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = sum((feature**2).sum() for feature in network(image))
        total.backward()
        kept.append(sum(sizes.values()))
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kept[1] < 0.5 * kept[0]
    assert torch.equal(thrifty.eval()(image)[3], plain.eval()(image)[3])


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (3, 2, 1), (3, 1, 2)])
def test_a_convolution_trains_by_the_sums_of_conv2d(kernel: int, stride: int, dilation: int) -> None:
    torch.manual_seed(0)
    conv = ConvNorm(16, 24, kernel, nn.Identity(), stride=stride, dilation=dilation)
    x = torch.randn(2, 16, 9, 7, requires_grad=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, conv.weight)]
    expected = F.conv2d(*exact, stride=stride, padding=dilation * (kernel // 2), dilation=dilation)
    found = conv(x)
    slopes = torch.randn(found.shape)
    found.backward(slopes)
    expected.backward(slopes.double())
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)
    for tensor, reference in zip((x, conv.weight), exact, strict=True):
        torch.testing.assert_close(tensor.grad, reference.grad.float(), rtol=1e-4, atol=1e-4)
