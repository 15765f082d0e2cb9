"""Semantic inference in one kernel: labels of the output's pixels, with nothing of size Q*H*W or K*H*W in memory.

label(y, x) = argmax_c sum_q P[q, c] * sigmoid(bilinear(mask logits)[q, y, x]), P = softmax(class logits) less its last
column (paper section 3.4). A tile of output pixels is computed as

    resampling -> [pixels, queries] -> sigmoid -> @ P [queries, classes] -> running argmax.

The logits are read from memory; `semantic_embeddings` computes them. Two kernels share the parts in `semantic_masks`
and `semantic_tile`:

- `_semantic_logits_kernel`, for up to `QUICK_QUERIES` queries: each program walks over tiles of one image. Where the
  probabilities of up to `RESIDENT_CLASSES` classes fit beside each other in shared memory, they stay there; else they
  are read for every tile. A program that met a NaN score says so in `undone`: its taps may contain a NaN or infinity,
  which spoils a complete tile.
- `_semantic_general_kernel`, for any number of queries and any logits: masks are computed again for every block of
  classes. After the first kernel, it repeats the programs that are `undone`, usually none.

The grid depends on shapes and the number of multiprocessors alone; the host reads nothing back.

Precision: all sums are in float32. Masks and P are multiplied as float16, scaled so that small values keep their bits.
For float32 inputs each factor is the sum of two such halves, which takes three products: results have float32
precision, scores are within 1e-5 x max(1, score). For float16 and bfloat16 inputs each factor is rounded once: scores
are within 2e-3 x max(1, score).
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.class_probabilities import (
    class_probabilities,
    class_probabilities_variant,
    class_probabilities_work,
)
from maskformer_fast.kernels.resample import narrow_maps
from maskformer_fast.kernels.semantic_masks import (
    exponent_parts,
    masks_of_logits,
    near_weights,
    query_groups,
    quick_masks,
    tile_axis,
)
from maskformer_fast.kernels.semantic_tile import (
    ELEMENTS,
    LAUNCH,
    QUERY_BLOCK,
    QUICK_QUERIES,
    SIZES,
    TAP_BLOCK,
    is_nan,
    kernel_variant,
    load_chances,
    no_ranks,
    place_tile,
    plan_tiles,
    rank_block,
    result_arguments,
    score_block,
    shape_constants,
    store_winners,
    variant_name,
)
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

RESIDENT_CLASSES = 256
"""Most classes whose probabilities stay in shared memory, up to 64 KiB of them: two programs fit a multiprocessor. Each
block of classes is compiled by itself. The two parts of float32 probabilities would take too many registers."""
PROGRAMS = 2
"""Programs of the quick kernel for each multiprocessor."""
MULTIPROCESSORS = 132
"""Number that is assumed where launches are recorded without a GPU: that of H100 and H200. Others run the same
programs in more or fewer rounds."""


@triton.jit
def _general_tiles(
    first, programs,
    results, probabilities, logits, num_queries, strides, classes, geometry,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    CLASSES: tl.constexpr, SPLIT: tl.constexpr, SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    """Results of every `programs`-th tile of one image, from any logits; pointers are those of the image."""
    num_classes, padded_classes = classes
    tiles_y, tiles_x = geometry[5]
    for index in tl.range(first, tiles_y * tiles_x, programs, num_stages=1):
        _, y, x, tile = place_tile(index, geometry, TILE_H, TILE_W)
        ranks = no_ranks(TILE_H * TILE_W)
        for start in tl.range(0, padded_classes, CLASSES, num_stages=1):
            score = tl.zeros((TILE_H * TILE_W, CLASSES), tl.float32)
            for first_query in tl.range(0, ROWS, QUERIES, num_stages=1):
                query = first_query + tl.arange(0, QUERIES)
                high, rest = masks_of_logits(logits, query, query < num_queries, tile, strides, geometry, TAPS)
                source = probabilities + query[:, None] * padded_classes + (start + tl.arange(0, CLASSES))[None, :]
                chance = tl.load(source)
                score = tl.dot(high, chance, score)
                if SPLIT:
                    score = tl.dot(rest, chance, score)
                    score = tl.dot(high, tl.load(source + ROWS * padded_classes), score)
            ranks = rank_block(ranks, score, start, MARGINS)
        store_winners(results, ranks, num_classes, y, x, geometry[1], SCORES, MARGINS)


@triton.jit(do_not_specialize=SIZES)
def _semantic_general_kernel(
    labels, scores, margins,  # [B, H, W]
    undone,  # int32 [B * programs]: 0 where nothing is to be done, read where REDO
    probabilities,  # [B, SPLIT + 1, ROWS, padded_classes]
    logits, stride_b, stride_q, stride_y, stride_x,  # [B, Q, h, w]
    num_queries, num_classes, padded_classes, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tap_rows, tap_columns, tiles_y, tiles_x, programs,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    CLASSES: tl.constexpr, SPLIT: tl.constexpr, SCORES: tl.constexpr, MARGINS: tl.constexpr, REDO: tl.constexpr,
):  # fmt: skip
    geometry = (
        (map_height, map_width), (height, width), (scale_y, rest_y, scale_x, rest_x), (offset_y, offset_x),
        (tap_rows, tap_columns), (tiles_y, tiles_x),
    )  # fmt: skip
    wanted = 1
    if REDO:
        wanted = tl.load(undone + tl.program_id(0))
    if wanted != 0:
        image = (tl.program_id(0) // programs).to(tl.int64)
        pixels = image * height * width
        _general_tiles(
            tl.program_id(0) % programs, programs, (labels + pixels, scores + pixels, margins + pixels),
            probabilities + image * (SPLIT + 1) * ROWS * padded_classes, logits + image * stride_b, num_queries,
            (stride_q, stride_y, stride_x), (num_classes, padded_classes), geometry,
            TILE_H, TILE_W, TAPS, ROWS, QUERIES, CLASSES, SPLIT, SCORES, MARGINS,
        )  # fmt: skip


@triton.jit
def _quick_tiles(
    first, programs,
    results, probabilities, logits, num_queries, strides, classes, geometry,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr, MANY: tl.constexpr, ROWS: tl.constexpr,
    CLASSES: tl.constexpr, BLOCKS: tl.constexpr, SPLIT: tl.constexpr, SCORES: tl.constexpr, MARGINS: tl.constexpr,
):  # fmt: skip
    """Results of every `programs`-th tile of one image, as `_general_tiles` -> [pixels], largest bits of scores.

    The probabilities of BLOCKS blocks of classes stay in shared memory; those of all are loaded again where it is 0.
    """
    map_size, output_size, scales, offsets, tap_counts, tile_counts = geometry
    map_height, map_width = map_size
    scale_y, rest_y, scale_x, rest_x = scales
    offset_y, offset_x = offsets
    _, tap_columns = tap_counts
    tiles_y, tiles_x = tile_counts
    num_classes, padded_classes = classes
    element: tl.constexpr = logits.dtype.element_ty
    groups = query_groups(ROWS)
    PARTS: tl.constexpr = len(groups) * (SPLIT + 1)
    resident = ()
    for block in tl.static_range(BLOCKS):
        resident += load_chances(probabilities, groups, padded_classes, block * CLASSES, ROWS, CLASSES, SPLIT)
    double_y = tl.cast(scale_y, tl.float64) + tl.cast(rest_y, tl.float64)
    double_x = tl.cast(scale_x, tl.float64) + tl.cast(rest_x, tl.float64)
    tile_y, tile_x = tl.arange(0, TILE_H * TILE_W) // TILE_W, tl.arange(0, TILE_H * TILE_W) % TILE_W
    tap = tl.arange(0, TAPS)
    tap_y = tap // tap_columns
    tap_x = tap - tap_y * tap_columns
    row, column = first // tiles_x, first % tiles_x
    row_step, column_step = programs // tiles_x, programs % tiles_x
    worst = tl.zeros((TILE_H * TILE_W,), tl.int32)
    # Loading the next tile's taps early would take registers of which two programs have just enough.
    for _ in tl.range(first, tiles_y * tiles_x, programs, num_stages=1):
        top, left = row * TILE_H - offset_y, column * TILE_W - offset_x
        first_y, at_y = tile_axis(top, tile_y, scale_y, double_y, map_height)
        first_x, at_x = tile_axis(left, tile_x, scale_x, double_x, map_width)
        parts = ()
        if not MANY:
            parts = exponent_parts(near_weights(at_y, at_x, tap_y, tap_x), element)
        place = tl.minimum(first_y + tap_y, map_height - 1) * strides[1]
        place += tl.minimum(first_x + tap_x, map_width - 1) * strides[2]
        masks = quick_masks(
            logits, groups, num_queries, strides, parts, place, top, left, tile_y, tile_x, first_y, first_x,
            geometry, TAPS, MANY, SPLIT,
        )  # fmt: skip
        ranks = no_ranks(TILE_H * TILE_W)
        if BLOCKS > 0:
            for block in tl.static_range(BLOCKS):
                score = score_block(masks, resident, block * PARTS, SPLIT)
                ranks = rank_block(ranks, score, block * CLASSES, MARGINS)
        else:
            for start in tl.range(0, padded_classes, CLASSES):
                chances = load_chances(probabilities, groups, padded_classes, start, ROWS, CLASSES, SPLIT)
                ranks = rank_block(ranks, score_block(masks, chances, 0, SPLIT), start, MARGINS)
        highest = store_winners(results, ranks, num_classes, top + tile_y, left + tile_x, output_size, SCORES, MARGINS)
        worst = tl.maximum(worst, highest)
        row, column = row + row_step, column + column_step
        wraps = (column >= tiles_x).to(tl.int32)
        row, column = row + wraps, column - wraps * tiles_x
    return worst


@triton.jit(do_not_specialize=SIZES)
def _semantic_logits_kernel(
    labels, scores, margins,  # [B, H, W]
    undone,  # int32 [B * programs], written
    probabilities,  # [B, SPLIT + 1, ROWS, padded_classes]
    logits, stride_b, stride_q, stride_y, stride_x,  # [B, Q, h, w]; all strides but stride_q in units of UNIT
    num_queries,  # in units of UNIT
    num_classes, padded_classes, map_height, map_width, height, width,
    scale_y, rest_y, scale_x, rest_x, offset_y, offset_x, tap_rows, tap_columns, tiles_y, tiles_x, programs,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, TAPS: tl.constexpr, MANY: tl.constexpr, ROWS: tl.constexpr,
    UNIT: tl.constexpr, CLASSES: tl.constexpr, RESIDENT: tl.constexpr, SPLIT: tl.constexpr,
    SCORES: tl.constexpr, MARGINS: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """Each program computes every `programs`-th tile of one image.

    RESIDENT is the number of blocks of classes that stay in shared memory, on targets whose tensor cores read it.
    """
    geometry = (
        (map_height, map_width), (height, width), (scale_y, rest_y, scale_x, rest_x), (offset_y, offset_x),
        (tap_rows, tap_columns), (tiles_y, tiles_x),
    )  # fmt: skip
    strides = (stride_q, stride_y * UNIT, stride_x * UNIT)
    image = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs
    pixels = image * height * width
    results = (labels + pixels, scores + pixels, margins + pixels)
    probabilities += image * (SPLIT + 1) * ROWS * padded_classes
    logits += image * stride_b * UNIT
    # Tensor cores of these targets add into tensor memory, where every product has columns of its own, 512 in total.
    TENSOR_MEMORY: tl.constexpr = TARGET // 10 == 10 or TARGET // 10 == 11
    if TENSOR_MEMORY and logits.dtype.element_ty != tl.float16:
        _general_tiles(
            first, programs, results, probabilities, logits, num_queries * UNIT, strides,
            (num_classes, padded_classes), geometry, TILE_H, TILE_W, 16, ROWS, 16, CLASSES, SPLIT, SCORES, MARGINS,
        )  # fmt: skip
        tl.store(undone + tl.program_id(0), 0)
    else:
        worst = _quick_tiles(
            first, programs, results, probabilities, logits, num_queries * UNIT, strides,
            (num_classes, padded_classes), geometry, TILE_H, TILE_W, TAPS, MANY, ROWS, CLASSES,
            RESIDENT if TARGET // 10 == 9 else 0, SPLIT, SCORES, MARGINS,
        )  # fmt: skip
        tl.store(undone + tl.program_id(0), is_nan(tl.max(worst, 0)).to(tl.int32))


def semantic_from_logits(
    mask_logits: Tensor,  # [B, Q, h, w] float16, bfloat16 or float32, any strides
    class_logits: Tensor,  # [B, Q, K+1] floating, "no object" last
    extent: tuple[float, float],
    labels: Tensor,  # [B, H, W] uint8 or int16, written
    scores: Tensor | None = None,  # [B, H, W] float32, written
    margins: Tensor | None = None,  # [B, H, W] float32, written
) -> None:
    """Write labels and, where a tensor is given, the winner's score and its lead over the runner-up.

    `extent` is the part of the maps that the output covers, height and width in map pixels. Infinite logits count as
    ±1e30. Pixels to which a NaN logit is interpolated get label 0 and NaN as score and margin; a query whose
    probabilities are NaN has this effect on the complete image. Fastest where queries are innermost in memory, a
    multiple of 4 or 8 of them (a matrix product can write them so): a tap's logits are then adjacent.

    Raises ValueError for other dtypes and maps of 2^31 elements.
    """
    tiling = plan_tiles(mask_logits, mask_logits.shape[2:], extent, labels)
    if not tiling.tiles:
        return
    mask_logits = narrow_maps(mask_logits)
    batch, queries = mask_logits.shape[:2]
    split, quick = mask_logits.dtype == torch.float32, queries <= QUICK_QUERIES
    values = {"SPLIT": split, "SCORES": scores is not None, "MARGINS": margins is not None}
    shapes = shape_constants(mask_logits.dtype, queries, class_logits.shape[2] - 1)
    programs = _programs(tiling.tiles, batch, labels.device)
    with torch.cuda.device_of(labels):
        undone = labels.new_empty(batch * programs, dtype=torch.int32)
        chances = class_probabilities(class_logits, shapes["ROWS"], shapes["CLASSES"], split)
        results = (*result_arguments(labels, scores, margins), undone, chances, mask_logits)
        sizes = (class_logits.shape[2] - 1, chances.shape[3], *mask_logits.shape[2:], *tiling.arguments, programs)
        if quick:
            constants = quick_constants(mask_logits, chances.shape[3], shapes, tiling.taps) | values
            unit = constants["UNIT"]
            stride_b, stride_q, stride_y, stride_x = mask_logits.stride()
            _semantic_logits_kernel[(batch * programs,)](
                *results, stride_b // unit, stride_q, stride_y // unit, stride_x // unit, queries // unit, *sizes,
                **constants, TARGET=_target(labels.device), **LAUNCH,
            )  # fmt: skip
        _semantic_general_kernel[(batch * programs,)](
            *results, *mask_logits.stride(), queries, *sizes, **general_constants(shapes, quick), **values, **LAUNCH
        )


def _programs(tiles: int, batch: int, device: torch.device) -> int:
    """Programs for each image of the batch."""
    count = MULTIPROCESSORS if device.type != "cuda" else _multiprocessors(device.index)
    return max(1, min(tiles, PROGRAMS * count // batch))


@functools.lru_cache(maxsize=64)
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _target(device: torch.device) -> int:
    """Compute capability, as in ``sm_90``; compilation for a target that is not present replaces it."""
    return 80 if device.type != "cuda" else _capability(device.index)


@functools.lru_cache(maxsize=64)
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def quick_constants(maps: Tensor, padded_classes: int, shapes: dict[str, int], taps: int) -> dict[str, int]:
    """Compile-time constants of the quick kernel for maps [B, Q, h, w], but for what is wanted and the target."""
    stays = padded_classes <= RESIDENT_CLASSES and maps.dtype != torch.float32
    stride_b, stride_q, stride_y, stride_x = maps.stride()
    return {
        **shapes,
        "TAPS": TAP_BLOCK if taps <= TAP_BLOCK else 2 * TAP_BLOCK,
        "MANY": taps > 2 * TAP_BLOCK,
        "UNIT": math.gcd(8, stride_b, stride_y, stride_x, maps.shape[1]) if stride_q == 1 else 1,
        "RESIDENT": padded_classes // shapes["CLASSES"] if stays else 0,
    }


def general_constants(shapes: dict[str, int], redo: bool) -> dict[str, int]:
    """Compile-time constants of the general kernel, but for what is wanted."""
    return {**shapes, "TAPS": TAP_BLOCK, "QUERIES": 16 if redo else QUERY_BLOCK, "REDO": redo}


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time."""
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    kernels = [
        quick_variant(half, 100, 150),
        quick_variant(half, 128, 847, taps=24),
        quick_variant(brain, 100, 150),
        quick_variant(brain, 128, 847, taps=99, scores=True),
        quick_variant(full, 100, 150),
        quick_variant(full, 128, 847, taps=24, scores=True, margins=True),
        quick_variant(half, 128, 200, taps=99, scores=True, margins=True),
        general_variant(half, 100, 150),
        general_variant(full, 300, 847, scores=True, margins=True),
    ]
    return [*kernels, class_probabilities_variant(split=False), class_probabilities_variant(split=True)]


