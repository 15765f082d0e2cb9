"""EoMT (Kerssies et al., CVPR 2025): a plain ViT that segments, with queries as tokens of its last blocks.

The queries join the tokens of the image before the last blocks (``decoder.layers``). Masks are predicted before each of
these blocks and at the end, by the same heads: mask embeddings of the queries times the upscaled tokens of the patches.
In training a query attends only to patches within the mask that it predicted before; the share of queries for which
this holds falls to 0 (``solver.mask_annealing``), so that in inference the attention is plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from maskformer_fast.config import ModelConfig
from maskformer_fast.core.checks import check
from maskformer_fast.modeling.backbone import is_vit, resolve_backbone
from maskformer_fast.modeling.linear import Linear, linear
from maskformer_fast.modeling.network import SegmentationNetwork, checked_sizes
from maskformer_fast.ops.upscaling import DTYPES as UPSCALING_DTYPES
from maskformer_fast.ops.upscaling import upscaling, upscaling_eager
from maskformer_fast.structures import LayerPredictions, Predictions

STRIDE = 4
"""Stride of the pixel embeddings, in pixels."""


class UpscaleBlock(nn.Module):
    """Maps of twice the height and width: a transposed 2x2 convolution, GELU, a depthwise 3x3 one, and LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(
        self,
        x: Tensor,  # [B, h, w, C]
    ) -> Tensor:
        """Output [B, 2h, 2w, C]."""
        x = linear(x, *self.windows()).unflatten(-1, (4, -1))  # [B, h, w, 4, C]
        return finish_upscaling(x, self.conv2, self.norm, gelu=True)

    def windows(self) -> tuple[Tensor, Tensor]:
        """Weight [4C, C] and bias [4C] of the transposed convolution: its windows do not overlap, so it is linear."""
        assert self.conv1.bias is not None
        return self.conv1.weight.permute(2, 3, 1, 0).flatten(0, 2), self.conv1.bias.repeat(4)


def finish_upscaling(
    x: Tensor,  # [B, h, w, 4, C]
    conv: nn.Conv2d,  # depthwise, 3x3
    norm: nn.LayerNorm,
    gelu: bool,
) -> Tensor:
    """GELU if wanted, convolution and norm -> [B, 2h, 2w, C].

    The operator is the CPU's, with gradients in float32. For the gradient only ``x`` is kept, by either way: what
    follows it is cheap to repeat.
    """
    by_operator = x.device.type == "cpu" and (x.dtype == torch.float32 or not x.requires_grad)
    if by_operator and x.dtype in UPSCALING_DTYPES and not torch.compiler.is_exporting():
        return upscaling(x, conv.weight.float(), norm.weight.float(), norm.bias.float(), norm.eps, gelu)
    arguments = (x, conv.weight, norm.weight, norm.bias, norm.eps, gelu)
    if torch.is_grad_enabled() and x.requires_grad:
        output: Tensor = checkpoint(upscaling_eager, *arguments, use_reentrant=False)
        return output
    return upscaling_eager(*arguments)


