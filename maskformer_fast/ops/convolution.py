"""3x3 convolution of stride 1 on the CPU, by Winograd's algorithm F(4x4, 3x3) (Lavin and Gray, 2016).

It takes 36 multiplications where the sum of products takes 144. Such convolutions are most of the time of the pixel
decoder and half of a ResNet's. The C++ (`csrc/convolution/kernels.cpp`) works with channels innermost;
`torch.nn.functional.conv2d` is its eager twin. Sums are in float32, images in float32 or bfloat16.

`conv3x3_winograd` is for inference, with weights transformed once. `conv3x3` is for training: it transforms the weights
in each call, and both gradients are by the same algorithm.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.core.arrays import address_of, dtype_name
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension
from maskformer_fast.ops.registration import register_gradient, register_operator

DTYPES = (torch.float32, torch.bfloat16)
PANEL = 16
"""Output channels that lie together in packed weights. The number of input channels must be a multiple of it."""
_POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2.0), -math.sqrt(2.0))
"""Interpolation points of F(4, 3), without the sixth, infinity."""
_TILE = 4
"""Side of a tile of the result in pixels."""
_MOST_TILES = 1024
"""Tiles that are transformed at a time for the gradient of the weights: for 256 channels 38 MB of each map."""


class _Arguments(NamedTuple):
    images: Tensor  # [B, C, H, W] float32 or bfloat16
    packed: Tensor  # [36, ceil(channels / 16), C, 16] float32
    bias: Tensor | None  # [channels] float32
    channels: int
    relu: bool


def _conv3x3_winograd_cpu(arguments: _Arguments) -> Tensor:
    images = arguments.images.contiguous(memory_format=torch.channels_last)
    result = _conv3x3_winograd_fake(arguments)
    count, in_channels, height, width = images.shape
    load_extension().conv3x3_winograd(
        _innermost_channels(images, "images"), dtype_name(images),
        (count, height, width, in_channels, arguments.channels),
        address_of(arguments.packed, "packed", "float32", _packed_shape(arguments)),
        address_of(arguments.bias, "bias", "float32", (arguments.channels,)), arguments.relu,
        _innermost_channels(result, "result"), torch.get_num_threads(),
    )  # fmt: skip
    return result


def _innermost_channels(images: Tensor, name: str) -> int:
    """Address of images whose channels are the innermost dimension."""
    pixels = images.permute(0, 2, 3, 1)
    return address_of(pixels, name, dtype_name(images), pixels.shape)


def _conv3x3_winograd_fake(arguments: _Arguments) -> Tensor:
    images = arguments.images
    shape = (images.shape[0], arguments.channels, *images.shape[2:])
    return torch.empty(shape, dtype=images.dtype, device=images.device, memory_format=torch.channels_last)


def _packed_shape(arguments: _Arguments) -> tuple[int, ...]:
    return 36, -(-arguments.channels // PANEL), arguments.images.shape[1], PANEL


def _check(arguments: _Arguments) -> None:
    images, packed, bias, channels, _ = arguments
    if images.dtype not in DTYPES:
        raise TypeError(f"images: expected torch.float32 or torch.bfloat16, got {images.dtype}")
    check(images.device.type == "cpu", "images", "a tensor on the CPU", images.device)
    check(images.dim() == 4, "images", "shape [B, C, H, W]", tuple(images.shape))
    check(channels > 0, "channels", ">= 1", channels)
    expected = _packed_shape(arguments)
    check(tuple(packed.shape) == expected, "packed", f"shape {expected}", tuple(packed.shape))
    for name, tensor in (("packed", packed), ("bias", bias)):
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            raise TypeError(f"{name}: expected a contiguous torch.float32, got {tensor.dtype} {tensor.stride()}")
    if bias is not None:
        check(tuple(bias.shape) == (channels,), "bias", f"shape [{channels}]", tuple(bias.shape))


_conv3x3_winograd = register_operator(
    "conv3x3_winograd(Tensor images, Tensor packed, Tensor? bias, int channels, bool relu) -> Tensor",
    _Arguments,
    check=_check,
    cpu=_conv3x3_winograd_cpu,
    fake=_conv3x3_winograd_fake,
)


def suits_winograd(images: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Tell whether `conv3x3_winograd` can convolve these: on the CPU, without gradients, and not while exporting."""
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (images, weight, bias))
    return (
        images.device.type == "cpu" and images.dtype in DTYPES
        and not needs_gradient and not torch.compiler.is_compiling()
        and weight.shape[1] % PANEL == 0 and tuple(weight.shape[2:]) == (3, 3)
    )  # fmt: skip


