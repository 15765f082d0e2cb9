"""EoMT: equality with `transformers`, and what holds of every network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig
from maskformer_fast.interop.huggingface import read_folder
from maskformer_fast.modeling import EoMT, build_model
from maskformer_fast.modeling.eomt import UpscaleBlock
from maskformer_fast.modeling.fuse_for_cpu import fuse_for_cpu
from maskformer_fast.modeling.vit import resample_positions
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.upscaling import upscaling_eager
from maskformer_fast.structures import LayerPredictions, Predictions

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "num_blocks": 3, "num_queries": 7,
    "num_labels": 5, "image_size": 96,
}  # fmt: skip


def randomize(network: nn.Module, seed: int = 0) -> None:
    """Random weights and biases everywhere, such that masks have edges."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.named_parameters():
        random = torch.randn(value.shape, generator=generator)
        with torch.no_grad():
            if "norm" in name or "gamma" in name or "lambda1" in name:
                value.copy_((0.0 if name.endswith("bias") else 1.0) + 0.3 * random)
            elif name.endswith("bias"):
                value.copy_(0.3 * random)
            elif "token" in name or "embed" in name or "query" in name:
                value.copy_(random)
            else:
                value.copy_(1.5 * random / value[0].numel() ** 0.5)


def made(positions: str = "learned", seed: int = 0, **changes: Any) -> EoMT:
    vit: dict[str, Any] = {
        "embed_dim": 32, "blocks": 5, "heads": 2, "mlp_dim": 64, "registers": 3, "image_size": (96, 96),
    }  # fmt: skip
    backbone = BackboneConfig("vit_small_dinov2" if positions == "learned" else "vit_small_dinov3", **(vit | changes))
    network = build_model(ModelConfig(
        type="eomt", num_classes=5, backbone=backbone, decoder=DecoderConfig(layers=3, num_queries=7), padding="black",
    ))  # fmt: skip
    assert isinstance(network, EoMT)
    randomize(network, seed)
    return network.eval()


