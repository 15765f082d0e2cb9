"""Semantic inference in one kernel: labels of the output's pixels, with nothing of size Q*H*W or K*H*W in memory.

label(y, x) = argmax_c sum_q P[q, c] * sigmoid(bilinear(mask logits)[q, y, x]), P = softmax(class logits) less its last
column (paper section 3.4). One program computes one tile of output pixels:

    resampling (`resample`) -> [pixels, queries] -> sigmoid -> @ P [queries, classes] -> running argmax.

The logits are read from memory (`semantic_from_logits`) or computed from embeddings for the tile's taps
(`semantic_from_embeddings`). Where only labels are wanted, queries that cannot matter may be left out
(`semantic_pruned`).

Precision: all sums are in float32. Masks and P are multiplied as float16, scaled so that small values keep their bits.
For float32 inputs each factor is the sum of two such halves, which takes three products: results have float32
precision, scores are within 1e-5 x max(1, score). For float16 and bfloat16 inputs each factor is rounded once: scores
are within 2e-3 x max(1, score).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.class_probabilities import (
    class_probabilities,
    class_probabilities_variant,
    class_probabilities_work,
)
from maskformer_fast.kernels.resample import add_taps, narrow_maps, tap_weights
from maskformer_fast.kernels.semantic_pruned import pruning_pays, semantic_pruned
from maskformer_fast.kernels.semantic_tile import (
    CLASS_BLOCK,
    ELEMENTS,
    LAUNCH,
    MAX_QUERIES,
    SIZES,
    TAP_BLOCK,
    Tiling,
    classify,
    classify_tile,
    constants_of,
    halves,
    kernel_variant,
    place_tile,
    plan_tiles,
)
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

DEPTH_BLOCKS = {torch.float16: 32, torch.bfloat16: 32, torch.float32: 16}
"""Channels of embeddings multiplied at once."""
FUSED_REPEATS = 4
"""Most times that tiles may compute one logit for logits to be computed inside the kernel. Not measured on a GPU."""
MARGIN_CLASS_BLOCK = 16
"""Classes scored at once where margins are wanted: runners-up of more classes spill on sm_120."""
PATHS = ("auto", "dense", "pruned")
"""Choices of all queries or pruned ones, see `semantic_from_logits`."""


@triton.jit(do_not_specialize=SIZES)
def _semantic_logits_kernel(
    labels, scores, margins,  # [B, H, W]
    probabilities,  # [B, SPLIT + 1, GROUPS * QUERIES, padded_classes]
    logits, stride_b, stride_q, stride_y, stride_x,  # [B, Q, h, w]
    num_queries, num_classes, padded_classes, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tap_rows, tap_columns, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr,
    SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    geometry = (
        (map_height, map_width), (height, width), (scale_y, rest_y, scale_x, rest_x), (offset_y, offset_x),
        (tap_rows, tap_columns), (tiles_y, tiles_x),
    )  # fmt: skip
    classify_tile(
        tl.program_id(0), (labels, scores, margins), probabilities, logits, stride_b, (stride_q, stride_y, stride_x),
        num_queries, (num_classes, padded_classes), geometry,
        TILE_H, TILE_W, TAPS, QUERIES, GROUPS, CLASSES, SPLIT, SCORES, MARGINS,
    )  # fmt: skip


@triton.jit
def _masks_of_embeddings(
    embeddings,  # [Q, D] of the tile's image
    embedding_strides,
    pixels,  # [D, h, w] of the tile's image
    pixel_strides,
    depth,
    query,  # [QUERIES] int32
    present,  # [QUERIES]: the masks of others are 0
    tile,
    geometry,
    TAPS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Masks of the given queries at a tile's pixels, as `halves`."""
    stride_eq, stride_ed = embedding_strides
    stride_d, stride_y, stride_x = pixel_strides
    map_size, _, _, _, tap_counts, _ = geometry
    map_height, map_width = map_size
    tap_rows, tap_columns = tap_counts
    first_y, first_x, low_y, share_y, low_x, share_x = tile
    resampled = tl.zeros((low_y.shape[0], query.shape[0]), tl.float32)
    for start in tl.range(0, tap_rows * tap_columns, TAPS):
        tap = start + tl.arange(0, TAPS)
        row, column = first_y + tap // tap_columns, first_x + tap % tap_columns
        place = tl.minimum(row, map_height - 1) * stride_y + tl.minimum(column, map_width - 1) * stride_x
        values = tl.zeros((TAPS, query.shape[0]), tl.float32)
        for first in tl.range(0, depth, DEPTH):
            channel = (first + tl.arange(0, DEPTH)).to(tl.int64)
            here = channel < depth
            pixel = tl.load(pixels + place[:, None] + channel[None, :] * stride_d, mask=here[None, :], other=0.0)
            embedding = tl.load(
                embeddings + channel[:, None] * stride_ed + query[None, :] * stride_eq,
                mask=here[:, None] & present[None, :],
                other=0.0,
            )
            values = tl.dot(pixel, embedding, values, input_precision="tf32x3")  # products of halves are exact anyway
        resampled = add_taps(resampled, tap_weights(row, column, low_y, share_y, low_x, share_x), values)
    return halves(resampled)


