"""Semantic inference: a class for every pixel of the output (paper section 3.4, "semantic inference").

`semantic_inference` is one fused operator: in C++ on the CPU (csrc/semantic/; tiles of pixels over threads, exact
pruning of classes and queries, temporaries below 16 MiB), in Triton on CUDA (kernels/semantic.py, without pruning).
`semantic_inference_eager` and the other functions are plain PyTorch: oracle of the tests, baseline of the benchmarks,
and fallback where there is no faster backend. No function has a gradient. Eager code works on tiles of rows: beside
inputs and results, temporaries stay within `resample.DEVICE_TILE_BYTES` (or one output row, if that is larger).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from maskformer_fast.core.arrays import address_of, dtype_name
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension, load_kernels
from maskformer_fast.ops.registration import register_operator
from maskformer_fast.ops.resample import check_geometry, resample_rows, row_tiles, without_float64

CLASS_CHUNK = 256
"""Classes scored at once: with hundreds or thousands even one row of scores would be too large."""


class SemanticMap(NamedTuple):
    """Result of `semantic_inference`."""

    labels: Tensor  # [B, H, W] uint8 or int16
    scores: Tensor | None  # [B, H, W] float32
    margins: Tensor | None  # [B, H, W] float32


class _Arguments(NamedTuple):
    mask_logits: Tensor  # [B, Q, h, w] floating
    class_logits: Tensor  # [B, Q, K+1] floating, "no object" last
    extent: tuple[float, float]
    output_size: tuple[int, int]
    with_scores: bool = False
    with_margins: bool = False
    path: str = "auto"
    """For tests and benchmarks on the CPU: ``dense`` computes every score, ``pruned`` only what can matter, ``auto``
    decides for each tile. Labels are the same. On CUDA every score is computed with any of them."""


def _semantic_inference_cpu(arguments: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    mask_logits, class_logits = without_float64(arguments.mask_logits), without_float64(arguments.class_logits)
    results = _semantic_inference_fake(arguments)
    labels, scores, margins = results
    shape = (len(mask_logits), *arguments.output_size)
    load_extension().semantic_inference(
        address_of(mask_logits, "mask_logits", dtype_name(mask_logits), mask_logits.shape, any_strides=True),
        dtype_name(mask_logits),
        tuple(mask_logits.shape),
        mask_logits.stride(),
        address_of(class_logits, "class_logits", dtype_name(class_logits), class_logits.shape, any_strides=True),
        dtype_name(class_logits),
        class_logits.shape[2] - 1,
        class_logits.stride(),
        arguments.extent,
        arguments.output_size,
        address_of(labels, "labels", dtype_name(labels), shape),
        address_of(scores if arguments.with_scores else None, "scores", "float32", shape),
        address_of(margins if arguments.with_margins else None, "margins", "float32", shape),
        arguments.path,
        torch.get_num_threads(),
    )
    return results


def _semantic_inference_cuda(arguments: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    kernels = load_kernels("semantic")
    results = _semantic_inference_fake(arguments)
    labels, scores, margins = results
    kernels.semantic_from_logits(
        without_float64(arguments.mask_logits),
        arguments.class_logits,
        arguments.extent,
        labels,
        scores if arguments.with_scores else None,
        margins if arguments.with_margins else None,
    )
    return results


def _semantic_inference_fake(arguments: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised labels, scores and margins; scores and margins that are not wanted have no elements."""
    mask_logits = arguments.mask_logits
    shape = (mask_logits.shape[0], *arguments.output_size)
    labels = mask_logits.new_empty(shape, dtype=label_dtype(arguments.class_logits.shape[2] - 1))
    scores, margins = (
        mask_logits.new_empty(shape if wanted else (0,), dtype=torch.float32)
        for wanted in (arguments.with_scores, arguments.with_margins)
    )
    return labels, scores, margins


_semantic_inference = register_operator(
    "semantic_inference(Tensor mask_logits, Tensor class_logits, float[] extent, SymInt[] output_size, "
    "bool with_scores=False, bool with_margins=False, str path='auto') -> (Tensor, Tensor, Tensor)",
    _Arguments,
    check=lambda arguments: _check(*arguments[:4]),
    cpu=_semantic_inference_cpu,
    cuda=_semantic_inference_cuda,
    fake=_semantic_inference_fake,
)


