"""Semantic labels of a picture from the class scores of its tiles.

Where tiles overlap, their class scores are averaged by weight (`TileGrid.weights`), as
``sum_t weight_t * sum_q P_t[q, c] * sigmoid(logits_t)``. Scores of a few rows are in memory at a time, never those of a
tile. Where one tile counts, its own labels do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maskformer_fast.inference.tile_grid import Block, TileGrid
from maskformer_fast.inference_config import TileBlend
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.resample import resample_rows, row_tiles
from maskformer_fast.structures import PixelPredictions, Predictions

Arrays = dict[str, np.ndarray]


def score_arrays(predictions: Predictions | PixelPredictions) -> list[Arrays]:
    """What is kept of a batch's predictions, from which scores of any pixels can be computed, for each image.

    ``maps`` are logits of masks [Q, h, w], or of classes [K, h, w] where there are no ``probabilities`` [Q, K];
    ``extent`` is the part of the maps that the image covers.
    """
    with torch.no_grad(), torch.autocast(predictions.valid_sizes.device.type, enabled=False):
        if isinstance(predictions, PixelPredictions):
            maps, probabilities = predictions.logits[-1], None
        else:
            maps = layer_mask_logits(_in_float32(predictions))
            probabilities = predictions.class_logits[-1].to(torch.float32).softmax(-1)[..., :-1]
    scale = [m / i for m, i in zip(maps.shape[-2:], predictions.input_size, strict=True)]
    kept = []
    for image, valid in enumerate(predictions.valid_sizes.tolist()):
        arrays = {"maps": maps[image].to(torch.float32).cpu().numpy(),
                  "extent": np.array([v * s for v, s in zip(valid, scale, strict=True)])}  # fmt: skip
        if probabilities is not None:
            arrays["probabilities"] = probabilities[image].cpu().numpy()
        kept.append(arrays)
    return kept


def _in_float32(predictions: Predictions) -> Predictions:
    return predictions._replace(mask_embeddings=predictions.mask_embeddings[-1:].to(torch.float32),
                                pixel_features=predictions.pixel_features.to(torch.float32))  # fmt: skip


@torch.no_grad()
def block_labels(
    grid: TileGrid,
    block: Block,
    tiles: Sequence[Arrays],  # `score_arrays` of each tile of the block
    blend: TileBlend,
    device: torch.device,
) -> np.ndarray:
    """Class of each pixel of a block -> [h, w] int64."""
    height, width = block.box.size
    labels = np.empty((height, width), np.int64)
    shares = grid.weights(block, blend)
    parts = [_OnDevice(grid, block, number, arrays, device) for number, arrays in zip(block.tiles, tiles, strict=True)]
    channels = max(part.channels for part in parts)
    for rows in row_tiles((height, width), channels, device):
        total: Tensor | None = None
        for part, (down, across) in zip(parts, shares, strict=True):
            scores = part.scores(rows)
            scores *= torch.from_numpy(down[rows]).to(device)[:, None] * torch.from_numpy(across).to(device)
            total = scores if total is None else total.add_(scores)
        assert total is not None  # a block has a tile
        labels[rows] = total.argmax(0).cpu().numpy()
    return labels


class _OnDevice:
    """A tile's maps on a device, cropped to the columns that a block reads."""

    def __init__(self, grid: TileGrid, block: Block, number: int, arrays: Arrays, device: torch.device) -> None:
        box = grid.boxes[number]
        self.size = box.size
        self.down, across = block.box.within(box)
        self.extent = (float(arrays["extent"][0]), float(arrays["extent"][1]))
        maps = torch.from_numpy(arrays["maps"])
        # columns as `ops.resample` defines them
        x = torch.arange(across.start, across.stop, dtype=torch.float64)
        x = ((x + 0.5) * (self.extent[1] / self.size[1]) - 0.5).clamp(0, maps.shape[-1] - 1)
        left = x.floor().long()
        right = (left + 1).clamp(max=maps.shape[-1] - 1)
        first = int(left[0])
        self.maps = maps[..., first : int(right[-1]) + 1].to(device)
        self.left, self.right = (left - first).to(device), (right - first).to(device)
        self.share = (x - left).to(torch.float32).to(device)
        found = arrays.get("probabilities")
        self.probabilities = None if found is None else torch.from_numpy(found).to(device)
        self.channels = 3 * len(self.maps) + 2 * (0 if found is None else found.shape[1])

    def scores(self, rows: slice) -> Tensor:
        """Scores of all classes in some of the block's rows -> [K, rows, columns] float32."""
        part = slice(rows.start + self.down.start, rows.stop + self.down.start)
        width = self.maps.shape[-1]  # resampled along rows only
        narrow = resample_rows(self.maps, (self.extent[0], width), (self.size[0], width), part)
        logits = torch.lerp(narrow[..., self.left], narrow[..., self.right], self.share)
        if self.probabilities is None:
            return logits.softmax(0)
        return torch.einsum("qk,qhw->khw", self.probabilities, logits.sigmoid_())
