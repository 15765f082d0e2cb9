"""What follows the transposed convolution of EoMT's upscaling blocks, on the CPU, in one pass over the map.

GELU, a depthwise 3x3 convolution and LayerNorm over the channels, none of which has products that would keep the
processor busy: apart, they read and write maps of 128x128 pixels at 512x512 six times, and training keeps four of them
for each prediction. Here some rows at a time stay in the processor's cache, and the backward pass computes them again.
`upscaling_eager` is the eager twin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.core.arrays import address_of, dtype_name
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension
from maskformer_fast.ops.registration import register_gradient, register_operator

DTYPES = (torch.float32, torch.bfloat16)


class _Arguments(NamedTuple):
    maps: Tensor  # [B, h, w, 4, C] float32 or bfloat16
    weight: Tensor  # [C, 1, 3, 3] float32
    norm_weight: Tensor  # [C] float32
    norm_bias: Tensor  # [C] float32
    epsilon: float
    gelu: bool


class _Backward(NamedTuple):
    gradient: Tensor  # [B, 2h, 2w, C] float32
    upscaling: _Arguments

    @staticmethod
    def of(gradient: Tensor, *arguments: Any) -> _Backward:
        return _Backward(gradient, _Arguments(*arguments))


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of the maps, the convolution's weight, and the norm's weight and bias."""


def _prepared(arguments: _Arguments) -> tuple[_Arguments, tuple[Any, ...]]:
    """Contiguous arguments, the weight as [3, 3, C], and what the extension takes of them."""
    maps, weight, *norm, epsilon, gelu = arguments
    maps, weight = maps.contiguous(), weight[:, 0].permute(1, 2, 0).contiguous()
    norm_weight, norm_bias = (x.contiguous() for x in norm)
    batch, height, width, _, channels = maps.shape
    addresses = tuple(
        address_of(x, name, "float32", x.shape)
        for x, name in ((weight, "weight"), (norm_weight, "norm_weight"), (norm_bias, "norm_bias"))
    )
    prepared = _Arguments(maps, weight, norm_weight, norm_bias, epsilon, gelu)
    return prepared, ((batch, height, width, channels), gelu, addresses, epsilon)


def _forward_fake(arguments: _Arguments) -> Tensor:
    batch, height, width, _, channels = arguments.maps.shape
    return arguments.maps.new_empty((batch, 2 * height, 2 * width, channels))


def _forward_cpu(arguments: _Arguments) -> Tensor:
    result = _forward_fake(arguments)
    prepared, given = _prepared(arguments)
    kind = dtype_name(result)
    load_extension().upscaling(
        address_of(prepared.maps, "maps", kind, prepared.maps.shape), kind, *given,
        address_of(result, "result", kind, result.shape), torch.get_num_threads(),
    )  # fmt: skip
    return result


def _backward_fake(arguments: _Backward) -> Gradients:
    maps, weight, norm_weight, norm_bias, *_ = arguments.upscaling
    first, second, third, fourth = (x.new_empty(x.shape) for x in (maps, weight, norm_weight, norm_bias))
    return first, second, third, fourth


def _backward_cpu(arguments: _Backward) -> Gradients:
    prepared, given = _prepared(arguments.upscaling)
    maps, gradient = prepared.maps, arguments.gradient.contiguous()
    by_maps, by_weights = torch.empty_like(maps), maps.new_empty((11, maps.shape[4]))
    load_extension().upscaling_backward(
        address_of(gradient, "gradient", "float32", gradient.shape), address_of(maps, "maps", "float32", maps.shape),
        *given, address_of(by_maps, "by_maps", "float32", by_maps.shape),
        address_of(by_weights, "by_weights", "float32", by_weights.shape), torch.get_num_threads(),
    )  # fmt: skip
    by_weight = by_weights[:9].t().reshape(arguments.upscaling.weight.shape).contiguous()
    return by_maps, by_weight, by_weights[9].clone(), by_weights[10].clone()


def _check(arguments: _Arguments) -> None:
    maps, weight, norm_weight, norm_bias, epsilon, _ = arguments
    if maps.dtype not in DTYPES:
        raise TypeError(f"maps: expected torch.float32 or torch.bfloat16, got {maps.dtype}")
    check(maps.device.type in ("cpu", "meta"), "maps", "a tensor on the CPU", maps.device)
    fits = maps.dim() == 5 and maps.shape[3] == 4 and maps.shape[4] > 0
    check(fits, "maps", "shape [B, h, w, 4, C]", tuple(maps.shape))
    channels = maps.shape[4]
    others = {"weight": (weight, (channels, 1, 3, 3)), "norm_weight": (norm_weight, (channels,)),
              "norm_bias": (norm_bias, (channels,))}  # fmt: skip
    for name, (tensor, shape) in others.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: expected torch.float32, got {tensor.dtype}")
        check(tuple(tensor.shape) == shape, name, f"shape {shape}", tuple(tensor.shape))
    check(epsilon >= 0, "epsilon", ">= 0", epsilon)


def _check_backward(arguments: _Backward) -> None:
    gradient, given = arguments
    _check(given)
    for name, tensor in (("maps", given.maps), ("gradient", gradient)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: expected torch.float32, got {tensor.dtype}")
    batch, height, width, _, channels = given.maps.shape
    shape = (batch, 2 * height, 2 * width, channels)
    check(tuple(gradient.shape) == shape, "gradient", f"shape {shape}", tuple(gradient.shape))


_SCHEMA = "Tensor maps, Tensor weight, Tensor norm_weight, Tensor norm_bias, float epsilon, bool gelu"
_upscaling = register_operator(
    f"upscaling({_SCHEMA}) -> Tensor", _Arguments, check=_check, cpu=_forward_cpu, fake=_forward_fake
)
_upscaling_backward = register_operator(
    f"upscaling_backward(Tensor gradient, {_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    _Backward.of,
    check=_check_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.epsilon, ctx.gelu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*_upscaling_backward(gradient, *ctx.saved_tensors, ctx.epsilon, ctx.gelu), None, None)


register_gradient("upscaling", _differentiate, _setup_context)


def upscaling(
    maps: Tensor,  # [B, h, w, 4, C] float32 or bfloat16
    weight: Tensor,  # [C, 1, 3, 3] float32
    norm_weight: Tensor,  # [C] float32
    norm_bias: Tensor,  # [C] float32
    epsilon: float,
    gelu: bool = True,
) -> Tensor:
    """GELU, depthwise convolution and LayerNorm -> [B, 2h, 2w, C] in the dtype of ``maps``.

    The four values of a pixel of ``maps`` are those of the window of 2x2 pixels that a transposed convolution makes of
    it, row by row. Around the map are zeros. With ``gelu`` False the values have been through GELU. Sums are in
    float32; GELU is within 2e-6 of its value. Differentiable in float32; neither result nor gradients depend on the
    number of threads.

    Source: the upscaling block of EoMT (Kerssies et al., CVPR 2025).

    Raises:
        TypeError: other dtypes, a gradient in bfloat16.
        ValueError: shapes that do not fit, a negative ``epsilon``, another device than the CPU.
        ImportError: without the compiled extension.
    """
    return _upscaling(maps, weight, norm_weight, norm_bias, epsilon, gelu)


def upscaling_eager(
    maps: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, epsilon: float, gelu: bool = True
) -> Tensor:
    """Eager twin of `upscaling`."""
    x = maps.unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    x = F.gelu(x) if gelu else x
    x = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=len(weight)).permute(0, 2, 3, 1)
    return F.layer_norm(x, (len(weight),), norm_weight, norm_bias, epsilon)