def quick_variant(
    dtype: torch.dtype, queries: int, classes: int, taps: int = 15, scores: bool = False, margins: bool = False,
    labels: str = "*u8",
) -> KernelVariant:  # fmt: skip
    """Specialisation for queries innermost in memory; `labels` is Triton's type of the labels, ``*u8`` or ``*i16``."""
    shapes = shape_constants(dtype, queries, classes)
    padded = triton.cdiv(classes, shapes["CLASSES"]) * shapes["CLASSES"]
    maps = torch.empty(1, 16, 16, queries, dtype=dtype).permute(0, 3, 1, 2)
    constants = quick_constants(maps, padded, shapes, taps) | {"stride_q": 1, "TARGET": 80}
    constants |= {"SPLIT": dtype == torch.float32, "SCORES": scores, "MARGINS": margins}
    name = variant_name("logits", dtype, f"q{queries}_k{classes}_t{taps}", scores, margins)
    return kernel_variant(name, _semantic_logits_kernel, dtype, constants, labels, ("stride_b",))


def general_variant(
    dtype: torch.dtype, queries: int, classes: int, scores: bool = False, margins: bool = False, labels: str = "*u8"
) -> KernelVariant:
    """Specialisation for queries innermost in memory."""
    constants = general_constants(shape_constants(dtype, queries, classes), queries <= QUICK_QUERIES) | {"stride_q": 1}
    constants |= {"SPLIT": dtype == torch.float32, "SCORES": scores, "MARGINS": margins}
    name = variant_name("general", dtype, f"q{queries}_k{classes}", scores, margins)
    return kernel_variant(name, _semantic_general_kernel, dtype, constants, labels)