def pack_winograd_weights(
    weight: Tensor,  # [N, C, 3, 3] floating, on the CPU
) -> Tensor:
    """Transform and pack a convolution's weights -> [36, ceil(N / 16), C, 16] float32, four times their memory.

    Raises ``ValueError`` for other kernels than 3x3, where N is 0, and where C is 0 or not a multiple of 16.
    """
    check(weight.dim() == 4 and weight.shape[2:] == (3, 3), "weight", "shape [N, C, 3, 3]", tuple(weight.shape))
    channels, in_channels = weight.shape[:2]
    check(channels > 0, "weight", "at least one output channel", channels)
    check(in_channels > 0 and in_channels % PANEL == 0, "weight", f"a multiple of {PANEL} input channels", in_channels)
    rows = F.pad(weight.detach().float().flatten(2), (0, 0, 0, 0, 0, -channels % PANEL))
    rows = rows.unflatten(0, (-1, PANEL)).permute(3, 0, 2, 1)  # [9, N / 16, C, 16]
    with torch.autocast("cpu", enabled=False):
        packed = _transform() @ rows.reshape(9, -1)
    return packed.view(36, *rows.shape[1:])


@functools.cache
def _transform() -> Tensor:
    """Winograd transform of a 3x3 kernel's 9 weights, the Kronecker product of G with itself -> [36, 9] float32.

    G [6, 3] evaluates a kernel of 3 weights at the points, divided by the scale that the input's transform B leaves
    out.
    """
    rows = []
    for point in _POINTS:
        scale = math.prod(point - other for other in _POINTS if other != point)
        rows.append([1 / scale, point / scale, point**2 / scale])
    values = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)
    return torch.kron(values, values).float()


def conv3x3_winograd(
    images: Tensor,  # [B, C, H, W] float32 or bfloat16; best with channels last in memory
    packed: Tensor,  # [36, ceil(channels / 16), C, 16] float32, by `pack_winograd_weights`
    bias: Tensor | None,  # [channels] float32
    channels: int,
    relu: bool = False,
) -> Tensor:
    """Convolve with zero padding, for inference only -> [B, channels, H, W] in the images' dtype, channels last.

    Differs from ``F.conv2d`` by rounding, about 1e-6 of the largest value in float32. A pixel that is not finite makes
    its tile of 4x4 pixels not finite, and the neighbouring tiles whose kernels reach it.

    Raises:
        TypeError: images of another dtype.
        ValueError: shapes that do not fit, another device than the CPU.
        ImportError: without the compiled extension.
    """
    return _conv3x3_winograd(images, packed, bias, channels, relu)


class _TrainedArguments(NamedTuple):
    images: Tensor  # [B, C, H, W] float32
    weight: Tensor  # [N, C, 3, 3] float32
    bias: Tensor | None  # [N] float32


def _conv3x3_cpu(arguments: _TrainedArguments) -> Tensor:
    images, weight, bias = arguments
    bias = None if bias is None else bias.contiguous()
    return _conv3x3_winograd_cpu(_Arguments(images, pack_winograd_weights(weight), bias, weight.shape[0], False))


def _conv3x3_fake(arguments: _TrainedArguments) -> Tensor:
    images, weight, bias = arguments
    return _conv3x3_winograd_fake(_Arguments(images, weight, bias, weight.shape[0], False))


def _check_trained(arguments: _TrainedArguments) -> None:
    images, weight, bias = arguments
    for name, tensor in (("images", images), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"{name}: expected torch.float32, got {tensor.dtype}")
    check(weight.dim() == 4 and weight.shape[2:] == (3, 3), "weight", "shape [N, C, 3, 3]", tuple(weight.shape))
    channels, in_channels = weight.shape[:2]
    for name, count in (("output", channels), ("input", in_channels)):
        check(count > 0 and count % PANEL == 0, "weight", f"a multiple of {PANEL} {name} channels", count)
    fits = images.dim() == 4 and images.shape[1] == in_channels
    check(fits, "images", f"shape [B, {in_channels}, H, W]", tuple(images.shape))
    if bias is not None:
        check(tuple(bias.shape) == (channels,), "bias", f"shape [{channels}]", tuple(bias.shape))


