"""Network, losses and results against Hugging Face's MaskFormer with the same random weights.

The weights go through a folder that `transformers` writes and `read_folder` reads. They are made peaky, as in a trained
network: classes are decided, and masks cover a few percent of the image.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.config import Config, LossConfig
from maskformer_fast.inference import postprocess
from maskformer_fast.interop.huggingface import RULES, read_folder
from maskformer_fast.interop.names import to_ours
from maskformer_fast.modeling import build_model
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import Predictions, Targets, pack_masks, unpack_masks
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.matcher import match

transformers = pytest.importorskip("transformers")

NUM_CLASSES = 9
STAGES = ["stage1", "stage2", "stage3", "stage4"]
COVERED = 0.05  # share of the image that masks cover
# Multiples of 32; no multiples; smaller than a window (5 tokens of 4 pixels); odd at every stage.
SIZES = [(64, 96), (75, 101), (17, 15), (61, 190)]


class Pair(NamedTuple):
    """Hugging Face's network and this package's, with the same weights."""

    theirs: Any
    ours: Any
    config: Config


def small(backbone: str) -> Any:
    if backbone == "resnet":
        backbone_config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32, 64, 128], depths=[1, 2, 1, 2], out_features=STAGES
        )
    else:
        backbone_config = transformers.MaskFormerSwinConfig(
            embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=5, out_features=STAGES
        )
    decoder_config = transformers.DetrConfig(
        d_model=32, decoder_layers=3, encoder_layers=3, decoder_attention_heads=4, decoder_ffn_dim=48, num_queries=14
    )
    return transformers.MaskFormerConfig(
        backbone_config=backbone_config,
        decoder_config=decoder_config,
        fpn_feature_size=64,
        mask_feature_size=16,
        num_labels=NUM_CLASSES,
    )


def full_size(backbone: str) -> Any:
    """Configuration of ResNet-50 or Swin-T as published for ADE20K."""
    backbones = {
        "resnet50": transformers.ResNetConfig(out_features=STAGES),
        "swin_tiny": transformers.SwinConfig(drop_path_rate=0.3, out_features=STAGES),
    }
    return transformers.MaskFormerConfig(backbone_config=backbones[backbone], num_labels=150)


@torch.no_grad()
def make_peaky(model: nn.Module) -> None:
    """Make weights random, with predictions as of a trained network.

    Norms, biases and statistics are random too: with ones and zeros, swapped parameters would go unnoticed.
    """
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name == "criterion.empty_weight":
            continue
        elif value.is_floating_point() and value.ndim == 1:
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.2)
        elif name.endswith(("relative_position_bias_table", "queries_embedder.weight")):
            value.normal_(generator=generator)
        elif value.is_floating_point() and value.ndim == 2:  # the initial ones are so small that all queries are alike
            value.normal_(std=1.5 * value.shape[1] ** -0.5, generator=generator)
    images = 4 * torch.rand(4, 3, 96, 128, generator=generator) - 2
    images[0, :, 60:] = 0
    images[1, :, :, 60:] = 0
    outputs = model(images)
    scale = 4 / outputs.class_queries_logits.std(1).mean()
    for parameter in (model.class_predictor.weight, model.class_predictor.bias):
        parameter.mul_(scale)
    # The first channel of the pixel embeddings becomes 1, so that the first mask embedding shifts the mask logits.
    last, projection = model.mask_embedder.get_submodule("2.0"), model.model.pixel_level_module.decoder.mask_projection
    for parameter in (last.weight, last.bias, projection.weight, projection.bias):
        parameter[0] = 0
    projection.bias[0] = 1
    logits = model(images).masks_queries_logits
    scale = 6 / logits.std()
    for parameter in (last.weight, last.bias):
        parameter.mul_(scale)
    last.bias[0] = -torch.quantile((scale * logits).flatten()[:100_000], 1 - COVERED)


def pair(config: Any, folder: Path) -> Pair:
    torch.manual_seed(0)
    theirs = transformers.MaskFormerForInstanceSegmentation(config).eval()
    make_peaky(theirs)
    theirs.save_pretrained(folder)
    weights, ours, _ = read_folder(folder)
    shutil.rmtree(folder)
    model = build_model(ours.model).eval()
    model.load_state_dict(weights)
    return Pair(theirs, model, ours)


@pytest.fixture(scope="module", params=["resnet", "swin"])
def small_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(small(request.param), tmp_path_factory.mktemp(request.param) / "model")


def batch(height: int, width: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Three images [3, 3, H, W] uint8 and their valid sizes: one fills the input, two are padded with noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8, generator=generator)
    return images, torch.tensor([[height, width], [height * 2 // 3, width], [height, width // 2]])


@torch.no_grad()
def run(networks: Pair, images: Tensor, valid_sizes: Tensor) -> tuple[Predictions, Any]:
    """Predictions of this package's network for every layer, and Hugging Face's output with all hidden states.

    Hugging Face's network takes normalised images padded with zeros, and a ``pixel_mask`` that it ignores.
    """
    pixel_values = networks.ours.normalize(images, valid_sizes)
    rows, columns = (torch.arange(size) < valid_sizes[:, i, None] for i, size in enumerate(images.shape[-2:]))
    mask = rows[:, :, None] & columns[:, None]
    theirs = networks.theirs(pixel_values=pixel_values, pixel_mask=mask, output_hidden_states=True)
    return networks.ours(images, valid_sizes, all_layers=True), theirs


def assert_close(name: str, got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"{name} differ by {error:.2e} of the largest"


def assert_same_logits(networks: Pair, got: Predictions, expected: Any) -> None:
    """Assert that the logits of every layer are close.

    Hugging Face's auxiliary predictions begin with the zero states before the first layer and leave out the final
    LayerNorm. So the hidden states go through Hugging Face's norm and heads here.
    """
    assert_close("class logits", got.class_logits[-1], expected.class_queries_logits)
    assert_close("mask logits", layer_mask_logits(got), expected.masks_queries_logits)
    states = expected.transformer_decoder_hidden_states
    assert len(states) == len(got.class_logits) + 1 and not states[0].any()
    norm = networks.theirs.model.transformer_module.decoder.layernorm
    for layer, state in enumerate(states[1:-1]):
        with torch.no_grad():
            classes = networks.theirs.class_predictor(norm(state))
            embeddings = networks.theirs.mask_embedder(norm(state))
        masks = torch.einsum("bqc,bchw->bqhw", embeddings, expected.pixel_decoder_last_hidden_state)
        assert_close(f"class logits of layer {layer}", got.class_logits[layer], classes)
        assert_close(f"mask logits of layer {layer}", layer_mask_logits(got, layer), masks)


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_hugging_face(small_pair: Pair, size: tuple[int, int]) -> None:
    assert_same_logits(small_pair, *run(small_pair, *batch(*size)))


@pytest.mark.parametrize("backbone", ["resnet50", pytest.param("swin_tiny", marks=pytest.mark.slow)])
def test_logits_of_full_size_models_equal_hugging_face(backbone: str, tmp_path: Path) -> None:
    networks = pair(full_size(backbone), tmp_path / "model")
    assert networks.config.model.backbone.name == backbone
    assert_same_logits(networks, *run(networks, *batch(70, 100)))


def random_targets(valid_sizes: Tensor, size: tuple[int, int], seed: int) -> Targets:
    """Targets of zero to six rectangles an image, inside its valid part."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([6, 0, 3])
    masks = torch.zeros(3, 6, *size, dtype=torch.bool)
    for image, count in enumerate(counts.tolist()):
        for target in range(count):
            limits = [sorted(torch.randint(0, int(side), (2,), generator=generator)) for side in valid_sizes[image]]
            (top, bottom), (left, right) = limits
            masks[image, target, top : bottom + 8, left : right + 8] = True
        masks[image, :, int(valid_sizes[image, 0]) :] = False
        masks[image, :, :, int(valid_sizes[image, 1]) :] = False
    labels = torch.randint(0, NUM_CLASSES, (3, 6), generator=generator)
    return Targets(labels, counts, pack_masks(masks), valid_sizes, size)


