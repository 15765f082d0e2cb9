"""Which implementation of a layer is the fastest on this processor, by measurements of some milliseconds.

Libraries differ by factors from processor to processor: MKL multiplies float32 matrices on AMD's slower than oneDNN,
and oneDNN's bfloat16 convolutions use matrix units that only some have. Each choice is made once in a process.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.ops.convolution import conv3x3_winograd, pack_winograd_weights

logger = logging.getLogger(__name__)

_PRODUCT = (1024, 384, 768)
"""Rows, inputs and outputs of the product by which MKL and oneDNN are compared."""
_MAP = 24
"""Height and width of the maps on which convolutions are compared."""
_ROUNDS = 4
"""Calls of each implementation, by turns; the least time counts."""
PLAIN: tuple[str, list[Any], str] = ("none", [], "")
"""What oneDNN's linear layers take for "no activation"."""
GEOMETRY: tuple[list[int], list[int], list[int], int] = ([1, 1], [1, 1], [1, 1], 1)
"""Padding, stride, dilation and groups of a 3x3 convolution that keeps the size."""


@functools.cache
def onednn_is_faster() -> bool:
    """Whether PyTorch has oneDNN and it multiplies float32 matrices faster than MKL."""
    if not torch.backends.mkldnn.is_available():
        return False
    rows, inputs, outputs = _PRODUCT
    x, weight = _random(rows, inputs), _random(outputs, inputs)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    return _fastest(
        f"float32 product {rows} x {inputs} x {outputs}",
        {
            "MKL": lambda: F.linear(x, weight),
            "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, *PLAIN),
        },
    ) == "oneDNN"


@functools.cache
def winograd_is_faster(in_channels: int, out_channels: int, dtype: torch.dtype) -> bool:
    """Whether `conv3x3_winograd` is faster than oneDNN's direct convolution in this dtype."""
    images = _random(1, in_channels, _MAP, _MAP).to(dtype, memory_format=torch.channels_last)
    weight = _random(out_channels, in_channels, 3, 3)
    transformed = pack_winograd_weights(weight)
    direct = weight.to(dtype, memory_format=torch.channels_last)
    packed = torch.ops.mkldnn._reorder_convolution_weight(direct, *GEOMETRY)
    return _fastest(
        f"{dtype} convolution 3x3, {in_channels} to {out_channels} channels",
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
    logger.debug("%s: %s", what, ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in least.items()))
    return best


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        run()
    return time.perf_counter() - start
