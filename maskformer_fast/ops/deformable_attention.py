"""Multi-scale deformable attention of Deformable DETR, which Mask2Former's pixel decoder consists of.

Each query and head reads a few points of every level, bilinearly, and adds them up with weights of its own. The
operator takes what the layers give: offsets in pixels and logits. Softmax, sampling locations and samples are never in
memory: in C++ on the CPU and in Triton on CUDA devices each query computes its own, again in the backward pass. Offsets
in pixels keep their accuracy in half precision, which locations in 0..1 do not. The eager twins are plain PyTorch by
gathers, and serve float64. ONNX graphs get gathers of their own (`maskformer_fast.deploy.build.deformable_attention`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskformer_fast.core.arrays import address_of, dtype_name
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension, load_kernels
from maskformer_fast.ops.registration import register_gradient, register_operator

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Gradients = tuple[Tensor, Tensor, Tensor]
"""Of the value, the offsets and the logits."""


class Attention(NamedTuple):
    """Arguments of the operator: B images, Q queries, S cells of all levels."""

    value: Tensor  # [B, S, heads, D]
    level_sizes: tuple[int, ...]  # height and width of each level in turn
    reference_points: Tensor  # [B, Q, levels, 2] float32, float64 with a float64 value
    offsets: Tensor  # [B, Q, heads, levels, points, 2] dtype of value
    logits: Tensor  # [B, Q, heads, levels, points] dtype of value

    @property
    def sizes(self) -> tuple[int, ...]:
        """B, S, heads, D, Q, levels, points."""
        return (*self.value.shape, self.logits.shape[1], *self.logits.shape[3:])

    def contiguous(self) -> Attention:
        """The same with every tensor in contiguous memory."""
        value, sizes, *others = self
        return Attention(value.contiguous(), sizes, *[tensor.contiguous() for tensor in others])


class AttentionBackward(NamedTuple):
    """Arguments of the backward operator."""

    gradient: Tensor  # [B, Q, heads * D] dtype of value
    attention: Attention

    @staticmethod
    def of(gradient: Tensor, *attention: Any) -> AttentionBackward:
        return AttentionBackward(gradient, Attention(*attention))


def _check(arguments: Attention) -> None:
    """Raise ``TypeError`` or ``ValueError`` for a shape or type that does not fit."""
    value, level_sizes, reference_points, offsets, logits = arguments
    dtypes = CUDA_DTYPES if value.device.type == "cuda" else CPU_DTYPES
    if value.dtype not in dtypes and value.device.type != "meta":
        raise TypeError(f"value: expected one of {', '.join(map(str, dtypes))}, got {value.dtype}")
    exact = torch.float64 if value.dtype == torch.float64 else torch.float32
    for name, tensor, dtype in (
        ("reference_points", reference_points, exact), ("offsets", offsets, value.dtype),
        ("logits", logits, value.dtype),
    ):  # fmt: skip
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    check(value.dim() == 4, "value", "shape [B, S, heads, D]", tuple(value.shape))
    check(logits.dim() == 5, "logits", "shape [B, Q, heads, levels, points]", tuple(logits.shape))
    batch, cells, heads, _ = value.shape
    queries, levels, points = logits.shape[1], logits.shape[3], logits.shape[4]
    check(levels > 0 and points > 0, "logits", "at least one level and point", tuple(logits.shape))
    check(len(level_sizes) == 2 * levels, "level_sizes", f"{levels} pairs of height and width", level_sizes)
    pairs = list(zip(level_sizes[::2], level_sizes[1::2], strict=True))
    for height, width in pairs:
        check(height > 0 and width > 0, "level_sizes", "positive sides", level_sizes)
    area = sum(height * width for height, width in pairs)
    check(area == cells, "value", f"{area} cells as level_sizes say", cells)
    for name, tensor, shape in (
        ("logits", logits, (batch, queries, heads, levels, points)),
        ("offsets", offsets, (batch, queries, heads, levels, points, 2)),
        ("reference_points", reference_points, (batch, queries, levels, 2)),
    ):
        check(tensor.shape == shape, name, f"shape {shape}", tuple(tensor.shape))


def _check_backward(arguments: AttentionBackward) -> None:
    gradient, attention = arguments
    _check(attention)
    batch, _, heads, dim, queries, _, _ = attention.sizes
    if gradient.dtype != attention.value.dtype:
        raise TypeError(f"gradient: expected {attention.value.dtype}, got {gradient.dtype}")
    expected = (batch, queries, heads * dim)
    check(gradient.shape == expected, "gradient", f"shape {expected}", tuple(gradient.shape))


def _inputs_of_extension(attention: Attention) -> tuple[Any, ...]:
    """Arguments of C++ for contiguous tensors."""
    value, level_sizes, reference_points, offsets, logits = attention
    dtype = dtype_name(value)
    return (
        address_of(value, "value", dtype, value.shape), dtype, attention.sizes, level_sizes,
        address_of(reference_points, "reference_points", "float32", reference_points.shape),
        address_of(offsets, "offsets", dtype, offsets.shape), address_of(logits, "logits", dtype, logits.shape),
    )  # fmt: skip


def _forward_fake(attention: Attention) -> Tensor:
    batch, _, heads, dim, queries, _, _ = attention.sizes
    return attention.value.new_empty(batch, queries, heads * dim)


def _forward_cpu(attention: Attention) -> Tensor:
    if attention.value.dtype == torch.float64:
        return _forward_eager(attention)
    attention = attention.contiguous()
    result = _forward_fake(attention)
    load_extension().deformable_attention(
        *_inputs_of_extension(attention), address_of(result, "result", dtype_name(result), result.shape),
        torch.get_num_threads(),
    )  # fmt: skip
    return result


def _forward_cuda(attention: Attention) -> Tensor:
    if attention.value.dtype == torch.float64:
        return _forward_eager(attention)
    result: Tensor = load_kernels("deformable_attention").deformable_attention_forward(*attention.contiguous())
    return result


def _backward_fake(arguments: AttentionBackward) -> Gradients:
    value, _, _, offsets, logits = arguments.attention
    return value.new_empty(value.shape), offsets.new_empty(offsets.shape), logits.new_empty(logits.shape)


def _backward_cpu(arguments: AttentionBackward) -> Gradients:
    if arguments.gradient.dtype == torch.float64:
        return _backward_eager(arguments)
    gradient, attention = arguments.gradient.contiguous(), arguments.attention.contiguous()
    results = _backward_fake(arguments)
    dtype = dtype_name(gradient)
    load_extension().deformable_attention_backward(
        address_of(gradient, "gradient", dtype, gradient.shape), *_inputs_of_extension(attention),
        *[address_of(result, "result", dtype, result.shape) for result in results], torch.get_num_threads(),
    )  # fmt: skip
    return results


def _backward_cuda(arguments: AttentionBackward) -> Gradients:
    if arguments.gradient.dtype == torch.float64 or torch.are_deterministic_algorithms_enabled():
        return _backward_eager(arguments)
    results: Gradients = load_kernels("deformable_attention").deformable_attention_backward(
        arguments.gradient.contiguous(), *arguments.attention.contiguous()
    )
    return results


class _Corner(NamedTuple):
    """One of the four cells around the points of a level; all [B, Q, heads, points]."""

    cell: Tensor  # int64, row of the table of `_table`
    x_share: Tensor  # share of the column in the sample, 0..1
    y_share: Tensor  # share of the row
    x_sign: int  # derivative of x_share
    y_sign: int


def _table(value: Tensor) -> Tensor:
    """Cells of all images, levels and heads, and zeros at the end for what is outside -> [B * S * heads + 1, D]."""
    return torch.cat([value.flatten(0, 2), value.new_zeros(1, value.shape[3])])


def _corners(attention: Attention) -> Iterator[tuple[int, list[_Corner]]]:
    """Each level with the cells that its points read."""
    value, level_sizes, reference_points, offsets, _ = attention
    batch, cells, heads, _, _, levels, _ = attention.sizes
    images = torch.arange(batch, device=value.device)[:, None, None, None] * (cells * heads)
    first = images + torch.arange(heads, device=value.device)[:, None]  # [B, 1, heads, 1]
    nowhere = batch * cells * heads
    start = 0
    for level in range(levels):
        height, width = level_sizes[2 * level], level_sizes[2 * level + 1]
        base = reference_points[:, :, None, level, None]  # [B, Q, 1, 1, 2]
        x = (base[..., 0] * width - 0.5) + offsets[:, :, :, level, :, 0]
        y = (base[..., 1] * height - 0.5) + offsets[:, :, :, level, :, 1]
        inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # false for NaN
        x, y = x.where(inside, 0), y.where(inside, 0)
        left, top = x.floor(), y.floor()
        right_share, low_share = x - left, y - top
        corners = []
        for y_sign, y_share, row in ((-1, 1 - low_share, top.long()), (1, low_share, top.long() + 1)):
            for x_sign, x_share, column in ((-1, 1 - right_share, left.long()), (1, right_share, left.long() + 1)):
                within = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                cell = first + (start + row * width + column) * heads
                corners.append(_Corner(cell.where(within, nowhere), x_share, y_share, x_sign, y_sign))
        yield level, corners
        start = start + height * width


def _weights(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of all points of a query and head, which add up to 1 -> [B, Q, heads, levels, points]."""
    return logits.to(dtype).flatten(3).softmax(-1).view(logits.shape)


