"""Per-pixel classification baselines of the paper (section 4.1), for comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskformer_fast.config import ModelConfig
from maskformer_fast.modeling.conv import msra_fill
from maskformer_fast.modeling.mask_head import QueryDecoder
from maskformer_fast.modeling.network import SegmentationNetwork, checked_sizes
from maskformer_fast.modeling.pixel_decoder import PixelDecoder
from maskformer_fast.structures import PixelPredictions


class PerPixelBaseline(SegmentationNetwork):
    """``PerPixelBaseline``: a 1x1 convolution that classifies the pixel embeddings, without a transformer decoder."""

    pixel_decoder: PixelDecoder

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, PixelDecoder)
        self.predictor = nn.Conv2d(config.pixel_decoder.mask_dim, config.num_classes, kernel_size=1)
        msra_fill(self.predictor)

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] uint8 RGB
        valid_sizes: Tensor | None = None,  # [B, 2] int64
        *,
        all_layers: bool | None = None,
    ) -> PixelPredictions:
        """Predict a batch; arguments as for `MaskFormer.forward`. ``all_layers`` has no effect: there is one layer."""
        sizes = checked_sizes(images, valid_sizes, self.config)
        pixel_embeddings, _ = self.embed(images, sizes)
        height, width = images.shape[-2:]
        return PixelPredictions(self.predictor(pixel_embeddings)[None], sizes, (height, width))


class PerPixelBaselinePlus(SegmentationNetwork):
    """``PerPixelBaseline+``: MaskFormer's modules with one query for each class, whose mask is the class's score."""

    pixel_decoder: PixelDecoder

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, PixelDecoder)
        self.predictor = QueryDecoder(
            self.pixel_decoder.memory_channels, config.num_classes, config.pixel_decoder.mask_dim, config.decoder
        )

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] uint8 RGB
        valid_sizes: Tensor | None = None,  # [B, 2] int64
        *,
        all_layers: bool | None = None,
    ) -> PixelPredictions:
        """Predict a batch; arguments as for `MaskFormer.forward`."""
        sizes = checked_sizes(images, valid_sizes, self.config)
        pixel_embeddings, memory = self.embed(images, sizes)
        states = self.predictor.decode(memory, self.training if all_layers is None else all_layers)
        logits = torch.einsum("lbkd,bdhw->lbkhw", self.predictor.mask_embed(states), pixel_embeddings)
        height, width = images.shape[-2:]
        return PixelPredictions(logits, sizes, (height, width))
