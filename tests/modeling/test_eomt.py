"""EoMT: equality with `transformers`, and what holds of every network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig
from maskformer_fast.interop.huggingface import read_folder
from maskformer_fast.modeling import EoMT, build_model
from maskformer_fast.modeling.vit import resample_positions
from maskformer_fast.ops.mask_product import layer_mask_logits
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
        "embed_dim": 32, "blocks": 5, "heads": 2, "mlp_dim": 64, "registers": 3, "image_size": (96, 96), "patch_size": 16,
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
