"""Softmax attention of all queries to all keys on the CPU, for the long sequences of a plain ViT.

PyTorch multiplies by MKL, which on AMD's processors uses a part of what they can do. Here blocks of scores stay in the
processor's cache, and products, softmax and sums are in C++ (`csrc/attention`), in bfloat16 by the processor's own
products where it has them, of AVX-512 or AMX. The backward pass computes the scores again. `attention_eager` is the
eager twin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from maskformer_fast.core.arrays import address_of, dtype_name
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension
from maskformer_fast.ops.registration import register_gradient, register_operator

DTYPES = (torch.float32, torch.bfloat16)
HIDDEN = -1e30
"""Score of a key that a query does not see; finite, so that a query that sees none attends to all alike."""


class _Arguments(NamedTuple):
    query: Tensor  # [B, N, heads, d] float32 or bfloat16, channels adjacent
    key: Tensor  # [B, M, heads, d]
    value: Tensor  # [B, M, heads, d]
    visible: Tensor | None  # [B, n, m] bool


class _Backward(NamedTuple):
    gradient: Tensor  # [B, N, heads, d] float32
    result: Tensor  # [B, N, heads, d]
    statistics: Tensor  # [B, heads, N, 2]
    attention: _Arguments

    @staticmethod
    def of(gradient: Tensor, result: Tensor, statistics: Tensor, *arguments: Any) -> _Backward:
        return _Backward(gradient, result, statistics, _Arguments(*arguments))


def _inputs_of_extension(arguments: _Arguments) -> tuple[Any, ...]:
    """Addresses, sizes, strides and sizes of the mask; keep ``arguments`` meanwhile."""
    query, key, _, visible = arguments
    addresses = [
        address_of(tensor, name, dtype_name(query), tensor.shape, any_strides=True)
        for name, tensor in zip(("query", "key", "value"), arguments[:3], strict=True)
    ]
    masked = (0, 0) if visible is None else (visible.shape[1], visible.shape[2])
    mask = 0 if visible is None else address_of(visible, "visible", "bool", visible.shape)
    strides = [stride for tensor in arguments[:3] for stride in tensor.stride()[:3]]
    batch, queries, heads, dim = query.shape
    return (*addresses, mask), (batch, queries, key.shape[1], heads, dim), strides, masked


def _adjacent(arguments: _Arguments) -> _Arguments:
    """The same with adjacent channels and a contiguous mask."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in arguments[:3])
    visible = arguments.visible
    return _Arguments(query, key, value, None if visible is None else visible.contiguous())


def _forward_fake(arguments: _Arguments) -> tuple[Tensor, Tensor]:
    query = arguments.query
    batch, queries, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, heads, queries, 2), dtype=torch.float32)


def _forward_cpu(arguments: _Arguments) -> tuple[Tensor, Tensor]:
    result, statistics = _forward_fake(arguments)
    arguments = _adjacent(arguments)
    addresses, sizes, strides, masked = _inputs_of_extension(arguments)
    load_extension().attention(
        addresses, dtype_name(result), sizes, strides, masked,
        address_of(result, "result", dtype_name(result), result.shape),
        address_of(statistics, "statistics", "float32", statistics.shape), torch.get_num_threads(),
    )  # fmt: skip
    return result, statistics