def _read(table: Tensor, cell: Tensor) -> Tensor:
    """Cells [...] of a table [N, D] -> [..., D]."""
    return table.index_select(0, cell.flatten()).view(*cell.shape, table.shape[1])


def _forward_eager(attention: Attention) -> Tensor:
    dtype = attention.reference_points.dtype
    table, weights = _table(attention.value), _weights(attention.logits, dtype)
    batch, _, heads, dim, queries, _, _ = attention.sizes
    result = table.new_zeros(batch, queries, heads, 1, dim, dtype=dtype)
    for level, corners in _corners(attention):
        for corner in corners:
            weight = weights[:, :, :, level] * corner.x_share * corner.y_share
            result = result + weight.unsqueeze(3) @ _read(table, corner.cell).to(dtype)
    return result.flatten(2).to(attention.value.dtype)


def _backward_eager(arguments: AttentionBackward) -> Gradients:
    gradient, attention = arguments
    value, _, _, offsets, logits = attention
    dtype = attention.reference_points.dtype
    table, weights = _table(value), _weights(logits, dtype)
    upstream = gradient.to(dtype).unflatten(2, value.shape[2:]).unsqueeze(3)  # [B, Q, heads, 1, D]
    by_table = torch.zeros_like(table, dtype=dtype)
    by_offset, by_weight = torch.zeros_like(offsets, dtype=dtype), torch.zeros_like(weights)
    for level, corners in _corners(attention):
        weight = weights[:, :, :, level]
        for cell, x_share, y_share, x_sign, y_sign in corners:
            product = (_read(table, cell).to(dtype) * upstream).sum(-1)  # [B, Q, heads, points]
            by_weight[:, :, :, level] += product * x_share * y_share
            by_offset[:, :, :, level, :, 0] += product * y_share * x_sign * weight
            by_offset[:, :, :, level, :, 1] += product * x_share * y_sign * weight
            by_table.index_add_(0, cell.flatten(), ((weight * x_share * y_share).unsqueeze(4) * upstream).flatten(0, 3))
    by_logit = weights * (by_weight - (weights * by_weight).sum((3, 4), keepdim=True))
    by_value = by_table[:-1].view(value.shape)
    return by_value.to(value.dtype), by_offset.to(offsets.dtype), by_logit.to(logits.dtype)