def goal_calls() -> list[GoalLaunch]:
    """Labels of 100 queries, innermost in memory, at scale 4."""
    sizes = ((1, 128, 128), (8, 128, 128), (1, 256, 512))
    calls = [(*sizes[0], 150, torch.float32), (*sizes[0], 150, torch.bfloat16)]
    calls += [(*size, 150, torch.float16) for size in sizes] + [(*sizes[0], k, torch.float16) for k in (19, 847)]
    return [launch for call in calls for launch in _goal_call(*call)]


def _goal_call(batch: int, rows: int, columns: int, classes: int, dtype: torch.dtype) -> list[GoalLaunch]:
    queries, height, width = 100, 4 * rows, 4 * columns
    masks = torch.empty(batch, rows, columns, queries, dtype=dtype, device="meta").permute(0, 3, 1, 2)
    logits = torch.empty(batch, queries, classes + 1, device="meta")
    labels = torch.empty(batch, height, width, dtype=torch.int16 if classes > 255 else torch.uint8, device="meta")
    tiling = plan_tiles(masks, masks.shape[2:], (rows, columns), labels)
    shapes = shape_constants(dtype, queries, classes)
    blocks = triton.cdiv(classes, shapes["CLASSES"])
    walk = {"tl.range(first, tiles_y * tiles_x, programs": tiling.tiles / _programs(tiling.tiles, batch, labels.device)}
    form = {
        **dict.fromkeys(("tl.static_range(", "tl.dot("), 1),  # waits for tensor memory
        "range(0, padded_classes, CLASSES": blocks,
        "range(0, ROWS, QUERIES": shapes["ROWS"] // 16,
        "tap_rows * tap_columns, TAPS": triton.cdiv(tiling.taps, TAP_BLOCK),
    }
    least_bytes = masks.numel() * dtype.itemsize + labels.numel() * labels.dtype.itemsize
    products = batch * height * width * queries * classes * (3 if dtype == torch.float32 else 1)
    works = [
        class_probabilities_work(classes, shapes["CLASSES"]),
        Work("labels", walk, least_bytes, products, form),
        Work("undone", {**walk, "if wanted != 0:": 0.0}, optional_runs=form),
    ]
    name = f"semantic {height}x{width} K={classes} B={batch} {ELEMENTS[dtype]}"
    return goal_launches(name, lambda: semantic_from_logits(masks, logits, (rows, columns), labels), works)