@torch.no_grad()
def semantic_inference(
    mask_logits: Tensor,  # [B, Q, h, w] floating
    class_logits: Tensor,  # [B, Q, K+1] floating, "no object" last
    extent: tuple[float, float],
    output_size: tuple[int, int],
    with_scores: bool = False,
    with_margins: bool = False,
) -> SemanticMap:
    """Most likely class of every output pixel.

    ``label(y, x) = argmax_c sum_q P[q, c] * M[q, y, x]`` with P = softmax(class_logits) less its last column and
    M = sigmoid(mask logits resampled straight to the output, `resample`). Equal scores give the lower class. Everything
    is computed in float32, whatever the inputs' dtype. Labels are right wherever the winner's score leads by more than
    1e-5 x max(1, its score); scores and margins are within 1e-5 of the same.

    Infinite mask logits count as ±1e30 (see `resample`): sigmoid gives 0 and 1. Invalid pixels have label 0, and NaN as
    score and margin. A NaN mask logit makes the pixels to which it is interpolated invalid. A query with NaN or +inf
    among its class logits, or with -inf only, makes the complete image invalid.

    On the CPU: the C++ operator, over ``torch.get_num_threads()`` threads; results do not depend on their number. It
    takes any strides and converts half precision on the fly, so beside the results it allocates less than 16 MiB
    (float64 inputs are first copied to float32).

    On CUDA: a Triton kernel, fastest for up to 128 queries. Where mask logits are float16 or bfloat16 its tolerance is
    2e-3 instead of 1e-5.

    Args:
        extent: height and width of the images in mask pixels, common to the batch.
        output_size: height H and width W of the result.
        with_scores: also return the winner's score.
        with_margins: also return by how much the winner's score exceeds the runner-up's (+inf with one class).

    Returns:
        labels [B, H, W], uint8 if K <= 255 (255 stays free for "ignore") else int16; scores and margins [B, H, W]
        float32, or None.

    Raises:
        ValueError: shapes that do not fit, K < 1 or K > 32767.
        ImportError: the extension is not built; on CUDA, Triton is not installed.
    """
    labels, scores, margins = _semantic_inference(
        mask_logits, class_logits, extent, output_size, with_scores, with_margins
    )
    return SemanticMap(labels, scores if with_scores else None, margins if with_margins else None)


@torch.no_grad()
def semantic_inference_eager(
    mask_logits: Tensor,  # [B, Q, h, w] floating
    class_logits: Tensor,  # [B, Q, K+1] floating, "no object" last
    extent: tuple[float, float],
    output_size: tuple[int, int],
    with_scores: bool = False,
    with_margins: bool = False,
) -> SemanticMap:
    """`semantic_inference` in plain PyTorch, on any device."""
    probabilities = _class_probabilities(mask_logits, class_logits, extent, output_size)

    def score(image: int, masks: Tensor, classes: slice) -> Tensor:
        return probabilities[image, :, classes].T @ masks

    return _argmax(
        mask_logits, probabilities.shape[2], torch.sigmoid_, score, extent, output_size, with_scores, with_margins
    )


@torch.no_grad()
def semantic_scores(
    mask_logits: Tensor,  # [B, Q, h, w] floating
    class_logits: Tensor,  # [B, Q, K+1] floating, "no object" last
    extent: tuple[float, float],
    output_size: tuple[int, int],
) -> Tensor:
    """Scores of all classes, of which `semantic_inference` takes the argmax -> [B, K, H, W] float32.

    They are sums over queries, in 0..Q: not probabilities, but they may be averaged over scales and flips.
    """
    probabilities = _class_probabilities(mask_logits, class_logits, extent, output_size)
    batch, num_queries, num_classes = probabilities.shape
    scores = mask_logits.new_empty((batch, num_classes, *output_size), dtype=torch.float32)
    for image in range(batch):
        for rows in row_tiles(output_size, num_queries + num_classes, mask_logits.device):
            masks = resample_rows(mask_logits[image], extent, output_size, rows).sigmoid_()
            with torch.autocast(mask_logits.device.type, enabled=False):
                tile = probabilities[image].T @ masks.flatten(1)
            scores[image, :, rows] = tile.unflatten(1, masks.shape[1:])
    return scores