class _Maps(NamedTuple):
    gradient: Tensor  # [B, N, H, W] float32
    images: Tensor  # [B, C, H, W] float32


def _weight_gradient_cpu(maps: _Maps) -> Tensor:
    gradient, images = (tensor.contiguous(memory_format=torch.channels_last) for tensor in maps)
    channels, in_channels = gradient.shape[1], images.shape[1]
    tiles = images.shape[0] * math.prod(-(-size // _TILE) for size in images.shape[2:])
    found = images.new_zeros(36, channels, in_channels)
    for first in range(0, tiles, _MOST_TILES):
        last = min(first + _MOST_TILES, tiles)
        found.baddbmm_(_tiles(gradient, True, first, last).mT, _tiles(images, False, first, last))
    return (_transform().t() @ found.view(36, -1)).t().contiguous().view(channels, in_channels, 3, 3)


def _tiles(maps: Tensor, of_gradient: bool, first: int, last: int) -> Tensor:
    """Transform tiles -> [36, last - first, channels]."""
    channels, height, width = maps.shape[1:]
    # Taps whose addresses differ by a multiple of the page's size would share few lines of the cache.
    step = (last - first) * channels + PANEL
    taps = maps.new_empty(36, step)
    load_extension().winograd_tiles(
        _innermost_channels(maps, "maps"), of_gradient, (height, width, channels, first, last, step),
        address_of(taps, "taps", "float32", taps.shape), torch.get_num_threads(),
    )  # fmt: skip
    return taps[:, :-PANEL].unflatten(1, (last - first, channels))


def _weight_gradient_fake(maps: _Maps) -> Tensor:
    return maps.images.new_empty(maps.gradient.shape[1], maps.images.shape[1], 3, 3)


def _check_maps(maps: _Maps) -> None:
    gradient, images = maps
    for name, tensor in maps._asdict().items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: expected torch.float32, got {tensor.dtype}")
        fits = tensor.dim() == 4 and tensor.shape[1] > 0 and tensor.shape[1] % PANEL == 0
        check(fits, name, f"shape [B, a multiple of {PANEL}, H, W]", tuple(tensor.shape))
    fits = gradient.shape[0] == images.shape[0] and gradient.shape[2:] == images.shape[2:]
    check(fits, "gradient", f"the size of images {tuple(images.shape)}", tuple(gradient.shape))


_conv3x3 = register_operator(
    "conv3x3(Tensor images, Tensor weight, Tensor? bias) -> Tensor",
    _TrainedArguments,
    check=_check_trained,
    cpu=_conv3x3_cpu,
    fake=_conv3x3_fake,
)
_weight_gradient = register_operator(
    "conv3x3_weight_gradient(Tensor gradient, Tensor images) -> Tensor",
    _Maps,
    check=_check_maps,
    cpu=_weight_gradient_cpu,
    fake=_weight_gradient_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, _ = inputs
    ctx.save_for_backward(images, weight)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    images, weight = ctx.saved_tensors
    with_images, with_weight, with_bias = ctx.needs_input_grad
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    # The images' gradient is the convolution of the output's with the kernels turned by half a circle.
    images_gradient = _conv3x3(gradient, weight.flip(2, 3).transpose(0, 1), None) if with_images else None
    return (
        images_gradient,
        _weight_gradient(gradient, images) if with_weight else None,
        gradient.sum((0, 2, 3)) if with_bias else None,
    )


register_gradient("conv3x3", _backward, _setup_context)


def conv3x3(
    images: Tensor,  # [B, C, H, W] float32, on the CPU; best with channels last in memory
    weight: Tensor,  # [N, C, 3, 3] float32
    bias: Tensor | None,  # [N] float32
) -> Tensor:
    """Convolve with zero padding, differentiably, for training -> [B, N, H, W] float32, channels last.

    Result and gradients are by Winograd's algorithm, and differ from those of ``F.conv2d`` by rounding, as those of
    `conv3x3_winograd` do.

    Raises:
        TypeError: tensors of another dtype.
        ValueError: shapes that do not fit; input or output channels that are not a multiple of 16.
        ImportError: without the compiled extension.
    """
    return _conv3x3(images, weight, bias)
