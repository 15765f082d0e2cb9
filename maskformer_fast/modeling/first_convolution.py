"""The first convolution of a backbone for pictures of other bands than RGB, and its weights from those for RGB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

Backbone = TypeVar("Backbone", bound=nn.Module)
_RGB = 3


def with_channels(backbone: Backbone, channels: int) -> Backbone:
    """Make the first convolution of a backbone take so many channels, in place -> the backbone.

    Its weights become those that `from_rgb` makes of its initial ones.
    """
    if channels != _RGB:
        first = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
        first.weight = nn.Parameter(from_rgb(first.weight.detach(), channels))
        first.in_channels = channels
    return backbone


def from_rgb(
    weight: Tensor,  # [out, 3, k, k]
    channels: int,
) -> Tensor:
    """Weights for another number C of channels: the mean over RGB, times 3 / C, for each -> [out, C, k, k].

    Channels that are all the same, as those of a grey picture, then give what the same three channels gave before.
    """
    mean = weight.mean(dim=1, keepdim=True)
    return (mean * (_RGB / channels)).repeat(1, channels, 1, 1)


def fitted_to_channels(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose first convolution for RGB, if they have one where another is expected, is made into that one."""
    fitted = dict(weights)
    for name, want in expected.items():
        got = weights.get(name)
        if got is None or got.ndim != 4 or want.ndim != 4:
            continue
        if got.shape[1] == _RGB != want.shape[1] and got.shape[::2] == want.shape[::2]:
            fitted[name] = from_rgb(got, want.shape[1])
    return fitted
