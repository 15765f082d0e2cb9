"""The resize kernel against Pillow, bit for bit, on ragged sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maskformer_fast.kernels.resize import resize_forward
from maskformer_fast.ops.resize import filters_columns_first

CASES = [  # input height, width -> height, width on a canvas; tiles are 8 x 32
    ((19, 45), (11, 24), (16, 32)),  # down on both axes
    ((9, 7), (21, 40), (24, 64)),  # up on both, two tiles wide
    ((11, 30), (37, 7), (40, 8)),  # up and down
    ((30, 11), (7, 37), (8, 40)),  # down and up: columns first, as in all tall ones
    ((40, 12), (15, 6), (16, 33)),
    ((13, 33), (13, 20), (13, 20)),  # rows as they are, canvas not a multiple of the tile
    ((12, 33), (7, 33), (9, 35)),  # columns as they are
    ((10, 35), (10, 35), (16, 70)),  # a copy, one tile of padding alone
    ((1, 1), (3, 5), (8, 8)),
    ((1, 40), (6, 9), (6, 9)),
    ((40, 1), (9, 6), (9, 6)),
    ((17, 23), (1, 1), (2, 3)),
    ((100, 3), (2, 3), (2, 4)),  # 50 rows to one
    ((2, 200), (2, 4), (2, 4)),  # 50 columns to one
]


def random_images(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Random images; half of the pixels are black or white, so that values are clipped at either end."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    return torch.from_numpy(np.where(rng.random(shape) < 0.5, noise, (noise > 127) * np.uint8(255)))


def on_canvas(images: Tensor, size: tuple[int, int], canvas: tuple[int, int]) -> np.ndarray:
    """Pillow's result -> uint8 [N, 3, canvas height, canvas width]."""
    expected = np.zeros((len(images), 3, *canvas), np.uint8)
    for row, image in zip(expected, images, strict=True):
        resized = Image.fromarray(image.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
        row[:, : size[0], : size[1]] = np.asarray(resized).transpose(2, 0, 1)
    return expected


@pytest.mark.parametrize(("shape", "size", "canvas"), CASES)
def test_pixels_equal_pillows(shape: tuple[int, int], size: tuple[int, int], canvas: tuple[int, int]) -> None:
    images = random_images(sum(shape), (1, *shape, 3))
    out = torch.full((1, 3, *canvas), 99, dtype=torch.uint8)
    resize_forward(images, size, out, filters_columns_first(shape, size))
    np.testing.assert_array_equal(out.numpy(), on_canvas(images, size, canvas))


@pytest.mark.parametrize("seed", range(5))
def test_random_sizes_equal_pillows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape, size = (tuple(int(side) for side in rng.integers(1, 25, 2)) for _ in range(2))
    canvas = (size[0] + int(rng.integers(0, 9)), size[1] + int(rng.integers(0, 9)))
    images = random_images(seed, (1, *shape, 3))
    out = torch.empty((1, 3, *canvas), dtype=torch.uint8)
    resize_forward(images, size, out, filters_columns_first(shape, size))
    np.testing.assert_array_equal(out.numpy(), on_canvas(images, size, canvas))


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize(("layout", "bgr"), [("pitch", False), ("alpha", True), ("planar", True), ("rows apart", True)])
def test_batches_of_any_layout(layout: str, bgr: bool, columns_first: bool) -> None:
    images = {
        "pitch": lambda: random_images(1, (2, 10, 32, 3))[:, :, :13],
        "alpha": lambda: random_images(2, (2, 10, 13, 4)),
        "planar": lambda: random_images(3, (2, 3, 10, 13)).permute(0, 2, 3, 1),
        "rows apart": lambda: random_images(4, (2, 20, 13, 3))[:, 1::2],
    }[layout]()
    size, canvas = ((5, 12) if columns_first else (7, 9)), (7, 14)
    if filters_columns_first((10, 13), size) != columns_first:
        pytest.skip("the installed Pillow, older than 13, filters rows first always")
    out = torch.full((4, 3, *canvas), 99, dtype=torch.uint8)
    resize_forward(images, size, out[1:3], columns_first, bgr)
    rgb = images[..., :3].flip(-1) if bgr else images[..., :3]
    np.testing.assert_array_equal(out[1:3].numpy(), on_canvas(rgb.contiguous(), size, canvas))
    assert (out[0] == 99).all() and (out[3] == 99).all(), "wrote to other images"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_levels_normalise_as_the_network_does(dtype: torch.dtype) -> None:
    images, size, canvas = random_images(5, (2, 7, 9, 3)), (4, 6), (5, 8)
    mean, std = torch.tensor([123.675, 116.28, 103.53])[:, None], torch.tensor([58.395, 57.12, 57.375])[:, None]
    out = torch.full((2, 3, *canvas), torch.nan, dtype=dtype)
    resize_forward(images, size, out, False, levels=((torch.arange(256) - mean) / std).to(dtype))
    expected = (torch.from_numpy(on_canvas(images, size, canvas)) - mean[..., None]) / std[..., None]
    expected[:, :, size[0] :], expected[:, :, :, size[1] :] = 0, 0
    torch.testing.assert_close(out, expected.to(dtype), rtol=0, atol=0)
