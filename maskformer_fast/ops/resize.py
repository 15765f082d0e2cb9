"""Frames of any size -> a padded batch, resized as the network was trained to see: antialiased bilinear, 8 bits.

Pillow does it on the CPU, a Triton kernel on CUDA, equal bit for bit: Pillow's arithmetic is in integers. So pixels
do not depend on the device, and frames that a decoder left in device memory need not visit the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from types import ModuleType

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from maskformer_fast.core.checks import check
from maskformer_fast.kernels.resize_table import columns_first

_library = torch.library.Library("maskformer_fast", "FRAGMENT")
_library.define(
    "resize_images(Tensor[] stacks, int[] sizes, int[] canvas, bool bgr) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _resize_images_cpu(stacks: Sequence[Tensor], sizes: Sequence[int], canvas: Sequence[int], bgr: bool) -> Tensor:
    batch = _resize_images_fake(stacks, sizes, canvas, bgr).zero_()
    rows = iter(batch)
    for stack, height, width in zip(stacks, sizes[::2], sizes[1::2], strict=True):
        for image in stack[..., :3].numpy():
            resized = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
            planes = torch.from_numpy(resized).permute(2, 0, 1)
            next(rows)[:, :height, :width] = planes.flip(0) if bgr else planes
    return batch


def _resize_images_cuda(stacks: Sequence[Tensor], sizes: Sequence[int], canvas: Sequence[int], bgr: bool) -> Tensor:
    kernel = _load_kernel()
    batch = _resize_images_fake(stacks, sizes, canvas, bgr)
    start = 0
    with torch.cuda.device(batch.device):
        for stack, height, width in zip(stacks, sizes[::2], sizes[1::2], strict=True):
            size, part = (height, width), batch[start : start + len(stack)]
            kernel.resize_forward(stack, size, part, filters_columns_first(tuple(stack.shape[1:3]), size), bgr)
            start += len(stack)
    return batch


def _resize_images_fake(stacks: Sequence[Tensor], sizes: Sequence[int], canvas: Sequence[int], bgr: bool) -> Tensor:
    return stacks[0].new_empty((sum(stack.shape[0] for stack in stacks), 3, *canvas))


_library.impl("resize_images", _resize_images_cpu, "CPU")
_library.impl("resize_images", _resize_images_cuda, "CUDA")
torch.library.register_fake("maskformer_fast::resize_images", _resize_images_fake, lib=_library)


def filters_columns_first(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """The order in which the installed Pillow filters: what the CPU does."""
    return int(PIL.__version__.split(".")[0]) >= 13 and columns_first(shape, size)


def _load_kernel() -> ModuleType:
    try:
        from maskformer_fast.kernels import resize as preprocess
    except ImportError as error:
        raise ImportError(
            f"resizing images on a CUDA device needs Triton, which cannot be imported: {error}. "
            "Install it with: pip install triton"
        ) from error
    return preprocess


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


def resize_images(
    images: Tensor | Sequence[Tensor],  # uint8 [N, H, W, 3 or 4], or one [H, W, 3 or 4] an image; any strides
    sizes: Sequence[tuple[int, int]],  # height, width of each image after the resize
    divisor: int = 1,
    canvas: tuple[int, int] = (0, 0),
    bgr: bool = False,
) -> tuple[Tensor, Tensor]:
    """Resize images and stack them at the top left of a canvas -> uint8 [B, 3, H, W] RGB, int64 [B, 2] valid sizes.

    The pixels are those of ``PIL.Image.resize(..., BILINEAR)``: `data.transforms.resize_image` and then
    `data.loader.pad_images`, in one step, on the images' device. H and W are the largest height and width (of ``sizes``
    and ``canvas``), rounded up to a multiple of ``divisor``; outside its size an image is zero. A fourth channel
    (alpha) is left out; ``bgr`` says that blue comes first.

    Rows may lie any pitch apart: pass the view (``buffer[:, :width]``, ``buffer.as_strided``), CUDA does not copy it.
    There, images of one size in one tensor take one launch, images in a list one each; sizes seen for the first
    time copy their filters to the device, which a CUDA graph cannot capture.

    Raises:
        TypeError: images that are not uint8 tensors.
        ValueError: an empty image or another shape, a size below 1, images of which not all are on one device.
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
    largest = [max(side, *sides) for side, sides in zip(canvas, zip(*sizes, strict=True), strict=True)]
    padded = [-(-side // divisor) * divisor for side in largest]
    flat = [side for size in sizes[:: count // len(stacks)] for side in size]
    batch = torch.ops.maskformer_fast.resize_images(stacks, flat, padded, bgr)
    return batch, _valid_sizes(sizes, batch.device)


def _valid_sizes(sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """int64 [B, 2]. Filled by the device: to copy it the host would wait for all work before, and a CUDA graph could
    not capture that."""
    result = torch.empty(len(sizes), 2, dtype=torch.int64, device=device)
    start = 0
    for size, equal in groupby(sizes):
        end = start + len(list(equal))
        for column, side in enumerate(size):
            result[start:end, column].fill_(side)
        start = end
    return result
