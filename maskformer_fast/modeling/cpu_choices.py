"""Which implementation of a layer is the fastest on this processor.

Libraries differ by factors from processor to processor: MKL multiplies float32 matrices on AMD's slower than oneDNN,
and oneDNN's bfloat16 convolutions use matrix units that only some have. Matrices go by the processor's vendor.
Convolutions go by measurements of some milliseconds, each made once in a process and told to this module's logger with
its times (level INFO); inference alone asks for them.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from maskformer_fast.core.machine import processor_vendor
from maskformer_fast.ops.convolution import conv3x3_winograd, pack_winograd_weights

logger = logging.getLogger(__name__)

_PRODUCTS = 2**26
"""Products of the maps on which convolutions are compared, for each tap: those of a ResNet's stages at 512x512."""
_SIDES = (16, 128)
"""Least and largest height and width of these maps; on smaller ones, calls would take longer than the sums."""
_ROUNDS = 4
"""Calls of each implementation, by turns; the least time counts."""
PLAIN: tuple[str, list[Any], str] = ("none", [], "")
"""What oneDNN's linear layers take for "no activation"."""
GEOMETRY: tuple[list[int], list[int], list[int], int] = ([1, 1], [1, 1], [1, 1], 1)
"""Padding, stride, dilation and groups of a 3x3 convolution that keeps the size."""


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices faster than PyTorch's own way does: on AMD's processors, beside MKL.

    A rule and not a measurement, because training goes by it too: all processes of a run, and those that resume it,
    must compute the same sums.
    """
    libraries = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return libraries and processor_vendor() == "AuthenticAMD"


@functools.cache
def winograd_is_faster(in_channels: int, out_channels: int, dtype: torch.dtype) -> bool:
    """Whether `conv3x3_winograd` is faster than oneDNN's direct convolution in this dtype."""
    side = min(max(math.isqrt(_PRODUCTS // (in_channels * out_channels)), _SIDES[0]), _SIDES[1])
    images = _random(1, in_channels, side, side).to(dtype, memory_format=torch.channels_last)
    weight = _random(out_channels, in_channels, 3, 3)
    transformed = pack_winograd_weights(weight)
    direct = weight.to(dtype, memory_format=torch.channels_last)
    packed = torch.ops.mkldnn._reorder_convolution_weight(direct, *GEOMETRY)
    return _fastest(
        f"{dtype} convolution 3x3, {in_channels} to {out_channels} channels, {side}x{side}",
        {
            "Winograd": lambda: conv3x3_winograd(images, transformed, None, out_channels),
            "direct": lambda: torch.ops.mkldnn._convolution_pointwise(images, packed, None, *GEOMETRY, *PLAIN),
        },
    ) == "Winograd"


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _fastest(what: str, runs: Mapping[str, Callable[[], object]]) -> str:
    """Name of the function that takes the least time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            times[name].append(_seconds(run))
    least = {name: min(seconds) for name, seconds in times.items()}
    best = min(least, key=least.__getitem__)
    found = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in least.items())
    logger.info("%s: %s, so %s is taken", what, found, best)
    return best


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        run()
    return time.perf_counter() - start