class Upscaling(nn.Module):
    """Pixel embeddings at stride 4 from the tokens of the patches."""

    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        doublings = (patch_size // STRIDE).bit_length() - 1
        self.upscale = nn.ModuleList(UpscaleBlock(dim) for _ in range(doublings))

    def forward(
        self,
        x: Tensor,  # [B, h, w, C] of the patches
    ) -> Tensor:
        """Output [B, C, H/4, W/4]; channels are innermost in memory."""
        for block in self.upscale:
            x = block(x)
        return x.permute(0, 3, 1, 2)


class MaskEmbedding(nn.Module):
    """Three linear layers with GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(dim, dim) for _ in range(3))

    def forward(
        self,
        x: Tensor,  # [B, Q, C]
    ) -> Tensor:
        """Output [B, Q, C]."""
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        return self.layers[-1](x)


class QueryHeads(nn.Module):
    """Learned queries, and the heads that all predictions share."""

    mask_probability: Tensor

    def __init__(self, dim: int, num_queries: int, num_classes: int, layers: int) -> None:
        super().__init__()
        self.query_embed = nn.Embedding(num_queries, dim)
        self.class_embed = Linear(dim, num_classes + 1)
        self.mask_embed = MaskEmbedding(dim)
        self.register_buffer("mask_probability", torch.ones(layers))


class EoMT(SegmentationNetwork):
    """Network that predicts a set of classes with masks, one for each query."""

    pixel_decoder: Upscaling

    def __init__(self, config: ModelConfig) -> None:
        backbone = resolve_backbone(config.backbone)
        check(is_vit(backbone), "backbone.name", "a ViT for eomt", backbone.name)
        patch, layers = backbone.patch_size or 0, config.decoder.layers
        blocks, divisor = backbone.blocks or 0, config.size_divisibility
        check(layers <= blocks, "decoder.layers", f"at most the {blocks} blocks of the ViT", layers)
        divisible = divisor > 0 and divisor % patch == 0
        check(divisible, "model.size_divisibility", f"a multiple of backbone.patch_size={patch}", divisor)
        super().__init__(config, lambda channels, _: Upscaling(channels[0], patch))
        self.predictor = QueryHeads(self.backbone.channels[0], config.decoder.num_queries, config.num_classes, layers)
        self.probabilities: tuple[float, ...] = (1.0,) * layers
        self.register_load_state_dict_post_hook(_read_probabilities)

    def set_mask_probability(self, probabilities: Sequence[float]) -> None:
        """Set the share of queries with masked attention in each of the last blocks; the host does not wait."""
        layers = len(self.probabilities)
        check(len(probabilities) == layers, "probabilities", f"one for each of {layers} blocks", probabilities)
        self.probabilities = tuple(float(value) for value in probabilities)
        buffer = self.predictor.mask_probability
        for index, value in enumerate(self.probabilities):
            buffer[index].fill_(value)

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] uint8 RGB; sides are multiples of the patch size
        valid_sizes: Tensor | None = None,  # [B, 2] int64: height, width of each image inside its padding
        *,
        all_layers: bool | None = None,
    ) -> Predictions | LayerPredictions:
        """Predict a batch of images.

        Args:
            all_layers: the predictions before each of the last blocks, too, as `LayerPredictions`; by default in
                training.

        Raises:
            TypeError, ValueError: as of `MaskFormer.forward`; or sides that are not multiples of the patch size.
        """
        sizes = checked_sizes(images, valid_sizes, self.config)
        all_layers = self.training if all_layers is None else all_layers
        layers = self.predict(self.normalize(images, sizes), sizes, all_layers)
        return LayerPredictions(layers) if all_layers else layers[-1]

    def predict(
        self,
        pixels: Tensor,  # [B, 3, H, W] normalised
        sizes: Tensor,  # [B, 2] int64: height, width of each image inside its padding
        all_layers: bool,
    ) -> tuple[Predictions, ...]:
        """Predictions, the final one last; those before it that are not needed are only made for ``all_layers``."""
        vit, queries = self.backbone, self.predictor.query_embed.weight
        x, rotary = vit.embed(pixels)
        grid = (pixels.shape[2] // vit.patch_size, pixels.shape[3] // vit.patch_size)
        start = len(vit.blocks) - self.config.decoder.layers
        layers: list[Predictions] = []
        for index, block in enumerate(vit.blocks):
            visible = None
            if index == start:
                x = torch.cat((queries.expand(x.shape[0], -1, -1).to(x.dtype), x), dim=1)
            if index >= start:
                masked = self.training or self.probabilities[index - start] > 0
                if masked or all_layers:
                    layers.append(self._predict(x, grid, sizes))
                if masked:
                    visible = self._visible(layers[-1], grid, index - start)
            x = vit.run(block, x, rotary, visible)
        return (*layers, self._predict(x, grid, sizes))

    def _predict(self, x: Tensor, grid: tuple[int, int], sizes: Tensor) -> Predictions:
        """Predictions from the tokens [B, Q + prefix + N, C] before or after a block."""
        x = self.backbone.norm(x)
        count = self.predictor.query_embed.num_embeddings
        queries, patches = x[:, :count], x[:, count + self.backbone.prefix :]
        features = self.pixel_decoder(patches.unflatten(1, grid))
        patch = self.backbone.patch_size
        return Predictions(
            self.predictor.class_embed(queries)[None], self.predictor.mask_embed(queries)[None], features, sizes,
            (grid[0] * patch, grid[1] * patch),
        )  # fmt: skip

    @torch.no_grad()
    def _visible(self, prediction: Predictions, grid: tuple[int, int], layer: int) -> Tensor:
        """Patches that each query may attend to -> [B, Q, N] bool: those within its mask, or all.

        Resizing is linear, so the pixel embeddings are resized to the patches instead of the masks.
        """
        embeddings = prediction.mask_embeddings[0]
        pixels = F.interpolate(prediction.pixel_features, grid, mode="bilinear", align_corners=False)
        visible = torch.bmm(embeddings, pixels.flatten(2).to(embeddings.dtype)) > 0
        if self.training or self.probabilities[layer] < 1:
            draws = self.draw(embeddings.shape[0], embeddings.device)
            visible = visible | (draws > self.predictor.mask_probability[layer]).unsqueeze(2)
        return visible

    def draw(self, batch: int, device: torch.device) -> Tensor:
        """Random numbers in 0..1 that decide which queries attend to all patches -> [batch, Q]."""
        return torch.rand(batch, self.predictor.query_embed.num_embeddings, device=device)


def _read_probabilities(network: nn.Module, _incompatible: Any) -> None:
    """Read the loaded probabilities once, so that inference does not wait for a device to know which blocks mask."""
    assert isinstance(network, EoMT)
    buffer = network.predictor.mask_probability
    if not buffer.is_meta:
        network.probabilities = tuple(buffer.tolist())
