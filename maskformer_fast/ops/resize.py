"""Resize of frames of any size into a padded batch as the network was trained on: antialiased bilinear, 8 bits.

Pillow resizes on the CPU, a Triton kernel on CUDA. Both are equal bit for bit, because Pillow's arithmetic is in
integers. So pixels do not depend on the device, and frames that a decoder left in device memory stay there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_kernels
from maskformer_fast.kernels.resize_table import columns_first
from maskformer_fast.ops.registration import register_operator


class _Arguments(NamedTuple):
    stacks: tuple[Tensor, ...]  # [N, H, W, 3 or 4] uint8 each
    sizes: tuple[int, ...]  # height and width after the resize, of each stack in turn
    canvas: tuple[int, int]
    bgr: bool

    def stacks_and_sizes(self) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        return zip(self.stacks, zip(self.sizes[::2], self.sizes[1::2], strict=True), strict=True)


def _resize_images_cpu(arguments: _Arguments) -> Tensor:
    batch = _resize_images_fake(arguments).zero_()
    rows = iter(batch)
    for stack, (height, width) in arguments.stacks_and_sizes():
        for image in stack[..., :3].numpy():
            resized = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
            planes = torch.from_numpy(resized).permute(2, 0, 1)
            next(rows)[:, :height, :width] = planes.flip(0) if arguments.bgr else planes
    return batch


def _resize_images_cuda(arguments: _Arguments) -> Tensor:
    kernels = load_kernels("resize")
    batch = _resize_images_fake(arguments)
    start = 0
    with torch.cuda.device(batch.device):
        for stack, size in arguments.stacks_and_sizes():
            part = batch[start : start + len(stack)]
            columns_come_first = filters_columns_first(tuple(stack.shape[1:3]), size)
            kernels.resize_forward(stack, size, part, columns_come_first, arguments.bgr)
            start += len(stack)
    return batch


def _resize_images_fake(arguments: _Arguments) -> Tensor:
    count = sum(stack.shape[0] for stack in arguments.stacks)
    return arguments.stacks[0].new_empty((count, 3, *arguments.canvas))


def _check_image(
    image: Tensor,
    dims: int,  # 4 for a stack
    device: torch.device,
) -> None:
    if image.dtype != torch.uint8:
        raise TypeError(f"images: expected torch.uint8, got {image.dtype}")
    shape = tuple(image.shape)
    fits = image.dim() == dims and shape[-1] in (3, 4) and image.numel() > 0
    check(fits, "images", "a tensor [N, H, W, 3 or 4] or a sequence of [H, W, 3 or 4], none empty", shape)
    check(image.device == device, "images", f"all on {device} as the first", image.device)


def _check(arguments: _Arguments) -> None:
    stacks, sizes, canvas, _ = arguments
    check(len(stacks) > 0, "stacks", "at least one", len(stacks))
    for stack in stacks:
        _check_image(stack, 4, stacks[0].device)
    check(len(sizes) == 2 * len(stacks), "sizes", f"height and width of each of the {len(stacks)} stacks", sizes)
    fits = len(canvas) == 2 and all(1 <= size <= canvas[index % 2] for index, size in enumerate(sizes))
    check(fits, "sizes", f"at least 1 x 1 and at most the canvas {canvas}", sizes)


_resize_images = register_operator(
    "resize_images(Tensor[] stacks, int[] sizes, int[] canvas, bool bgr) -> Tensor",
    _Arguments,
    check=_check,
    cpu=_resize_images_cpu,
    cuda=_resize_images_cuda,
    fake=_resize_images_fake,
)


def filters_columns_first(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Tell whether the installed Pillow, which resizes on the CPU, filters columns before rows."""
    return int(PIL.__version__.split(".")[0]) >= 13 and columns_first(shape, size)


def resize_images(
    images: Tensor | Sequence[Tensor],  # uint8 [N, H, W, 3 or 4], or one [H, W, 3 or 4] an image; any strides
    sizes: Sequence[tuple[int, int]],  # height, width of each image after the resize
    divisor: int = 1,
    canvas: tuple[int, int] = (0, 0),
    bgr: bool = False,
) -> tuple[Tensor, Tensor]:
    """Resize images and stack them at the top left of a canvas -> uint8 [B, 3, H, W] RGB, int64 [B, 2] valid sizes.

    The pixels are those of ``PIL.Image.resize(..., BILINEAR)``. One call does the work of
    `data.transforms.resize_image` and `data.loader.pad_images`, on the images' device. H and W are the largest height
    and width (of ``sizes`` and ``canvas``), rounded up to a multiple of ``divisor``; outside its size an image is zero.
    A fourth channel (alpha) is left out. With ``bgr`` the first channel is blue.

    Rows may be any distance apart in memory: pass the view (``buffer[:, :width]``, ``buffer.as_strided``), which CUDA
    does not copy. On CUDA, images of one tensor take one launch together, images of a list one each. The first call
    with a size copies its filters to the device, which a CUDA graph cannot capture.

    Raises:
        TypeError: images that are not uint8 tensors.
        ValueError: an empty image or another shape, a size below 1, images on different devices.
        ImportError: a CUDA device without Triton.
    """
    single = isinstance(images, Tensor)
    given = [images] if isinstance(images, Tensor) else list(images)
    check(len(given) > 0, "images", "at least one", len(given))
    for image in given:
        if not isinstance(image, Tensor):
            raise TypeError(f"images: expected Tensors, got {type(image).__name__}")
        _check_image(image, 4 if single else 3, given[0].device)
    stacks = given if single else [image.unsqueeze(0) for image in given]
    check(divisor >= 1, "divisor", ">= 1", divisor)
    count = sum(len(stack) for stack in stacks)
    sizes = [(int(height), int(width)) for height, width in sizes]
    check(len(sizes) == count, "sizes", f"one for each of the {count} images", len(sizes))
    check(all(min(size) >= 1 for size in sizes), "sizes", "at least 1 x 1", sizes)
    if single:
        check(len(set(sizes)) == 1, "sizes", "the same for all images of one tensor", sizes)
    largest = [max(length, *lengths) for length, lengths in zip(canvas, zip(*sizes, strict=True), strict=True)]
    padded = [-(-length // divisor) * divisor for length in largest]
    flat = [length for size in sizes[:: count // len(stacks)] for length in size]
    batch = _resize_images(stacks, flat, padded, bgr)
    return batch, _valid_sizes(sizes, batch.device)


def _valid_sizes(sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Make the tensor of sizes on the device -> [B, 2] int64."""
    # Filled by the device: a copy from the host would wait for all work before it, and a CUDA graph could not capture
    # it.
    result = torch.empty(len(sizes), 2, dtype=torch.int64, device=device)
    start = 0
    for size, equal in groupby(sizes):
        end = start + len(list(equal))
        for column, length in enumerate(size):
            result[start:end, column].fill_(length)
        start = end
    return result