_ARGUMENTS = "Tensor value, SymInt[] level_sizes, Tensor reference_points, Tensor offsets, Tensor logits"
_deformable_attention = register_operator(
    f"deformable_attention({_ARGUMENTS}) -> Tensor",
    Attention,
    check=_check,
    cpu=_forward_cpu,
    cuda=_forward_cuda,
    fake=_forward_fake,
)
_deformable_attention_backward = register_operator(
    f"deformable_attention_backward(Tensor gradient, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    AttentionBackward.of,
    check=_check_backward,
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, level_sizes, reference_points, offsets, logits = inputs
    ctx.level_sizes = level_sizes
    ctx.save_for_backward(value, reference_points, offsets, logits)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    value, reference_points, offsets, logits = ctx.saved_tensors
    by_value, by_offset, by_logit = _deformable_attention_backward(
        gradient, value, ctx.level_sizes, reference_points, offsets, logits
    )
    by_reference = None
    if ctx.needs_input_grad[2]:
        by_reference = by_offset.to(reference_points.dtype).sum((2, 4))  # [B, Q, levels, 2], by pixels
        by_reference = torch.stack([
            by_reference[:, :, level] * torch.stack([by_reference.new_full((), side) for side in (width, height)])
            for level, (height, width) in enumerate(zip(ctx.level_sizes[::2], ctx.level_sizes[1::2], strict=True))
        ], 2)  # fmt: skip
    return by_value, None, by_reference, by_offset, by_logit


register_gradient("deformable_attention", _differentiate, _setup_context)


def deformable_attention(
    value: Tensor,  # [B, S, heads, D] float16 (on CUDA), bfloat16, float32 or float64: cells row by row, level by level
    level_sizes: Sequence[tuple[int, int]],  # height and width of each level; S is the sum of their products
    reference_points: Tensor,  # [B, Q, levels, 2] float32 (float64 with a float64 value): x, y in 0..1
    offsets: Tensor,  # [B, Q, heads, levels, points, 2] dtype of value: x, y in pixels of the level
    logits: Tensor,  # [B, Q, heads, levels, points] dtype of value
) -> Tensor:
    """Attend to a few points of each level -> [B, Q, heads * D] in the dtype of ``value``.

    A point of a level of h x w cells is at column ``reference_x * w - 0.5 + offset_x`` and at row
    ``reference_y * h - 0.5 + offset_y``, where cell (0, 0) has its centre. It reads the four cells around it
    bilinearly; cells outside the level are zeros, at all sides of a level of one pixel too. The weights of a query's
    points are the softmax of its logits over all levels and points. Sums are in float32. Source: Deformable DETR,
    equation 3.

    A location that is NaN or infinite is outside: it reads nothing and has no gradient. A logit of -inf is weight 0;
    where a logit is NaN or +inf, or all are -inf, the result of that query and head is NaN. A value that is NaN or
    infinite makes the results of all queries NaN that read its cell, be it with weight 0.

    Gradients go to value, offsets, logits and reference points. On the CPU the results are the same for any number of
    threads, in both passes. On CUDA devices the backward pass adds to the value's gradient by float32 atomics, in no
    fixed order; with `torch.use_deterministic_algorithms` it is the eager twin's, slower and with samples in memory.

    Raises:
        TypeError: other dtypes.
        ValueError: shapes that do not fit.
        ImportError: the extension is not built, or Triton is missing on a CUDA device.
    """
    arguments = Attention(value, _flat(level_sizes), reference_points, offsets, logits)
    return _deformable_attention(*arguments)


def deformable_attention_eager(
    value: Tensor,
    level_sizes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor:
    """Eager twin of `deformable_attention`, which keeps the samples of one corner and level in memory."""
    return _forward_eager(Attention(value, _flat(level_sizes), reference_points, offsets, logits))


def _flat(level_sizes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    for pair in level_sizes:
        check(len(pair) == 2, "level_sizes", "pairs of height and width", level_sizes)
    return tuple(side for pair in level_sizes for side in pair)