@pytest.mark.parametrize("size, seed", [((64, 96), 0), ((75, 101), 1), ((61, 190), 2)])
def test_matching_losses_and_gradients_equal_hugging_face(small_pair: Pair, size: tuple[int, int], seed: int) -> None:
    """Compares the final layer only; Hugging Face's other layers are other predictions, see `assert_same_logits`."""
    theirs, model = small_pair.theirs, small_pair.ours
    images, valid_sizes = batch(*size, seed=10 + seed)
    got = model(images, valid_sizes)
    expected = theirs(pixel_values=model.normalize(images, valid_sizes))
    targets = random_targets(valid_sizes, size, seed)
    counts = targets.counts.tolist()
    masks = [m[:n].float() for m, n in zip(unpack_masks(targets.masks, size[1]), counts, strict=True)]
    labels = [row[:n] for row, n in zip(targets.labels, counts, strict=True)]
    loss = LossConfig(padding="include")  # Hugging Face counts padding too

    logits = expected.masks_queries_logits, expected.class_queries_logits
    query = match(got, targets, loss).query[-1]
    for image, (rows, columns) in enumerate(theirs.matcher(*logits, masks, labels)):
        assert torch.equal(query[image, columns], rows) and len(rows) == counts[image]

    peer = theirs.get_loss_dict(*logits, masks, labels, None)
    losses = Criterion(NUM_CLASSES, loss)(got, targets)
    for name, peer_name in (("loss_ce", "loss_cross_entropy"), ("loss_mask", "loss_mask"), ("loss_dice", "loss_dice")):
        assert losses.terms[name].item() == pytest.approx(peer[peer_name].item(), rel=1e-4)
    total = sum(peer.values())
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-4)

    for network, value in ((model, losses.total), (theirs, total)):
        network.zero_grad()
        value.backward()
    # Hugging Face's last Swin norm is not used and has no gradient.
    gradients = to_ours({n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}, RULES)
    assert gradients.problems == [] and gradients.weights.keys() == dict(model.named_parameters()).keys()
    largest = max(gradient.norm() for gradient in gradients.weights.values())
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients.weights[name]).norm()
        assert error <= 1e-3 * gradients.weights[name].norm() + 1e-7 * largest, name


