"""Class probabilities for matrix products: softmax without "no object", float16, padded to full blocks of classes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.variant import KernelVariant, Work

SCALE = tl.constexpr(4096.0)
"""Factor of probabilities before their conversion to float16, which has few bits for numbers below 6e-5."""
_BLOCK = 1024
"""Classes of which a program takes the softmax at once."""


@triton.jit(do_not_specialize=["num_queries", "num_classes", "num_rows"])
def _probabilities_kernel(
    probabilities,  # [B, SPLIT + 1, num_rows, padded_classes] float16
    largest,  # [B, num_rows] float32
    class_logits,  # [B, Q, K+1]
    stride_b, stride_q, stride_k, num_queries, num_classes, num_rows, padded_classes,
    SPLIT: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the softmax of one query. Rows beyond the queries are zeros, columns from K on repeat class K-1."""
    image = (tl.program_id(0) // num_rows).to(tl.int64)
    query = tl.program_id(0) % num_rows
    present = query < num_queries
    source = class_logits + image * stride_b + query.to(tl.int64) * stride_q
    block = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in tl.range(0, num_classes + 1, BLOCK):
        here = (start + block <= num_classes) & present
        values = tl.load(source + (start + block) * stride_k, mask=here, other=float("-inf")).to(tl.float32)
        peaks = tl.maximum(peaks, values)
    peak = tl.max(peaks, 0)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, num_classes + 1, BLOCK):
        here = (start + block <= num_classes) & present
        values = tl.load(source + (start + block) * stride_k, mask=here, other=float("-inf")).to(tl.float32)
        sums += tl.exp(values - peak)  # NaN, and infinities that leave no maximum, make the sum NaN
    factor = SCALE / tl.sum(sums, 0)
    target = probabilities + (image * (SPLIT + 1) * num_rows + query) * padded_classes
    tops = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, padded_classes, BLOCK):
        column = start + block
        inside = column < padded_classes
        values = tl.load(source + tl.minimum(column, num_classes - 1) * stride_k, mask=inside & present, other=0.0)
        chance = tl.where(present, tl.exp(values.to(tl.float32) - peak) * factor, 0.0)
        high = chance.to(tl.float16)
        tl.store(target + column, high, mask=inside)
        if SPLIT:
            rest = (chance - high.to(tl.float32)).to(tl.float16)
            tl.store(target + num_rows * padded_classes + column, rest, mask=inside)
        if LARGEST:
            tops = tl.maximum(tops, tl.where(inside, chance, 0.0))
    if LARGEST:
        top = tl.max(tops, 0) / SCALE
        tl.store(largest + image * num_rows + query, tl.where(present & (factor != factor), float("nan"), top))


def class_probabilities(
    class_logits: Tensor,  # [B, Q, K+1] floating, any strides
    num_rows: int,  # >= Q
    class_block: int,
    split: bool,
    largest: Tensor | None = None,  # [B, num_rows] float32, written
) -> Tensor:
    """``SCALE * softmax(class_logits)[..., :-1]`` -> [B, 1 + split, num_rows, K rounded up to class_block] float16.

    With `split` the second part is the rounding error of the first: their sum has 22 bits. Rows from Q on are zeros.
    Classes from K on repeat class K-1, so that the first of equal maxima is never one of them. `largest` receives the
    largest probability of each row, NaN where the row contains NaN.
    """
    batch, queries, columns = class_logits.shape
    padded = triton.cdiv(columns - 1, class_block) * class_block
    probabilities = class_logits.new_empty((batch, 1 + split, num_rows, padded), dtype=torch.float16)
    with torch.cuda.device_of(class_logits):
        _probabilities_kernel[(batch * num_rows,)](
            probabilities, probabilities if largest is None else largest, class_logits, *class_logits.stride(),
            queries, columns - 1, num_rows, padded, SPLIT=split, LARGEST=largest is not None, BLOCK=_BLOCK,
        )  # fmt: skip
    return probabilities


def class_probabilities_variant(split: bool, largest: bool = False) -> KernelVariant:
    """Specialisation for contiguous float32 logits."""
    constants = {"SPLIT": split, "LARGEST": largest, "BLOCK": _BLOCK, "stride_k": 1}
    types = {"probabilities": "*fp16", "largest": "*fp32", "class_logits": "*fp32"}
    names = [name for name in _probabilities_kernel.arg_names if name not in constants]
    arguments = {name: types.get(name, "i32") for name in names}
    name = "class_probabilities" + "_split" * split + "_largest" * largest
    return KernelVariant(name, _probabilities_kernel, arguments, constants, aligned=(*types, "padded_classes"))


def class_probabilities_work(classes: int, class_block: int) -> Work:
    """Work of `class_probabilities` in a goal call."""
    padded = triton.cdiv(classes, class_block) * class_block
    blocks = (triton.cdiv(classes + 1, _BLOCK), triton.cdiv(padded, _BLOCK))
    return Work("probabilities", {"num_classes + 1, BLOCK)": blocks[0], "padded_classes, BLOCK)": blocks[1]})