@torch.no_grad()
def pixel_semantic_inference(
    logits: Tensor,  # [B, K, h, w] floating
    extent: tuple[float, float],
    output_size: tuple[int, int],
    with_scores: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`semantic_inference` of a per-pixel model: argmax of its logits resampled to the output.

    Scores, where wanted, are the winner's softmax probability. Results and errors are those of `semantic_inference`.
    """
    check(logits.ndim == 4, "logits", "[B, K, h, w]", tuple(logits.shape))
    check_geometry(logits, extent, output_size)

    def activation(tile: Tensor) -> Tensor:
        return tile.softmax(0) if with_scores else tile

    def score(image: int, tile: Tensor, classes: slice) -> Tensor:
        return tile[classes]

    return _argmax(logits, logits.shape[1], activation, score, extent, output_size, with_scores)[:2]


@torch.no_grad()
def pixel_semantic_scores(
    logits: Tensor,  # [B, K, h, w] floating
    extent: tuple[float, float],
    output_size: tuple[int, int],
) -> Tensor:
    """Class probabilities of a per-pixel model, from logits resampled to the output -> [B, K, H, W] float32."""
    check(logits.ndim == 4, "logits", "[B, K, h, w]", tuple(logits.shape))
    check_geometry(logits, extent, output_size)
    scores = logits.new_empty((*logits.shape[:2], *output_size), dtype=torch.float32)
    for image in range(len(logits)):
        for rows in row_tiles(output_size, 2 * logits.shape[1], logits.device):
            scores[image, :, rows] = resample_rows(logits[image], extent, output_size, rows).softmax(0)
    return scores


def label_dtype(num_classes: int) -> torch.dtype:
    """dtype of a label map of K classes: uint8 up to 255, int16 up to 32767, else ``ValueError``."""
    check(1 <= num_classes <= 32767, "number of classes", "1..32767", num_classes)
    return torch.uint8 if num_classes <= 255 else torch.int16


def _check(
    mask_logits: Tensor, class_logits: Tensor, extent: tuple[float, float], output_size: tuple[int, int]
) -> None:
    check(mask_logits.ndim == 4, "mask_logits", "[B, Q, h, w]", tuple(mask_logits.shape))
    for name, logits in (("mask_logits", mask_logits), ("class_logits", class_logits)):
        check(logits.is_floating_point(), name, "a floating-point type", logits.dtype)
    expected = mask_logits.shape[:2]
    fits = class_logits.ndim == 3 and class_logits.shape[:2] == expected and class_logits.shape[2] >= 2
    check(fits, "class_logits", f"[{expected[0]}, {expected[1]}, K+1] with K >= 1", tuple(class_logits.shape))
    label_dtype(class_logits.shape[2] - 1)
    check_geometry(mask_logits, extent, output_size)


def _class_probabilities(
    mask_logits: Tensor, class_logits: Tensor, extent: tuple[float, float], output_size: tuple[int, int]
) -> Tensor:
    """Check the arguments, take the softmax over classes and "no object", drop the latter -> [B, Q, K] float32."""
    _check(mask_logits, class_logits, extent, output_size)
    return class_logits.to(torch.float32).softmax(-1)[..., :-1]


def _argmax(
    maps: Tensor,  # [B, N, h, w] floating
    num_classes: int,
    activation: Callable[[Tensor], Tensor],
    score: Callable[[int, Tensor, slice], Tensor],
    extent: tuple[float, float],
    output_size: tuple[int, int],
    with_scores: bool,
    with_margins: bool = False,
) -> SemanticMap:
    """Running argmax over chunks of classes, for every tile of every image.

    ``score(image, activated tile [N, pixels], classes)`` returns the scores [classes, pixels] of a chunk of classes.
    """
    labels = maps.new_empty((len(maps), *output_size), dtype=label_dtype(num_classes))
    scores = maps.new_empty(labels.shape, dtype=torch.float32) if with_scores else None
    margins = maps.new_empty(labels.shape, dtype=torch.float32) if with_margins else None
    chunks = [slice(start, min(start + CLASS_CHUNK, num_classes)) for start in range(0, num_classes, CLASS_CHUNK)]
    channels = maps.shape[1] + min(num_classes, CLASS_CHUNK)
    for image in range(len(maps)):
        for rows in row_tiles(output_size, channels, maps.device):
            tile = activation(resample_rows(maps[image], extent, output_size, rows)).flatten(1)
            second: Tensor | None = None
            with torch.autocast(maps.device.type, enabled=False):  # a matrix product in bfloat16 would change labels
                for classes in chunks:
                    chunk = score(image, tile, classes)
                    value, index = chunk.max(0)
                    if with_margins:
                        runner_up = chunk.scatter_(0, index[None], -torch.inf).amax(0)
                    if classes.start == 0:
                        best, label = value, index
                        second = runner_up if with_margins else None
                        continue
                    if second is not None:
                        second = torch.maximum(torch.minimum(best, value), torch.maximum(second, runner_up))
                    better = value > best  # strictly: of equal scores the lower class stays
                    best = torch.where(better, value, best)
                    label = torch.where(better, index + classes.start, label)
            labels[image, rows] = label.view(-1, output_size[1]).to(labels.dtype)
            if scores is not None:
                scores[image, rows] = best.view(-1, output_size[1])
            if margins is not None and second is not None:
                margins[image, rows] = (best - second).view(-1, output_size[1])
    return SemanticMap(labels, scores, margins)