def random_images(*shape: int, seed: int = 3) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def their_network(kind: str, folder: Path, **changes: Any) -> Any:
    """Their network with random weights, saved in the folder."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    theirs = getattr(transformers, f"{kind}ForUniversalSegmentation")(config).eval()
    randomize(theirs)
    theirs.save_pretrained(folder)
    return theirs


def set_grid(theirs: Any, height: int, width: int, learned: bool) -> None:
    """Let their network take images of another size, which it can only with changed positions."""
    theirs.grid_size = (height // 16, width // 16)
    if learned:
        table = theirs.embeddings.position_embeddings.weight
        resampled = resample_positions(table[None], (6, 6), theirs.grid_size)[0]
        theirs.embeddings.position_embeddings = nn.Embedding.from_pretrained(resampled)
        theirs.embeddings.position_ids = torch.arange(len(resampled))[None]


KINDS = {
    "dinov2": ("Eomt", {}),
    "dinov2_swiglu": ("Eomt", {"use_swiglu_ffn": True}),
    "dinov3": ("EomtDinov3", {"intermediate_size": 48, "num_register_tokens": 2}),
    "dinov3_eps": ("EomtDinov3", {"intermediate_size": 128, "layer_norm_eps": 1e-5}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "probability"), [((96, 96), 1.0), ((48, 144), 0.5), ((112, 64), 0.0)], ids=str)
@torch.no_grad()
def test_all_layers_equal_those_of_transformers(
    kind: str, size: tuple[int, int], probability: float, tmp_path: Path
) -> None:
    name, changes = KINDS[kind]
    theirs = their_network(name, tmp_path, **changes)
    got = read_folder(tmp_path)
    network = build_model(got.config.model).eval()
    network.load_state_dict(got.weights)
    assert isinstance(network, EoMT)
    set_grid(theirs, *size, learned=name == "Eomt")
    # Their evaluation keeps the mask of the block before where the probability is 0, so 1e-30 stands for it.
    theirs.attn_mask_probs.fill_(probability or 1e-30)
    network.set_mask_probability([probability] * 3)
    images = random_images(2, 3, *size)
    layers: list[tuple[Tensor, Tensor]] = []
    predict = theirs.predict
    theirs.predict = lambda tokens: layers.append(predict(tokens)) or layers[-1]
    torch.manual_seed(5)
    pixels = network.normalize(images, torch.tensor([size] * 2))
    theirs(pixels)
    assert len(layers) == 4
    torch.manual_seed(5)
    if probability == 0.0:  # ours draws nothing, and every query sees everything
        theirs_last = layers[-1]
        ours = network(images)
        assert isinstance(ours, Predictions)
        masks = layer_mask_logits(ours)
        assert (masks - theirs_last[0]).abs().max() < 1e-4 * theirs_last[0].abs().max()
    ours = network(images, all_layers=True)
    assert isinstance(ours, LayerPredictions) and len(ours.layers) == 4
    for mine, (masks, classes) in zip(ours.layers, layers, strict=True):
        assert (mine.class_logits[0] - classes).abs().max() < 1e-4 * classes.abs().max()
        assert (layer_mask_logits(mine) - masks).abs().max() < 1e-4 * masks.abs().max()
    shares = [float((masks > 0).float().mean()) for masks, _ in layers]
    assert all(0.02 < share < 0.98 for share in shares), f"masks without edges: {shares}"


@pytest.mark.parametrize("size", [(64, 96), (16, 16), (32, 144)], ids=str)
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@torch.no_grad()
def test_images_of_any_size_give_masks_at_a_quarter_of_it(positions: str, size: tuple[int, int]) -> None:
    network = made(positions)
    network.set_mask_probability([0.0] * 3)
    predictions = network(random_images(2, 3, *size))
    assert predictions.class_logits.shape == (1, 2, 7, 6) and predictions.mask_embeddings.shape == (1, 2, 7, 32)
    assert predictions.pixel_features.shape == (2, 32, size[0] // 4, size[1] // 4) and predictions.input_size == size
    every = network(random_images(2, 3, *size), all_layers=True).layers
    torch.testing.assert_close(every[-1].class_logits, predictions.class_logits)
    with pytest.raises(ValueError, match=r"images: expected height and width that are multiples of 16.*\(17, 32\)"):
        network(random_images(1, 3, 17, 32))


@torch.no_grad()
def test_padding_is_black_or_the_mean_whatever_its_pixels_are() -> None:
    sizes = torch.tensor([[32, 20], [17, 48]])
    images, other = random_images(2, 3, 32, 48), random_images(2, 3, 32, 48, seed=1)
    for image, changed, (height, width) in zip(images, other, sizes.tolist(), strict=True):
        changed[:, :height, :width] = image[:, :height, :width]
    network = made()
    black = network.normalize(images, sizes)
    torch.testing.assert_close(black, network.normalize(other, sizes), rtol=0, atol=0)
    torch.testing.assert_close(black[0, :, 0, 30], -(network.pixel_mean / network.pixel_std).flatten())
    network.config = replace(network.config, padding="mean")
    assert not network.normalize(images, sizes)[0, :, :, 20:].any()


@torch.no_grad()
def test_a_masked_query_sees_the_patches_of_its_mask_and_all_other_tokens() -> None:
    network = made()
    visible: list[Tensor] = []
    for block in network.backbone.blocks[2:]:
        block.register_forward_pre_hook(lambda _, inputs: visible.append(inputs[2]))
    layers = network(random_images(2, 3, 64, 80), all_layers=True).layers
    assert len(visible) == 3
    for mask, layer in zip(visible, layers[:-1], strict=True):
        logits = nn.functional.interpolate(layer_mask_logits(layer), (4, 5), mode="bilinear").flatten(2)
        clear = logits.abs() > 1e-4 * logits.abs().max()
        assert mask.shape == (2, 7, 20) and torch.equal(mask[clear], (logits > 0)[clear])
    network.draw = lambda batch, device: torch.arange(14.0).view(2, 7) / 14  # type: ignore[method-assign]
    visible.clear()
    network.set_mask_probability([0.5, 0.5, 0.5])
    network(random_images(2, 3, 64, 80))
    open_rows = (torch.arange(14.0).view(2, 7) / 14 > 0.5)[..., None].expand(-1, -1, 20)
    assert all(mask[open_rows].all() and not mask.all() for mask in visible)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_every_parameter_gets_a_finite_gradient_also_by_checkpointing(positions: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        network = made(positions, checkpointing=checkpointing).train()
        torch.manual_seed(0)
        layers = network(random_images(2, 3, 64, 80)).layers
        generator = torch.Generator().manual_seed(0)
        outputs = [part for layer in layers for part in (layer.class_logits, layer_mask_logits(layer))]
        sum((part * torch.randn(part.shape, generator=generator)).sum() for part in outputs).backward()
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
        assert [name for name, gradient in gradients[-1].items() if not gradient.any()] == []
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_upscaling_keeps_its_products_only_and_has_the_plain_gradients() -> None:
    torch.manual_seed(0)
    block, x = UpscaleBlock(16), torch.randn(2, 5, 7, 16, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(x)
    assert sum(kept.values()) <= x.nbytes + 4 * x.nbytes + block.windows()[0].nbytes
    weights = torch.randn_like(output)
    parameters = [x, *block.parameters()]
    gradients = torch.autograd.grad((output * weights).sum(), parameters)
    product = nn.functional.linear(x, *block.windows()).unflatten(-1, (4, -1))
    plain = upscaling_eager(product, block.conv2.weight, block.norm.weight, block.norm.bias, block.norm.eps)
    torch.testing.assert_close(output, plain)
    for got, expected in zip(gradients, torch.autograd.grad((plain * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@torch.no_grad()
def test_fused_and_bfloat16_predictions_are_close_to_float32(positions: str) -> None:
    for gated, probability in ((False, 0.0), (True, 1.0)):
        network = made(positions, gated_mlp=gated)
        network.set_mask_probability([probability] * 3)
        images, sizes = random_images(2, 3, 64, 96), torch.tensor([[61, 96], [50, 70]])
        expected = network(images, sizes)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(images, sizes)
        assert all(part.isfinite().all() for part in half[:3])
        if probability == 0.0:
            assert (half.pixel_features - expected.pixel_features).norm() < 0.1 * expected.pixel_features.norm()
        fuse_for_cpu(network)
        fused = network(images, sizes)
        masks = layer_mask_logits(expected)
        assert (fused.class_logits - expected.class_logits).abs().max() < 1e-4 * expected.class_logits.abs().max()
        assert (layer_mask_logits(fused) - masks).abs().max() < 1e-4 * masks.abs().max()


@pytest.mark.no_cover
@torch.no_grad()
def test_training_compiles_as_one_graph() -> None:
    network = made("rotary").train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(network, fullgraph=True, backend=counter)
    images = random_images(2, 3, 64, 80)
    for probability in (1.0, 0.5):
        network.set_mask_probability([probability] * 3)
        torch.manual_seed(0)
        got = compiled(images)
        torch.manual_seed(0)
        for a, b in zip(got.layers, network(images).layers, strict=True):
            torch.testing.assert_close(a.class_logits, b.class_logits)
    assert counter.frame_count == 1


def test_settings_that_do_not_fit_are_refused_by_name() -> None:
    micro = BackboneConfig("vit_micro")
    model = ModelConfig(type="eomt", num_classes=5, backbone=micro, decoder=DecoderConfig(layers=2))
    for changed, match in (
        (replace(model, backbone=BackboneConfig("resnet50")), r"backbone\.name: expected a ViT for eomt"),
        (replace(model, decoder=DecoderConfig(layers=5)), r"decoder\.layers: expected at most the 4 blocks"),
        (replace(model, size_divisibility=20), r"size_divisibility: expected a multiple of backbone\.patch_size=8"),
        (replace(model, type="maskformer"), r"backbone\.name: expected a ResNet or Swin Transformer for maskformer"),
        (replace(model, backbone=replace(micro, heads=5)), r"backbone\.heads: expected a divisor"),
        (replace(model, backbone=replace(micro, window_size=5)), r"backbone\.window_size: expected nothing"),
    ):
        with pytest.raises(ValueError, match=match):
            build_model(changed)


@pytest.mark.parametrize(
    ("old", "new"), [((6, 6), (3, 11)), ((5, 7), (12, 4)), ((6, 6), (1, 20)), ((3, 2), (3, 5))], ids=str
)
def test_positions_are_resampled_as_by_interpolation(old: tuple[int, int], new: tuple[int, int]) -> None:
    positions = torch.randn(1, old[0] * old[1], 4, generator=torch.Generator().manual_seed(0))
    maps = positions.unflatten(1, old).permute(0, 3, 1, 2)
    maps = nn.functional.interpolate(maps, new, mode="bicubic", antialias=True, align_corners=False)
    wanted = maps.permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(resample_positions(positions, old, new), wanted, rtol=1e-5, atol=1e-5)
    assert resample_positions(positions, old, old) is positions