def _backward_fake(arguments: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, _ = arguments.attention
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _backward_cpu(arguments: _Backward) -> tuple[Tensor, Tensor, Tensor]:
    results = _backward_fake(arguments)
    gradient = arguments.gradient.contiguous()
    attention = _adjacent(arguments.attention)
    addresses, sizes, strides, masked = _inputs_of_extension(attention)
    shape = tuple(arguments.result.shape)
    load_extension().attention_backward(
        addresses, sizes, strides, masked, address_of(arguments.result, "result", "float32", shape),
        address_of(arguments.statistics, "statistics", "float32", arguments.statistics.shape),
        address_of(gradient, "gradient", "float32", shape),
        tuple(address_of(tensor, "gradients", "float32", tensor.shape) for tensor in results), torch.get_num_threads(),
    )  # fmt: skip
    return results


def _check(arguments: _Arguments) -> None:
    query, key, value, visible = arguments
    if query.dtype not in DTYPES:
        raise TypeError(f"query: expected torch.float32 or torch.bfloat16, got {query.dtype}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected {query.dtype}, got {tensor.dtype}")
    check(query.device.type in ("cpu", "meta"), "query", "a tensor on the CPU", query.device)
    check(query.dim() == 4 and query.shape[3] > 0, "query", "shape [B, N, heads, d]", tuple(query.shape))
    batch, _, heads, dim = query.shape
    fits = key.dim() == 4 and (key.shape[0], *key.shape[2:]) == (batch, heads, dim) and key.shape[1] > 0
    check(fits, "key", f"shape [{batch}, M, {heads}, {dim}]", tuple(key.shape))
    check(value.shape == key.shape, "value", f"shape {tuple(key.shape)}", tuple(value.shape))
    if visible is not None:
        if visible.dtype != torch.bool:
            raise TypeError(f"visible: expected torch.bool, got {visible.dtype}")
        fits = visible.dim() == 3 and visible.shape[0] == batch
        fits = fits and visible.shape[1] <= query.shape[1] and visible.shape[2] <= key.shape[1]
        check(fits, "visible", f"shape [{batch}, at most {query.shape[1]}, at most {key.shape[1]}]",
              tuple(visible.shape))


def _check_backward(arguments: _Backward) -> None:
    _check(arguments.attention)
    query = arguments.attention.query
    for name, tensor in (("query", query), ("gradient", arguments.gradient), ("result", arguments.result)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name}: expected torch.float32, got {tensor.dtype}")
        check(tensor.shape == query.shape, name, f"shape {tuple(query.shape)}", tuple(tensor.shape))


_SCHEMA = "Tensor query, Tensor key, Tensor value, Tensor? visible"
_attention = register_operator(
    f"attention({_SCHEMA}) -> (Tensor, Tensor)", _Arguments, check=_check, cpu=_forward_cpu, fake=_forward_fake
)
_attention_backward = register_operator(
    f"attention_backward(Tensor gradient, Tensor result, Tensor statistics, {_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    _Backward.of,
    check=_check_backward,
    cpu=_backward_cpu,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs)


def _differentiate(ctx: Any, gradient: Tensor | None, _statistics: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return None, None, None, None
    result, statistics, *inputs = ctx.saved_tensors
    return (*_attention_backward(gradient, result, statistics, *inputs), None)


register_gradient("attention", _differentiate, _setup_context)


def attention(
    query: Tensor,  # [B, N, heads, d] float32 or bfloat16
    key: Tensor,  # [B, M, heads, d] of the same dtype
    value: Tensor,  # [B, M, heads, d] of the same dtype
    visible: Tensor | None = None,  # [B, n, m] bool: which of the last m keys the first n queries see
) -> Tensor:
    """Softmax attention -> [B, N, heads, d] in the dtype of ``query``; a score is query . key / sqrt(d).

    Queries beyond the first n, and keys before the last m, are not masked. A query that sees no key attends to all
    alike; one with a score of NaN or infinity gives NaN. Sums are in float32; in bfloat16 the weights are rounded to
    it before they are multiplied by values where the processor has such products. Differentiable in float32; the
    result and the gradients do not depend on the number of threads. Tensors are read by their strides, so those of one
    product of queries, keys and values need no copies.

    Raises:
        TypeError: other dtypes, a gradient in bfloat16.
        ValueError: shapes that do not fit, another device than the CPU.
        ImportError: without the compiled extension.
    """
    return _attention(query, key, value, visible)[0]


def attention_eager(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
    """Eager twin of `attention`, in the precision of ``query``."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if visible is not None:
        rows, others = visible.shape[1], scores.shape[-1] - visible.shape[2]
        mask = torch.nn.functional.pad(visible, (others, 0, 0, scores.shape[-2] - rows), value=True)
        scores = scores.masked_fill(~mask.unsqueeze(1), HIDDEN)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous()
