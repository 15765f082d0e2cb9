"""Bilinear resampling of a window of low-resolution maps to an output grid, tile by tile.

Maps [N, h, w] cover the network's padded input; an image covers their top-left `extent` = (eh, ew) in map pixels
(eh = valid height * h / padded height, not necessarily an integer). Output pixel (y, x) of an (H, W) grid over that
window reads the maps bilinearly at

    ((y + 0.5) * eh / H - 0.5, (x + 0.5) * ew / W - 0.5),

coordinates below 0 taken as 0 and taps beyond the last row or column taken from it, as ``align_corners=False`` does.
Taps may lie outside the window (in the padding), never outside the maps: where (H, W) is the image's size in the padded
input, the result is ``F.interpolate`` to the padded size, cropped.

Values beyond ±`VALUE_LIMIT`, also infinities, count as ±`VALUE_LIMIT`, so that interpolation never computes inf - inf:
a tap at -inf makes every pixel that it reaches hugely negative, and between opposite infinities the nearer one wins.
NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from maskformer_fast.core.checks import check

CPU_TILE_BYTES = 4 << 20
"""Bytes of one tile's temporaries on the CPU: about one core's cache. From 1 to 16 MiB the time is the same; complete
images take 1.6 times as long."""
DEVICE_TILE_BYTES = 64 << 20
"""Bytes of one tile's temporaries on an accelerator, where launches cost more than cache misses."""
VALUE_LIMIT = 1e30
"""Largest magnitude of a value: far beyond any logit, and so far below the largest float32 that differences and
products stay finite."""


def check_geometry(maps: Tensor, extent: tuple[float, float], output_size: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless 0 < extent <= the maps' size and the output has pixels."""
    check(len(extent) == 2, "extent", "height and width in map pixels", extent)
    inside = all(0 < e <= n * (1 + 1e-6) for e, n in zip(extent, maps.shape[-2:], strict=True))
    check(inside, "extent", f"two sizes in (0, {tuple(maps.shape[-2:])}]", extent)
    check(len(output_size) == 2 and min(output_size) > 0, "output_size", "positive height and width", output_size)


def without_float64(logits: Tensor) -> Tensor:
    """Convert float64, which no kernel takes, to float32; leave other types as they are."""
    return logits.float() if logits.dtype == torch.float64 else logits


def row_tiles(output_size: tuple[int, int], channels: int, device: torch.device) -> Iterator[slice]:
    """Split the output's rows so that `channels` float32 values a pixel stay within one tile's memory."""
    height, width = output_size
    budget = CPU_TILE_BYTES if device.type == "cpu" else DEVICE_TILE_BYTES
    rows = max(1, budget // (4 * max(1, channels) * width))
    for start in range(0, height, rows):
        yield slice(start, min(start + rows, height))


def resample_rows(
    maps: Tensor,  # [N, h, w] floating
    extent: tuple[float, float],
    output_size: tuple[int, int],
    rows: slice,
) -> Tensor:
    """Resample a slice of the output's rows -> [N, rows, W] float32. The module's docstring defines the coordinates."""
    height, width = output_size
    source_height, source_width = maps.shape[-2:]
    y = torch.arange(rows.start, rows.stop, dtype=torch.float64, device=maps.device)
    y = ((y + 0.5) * (extent[0] / height) - 0.5).clamp(0, source_height - 1)
    top = y.floor().long()
    bottom = (top + 1).clamp(max=source_height - 1)
    weight = (y - top).to(torch.float32)[:, None]
    # Rows first: the intermediate is narrow. lerp keeps a weight of 0 exact, so an identity stays one.
    upper, lower = (
        maps.index_select(-2, index).to(torch.float32).clamp_(-VALUE_LIMIT, VALUE_LIMIT) for index in (top, bottom)
    )
    tile = torch.lerp(upper, lower, weight)
    if (extent[1], source_width) == (width, width):
        return tile
    if source_width == width:  # the operator below copies equal sizes, whatever the scale; a repeated edge is no change
        tile = torch.cat([tile, tile[..., -1:]], -1)
    # F.interpolate cannot read a window: it derives the scale from integer sizes. The operator takes the scale itself.
    return torch.ops.aten.upsample_linear1d(tile, [width], False, width / extent[1])


def resample(
    maps: Tensor,  # [N, h, w] floating
    extent: tuple[float, float],
    output_size: tuple[int, int],
) -> Tensor:
    """Resample all rows at once -> [N, H, W] float32."""
    return resample_rows(maps, extent, output_size, slice(0, output_size[0]))
