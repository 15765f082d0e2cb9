"""Argmax over channels of bilinearly resized maps, for results of code that resizes scores in place of logits.

`resized_argmax` is the label of the largest channel, `resized_winners` also counts pixels. On the CPU they run in C++
(csrc/resized_argmax/): between four neighbouring grid points every channel is bilinear, so most cells have one channel
that is the largest everywhere, and the resized maps are never stored. Elsewhere the eager twins run, by tiles of rows.
Sample positions are those of ``F.interpolate(mode="bilinear", align_corners=False)``, in single precision like its own.
No function has a gradient. Values should be finite.

`label_band` and `decide_band` work on a band of the grid's rows, so that a caller need not hold all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.core.arrays import address_of
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension
from maskformer_fast.ops.registration import register_operator
from maskformer_fast.ops.resample import row_tiles

VECTOR = 16
"""Channels that the extension reads at a time: the pitch of its maps is a multiple of it."""


class Winners(NamedTuple):
    """Result of `resized_winners`."""

    labels: Tensor  # [H, W] int32 (int64 with scales): the winning channel; with scales -1 where it does not own
    won: Tensor  # [N] int64: pixels where the channel is the largest
    owned: Tensor  # [N] int64: pixels where the channel's value is at least its own_value
    both: Tensor  # [N] int64, with scales: pixels that it wins and owns; otherwise 0


class Band(NamedTuple):
    """Consecutive rows of a grid of values, channels innermost. The last row is the next band's first."""

    values: Tensor  # [points, pitch] float32, contiguous; pitch a multiple of `VECTOR`
    channels: int
    first_row: int
    rows: int
    grid: tuple[int, int]  # height and width of the complete grid
    value_of_point: Tensor | None = None  # [rows * width] int32, row of `values` of each point; None: its own number

    def sizes(self) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
        """First row, rows, the grid's height and width; channels and pitch: as the extension takes them."""
        return (self.first_row, self.rows, *self.grid), (self.channels, self.values.shape[1])


def bands(grid: tuple[int, int], rows: int) -> Iterator[slice]:
    """Split the grid's rows into bands whose last row is the next one's first."""
    start = 0
    while True:
        stop = min(start + rows + 1, grid[0])
        yield slice(start, stop)
        if stop == grid[0]:
            return
        start = stop - 1


