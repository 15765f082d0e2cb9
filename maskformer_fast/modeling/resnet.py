"""ResNet backbone (He et al., 2015) with the stride in the 3x3 convolution, and the deep stem of ResNet-101c."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.modeling.conv import ConvNorm, FrozenBatchNorm2d, msra_fill

NORMS: dict[str, type[nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "frozen": FrozenBatchNorm2d,
    "sync": nn.SyncBatchNorm,
}
MULTI_GRID = (1, 2, 4)
"""Dilations of the blocks of res5 in ResNet-101c ("multi-grid", Chen et al., 2017)."""


class BasicStem(nn.Module):
    """One 7x7 convolution and a max pooling, with a stride of 4."""

    def __init__(self, channels: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, channels, 7, norm(channels), stride=2, relu=True)

    def forward(
        self,
        x: Tensor,  # [B, 3, H, W]
    ) -> Tensor:
        """Output [B, channels, ceil(H/4), ceil(W/4)]."""
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class DeepStem(nn.Module):
    """Three 3x3 convolutions and a max pooling, with a stride of 4."""

    def __init__(self, channels: int, norm: type[nn.Module]) -> None:
        super().__init__()
        inner = channels // 2
        self.conv1_1 = ConvNorm(3, inner, 3, norm(inner), stride=2, relu=True)
        self.conv1_2 = ConvNorm(inner, inner, 3, norm(inner), relu=True)
        self.conv1_3 = ConvNorm(inner, channels, 3, norm(channels), relu=True)

    def forward(
        self,
        x: Tensor,  # [B, 3, H, W]
    ) -> Tensor:
        """Output [B, channels, ceil(H/4), ceil(W/4)]."""
        x = self.conv1_3(self.conv1_2(self.conv1_1(x)))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class Bottleneck(nn.Module):
    """Convolutions 1x1 to the inner width, 3x3 (with stride and dilation), 1x1 to the output width, plus shortcut."""

    def __init__(
        self, in_channels: int, inner: int, out_channels: int, stride: int, dilation: int, norm: type[nn.Module]
    ) -> None:
        super().__init__()
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels and stride == 1
            else ConvNorm(in_channels, out_channels, 1, norm(out_channels), stride=stride)
        )
        self.conv1 = ConvNorm(in_channels, inner, 1, norm(inner), relu=True)
        self.conv2 = ConvNorm(inner, inner, 3, norm(inner), stride=stride, dilation=dilation, relu=True)
        self.conv3 = ConvNorm(inner, out_channels, 1, norm(out_channels))

    def forward(
        self,
        x: Tensor,  # [B, in_channels, H, W]
    ) -> Tensor:
        """Output [B, out_channels, ceil(H/stride), ceil(W/stride)]."""
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """Bottleneck ResNet without classifier; ``channels`` are those of the four outputs."""

    def __init__(
        self,
        depths: Sequence[int],
        stem: Literal["basic", "deep"],
        stem_channels: int,
        bottleneck_channels: int,
        res2_channels: int,
        multi_grid: bool,
        norm: Literal["batch", "frozen", "sync"],
    ) -> None:
        """The arguments are fields of `maskformer_fast.config.BackboneConfig`."""
        super().__init__()
        self.channels = tuple(res2_channels * 2**stage for stage in range(4))

        def blocks(stage: int) -> nn.Sequential:
            inner, out_channels = bottleneck_channels * 2**stage, self.channels[stage]
            in_channels = self.channels[stage - 1] if stage > 0 else stem_channels
            dilations = MULTI_GRID if multi_grid and stage == 3 else (1,)
            layers = []
            for index in range(depths[stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                dilation = dilations[index % len(dilations)]
                layers.append(Bottleneck(in_channels, inner, out_channels, stride, dilation, NORMS[norm]))
                in_channels = out_channels
            return nn.Sequential(*layers)

        self.stem = (DeepStem if stem == "deep" else BasicStem)(stem_channels, NORMS[norm])
        self.res2, self.res3, self.res4, self.res5 = (blocks(stage) for stage in range(4))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                msra_fill(module)

    def forward(
        self,
        x: Tensor,  # [B, 3, H, W] normalised
    ) -> list[Tensor]:
        """Feature maps res2 ... res5 at strides 4, 8, 16, 32 (sizes rounded up): [B, channels[i], ., .]."""
        x = self.stem(x)
        features = []
        for stage in (self.res2, self.res3, self.res4, self.res5):
            x = stage(x)
            features.append(x)
        return features
