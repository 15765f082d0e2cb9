"""The network against Hugging Face's MaskFormer with the same random weights."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from maskformer_fast.config import BackboneConfig, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.modeling import build_model

transformers = pytest.importorskip("transformers")

NUM_CLASSES = 5
STAGES = ["stage1", "stage2", "stage3", "stage4"]
# Ours -> theirs, applied in order to our parameter names.
COMMON = (
    (r"^pixel_decoder\.layer_4\.norm", "model.pixel_level_module.decoder.fpn.stem.1"),
    (r"^pixel_decoder\.layer_4", "model.pixel_level_module.decoder.fpn.stem.0"),
    *(
        (rf"^pixel_decoder\.{module}_{ours}{part}\.(\w+)$", rf"model.pixel_level_module.decoder.fpn.layers.{to}.\1")
        for ours, theirs in ((3, 0), (2, 1), (1, 2))
        for module, to in (("adapter", f"{theirs}.proj"), ("layer", f"{theirs}.block"))
        for part, to in ((r"\.norm", f"{to}.1"), ("", f"{to}.0"))
    ),
    (r"^pixel_decoder\.mask_features", "model.pixel_level_module.decoder.mask_projection"),
    (r"^predictor\.query_embed", "model.transformer_module.queries_embedder"),
    (r"^predictor\.input_proj", "model.transformer_module.input_projection"),
    (r"^predictor\.transformer", "model.transformer_module"),
    (r"decoder\.norm", "decoder.layernorm"),
    (r"multihead_attn", "encoder_attn"),
    (r"attn\.out_proj", "attn.o_proj"),
    (r"(decoder\.layers\.\d)\.linear", r"\1.mlp.fc"),
    (r"(decoder\.layers\.\d)\.norm1", r"\1.self_attn_layer_norm"),
    (r"(decoder\.layers\.\d)\.norm2", r"\1.encoder_attn_layer_norm"),
    (r"(decoder\.layers\.\d)\.norm3", r"\1.final_layer_norm"),
    (r"^predictor\.class_embed", "class_predictor"),
    (r"^predictor\.mask_embed\.layers\.(\d)", r"mask_embedder.\1.0"),
)
RESNET = (
    (r"^backbone\.stem\.conv1", "model.pixel_level_module.encoder.embedder.embedder"),
    (r"^backbone\.res2", "model.pixel_level_module.encoder.encoder.stages.0.layers"),
    (r"^backbone\.res3", "model.pixel_level_module.encoder.encoder.stages.1.layers"),
    (r"^backbone\.res4", "model.pixel_level_module.encoder.encoder.stages.2.layers"),
    (r"^backbone\.res5", "model.pixel_level_module.encoder.encoder.stages.3.layers"),
    (r"(encoder\..*)\.conv1\.", r"\1.layer.0."),
    (r"(encoder\..*)\.conv2\.", r"\1.layer.1."),
    (r"(encoder\..*)\.conv3\.", r"\1.layer.2."),
    (r"(encoder\..*)\.norm\.", r"\1.normalization."),
    (r"(module\.encoder\..*(?:embedder|layer\.\d|shortcut))\.weight", r"\1.convolution.weight"),
)
SWIN = (
    (r"^backbone\.norm(\d)", r"model.pixel_level_module.encoder.hidden_states_norms.\1"),
    (r"^backbone\.patch_embed\.proj", "model.pixel_level_module.encoder.model.embeddings.patch_embeddings.projection"),
    (r"^backbone\.patch_embed", "model.pixel_level_module.encoder.model.embeddings"),
    (r"^backbone\.layers", "model.pixel_level_module.encoder.model.encoder.layers"),
    (r"(blocks\.\d)\.norm1", r"\1.layernorm_before"),
    (r"(blocks\.\d)\.norm2", r"\1.layernorm_after"),
    (r"attn\.relative", "attention.self.relative"),
    (r"attn\.proj", "attention.output.dense"),
    (r"attn\.qkv", "attention.self.qkv"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)


def fetch(name: str, theirs: dict[str, Tensor], rules: tuple[tuple[str, str], ...]) -> Tensor:
    """Their value of our parameter; packed projections are theirs concatenated."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    if "in_proj_" in name:
        return torch.cat([theirs[name.replace("in_proj_", f"{part}_proj.")] for part in "qkv"])
    if "qkv" in name:
        return torch.cat([theirs[name.replace("qkv", part)] for part in ("query", "key", "value")])
    return theirs[name]


def randomize(model: nn.Module) -> None:
    """Random norms, biases and statistics: with ones and zeros a swapped parameter would go unseen."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.is_floating_point() and value.ndim == 1:
                value.add_(torch.randn(value.shape, generator=generator), alpha=0.2)
            elif name.endswith("relative_position_bias_table"):
                value.normal_(generator=generator)


def hugging_face(backbone: str) -> nn.Module:
    if backbone == "resnet":
        backbone_config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32, 64, 128], depths=[1, 2, 1, 2], out_features=STAGES
        )
    else:
        backbone_config = transformers.MaskFormerSwinConfig(
            embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=5, out_features=STAGES
        )
    decoder_config = transformers.DetrConfig(
        d_model=32, decoder_layers=2, encoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48, num_queries=7
    )
    torch.manual_seed(0)
    model = transformers.MaskFormerForInstanceSegmentation(
        transformers.MaskFormerConfig(
            backbone_config=backbone_config,
            decoder_config=decoder_config,
            fpn_feature_size=64,
            mask_feature_size=16,
            num_labels=NUM_CLASSES,
        )
    ).eval()
    randomize(model)
    return model


def ours(backbone: str) -> nn.Module:
    if backbone == "resnet":
        config = BackboneConfig(
            "resnet50", depths=(1, 2, 1, 2), stem_channels=8, bottleneck_channels=4, res2_channels=16
        )
    else:
        config = BackboneConfig("swin_tiny", depths=(2, 2, 2, 2), embed_dim=8, num_heads=(1, 2, 4, 8), window_size=5)
    return build_model(
        ModelConfig(
            num_classes=NUM_CLASSES,
            backbone=config,
            pixel_decoder=PixelDecoderConfig(conv_dim=64, mask_dim=16),
            decoder=DecoderConfig(layers=2, hidden_dim=32, num_heads=4, ffn_dim=48, num_queries=7),
        )
    ).eval()


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_same_weights_give_the_same_logits(backbone: str) -> None:
    theirs, model = hugging_face(backbone), ours(backbone)
    weights = theirs.state_dict()
    rules = (*(RESNET if backbone == "resnet" else SWIN), *COMMON)
    model.load_state_dict({name: fetch(name, weights, rules) for name in model.state_dict()})

    generator = torch.Generator().manual_seed(2)
    # Multiples of 32, neither side one, below one window (5 tokens of 4 pixels), odd at every stage.
    for height, width in [(64, 96), (75, 101), (17, 15), (61, 190)]:
        images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
        with torch.no_grad():
            valid = torch.full((2, 2), 1000)
            expected = theirs(pixel_values=model.normalize(images, valid))
            got = model(images)
        for name, a, b in (
            ("class", got.class_logits[-1], expected.class_queries_logits),
            ("mask", got.mask_logits(), expected.masks_queries_logits),
        ):
            assert a.shape == b.shape
            error = (a - b).abs().max() / b.abs().max()
            assert error < 1e-4, f"{name} logits at {height}x{width} differ by {error:.2e} of the largest"
