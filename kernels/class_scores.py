"""Best class of each query and its probability, for panoptic inference; nothing is read back from the device.

The kernel does the work of softmax, max and masked_fill in `postprocess.panoptic`, for runtimes without these
operators.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

_BLOCK = 1024
"""Classes of which a program takes the softmax at once."""
_VOID = tl.constexpr(-1)


@triton.jit(do_not_specialize=["num_queries", "num_classes", "threshold"])
def _class_scores_kernel(
    scores,  # [B, num_queries] float32
    categories,  # [B, num_queries] int64
    class_logits,  # [B, num_queries, num_classes + 1]
    stride_b, stride_q, stride_k, num_queries, num_classes, threshold,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Find the best class of one query."""
    image = (tl.program_id(0) // num_queries).to(tl.int64)
    query = (tl.program_id(0) % num_queries).to(tl.int64)
    source = class_logits + image * stride_b + query * stride_q
    block = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in tl.range(0, num_classes + 1, BLOCK):
        here = start + block <= num_classes
        values = tl.load(source + (start + block) * stride_k, mask=here, other=float("-inf")).to(tl.float32)
        peaks = tl.maximum(peaks, values)
    peak = tl.max(peaks, 0)
    sums = tl.zeros((BLOCK,), tl.float32)
    firsts = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    for start in tl.range(0, num_classes + 1, BLOCK):
        column = start + block
        values = tl.load(source + column * stride_k, mask=column <= num_classes, other=float("-inf")).to(tl.float32)
        chance = tl.exp(values - peak)  # NaN, and infinities that leave no maximum, make the sum NaN
        sums += chance
        # logits so close that their probabilities are equal are a tie, which the lower class wins
        firsts = tl.minimum(firsts, tl.where((chance >= 1.0) & (column <= num_classes), column, 0x7FFFFFFF))
    score = 1.0 / tl.sum(sums, 0)
    category = tl.min(firsts, 0)
    kept = (category < num_classes) & (score > threshold)  # not where the score is NaN
    place = image * num_queries + query
    tl.store(scores + place, score)
    tl.store(categories + place, tl.where(kept, category, _VOID).to(tl.int64))


def class_scores(
    class_logits: Tensor,  # [B, Q, K+1] floating, "no object" last, any strides
    threshold: float,
    scores: Tensor,  # [B, Q] float32, contiguous, written
    categories: Tensor,  # [B, Q] int64, contiguous, written
) -> None:
    """Find each query's best class and its probability, by a softmax that includes "no object".

    The category is -1 where the best class is "no object" or its probability is not above the threshold. Of equal
    probabilities the lower class is best. A query with NaN or +inf among its logits, or with -inf only, has score NaN
    and category -1.
    """
    batch, queries, columns = class_logits.shape
    if batch * queries == 0:
        return
    with torch.cuda.device_of(class_logits):
        _class_scores_kernel[(batch * queries,)](
            scores, categories, class_logits, *class_logits.stride(), queries, columns - 1, threshold, BLOCK=_BLOCK
        )


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time: contiguous float32 logits."""
    constants = {"BLOCK": _BLOCK, "stride_k": 1}
    types = {"scores": "*fp32", "categories": "*i64", "class_logits": "*fp32", "threshold": "fp32"}
    names = [name for name in _class_scores_kernel.arg_names if name not in constants]
    arguments = {name: types.get(name, "i32") for name in names}
    aligned = ("scores", "categories", "class_logits")
    return [KernelVariant("class_scores", _class_scores_kernel, arguments, constants, aligned=aligned)]


def goal_calls() -> list[GoalLaunch]:
    """COCO's classes."""
    logits = torch.empty(1, 100, 134, device="meta")
    results = (torch.empty(1, 100, device="meta"), torch.empty(1, 100, dtype=torch.int64, device="meta"))
    works = [Work("class_scores", {"range(0, num_classes + 1, BLOCK)": 1}, 4 * 100 * 134)]
    return goal_launches("class scores Q=100 K=133", lambda: class_scores(logits, 0.8, *results), works)
