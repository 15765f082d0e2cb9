"""Networks with fused convolutions against the networks that they were made from."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional

import maskformer_fast
from maskformer_fast.config import BackboneConfig, Config, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.inference.load import load_network
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.fuse_for_cpu import (
    FusedBottleneck,
    FusedConv,
    convolves_bfloat16,
    fuse_for_cpu,
    implementations,
)
from maskformer_fast.modeling.fused_linear import FusedAttention, FusedLinear, FusedSwinStage
from maskformer_fast.modeling.weights import save_weights
from maskformer_fast.ops.mask_product import layer_mask_logits

BACKBONES = {
    "frozen": BackboneConfig("resnet_micro", norm="frozen", depths=(2, 1, 2, 2)),
    "batch, wider": BackboneConfig(
        "resnet_micro", norm="batch", stem_channels=32, bottleneck_channels=32, res2_channels=64
    ),
    "deep stem": BackboneConfig("resnet_micro", norm="sync", stem="deep", stem_channels=32, multi_grid=True),
    "input is the shortcut": BackboneConfig("resnet_micro", norm="batch", stem_channels=32, res2_channels=32),
    "swin": BackboneConfig("swin_micro"),
}


def make_network(backbone, kind="maskformer", encoder_layers=0):
    """Network with BatchNorm statistics as of a trained one, so that folding them changes the weights."""
    torch.manual_seed(0)
    network = build_model(ModelConfig(
        type=kind, num_classes=7, backbone=backbone,
        pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=32, norm_groups=8, encoder_layers=encoder_layers),
        decoder=DecoderConfig(layers=2, hidden_dim=32, num_heads=4, ffn_dim=64, num_queries=10),
    ))  # fmt: skip
    for module in network.modules():
        if hasattr(module, "running_var"):
            with torch.no_grad():
                module.running_mean.uniform_(-0.5, 0.5), module.running_var.uniform_(0.3, 3)
                module.weight.uniform_(-0.5, 1.5), module.bias.uniform_(-0.5, 0.5)
    return network.eval()


def error(got, wanted):
    return ((got.float() - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("size", [(64, 96), (45, 131)])
@torch.no_grad()
def test_fused_predictions_equal_the_networks(name, size):
    network = make_network(BACKBONES[name], encoder_layers=1 if name == "frozen" else 0)
    fast = copy.deepcopy(network)
    fuse_for_cpu(fast)
    kinds = {type(module) for module in fast.modules()}
    assert FusedConv in kinds and (FusedBottleneck in kinds) == (name != "swin") == (FusedSwinStage not in kinds)
    assert {FusedLinear, FusedAttention} <= kinds and nn.Linear not in kinds
    assert nn.BatchNorm2d not in kinds and nn.SyncBatchNorm not in kinds
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    sizes = torch.tensor([size, (size[0] - 9, size[1] - 20)])
    wanted, got = network(images, sizes), fast(images, sizes)
    again = fast(images, sizes)  # a call does not change its inputs
    for one in (got, again):
        assert error(one.class_logits, wanted.class_logits) < 2e-5
        assert error(layer_mask_logits(one), layer_mask_logits(wanted)) < 5e-5


@torch.no_grad()
def test_fused_per_pixel_baselines_equal_the_networks():
    for kind in ("per_pixel", "per_pixel_plus"):
        network = make_network(BACKBONES["frozen"], kind)
        fast = copy.deepcopy(network)
        fuse_for_cpu(fast)
        images = torch.randint(0, 256, (1, 3, 64, 80), dtype=torch.uint8)
        assert error(fast(images).logits, network(images).logits) < 2e-5


needs_bfloat16 = pytest.mark.skipif(not convolves_bfloat16(), reason="this processor has no bfloat16 convolutions")


@needs_bfloat16
@pytest.mark.parametrize("name", ["batch, wider", "swin"])
@torch.no_grad()
def test_fused_bfloat16_is_as_close_as_autocast(name):
    network = make_network(BACKBONES[name])
    fast = copy.deepcopy(network)
    fuse_for_cpu(fast, torch.bfloat16)
    images = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    wanted = layer_mask_logits(network(images))
    with torch.autocast("cpu", torch.bfloat16):
        ours, autocast = (error(layer_mask_logits(model(images)), wanted) for model in (fast, network))
    assert 1e-5 < ours < max(2 * autocast, 0.05)


@pytest.mark.parametrize("winograd", [True, False])
@torch.no_grad()
def test_the_size_of_the_maps_decides_and_is_told(winograd, monkeypatch):
    asked = set()

    def is_faster(in_channels, out_channels, dtype, pixels):
        asked.add(pixels)
        return winograd

    monkeypatch.setattr("maskformer_fast.modeling.fuse_for_cpu.winograd_is_faster", is_faster)
    network = make_network(BACKBONES["batch, wider"])
    fast = copy.deepcopy(network)
    fuse_for_cpu(fast)
    assert set(implementations(fast).values()) <= {"oneDNN float32", "PyTorch float32"}  # no convolution ran yet
    for size in ((64, 96), (32, 32), (64, 96)):
        images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
        assert error(layer_mask_logits(fast(images)), layer_mask_logits(network(images))) < 5e-5
        assert size[0] * size[1] // 16 in asked
    told = implementations(fast)
    assert told["pixel_decoder.layer_1"] == ("Winograd float32" if winograd else "direct float32")
    assert told["pixel_decoder.adapter_1"] == told["backbone.stem.conv1"] == "direct float32"
    assert len(told) == sum(isinstance(module, FusedConv | FusedLinear) for module in fast.modules())
    assert implementations(network) == {}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
@torch.no_grad()
def test_counts_of_implementations_are_told_once_for_each_size(dtype, monkeypatch, caplog):
    monkeypatch.setattr(
        "maskformer_fast.modeling.fuse_for_cpu.winograd_is_faster", lambda c, n, dtype, pixels: pixels > 300
    )
    monkeypatch.setattr("maskformer_fast.modeling.fused_linear.packed_linear_is_faster", lambda channels, gelu: False)
    caplog.set_level("INFO", "maskformer_fast.modeling.fuse_for_cpu")
    network = make_network(BACKBONES["batch, wider"])
    fuse_for_cpu(network, dtype)
    convs, linears = (sum(isinstance(m, kind) for m in network.modules()) for kind in (FusedConv, FusedLinear))
    name = str(dtype).removeprefix("torch.")
    by = f"{linears} linear layers: {linears} {'PyTorch' if dtype == torch.float32 else 'oneDNN'} {name}"
    first = f"rebuilt for the CPU: {convs} convolutions: {convs} chosen at the first picture of a size; {by}"
    assert caplog.messages == [first]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for size in ((64, 96), (32, 32), (64, 96), (96, 64)):
            network(torch.zeros(1, 3, *size, dtype=torch.uint8))
    large, small = caplog.messages[1:3]
    assert len(caplog.messages) == 4 and caplog.messages[3] == large.replace("64x96", "96x64")
    assert large.startswith(f"images 1x3x64x96: {convs} convolutions: ") and " Winograd float32" in large
    assert small == f"images 1x3x32x32: {convs} convolutions: {convs} direct {name}; {by}"
    counts = Counter(implementations(network).values())
    assert f"{counts[f'direct {name}']} direct {name}" in large and large.endswith(by)


@torch.no_grad()
def test_fused_networks_take_images_of_a_pixel_and_empty_batches():
    network = make_network(BACKBONES["input is the shortcut"], encoder_layers=1)
    fast = copy.deepcopy(network)
    fuse_for_cpu(fast)
    for shape in ((1, 3, 1, 1), (3, 3, 1, 1), (2, 3, 33, 1), (1, 3, 2, 77)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        assert error(layer_mask_logits(fast(images)), layer_mask_logits(network(images))) < 5e-5
    assert fast(images[:0]).class_logits.shape == network(images[:0]).class_logits.shape


@pytest.mark.parametrize("faster", [True, False], ids=["oneDNN", "MKL"])
@torch.no_grad()
def test_linear_layers_equal_pytorchs_by_either_library(faster, monkeypatch):
    monkeypatch.setattr("maskformer_fast.modeling.fused_linear.packed_linear_is_faster", lambda channels, gelu: faster)
    torch.manual_seed(0)
    plain = nn.Linear(45, 31)
    for shape in ((1, 45), (3, 7, 45), (0, 45)):
        x, residual = torch.randn(shape), torch.randn(*shape[:-1], 31)
        for bias in (plain.bias, None):
            wanted = torch.nn.functional.linear(x, plain.weight, bias)
            for name, function in {"none": lambda y: y, "gelu": functional.gelu, "relu": functional.relu}.items():
                layer = pickle.loads(pickle.dumps(FusedLinear(plain.weight, bias, torch.float32, name)))
                assert layer.weight.is_mkldnn == faster
                torch.testing.assert_close(layer(x), function(wanted))
            before = residual.clone()
            torch.testing.assert_close(FusedLinear(plain.weight, bias, torch.float32)(x, residual), wanted + residual)
            assert torch.equal(residual, before)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
@pytest.mark.parametrize("name", ["batch, wider", "swin"])
@torch.no_grad()
def test_copies_of_a_fused_network_predict_the_same(copier, dtype, name):
    network = make_network(BACKBONES[name])
    fuse_for_cpu(network, dtype)
    images = torch.randint(0, 256, (1, 3, 50, 70), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert torch.equal(layer_mask_logits(copier(network)(images)), layer_mask_logits(network(images)))


def test_a_fused_network_refuses_to_be_moved_converted_or_saved():
    network = make_network(BACKBONES["frozen"])
    fuse_for_cpu(network)
    for move in (lambda: network.to("meta"), network.double, network.bfloat16):
        with pytest.raises(RuntimeError, match=r"rebuilt for the CPU and stays in its precision; .*load_network"):
            move()
    with pytest.raises(RuntimeError, match=r"has no checkpoint's weights; .*load_network"):
        network.state_dict()
    network.to("cpu").float().train().eval()  # these change nothing
    assert not network(torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)).class_logits.isnan().any()


def write_weights(path):
    network = make_network(BACKBONES["frozen"])
    metadata = Metadata("test", tuple("abcdefg"), (True,) * 7, tuple(range(7)), ((0, 0, 0),) * 7)
    save_weights(path, network, Config(model=network.config), metadata, step=0)
    return network


def test_bfloat16_is_refused_on_processors_without_it(monkeypatch):
    monkeypatch.setattr("maskformer_fast.modeling.fuse_for_cpu.convolves_bfloat16", lambda: False)
    with pytest.raises(ValueError, match=r"dtype: expected torch.float32, as .*, got torch.bfloat16"):
        fuse_for_cpu(make_network(BACKBONES["batch, wider"]), torch.bfloat16)


def test_convolutions_stay_float32_on_processors_without_bfloat16(tmp_path, monkeypatch):
    write_weights(tmp_path / "weights.safetensors")
    monkeypatch.setattr("maskformer_fast.inference.load.convolves_bfloat16", lambda: False)
    predictor = maskformer_fast.load(tmp_path / "weights.safetensors", "cpu", amp="bf16")
    assert {module.dtype for module in predictor.network.modules() if isinstance(module, FusedConv)} == {torch.float32}
    assert predictor.amp == "bf16"
    assert predictor.predict(torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)).labels.shape == (40, 50)


def test_load_fuses_convolutions_and_load_network_does_not(tmp_path):
    path = tmp_path / "weights.safetensors"
    network = write_weights(path)
    image = torch.randint(0, 256, (3, 70, 50), dtype=torch.uint8)
    plain = load_network(path, "cpu")
    assert not any(isinstance(module, FusedConv) for module in plain.network.modules())
    assert plain.network.state_dict().keys() == network.state_dict().keys()
    half = torch.bfloat16 if convolves_bfloat16() else torch.float32
    for amp, dtype in ((None, torch.float32), ("fp16", torch.float32), ("bf16", half)):
        fast = maskformer_fast.load(path, "cpu", amp=amp)
        assert {module.dtype for module in fast.network.modules() if isinstance(module, FusedConv)} == {dtype}
        same = (fast.predict(image).labels == plain.predict(image).labels).float().mean()
        assert same >= (0.5 if amp == "bf16" else 0.999)
    with pytest.raises(ValueError, match="amp: expected one of 'off', 'bf16', 'fp16', got 'fp8'"):
        maskformer_fast.load(path, "cpu", amp="fp8")
