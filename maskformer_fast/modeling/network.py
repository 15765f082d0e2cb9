"""Base of the networks: from images to pixel embeddings and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from maskformer_fast.config import ModelConfig
from maskformer_fast.core.checks import check
from maskformer_fast.modeling.backbone import build_backbone
from maskformer_fast.modeling.first_convolution import with_channels


class SegmentationNetwork(nn.Module):
    """Normalisation, backbone and pixel decoder; subclasses add a head (``predictor``)."""

    pixel_mean: Tensor
    pixel_std: Tensor
    pixel_decoder: Any  # subclasses say which

    def __init__(self, config: ModelConfig, pixel_decoder: Callable[..., nn.Module]) -> None:
        """``pixel_decoder`` is made of the backbone's channels and the config's section."""
        super().__init__()
        check(config.num_classes > 0, "model.num_classes", "at least 1", config.num_classes)
        self.config = config
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std)[:, None, None], persistent=False)
        self.backbone: Any = with_channels(build_backbone(config.backbone), config.channels)
        self.pixel_decoder = pixel_decoder(self.backbone.channels, config.pixel_decoder)

    def normalize(
        self,
        images: Tensor,  # [B, C, H, W] uint8 or float32
        valid_sizes: Tensor,  # [B, 2] int64
    ) -> Tensor:
        """Standardise each channel -> [B, C, H, W] float; outside the valid sizes as ``model.padding`` says."""
        height, width = images.shape[-2:]
        inside_rows = torch.arange(height, device=images.device) < valid_sizes[:, :1]  # [B, H]
        inside_columns = torch.arange(width, device=images.device) < valid_sizes[:, 1:]  # [B, W]
        inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
        if self.config.padding == "black":
            return (images * inside - self.pixel_mean) / self.pixel_std
        return (images - self.pixel_mean) / self.pixel_std * inside

    def embed(
        self,
        images: Tensor,  # [B, 3, H, W] uint8 RGB
        valid_sizes: Tensor,  # [B, 2] int64
    ) -> tuple[Tensor, Tensor]:
        """Pixel embeddings [B, D, ceil(H/4), ceil(W/4)] and memory [B, C, ceil(H/32), ceil(W/32)]."""
        return self.pixel_decoder(self.backbone(self.normalize(images, valid_sizes)))


def checked_sizes(
    images: Tensor,  # [B, C, H, W] uint8, RGB for C = 3; or float32 of the stored scale, of pictures of bands
    valid_sizes: Tensor | None,  # [B, 2] int64: height, width of each image inside its padding
    config: ModelConfig,
) -> Tensor:
    """Check a network's input -> valid sizes [B, 2] int64; for ``None``, the full size of every image.

    Floats are refused by a network with the mean of ImageNet's 8-bit colours: they are likely to be normalised already.

    Raises:
        TypeError: another dtype.
        ValueError: another shape.
    """
    if images.dtype not in (torch.uint8, torch.float32) or (images.is_floating_point() and config.has_imagenet_mean):
        raise TypeError("images: expected torch.uint8, or torch.float32 of bands with a model.pixel_mean of their own "
                        f"(normalisation is inside the network), got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != config.channels:
        raise ValueError(f"images: expected shape [B, {config.channels}, H, W], got {list(images.shape)}")
    batch, _, height, width = images.shape
    if valid_sizes is None:
        full = [torch.full((batch,), size, dtype=torch.int64, device=images.device) for size in (height, width)]
        return torch.stack(full, dim=1)
    if valid_sizes.dtype != torch.int64:
        raise TypeError(f"valid_sizes: expected torch.int64, got {valid_sizes.dtype}")
    if valid_sizes.ndim != 2 or valid_sizes.shape[0] != batch or valid_sizes.shape[1] != 2:
        raise ValueError(f"valid_sizes: expected shape [{batch}, 2], got {list(valid_sizes.shape)}")
    return valid_sizes