def test_label_maps_and_instances_equal_hugging_face(small_pair: Pair) -> None:
    """Label maps are compared at several sizes, and instances at the size of the mask logits, as Hugging Face does."""
    images, valid_sizes = batch(96, 128, seed=20)
    full = torch.tensor([[96, 128]] * 3)  # Hugging Face does not crop the padding
    got, expected = run(small_pair, images, valid_sizes)
    got = got._replace(valid_sizes=full)
    covered = (expected.masks_queries_logits > 0).float().mean()
    assert 0.005 < covered < 0.2 and expected.class_queries_logits.softmax(-1).amax(-1).mean() > 0.6  # peaky

    processor = transformers.MaskFormerImageProcessor()
    sizes = [(96, 128), (41, 77), (200, 150)]
    theirs = processor.post_process_semantic_segmentation(expected, sizes)
    scores = postprocess.semantic_scores(got, sizes, order="huggingface")
    results = postprocess.semantic(got, sizes, order="huggingface")
    for result, score, labels in zip(results, scores, theirs, strict=True):
        best = score.topk(2, dim=0).values
        sure = best[0] - best[1] > 1e-4 * best[0]
        assert sure.float().mean() > 0.999 and (result.labels.long() == labels)[sure].all()

    low = got.pixel_embeddings.shape[-2:]
    results = postprocess.instances(got, [low] * 3, [True] * NUM_CLASSES, top_k=got.class_logits.shape[2])
    peers = processor.post_process_instance_segmentation(expected, 0.0, return_binary_maps=True)
    larger = processor.post_process_instance_segmentation(
        expected, 0.0, target_sizes=[(192, 256)] * 3, return_binary_maps=True
    )
    for result, peer, large in zip(results, peers, larger, strict=True):
        segments = peer["segments_info"]
        order = sorted(range(len(segments)), key=lambda index: -segments[index]["score"])
        assert len(order) > 0 and result.labels.tolist() == [segments[index]["label_id"] for index in order]
        torch.testing.assert_close(
            result.scores, torch.tensor([segments[index]["score"] for index in order]), atol=1e-5, rtol=0
        )
        masks = unpack_masks(result.masks, low[1])
        assert torch.equal(masks, peer["segmentation"][order].bool())
        # Hugging Face enlarges the binary masks, by nearest neighbours.
        enlarged = F.interpolate(masks[None].float(), (192, 256))[0]
        assert torch.equal(enlarged, large["segmentation"][order])
