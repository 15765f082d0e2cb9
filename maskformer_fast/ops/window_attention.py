"""Attention within the windows of Swin Transformer, on the CPU.

Scores, softmax and weighted sum of a window stay in the processor's cache, in the backward pass too, which computes
them again; windows are read from the map and written to it in place, so that neither padding, cyclic shift nor
partition into windows copies it. The C++ is in `csrc/window_attention`; `window_attention_eager` is its eager twin.
Sums are in float32, maps in float32 or bfloat16.
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
SEAM = -100.0
"""Added to the scores of tokens from opposite sides of the image, which a cyclic shift brings into one window; finite,
as in the training of the published weights."""
_KEY_PANEL = 16
_ABSENT = -1e30
"""Bias of keys that only fill a row of memory."""


class _Arguments(NamedTuple):
    qkv: Tensor  # [B, H, W, 3 * heads * d] float32 or bfloat16
    padding: Tensor  # [3 * heads * d] of the same dtype
    bias: Tensor  # [heads, N, ceil(N / 16) * 16] float32, N = window squared
    window: int
    shift: int


class _BackwardArguments(NamedTuple):
    gradient: Tensor  # [B, H, W, heads * d] dtype of qkv
    attention: _Arguments

    @staticmethod
    def of(gradient: Tensor, *attention: Any) -> _BackwardArguments:
        return _BackwardArguments(gradient, _Arguments(*attention))


def _inputs_of_extension(arguments: _Arguments) -> tuple[Any, ...]:
    qkv, padding, bias, window, shift = arguments
    heads, channels, dtype = bias.shape[0], qkv.shape[3] // 3, dtype_name(qkv)
    return (
        address_of(qkv, "qkv", dtype, qkv.shape), address_of(padding, "padding", dtype, padding.shape), dtype,
        (*qkv.shape[:3], heads, channels // heads, window, shift), address_of(bias, "bias", "float32", bias.shape),
        bias.shape[2],
    )  # fmt: skip


def _window_attention_cpu(arguments: _Arguments) -> Tensor:
    result = _window_attention_fake(arguments)
    load_extension().window_attention(
        *_inputs_of_extension(arguments), address_of(result, "result", dtype_name(result), result.shape),
        torch.get_num_threads(),
    )  # fmt: skip
    return result


def _backward_cpu(arguments: _BackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    gradient, attention = arguments
    dtype, padding = dtype_name(gradient), attention.padding
    results = torch.empty_like(attention.qkv), torch.empty_like(padding, dtype=torch.float32), torch.empty_like(
        attention.bias
    )
    load_extension().window_attention_backward(
        address_of(gradient, "gradient", dtype, gradient.shape), *_inputs_of_extension(attention),
        *[address_of(result, "result", dtype_name(result), result.shape) for result in results],
        torch.get_num_threads(),
    )  # fmt: skip
    by_qkv, by_padding, by_bias = results
    return by_qkv, by_padding.to(padding.dtype), by_bias


def _backward_fake(arguments: _BackwardArguments) -> tuple[Tensor, Tensor, Tensor]:
    qkv, padding, bias = arguments.attention[:3]
    return torch.empty_like(qkv), torch.empty_like(padding), torch.empty_like(bias)


def _window_attention_fake(arguments: _Arguments) -> Tensor:
    qkv = arguments.qkv
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))


def _check(arguments: _Arguments) -> None:
    qkv, padding, bias, window, shift = arguments
    if qkv.dtype not in DTYPES:
        raise TypeError(f"qkv: expected torch.float32 or torch.bfloat16, got {qkv.dtype}")
    for name, tensor, dtype in (("padding", padding, qkv.dtype), ("bias", bias, torch.float32)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    for name, tensor in (("qkv", qkv), ("padding", padding), ("bias", bias)):
        check(tensor.device.type in ("cpu", "meta"), name, "a tensor on the CPU", tensor.device)
        check(tensor.is_contiguous(), name, "contiguous memory", tensor.stride())
    check(window > 0, "window", "> 0", window)
    check(0 <= shift < window, "shift", f"0..{window - 1}", shift)
    tokens = window * window
    keys = -(-tokens // _KEY_PANEL) * _KEY_PANEL
    fits = bias.dim() == 3 and bias.shape[0] > 0 and tuple(bias.shape[1:]) == (tokens, keys)
    check(fits, "bias", f"shape [heads, {tokens}, {keys}]", tuple(bias.shape))
    heads = bias.shape[0]
    fits = qkv.dim() == 4 and qkv.shape[3] > 0 and qkv.shape[3] % (3 * heads) == 0
    check(fits, "qkv", f"shape [B, H, W, a multiple of {3 * heads}]", tuple(qkv.shape))
    check(tuple(padding.shape) == (qkv.shape[3],), "padding", f"shape [{qkv.shape[3]}]", tuple(padding.shape))


def _check_backward(arguments: _BackwardArguments) -> None:
    gradient, attention = arguments
    _check(attention)
    qkv = attention.qkv
    if gradient.dtype != qkv.dtype:
        raise TypeError(f"gradient: expected {qkv.dtype}, got {gradient.dtype}")
    expected = (*qkv.shape[:3], qkv.shape[3] // 3)
    check(tuple(gradient.shape) == expected, "gradient", f"shape {expected}", tuple(gradient.shape))
    check(gradient.is_contiguous(), "gradient", "contiguous memory", gradient.stride())


_INPUTS = "Tensor qkv, Tensor padding, Tensor bias, int window, int shift"
_window_attention = register_operator(
    f"window_attention({_INPUTS}) -> Tensor",
    _Arguments,
    check=_check,
    cpu=_window_attention_cpu,
    fake=_window_attention_fake,
)
_window_attention_backward = register_operator(
    f"window_attention_backward(Tensor gradient, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _BackwardArguments.of,
    check=_check_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, padding, bias, ctx.window, ctx.shift = inputs
    ctx.save_for_backward(qkv, padding, bias)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    slopes = _window_attention_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.window, ctx.shift)
    return (*slopes, None, None)


register_gradient("window_attention", _differentiate, _setup_context)


def pack_window_bias(
    bias: Tensor,  # [heads, N, N] floating
) -> Tensor:
    """Bias of query and key tokens for `window_attention` -> [heads, N, ceil(N / 16) * 16] float32; differentiable."""
    check(bias.dim() == 3 and bias.shape[1] == bias.shape[2], "bias", "shape [heads, N, N]", tuple(bias.shape))
    return F.pad(bias.float(), (0, -bias.shape[2] % _KEY_PANEL), value=_ABSENT).contiguous()


def window_attention(
    qkv: Tensor,  # [B, H, W, 3 * heads * d] float32 or bfloat16: queries, keys and values, head by head
    padding: Tensor,  # [3 * heads * d] of the same dtype
    bias: Tensor,  # [heads, N, ceil(N / 16) * 16] float32 by `pack_window_bias`; N = window squared
    window: int,
    shift: int,
) -> Tensor:
    """Attend within windows of ``window`` x ``window`` tokens -> [B, H, W, heads * d] in the dtype of ``qkv``.

    The map is padded at the right and below to complete windows; padding tokens take part, with the query, key and
    value ``padding``. With a ``shift``, the map is rolled by so many tokens to the top and left first, and back at the
    end; scores of tokens from opposite sides of the image get `SEAM` added. A score is query . key / sqrt(d) + bias. A
    query with a score that is not finite gives NaN.

    Gradients go to ``qkv``, ``padding`` and ``bias``. Results are the same for any number of threads, in both passes.

    Raises:
        TypeError: other dtypes.
        ValueError: shapes that do not fit, another device than the CPU.
        ImportError: without the compiled extension.
    """
    return _window_attention(qkv, padding, bias, window, shift)


def window_attention_eager(qkv: Tensor, padding: Tensor, bias: Tensor, window: int, shift: int) -> Tensor:
    """Eager twin of `window_attention`, in the precision of ``qkv``."""
    batch, height, width, channels = qkv.shape
    heads, tokens = bias.shape[:2]
    rows, columns = -(-height // window), -(-width // window)
    padded = padding.expand(batch, rows * window, columns * window, channels).clone()
    padded[:, :height, :width] = qkv
    padded = padded.roll((-shift, -shift), dims=(1, 2))
    windows = padded.view(batch, rows, window, columns, window, 3, heads, channels // 3 // heads)
    windows = windows.permute(5, 0, 1, 3, 6, 2, 4, 7)
    query, key, value = windows.flatten(-3, -2)  # each [B, rows, columns, heads, N, d]
    scores = query @ key.mT * query.shape[-1] ** -0.5 + bias[:, :, :tokens].to(qkv.dtype)
    if shift:
        beyond = torch.arange(window) >= window - window // 2
        below = beyond.repeat_interleave(window) & (torch.arange(rows) == rows - 1)[:, None, None]  # [rows, 1, N]
        beside = beyond.repeat(window) & (torch.arange(columns) == columns - 1)[:, None]  # [columns, N]
        side = 2 * below + beside  # [rows, columns, N]
        scores = scores + SEAM * (side[..., :, None] != side[..., None, :])[None, :, :, None]
    result = (scores.softmax(-1) @ value).unflatten(-2, (window, window))  # [B, rows, columns, heads, y, x, d]
    result = result.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, rows * window, columns * window, channels // 3)
    return result.roll((shift, shift), dims=(1, 2))[:, :height, :width].contiguous()
