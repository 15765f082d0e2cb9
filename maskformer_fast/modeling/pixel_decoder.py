"""FPN pixel decoder (paper section 3.2), optionally with a transformer encoder on res5."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.config import PixelDecoderConfig
from maskformer_fast.core.checks import check
from maskformer_fast.modeling.conv import Conv2d, ConvNorm, xavier_fill
from maskformer_fast.modeling.position import sine_positions
from maskformer_fast.modeling.transformer import TransformerEncoder
from maskformer_fast.structures import Projection


class PixelDecoder(nn.Module):
    """FPN from backbone features to pixel embeddings at stride 4 and the memory for the transformer decoder.

    The memory has ``memory_channels`` channels: those of res5, or ``conv_dim`` after a transformer encoder.
    """

    def __init__(self, in_channels: Sequence[int], config: PixelDecoderConfig) -> None:
        """``in_channels`` are those of res2, res3, res4, res5."""
        super().__init__()
        dim = config.conv_dim

        def conv(channels: int, kernel: int, relu: bool = False) -> ConvNorm:
            return ConvNorm(channels, dim, kernel, nn.GroupNorm(config.norm_groups, dim), relu=relu)

        self.adapter_1 = conv(in_channels[0], 1)
        self.layer_1 = conv(dim, 3, relu=True)
        self.adapter_2 = conv(in_channels[1], 1)
        self.layer_2 = conv(dim, 3, relu=True)
        self.adapter_3 = conv(in_channels[2], 1)
        self.layer_3 = conv(dim, 3, relu=True)
        self.has_encoder = config.encoder_layers > 0
        if self.has_encoder:
            check(dim % 4 == 0, "pixel_decoder.conv_dim", "a multiple of 4 (sine positions)", dim)
            self.input_proj = Conv2d(in_channels[3], dim, kernel_size=1)
            encoder = TransformerEncoder(
                config.encoder_layers, dim, config.encoder_heads, config.encoder_ffn_dim, config.encoder_dropout
            )
            self.transformer = nn.ModuleDict({"encoder": encoder})
        self.memory_channels = dim if self.has_encoder else in_channels[3]
        self.layer_4 = conv(self.memory_channels, 3, relu=True)
        self.mask_features = Conv2d(dim, config.mask_dim, kernel_size=3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                xavier_fill(module)

    def forward(
        self,
        features: Sequence[Tensor],  # res2 ... res5, [B, in_channels[i], H/2^(i+2), W/2^(i+2)]
    ) -> tuple[Tensor, Tensor]:
        """Pixel embeddings [B, mask_dim, H/4, W/4] and memory [B, memory_channels, H/32, W/32]."""
        x, memory = self.fuse(features)
        return self.mask_features(x), memory

    @property
    def projection(self) -> Projection:
        """Last convolution, in the form that `Predictions` carries."""
        assert self.mask_features.bias is not None
        return Projection(self.mask_features.weight, self.mask_features.bias)

    def fuse(
        self,
        features: Sequence[Tensor],  # as for `forward`
    ) -> tuple[Tensor, Tensor]:
        """Run all but the last convolution -> its input [B, conv_dim, H/4, W/4], and memory as from `forward`."""
        res2, res3, res4, memory = features
        if self.has_encoder:
            memory = self.encode(memory)
        x = self.layer_4(memory)
        x = self.layer_3(merge(self.adapter_3(res4), x))
        x = self.layer_2(merge(self.adapter_2(res3), x))
        return self.layer_1(merge(self.adapter_1(res2), x)), memory

    def encode(
        self,
        res5: Tensor,  # [B, C, h, w]
    ) -> Tensor:
        """Run the transformer encoder over the pixels of res5 -> [B, conv_dim, h, w]."""
        x = self.input_proj(res5)
        height, width = x.shape[-2:]
        positions = sine_positions(height, width, x.shape[1], x.device).to(x.dtype)
        x = self.transformer["encoder"](x.flatten(2).transpose(1, 2), positions)
        return x.transpose(1, 2).unflatten(2, (height, width))


def merge(
    lateral: Tensor,  # [B, C, H, W]
    top: Tensor,  # [B, C, ceil(H/2), ceil(W/2)]
) -> Tensor:
    """Add the coarser map, upsampled (nearest) to the size of the lateral one -> [B, C, H, W]."""
    return lateral + F.interpolate(top, size=lateral.shape[-2:], mode="nearest")