def padded_channels(channels: int) -> int:
    """Pitch of a map of so many channels."""
    return -(-channels // VECTOR) * VECTOR


def channels_innermost(
    maps: Tensor,  # [N, ...] floating
) -> Tensor:
    """Copy maps to [points, pitch] float32, as a `Band` has them."""
    flat = maps.reshape(len(maps), -1).to(torch.float32)
    values = flat.new_zeros((flat.shape[1], padded_channels(len(flat))))
    values[:, : len(flat)] = flat.T
    return values


def label_band(
    band: Band,
    labels: Tensor,  # [H, W] int64, int32 for `own_value` without scales; written where the band's cells are
    decided: Tensor | None = None,  # [rows * width] int32, from `decide_band`
    own_value: Tensor | None = None,  # [N] float32
    scale: Tensor | None = None,  # [N] float32
    counts: Tensor | None = None,  # [3, N] int64, added to: won, owned, both
) -> None:
    """Label the output pixels that lie in the cells of a band, on the CPU. The arguments are those of the operators."""
    kind = "scores" if own_value is None else "masks" if scale is None else "sigmoids"
    pitch = band.values.shape[1]
    extras = [None if t is None else F.pad(t.to(torch.float32), (0, pitch - len(t))) for t in (scale, own_value)]
    won, owned, both = (None,) * 3 if counts is None else counts.unbind()
    load_extension().resized_argmax(
        address_of(band.values, "values", "float32", band.values.shape),
        address_of(band.value_of_point, "value_of_point", "int32", (band.rows * band.grid[1],)),
        *band.sizes(),
        address_of(decided, "decided", "int32", (band.rows * band.grid[1],)),
        kind,
        *(address_of(t, "own_value", "float32", (pitch,)) for t in extras),
        address_of(labels, "labels", "int32" if kind == "masks" else "int64", labels.shape),
        tuple(labels.shape),
        *(address_of(t, "counts", "int64", (band.channels,)) for t in (won, owned, both)),
        torch.get_num_threads(),
    )


def decide_band(
    band: Band,
    slack: Tensor,  # [N] float32
    others: float,
    labels: Tensor,  # [N] int32
) -> Tensor:
    """Label the cells that one channel surely fills -> [rows * width] int32, -1 elsewhere; on the CPU.

    A channel's value may be larger than in the band by its slack, and channels that the band lacks are at most
    `others`. The last row is decided only where the grid ends.
    """
    decided = torch.full((band.rows * band.grid[1],), -1, dtype=torch.int32)
    padded = F.pad(slack, (0, band.values.shape[1] - len(slack)))
    load_extension().decide_cells(
        address_of(band.values, "values", "float32", band.values.shape),
        *band.sizes(),
        address_of(padded, "slack", "float32", padded.shape),
        others,
        address_of(labels, "labels", "int32", (band.channels,)),
        address_of(decided, "decided", "int32", decided.shape),
        torch.get_num_threads(),
    )
    return decided


class _Arguments(NamedTuple):
    maps: Tensor  # [N, h, w] floating
    output_size: tuple[int, int]


def _check(arguments: _Arguments) -> None:
    maps, size = arguments
    check(maps.ndim == 3 and maps.numel() > 0, "maps", "[N, h, w] with values", tuple(maps.shape))
    check(maps.is_floating_point(), "maps", "a floating-point type", maps.dtype)
    check(len(size) == 2 and min(size) > 0, "output_size", "positive height and width", size)


def _complete(maps: Tensor) -> Band:
    return Band(channels_innermost(maps), len(maps), 0, maps.shape[1], (maps.shape[1], maps.shape[2]))


def _resized_argmax_cpu(arguments: _Arguments) -> Tensor:
    labels = _resized_argmax_fake(arguments)
    label_band(_complete(arguments.maps), labels)
    return labels


def _resized_argmax_cuda(arguments: _Arguments) -> Tensor:
    return resized_argmax_eager(*arguments)


def _resized_argmax_fake(arguments: _Arguments) -> Tensor:
    return arguments.maps.new_empty(arguments.output_size, dtype=torch.int64)


_resized_argmax = register_operator(
    "resized_argmax(Tensor maps, SymInt[2] output_size) -> Tensor",
    _Arguments,
    check=_check,
    cpu=_resized_argmax_cpu,
    cuda=_resized_argmax_cuda,
    fake=_resized_argmax_fake,
)


@torch.no_grad()
def resized_argmax(
    maps: Tensor,  # [N, h, w] floating
    output_size: tuple[int, int],
) -> Tensor:
    """``F.interpolate(maps, output_size, bilinear).argmax(0)`` without the resized maps -> [H, W] int64.

    Labels may differ where the winner leads by no more than rounding; of equal values the first wins.

    Raises:
        ValueError: maps of another rank or type or without values, an empty output.
        ImportError: the extension is not built.
    """
    return _resized_argmax(maps, output_size)


def resized_argmax_eager(
    maps: Tensor,  # [N, h, w] floating
    output_size: tuple[int, int],
) -> Tensor:
    """`resized_argmax` in plain PyTorch, by tiles of rows."""
    _check(_Arguments(maps, output_size))
    maps = maps.detach()
    labels = maps.new_empty(output_size, dtype=torch.int64)
    for rows in row_tiles(output_size, 2 * len(maps), maps.device):
        labels[rows] = resized_rows(maps, output_size, rows).argmax(0)
    return labels


class _WinnerArguments(NamedTuple):
    maps: Tensor  # [N, h, w] floating
    own_value: Tensor  # [N] floating
    scale: Tensor | None  # [N] floating
    output_size: tuple[int, int]


def _check_winners(arguments: _WinnerArguments) -> None:
    _check(_Arguments(arguments.maps, arguments.output_size))
    for name, value in (("own_value", arguments.own_value), ("scale", arguments.scale)):
        if value is not None:
            check(value.shape == arguments.maps.shape[:1], name, f"[{len(arguments.maps)}]", tuple(value.shape))


def _resized_winners_cpu(arguments: _WinnerArguments) -> tuple[Tensor, Tensor]:
    labels, counts = _resized_winners_fake(arguments)
    label_band(_complete(arguments.maps), labels, None, arguments.own_value, arguments.scale, counts.zero_())
    return labels, counts


def _resized_winners_cuda(arguments: _WinnerArguments) -> tuple[Tensor, Tensor]:
    labels, *counts = resized_winners_eager(*arguments)
    return labels, torch.stack(counts)


def _resized_winners_fake(arguments: _WinnerArguments) -> tuple[Tensor, Tensor]:
    dtype = torch.int32 if arguments.scale is None else torch.int64
    labels = arguments.maps.new_empty(arguments.output_size, dtype=dtype)
    return labels, labels.new_empty((3, arguments.maps.shape[0]), dtype=torch.int64)


_resized_winners = register_operator(
    "resized_winners(Tensor maps, Tensor own_value, Tensor? scale, SymInt[2] output_size) -> (Tensor, Tensor)",
    _WinnerArguments,
    check=_check_winners,
    cpu=_resized_winners_cpu,
    cuda=_resized_winners_cuda,
    fake=_resized_winners_fake,
)


@torch.no_grad()
def resized_winners(
    maps: Tensor,  # [N, h, w] floating
    own_value: Tensor,  # [N] floating
    scale: Tensor | None,  # [N] floating, positive
    output_size: tuple[int, int],
) -> Winners:
    """Winning channel of each pixel of the resized maps, and how many pixels each channel wins and owns.

    Without scales the largest value wins. With them the largest ``scale * sigmoid(value)`` does, and the pixels that
    the winner does not own (value >= own_value) have label -1. Errors are those of `resized_argmax`.
    """
    labels, counts = _resized_winners(maps, own_value, scale, output_size)
    return Winners(labels, *counts.unbind())


@torch.no_grad()
def twice_resized_winners(
    maps: Tensor,  # [N, h, w] floating, mask logits
    own_value: Tensor,  # [N] floating
    scale: Tensor,  # [N] floating, positive
    sigmoids: bool,
    grid: tuple[int, int],
    window: tuple[int, int],
    output_size: tuple[int, int],
) -> Winners:
    """`resized_winners` of maps that are first resized to a grid, bilinearly, and cropped to its top-left window.

    With `sigmoids` the logits at the grid are resized and ``scale * sigmoid`` of the result counts; otherwise ``scale *
    sigmoid(logit at the grid)`` is resized, and own_value is compared with that. On the CPU values at the grid are
    computed only near the borders between winners. Errors are those of `resized_argmax`.
    """
    if maps.device.type != "cpu":
        return twice_resized_winners_eager(maps, own_value, scale, sigmoids, grid, window, output_size)
    _check_winners(_WinnerArguments(maps, own_value, scale, output_size))
    check(all(0 < w <= g for w, g in zip(window, grid, strict=True)), "window", f"within {tuple(grid)}", window)
    values = channels_innermost(maps)
    channels, pitch = len(maps), values.shape[1]
    extras = [F.pad(t.to(torch.float32), (0, pitch - channels)) for t in (scale, own_value)]
    labels = torch.empty(output_size, dtype=torch.int64 if sigmoids else torch.int32)
    counts = torch.zeros((3, channels), dtype=torch.int64)
    load_extension().twice_resized_winners(
        address_of(values, "values", "float32", values.shape), (*maps.shape[1:], channels, pitch), grid, window,
        "sigmoids" if sigmoids else "masks",
        *(address_of(t, "own_value", "float32", (pitch,)) for t in extras),
        address_of(labels, "labels", "int64" if sigmoids else "int32", output_size), output_size,
        [address_of(row, "counts", "int64", (channels,)) for row in counts],
        torch.get_num_threads(),
    )  # fmt: skip
    return Winners(labels, *counts.unbind())


def twice_resized_winners_eager(
    maps: Tensor,  # [N, h, w] floating
    own_value: Tensor,  # [N] floating
    scale: Tensor,  # [N] floating
    sigmoids: bool,
    grid: tuple[int, int],
    window: tuple[int, int],
    output_size: tuple[int, int],
) -> Winners:
    """`twice_resized_winners` in plain PyTorch; all maps at the grid are in memory at once."""
    values = resized_rows(maps.detach(), grid, slice(0, window[0]))[..., : window[1]]
    if sigmoids:
        return resized_winners_eager(values, own_value, scale, output_size)
    return resized_winners_eager(values.sigmoid() * scale[:, None, None], own_value, None, output_size)


def resized_winners_eager(
    maps: Tensor,  # [N, h, w] floating
    own_value: Tensor,  # [N] floating
    scale: Tensor | None,  # [N] floating
    output_size: tuple[int, int],
) -> Winners:
    """`resized_winners` in plain PyTorch, by tiles of rows."""
    _check_winners(_WinnerArguments(maps, own_value, scale, output_size))
    maps = maps.detach()
    labels = maps.new_empty(output_size, dtype=torch.int32 if scale is None else torch.int64)
    won, owned, both = maps.new_zeros((3, len(maps)), dtype=torch.int64).unbind()
    for rows in row_tiles(output_size, 3 * len(maps), maps.device):
        values = resized_rows(maps, output_size, rows)
        own = values >= own_value[:, None, None]
        winner = (values if scale is None else values.sigmoid() * scale[:, None, None]).argmax(0)
        owned += own.sum((1, 2))
        won.scatter_add_(0, winner.flatten(), torch.ones_like(winner).flatten())
        if scale is not None:
            inside = own.gather(0, winner[None])[0]
            both.scatter_add_(0, winner.flatten(), inside.flatten().to(torch.int64))
            winner = winner.where(inside, -1)
        labels[rows] = winner.to(labels.dtype)
    return Winners(labels, won, owned, both)


def resized_rows(
    maps: Tensor,  # [N, h, w] floating
    size: tuple[int, int],
    rows: slice,
    chosen: Tensor | None = None,  # [M] int64
) -> Tensor:
    """Rows of ``F.interpolate(maps, size, mode="bilinear", align_corners=False)`` -> [N, rows, W] float32.

    With `chosen` of these maps only -> [M, rows, W], new memory.
    """
    if maps.shape[1:] == size:
        return (maps[:, rows] if chosen is None else maps[:, rows].index_select(0, chosen)).to(torch.float32)
    top, bottom, share = resized_positions(maps.shape[1], size[0], rows, maps.device)
    if chosen is None:
        upper, lower = (maps.index_select(1, index).to(torch.float32) for index in (top, bottom))
    else:
        upper, lower = (maps[chosen[:, None], index].to(torch.float32) for index in (top, bottom))
    tile = torch.lerp(upper, lower, share[:, None])
    return tile if size[1] == tile.shape[2] else F.interpolate(tile, size[1], mode="linear", align_corners=False)


def resized_positions(
    source: int,
    size: int,
    part: slice,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Source positions that `F.interpolate` reads for a part of its output: low, high int64, share of high float32."""
    scale = torch.tensor(float(source), dtype=torch.float32, device=device) / size
    at = torch.arange(part.start, part.stop, dtype=torch.float32, device=device)
    at = (scale * (at + 0.5) - 0.5).clamp(min=0)
    low = at.long().clamp(max=source - 1)
    return low, (low + 1).clamp(max=source - 1), at - low
