"""Results of a batch at the wanted sizes, from the network's predictions (paper section 3.4).

Each function takes the final decoder layer of a batch and one output size an image. Images of one geometry (valid size
and output size) are processed together. Predictions may be on any device and of any floating type. Nothing has a
gradient, and results stay on the device except the lists of segments.

On the CPU everything is computed in float32, and masks only of the queries that take part, whose number is read first.
On a GPU mask logits have the precision of the mask embeddings, for which the kernels have faster forms. Nothing is read
back before the last operator is launched: the numbers of masks depend on shapes only (not in the order ``official``,
whose masks of full size are many bytes), and one transfer at the end brings segments and the numbers of instances.
`inference.device_postprocess` is the part before this transfer, `inference.device_parts` makes it. `Predictor` needs
one for all its tasks, the functions here one each. Valid sizes are best on the host, as `Predictor` leaves them.

With ``fp16``, features beyond 65504 overflow, as before every convolution under autocast: the pixels around them have
wrong labels or none. ``bf16`` has no such limit.

**Order of operations.** Published implementations resample at different points, which changes a few percent of the
labels:

- ``direct`` (default): mask logits are resampled from stride 4 to the output size, then sigmoid and classes. There is
  one resampling, and nothing of full size per query or class is in memory. Where the output size is the image's size in
  the network, it is the official result.
- ``official``: the semantic models of the official code upsample logits to the padded input, apply sigmoid and
  classes, crop the padding and resize the scores. Its panoptic models and per-pixel baselines resize the cropped
  logits instead: for semantic results of a panoptic model this is ``official_panoptic``.
- ``huggingface``: sigmoid and classes at stride 4, then the scores are resized; padding is not cropped, so parity holds
  for images that fill the padded input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from maskformer_fast.core.results import InstanceResult, PanopticResult, SemanticResult
from maskformer_fast.inference.device_parts import Size, read_results
from maskformer_fast.inference.device_postprocess import (
    panoptic_maps,
    ranked_instances,
    semantic_maps,
    semantic_score_maps,
)
from maskformer_fast.inference_config import PanopticOrder, PanopticRule, SemanticOrder
from maskformer_fast.structures import PixelPredictions, Predictions


def semantic(
    predictions: Predictions | PixelPredictions,
    output_sizes: Sequence[Size],
    with_scores: bool = False,
    order: SemanticOrder = "direct",
) -> list[SemanticResult]:
    """Class of every pixel: argmax over classes of the sum over queries of class probability x mask probability.

    Args:
        output_sizes: height, width of each image's result.
        with_scores: also return the winner's score (for per-pixel models its softmax probability).
        order: where resampling happens, see the module; per-pixel models support ``direct`` and ``official``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, number, or value.
    """
    part = semantic_maps(predictions, output_sizes, with_scores, order)
    return cast(list[SemanticResult], read_results([part])[0])


def semantic_scores(
    predictions: Predictions | PixelPredictions,
    output_sizes: Sequence[Size],
    order: SemanticOrder = "direct",
) -> list[Tensor]:
    """Scores of every class at every pixel, one [K, H, W] float32 tensor an image.

    They serve averaging over scales and flips, and evaluation that needs more than labels; `semantic` takes far less
    memory. Mask classification gives sums over queries (0..Q), per-pixel models softmax probabilities. Arguments and
    errors are those of `semantic`.
    """
    return semantic_score_maps(predictions, output_sizes, order)


def panoptic(
    predictions: Predictions,
    output_sizes: Sequence[Size],
    is_thing: Sequence[bool],
    object_mask_threshold: float,
    overlap_threshold: float,
    order: PanopticOrder = "direct",
    rule: PanopticRule = "maskformer",
) -> list[PanopticResult]:
    """Non-overlapping segments (`panoptic_inference`); the default of `rule` is the official MaskFormer's.

    Queries take part whose best class is not "no object" and has a probability above `object_mask_threshold`; only
    their masks are computed. A segment's score is that probability (the highest, where stuff merged).

    Args:
        output_sizes: height, width of each image's result.
        is_thing: one flag a class; stuff segments of one class are merged.
        overlap_threshold: least share of its own mask (sigmoid >= 0.5) that a segment must win.
        order: where resampling happens, see the module.
        rule: implementation whose segments are made of these masks, see `panoptic_inference`.

    Raises:
        TypeError: predictions of a per-pixel model.
        ValueError: an argument of the wrong number or value.
    """
    part = panoptic_maps(
        predictions, output_sizes, is_thing, object_mask_threshold, overlap_threshold, order, rule
    )
    return cast(list[PanopticResult], read_results([part])[0])


def instances(
    predictions: Predictions,
    output_sizes: Sequence[Size],
    is_thing: Sequence[bool],
    top_k: int,
) -> list[InstanceResult]:
    """Scored instances, best first: the `top_k` best pairs of query and thing class, without those of an empty mask.

    A query may give several results of different classes; its mask is computed once. The score is the class
    probability (softmax with "no object") times the mean sigmoid over the mask, as in Mask2Former and Hugging Face. A
    query with NaN among its class logits gives no result.

    Args:
        output_sizes: height, width of each image's result.
        is_thing: one flag a class; stuff classes give no result and take no place among the `top_k`.

    Raises:
        TypeError: predictions of a per-pixel model.
        ValueError: an argument of the wrong number or value.
    """
    part = ranked_instances(predictions, output_sizes, is_thing, top_k)
    return cast(list[InstanceResult], read_results([part])[0])