@triton.jit(do_not_specialize=[*SIZES, "depth"])
def _semantic_embeddings_kernel(
    labels, scores, margins,  # [B, H, W]
    probabilities,  # [B, SPLIT + 1, GROUPS * QUERIES, padded_classes]
    embeddings, stride_eb, stride_eq, stride_ed,  # [B, Q, D]
    pixels, stride_b, stride_d, stride_y, stride_x,  # [B, D, h, w]
    num_queries, num_classes, padded_classes, depth, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tap_rows, tap_columns, tiles_y, tiles_x,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr, DEPTH: tl.constexpr,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr, SPLIT: tl.constexpr,
    SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    geometry = (
        (map_height, map_width), (height, width), (scale_y, rest_y, scale_x, rest_x), (offset_y, offset_x),
        (tap_rows, tap_columns), (tiles_y, tiles_x),
    )  # fmt: skip
    image, y, x, tile = place_tile(tl.program_id(0), geometry, TILE_H, TILE_W)
    masks = ()
    for group in tl.static_range(GROUPS):
        query = group * QUERIES + tl.arange(0, QUERIES)
        masks += (_masks_of_embeddings(
            embeddings + image * stride_eb, (stride_eq, stride_ed),
            pixels + image * stride_b, (stride_d, stride_y, stride_x),
            depth, query, query < num_queries, tile, geometry, TAPS, DEPTH,
        ),)  # fmt: skip
    classify(
        masks, tl.arange(0, QUERIES), probabilities, GROUPS * QUERIES, (num_classes, padded_classes),
        (labels, scores, margins), image, y, x, geometry, GROUPS, CLASSES, SPLIT, SCORES, MARGINS,
    )  # fmt: skip


def semantic_from_logits(
    mask_logits: Tensor,  # [B, Q, h, w] float16, bfloat16 or float32, any strides
    class_logits: Tensor,  # [B, Q, K+1] floating, "no object" last
    extent: tuple[float, float],
    labels: Tensor,  # [B, H, W] uint8 or int16, written
    scores: Tensor | None = None,  # [B, H, W] float32, written
    margins: Tensor | None = None,  # [B, H, W] float32, written
    path: str = "auto",
) -> None:
    """Write labels and, where a tensor is given, the winner's score and its lead over the runner-up.

    `extent` is the part of the maps that the output covers, height and width in map pixels. Infinite logits count as
    ±1e30. Pixels to which a NaN logit is interpolated get label 0 and NaN as score and margin; a query whose
    probabilities are NaN has this effect on the complete image. Fastest where queries are innermost in memory (a matrix
    product can write them so): a tap's logits are then adjacent.

    `path` is ``dense``, ``pruned`` (`semantic_pruned`: the same labels unless float32 rounding decides) or ``auto``, in
    which shapes decide (`pruning_pays`). Scores and margins take all queries with any path.

    Raises ValueError for more than `MAX_QUERIES` queries, for other dtypes and paths, and maps of 2^31 elements.
    """
    tiling = plan_tiles(mask_logits, mask_logits.shape[2:], extent, labels)
    pruned = _prunes(path, tiling, class_logits, scores, margins)
    if not tiling.tiles:
        return
    mask_logits = narrow_maps(mask_logits)
    if pruned:
        semantic_pruned(mask_logits, class_logits, tiling, labels)
        return
    with torch.cuda.device_of(labels):
        constants = constants_of(mask_logits) | _result_constants(scores is not None, margins is not None)
        _semantic_logits_kernel[(tiling.tiles,)](
            *_results(labels, scores, margins),
            chances := _chances(class_logits, constants),
            mask_logits, *mask_logits.stride(),
            mask_logits.shape[1], class_logits.shape[2] - 1, chances.shape[3], *mask_logits.shape[2:],
            *tiling.arguments, **constants, **LAUNCH,
        )  # fmt: skip


def semantic_from_embeddings(
    embeddings: Tensor,  # [B, Q, D] of masks
    pixels: Tensor,  # [B, D, h, w] of the same dtype
    class_logits: Tensor,  # [B, Q, K+1] floating, "no object" last
    extent: tuple[float, float],
    labels: Tensor,  # [B, H, W] uint8 or int16, written
    scores: Tensor | None = None,  # [B, H, W] float32, written
    margins: Tensor | None = None,  # [B, H, W] float32, written
    fused: bool | None = None,
    path: str = "auto",
) -> None:
    """Run `semantic_from_logits` on the mask logits ``einsum("bqd,bdhw->bqhw", embeddings, pixels)``.

    With `fused` the kernel computes the logits, in float32 and for all queries; otherwise a matrix product writes them,
    in the inputs' dtype. With None, pruning has them written, and else `FUSED_REPEATS` decides.

    Raises ValueError also for a fused path ``pruned``.
    """
    if embeddings.dtype != pixels.dtype:
        raise ValueError(f"pixels: expected the embeddings' dtype {embeddings.dtype}, got {pixels.dtype}")
    tiling = plan_tiles(embeddings, pixels.shape[2:], extent, labels)
    pruned = _prunes("dense" if fused and path == "auto" else path, tiling, class_logits, scores, margins)
    if fused and pruned:
        raise ValueError("path: expected dense or auto where the kernel computes the logits, got pruned")
    if not tiling.tiles:
        return
    if fused is None and not pruned:
        computed = tiling.tiles * triton.cdiv(tiling.taps, TAP_BLOCK) * TAP_BLOCK
        fused = computed <= FUSED_REPEATS * len(pixels) * pixels.shape[2] * pixels.shape[3]
    if not fused:
        logits = pixels.permute(0, 2, 3, 1).flatten(1, 2) @ embeddings.mT  # [B, h*w, Q]: queries innermost
        logits = logits.unflatten(1, pixels.shape[2:]).permute(0, 3, 1, 2)
        semantic_from_logits(logits, class_logits, extent, labels, scores, margins, "pruned" if pruned else "dense")
        return
    pixels = narrow_maps(pixels)
    with torch.cuda.device_of(labels):
        constants = constants_of(embeddings) | _result_constants(scores is not None, margins is not None)
        _semantic_embeddings_kernel[(tiling.tiles,)](
            *_results(labels, scores, margins),
            chances := _chances(class_logits, constants),
            embeddings, *embeddings.stride(),
            pixels, *pixels.stride(),
            embeddings.shape[1], class_logits.shape[2] - 1, chances.shape[3], *pixels.shape[1:],
            *tiling.arguments, **constants, DEPTH=DEPTH_BLOCKS[pixels.dtype], **LAUNCH,
        )  # fmt: skip


def _prunes(path: str, tiling: Tiling, class_logits: Tensor, scores: Tensor | None, margins: Tensor | None) -> bool:
    if path not in PATHS:
        raise ValueError(f"path: expected one of {', '.join(PATHS)}, got {path!r}")
    if path == "dense" or scores is not None or margins is not None:
        return False
    return path == "pruned" or pruning_pays(tiling.tiles, class_logits.shape[1], class_logits.shape[2] - 1)


def _result_constants(scores: bool, margins: bool) -> dict[str, int]:
    return {"SCORES": scores, "MARGINS": margins, "CLASSES": MARGIN_CLASS_BLOCK if margins else CLASS_BLOCK}


def _results(labels: Tensor, scores: Tensor | None, margins: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments for the results; one that is not wanted is never written, so that any pointer serves."""
    return labels, labels if scores is None else scores, labels if margins is None else margins


def _chances(class_logits: Tensor, constants: dict[str, int]) -> Tensor:
    rows = constants["GROUPS"] * constants["QUERIES"]
    return class_probabilities(class_logits, rows, constants["CLASSES"], constants["SPLIT"])


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time."""
    shapes = ((torch.float16, 128), (torch.bfloat16, MAX_QUERIES), (torch.float32, MAX_QUERIES))
    kernels = [semantic_variant(form, *shape) for form in ("logits", "embeddings") for shape in shapes]
    kernels.append(semantic_variant("logits", torch.float32, MAX_QUERIES, scores=True, margins=True))
    return [*kernels, class_probabilities_variant(split=False), class_probabilities_variant(split=True)]


def semantic_variant(
    form: str, dtype: torch.dtype, queries: int, scores: bool = False, margins: bool = False, labels: str = "*u8"
) -> KernelVariant:
    """Specialisation for contiguous inputs and at most so many queries.

    `form` is "logits" or "embeddings", `labels` Triton's type of the labels, ``*u8`` or ``*i16``.
    """
    constants = constants_of(torch.empty(0, queries, dtype=dtype))
    name = f"semantic_{form}_{ELEMENTS[dtype]}_q{constants['GROUPS'] * constants['QUERIES']}"
    constants |= {**_result_constants(scores, margins), "stride_x": 1}
    if form == "embeddings":
        constants |= {"DEPTH": DEPTH_BLOCKS[dtype], "stride_ed": 1}
    kernel = _semantic_embeddings_kernel if form == "embeddings" else _semantic_logits_kernel
    return kernel_variant(f"{name}{'_scores' * scores}{'_margins' * margins}", kernel, dtype, constants, labels)


def goal_calls() -> list[GoalLaunch]:
    """Labels of 100 queries, innermost in memory, at scale 4, from all queries."""
    sizes = ((1, 128, 128), (8, 128, 128), (1, 256, 512))
    calls = [(*sizes[0], 150, torch.float32)]
    calls += [(*size, 150, torch.float16) for size in sizes] + [(*sizes[0], k, torch.float16) for k in (19, 847)]
    return [launch for call in calls for launch in _goal_call(*call)]


def _goal_call(batch: int, rows: int, columns: int, classes: int, dtype: torch.dtype) -> list[GoalLaunch]:
    queries, height, width = 100, 4 * rows, 4 * columns
    masks = torch.empty(batch, rows, columns, queries, dtype=dtype, device="meta").permute(0, 3, 1, 2)
    logits = torch.empty(batch, queries, classes + 1, device="meta")
    labels = torch.empty(batch, height, width, dtype=torch.int16 if classes > 255 else torch.uint8, device="meta")
    tiling = plan_tiles(masks, masks.shape[2:], (rows, columns), labels)
    works = [
        class_probabilities_work(classes, CLASS_BLOCK),
        Work(
            "labels",
            {
                "tap_rows * tap_columns, TAPS)": triton.cdiv(tiling.taps, TAP_BLOCK),
                "range(0, padded_classes, CLASSES)": triton.cdiv(classes, CLASS_BLOCK),
            },
            masks.numel() * dtype.itemsize + labels.numel() * labels.dtype.itemsize,
            batch * height * width * queries * classes * (3 if dtype == torch.float32 else 1),
        ),
    ]
    name = f"semantic {height}x{width} K={classes} B={batch} {ELEMENTS[dtype]}"
    return goal_launches(
        name, lambda: semantic_from_logits(masks, logits, (rows, columns), labels, path="dense"), works
    )
