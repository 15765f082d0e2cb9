"""Matching cost of every layer, image, query and target, with nothing of size Q*h*w in memory (paper section 3.3).

Three kernels, without floating-point atomics: the same inputs give the same costs to the last bit.

1. `_sample_kernel` samples the packed targets at the resolution of the mask logits: for each pixel a word with a bit
   for each of `BLOCK_TARGETS` targets, and a last bit that is set where the pixel is counted.
2. `_sums_kernel` processes a chunk of an image's pixels and a block of its queries (those of all layers in one row),
   tile by tile: mask logits, from memory or computed from embeddings, then probabilities and losses of their pixels,
   then the product of these with the unpacked words. The last bit's column is the sum over all counted pixels.
3. `_cost_kernel` adds the chunks' sums, divides, and adds the class cost.

Precision: embeddings are multiplied with 22 bits or more (products of halves are exact). Exponentials and logarithms
are those of the hardware, with errors of about 2^-22. Of the values multiplied by the targets, probabilities are sums
of two float16, losses of three bfloat16. All sums are in float32.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskformer_fast.kernels.matching_losses import (
    SCALE,
    any_times_truth,
    class_probability,
    pixel_losses,
    times_truth,
)
from maskformer_fast.kernels.products import leading_bits, product
from maskformer_fast.kernels.variant import GoalLaunch, KernelVariant, Work, goal_launches

WORD_BITS = 32
"""Bits of a pixel's word."""
BLOCK_TARGETS = WORD_BITS - 1
"""Targets of one word. Images with more targets compute the logits once for each block of targets."""
ROWS = 64
"""Queries of a program: 6 layers of 100 queries are 10 blocks with 40 unused rows. With 128 and 8 warps a logit takes a
tenth fewer instructions, but only one program fits a multiprocessor."""
PIXELS = 32
"""Pixels of a tile: with 64, products of float32 spill."""
DEPTH_BLOCKS = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}
"""Channels of embeddings multiplied at once: 128 bytes of a row."""
MOST_WHOLE = 256
"""Channels of embeddings in half precision up to which they stay in shared memory, read once in a program."""
KEEPING = 160 << 10
"""Bytes of shared memory of a multiprocessor from which on they do."""
LAUNCH = {"num_warps": 4, "num_stages": 2}
"""Options of every launch. With them and the sizes above no target spills registers or lacks shared memory, and two or
three programs fit a multiprocessor: one multiplies while another takes logarithms. Not measured on a GPU."""
PROGRAMS = 1024
"""Number of programs up to which pixels are split into chunks: a few for each multiprocessor. It also bounds the memory
of their sums, to 16 MiB where the result is smaller. Not measured on a GPU."""
SAMPLE_PIXELS = 128
"""Pixels of a program of `_sample_kernel`."""
COST_ROWS = 16
"""Queries of a program of `_cost_kernel`."""
CLASSES = 64
"""Classes of which `_cost_kernel` takes the softmax at once."""

_ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@triton.jit
def _block_of_program(num_blocks, rest, counts, TARGETS: tl.constexpr):
    """Place of a program in blocks of targets -> image, first target, flag that the image has this target."""
    image = rest // num_blocks
    first = rest % num_blocks * (TARGETS - 1)
    return image.to(tl.int64), first, first < tl.load(counts + image)


@triton.jit
def _source_index(index, scale, size):
    """Pixel that ``F.interpolate(mode="nearest")`` reads, in float32 as in torch: exact arithmetic would differ."""
    return tl.minimum((index.to(tl.float32) * scale).to(tl.int32), size - 1)


@triton.jit(do_not_specialize=["num_targets", "num_blocks", "num_tiles", "width", "input_height", "input_width"])
def _sample_kernel(
    words,  # [B, num_blocks, num_pixels] int32
    areas,  # [B, num_blocks, num_tiles, TARGETS] int32: of each bit, how many pixels of the tile have it
    masks, stride_b, stride_t, stride_y, stride_x,  # [B, T, H, ceil(W/8)] uint8
    counts,  # [B] int64
    valid_sizes,  # [B, 2] int64, read with EXCLUDE
    num_targets, num_blocks, num_tiles, num_pixels, width, input_height, input_width, scale_y, scale_x,
    EXCLUDE: tl.constexpr, TARGETS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % num_tiles
    block = tl.program_id(0) // num_tiles
    image, first, present = _block_of_program(num_blocks, block, counts, TARGETS)
    if not present:
        return
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    counted = pixel < num_pixels
    row = _source_index(pixel // width, scale_y, input_height)
    column = _source_index(pixel % width, scale_x, input_width)
    if EXCLUDE:
        counted = counted & (row < tl.load(valid_sizes + 2 * image))
        counted = counted & (column < tl.load(valid_sizes + 2 * image + 1))
    bit = tl.arange(0, TARGETS)
    target = first + bit
    source = masks + image * stride_b + target.to(tl.int64)[:, None] * stride_t
    source += (row.to(tl.int64) * stride_y + column // 8 * stride_x)[None, :]
    wanted = (bit < TARGETS - 1) & (target < num_targets)
    packed = tl.load(source, mask=wanted[:, None] & counted[None, :], other=0).to(tl.int32)
    sampled = (packed >> (column % 8)[None, :]) & 1
    sampled = tl.where((bit == TARGETS - 1)[:, None], counted.to(tl.int32)[None, :], sampled)
    word = tl.sum(sampled << bit[:, None], 0)  # different bits: nothing is carried
    tl.store(words + block.to(tl.int64) * num_pixels + pixel, word, mask=pixel < num_pixels)
    tl.store(areas + tl.program_id(0).to(tl.int64) * TARGETS + bit, tl.sum(sampled, 1))


@triton.jit(do_not_specialize=["num_queries", "num_rows", "num_blocks", "num_chunks", "chunk_tiles"])
def _sums_kernel(
    sums,  # [B, num_blocks, num_chunks, row blocks, 2, ROWS, TARGETS] float32: mask loss; probability
    words,  # [B, num_blocks, num_pixels] int32
    counts,  # [B] int64
    queries, stride_l, stride_b, stride_q, stride_i,  # embeddings [L, B, Q, D], or mask logits [L, B, Q, num_pixels]
    pixels, stride_pb, stride_pd, stride_pp,  # [B, D, num_pixels], read with FACTORED
    num_queries, num_rows, depth, num_pixels, num_blocks, num_chunks, chunk_tiles, on_weight, off_weight, gamma,
    FACTORED: tl.constexpr, EXPONENT: tl.constexpr,
    ROWS: tl.constexpr, PIXELS: tl.constexpr, TARGETS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0)
    chunk = program // row_blocks % num_chunks  # programs that run together read the same pixels
    block = program // (row_blocks * num_chunks)
    image, _, present = _block_of_program(num_blocks, block, counts, TARGETS)
    if not present:
        return
    row = tl.minimum(program % row_blocks * ROWS + tl.arange(0, ROWS), num_rows - 1)
    layer, query = (row // num_queries).to(tl.int64), (row % num_queries).to(tl.int64)
    source = queries + image * stride_b + layer * stride_l + query * stride_q
    words += block.to(tl.int64) * num_pixels
    pixels += image * stride_pb
    column = tl.arange(0, TARGETS)
    off_sum = tl.zeros((ROWS,), tl.float32)
    rise_sum = tl.zeros((ROWS, TARGETS), tl.float32)
    probability_sum = tl.zeros((ROWS, TARGETS), tl.float32)
    if WHOLE:  # all channels at once: the embeddings are read once and stay in shared memory
        channel = tl.arange(0, DEPTH)
        exists = channel < depth
        embedding = tl.load(source[:, None] + channel[None, :] * stride_i, mask=exists[None, :], other=0.0)
    begin = chunk * chunk_tiles * PIXELS
    for start in tl.range(begin, tl.minimum(begin + chunk_tiles * PIXELS, num_pixels), PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        here = pixel < num_pixels
        if WHOLE:
            place = channel.to(tl.int64)[:, None] * stride_pd + pixel.to(tl.int64)[None, :] * stride_pp
            values = tl.load(pixels + place, mask=exists[:, None] & here[None, :], other=0.0)
            logits = product(embedding, values)
        elif FACTORED:
            logits = tl.zeros((ROWS, PIXELS), tl.float32)
            for first in tl.range(0, depth, DEPTH):
                channel = first + tl.arange(0, DEPTH)
                exists = channel < depth
                channel = channel.to(tl.int64)
                embedding = tl.load(source[:, None] + channel[None, :] * stride_i, mask=exists[None, :], other=0.0)
                place = channel[:, None] * stride_pd + pixel.to(tl.int64)[None, :] * stride_pp
                values = tl.load(pixels + place, mask=exists[:, None] & here[None, :], other=0.0)
                if embedding.dtype == tl.float32:
                    high, high_values = leading_bits(embedding), leading_bits(values)
                    logits = tl.dot(embedding - high, high_values, logits, input_precision="tf32")
                    logits = tl.dot(high, values - high_values, logits, input_precision="tf32")
                    logits = tl.dot(high, high_values, logits, input_precision="tf32")
                else:
                    logits += product(embedding, values)
        else:
            place = pixel.to(tl.int64)[None, :] * stride_i
            logits = tl.load(source[:, None] + place, mask=here[None, :], other=0.0).to(tl.float32)
        word = tl.load(words + pixel, mask=here, other=0)
        scaled, off, rise = pixel_losses(logits, on_weight, off_weight, gamma, EXPONENT)
        truth = (word[:, None] >> column[None, :]) & 1
        probability_sum += times_truth(scaled, truth)
        off_sum += tl.sum(off * ((word >> (TARGETS - 1)) & 1).to(tl.float32)[None, :], 1)
        rise_sum += any_times_truth(rise, truth)
    target = sums + program.to(tl.int64) * (2 * ROWS * TARGETS)
    target += tl.arange(0, ROWS)[:, None] * TARGETS + column[None, :]
    tl.store(target, off_sum[:, None] + rise_sum)
    tl.store(target + ROWS * TARGETS, probability_sum / SCALE)


@triton.jit(do_not_specialize=[
    "num_images", "num_queries", "num_rows", "num_targets", "num_columns", "num_blocks", "num_chunks", "num_tiles",
])  # fmt: skip
def _cost_kernel(
    cost,  # [L, B, Q, T] float32
    sums, areas,  # see the other kernels
    class_logits, stride_l, stride_b, stride_q, stride_k,  # [L, B, Q, K+1]
    labels, stride_lb, stride_lt,  # [B, T] int64
    counts,  # [B] int64
    num_images, num_queries, num_rows, num_targets, num_columns, num_blocks, num_chunks, num_tiles,
    class_weight, mask_weight, dice_weight,
    SUM_ROWS: tl.constexpr, ROWS: tl.constexpr, TARGETS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(num_rows, ROWS)
    block = tl.program_id(0) // parts
    image, first, present = _block_of_program(num_blocks, block, counts, TARGETS)
    row = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    layer, query = (row // num_queries).to(tl.int64), (row % num_queries).to(tl.int64)
    bit = tl.arange(0, TARGETS)
    target = first + bit
    exists = (bit < TARGETS - 1) & (target < num_targets)
    place = cost + ((layer * num_images + image) * num_queries + query)[:, None] * num_targets + target[None, :]
    inside = (row < num_rows)[:, None] & exists[None, :]
    if not present:
        tl.store(place, tl.zeros((ROWS, TARGETS), tl.float32), mask=inside)
        return
    row_blocks = tl.cdiv(num_rows, SUM_ROWS)
    source = sums + (block.to(tl.int64) * num_chunks * row_blocks + row // SUM_ROWS)[:, None] * (2 * SUM_ROWS * TARGETS)
    source += (row % SUM_ROWS)[:, None] * TARGETS + bit[None, :]
    mask = tl.zeros((ROWS, TARGETS), tl.float32)
    overlap = tl.zeros((ROWS, TARGETS), tl.float32)
    for _ in tl.range(num_chunks):  # rows past the last exist in the last block of sums
        mask += tl.load(source)
        overlap += tl.load(source + SUM_ROWS * TARGETS)
        source += row_blocks * (2 * SUM_ROWS * TARGETS)
    areas += block.to(tl.int64) * num_tiles * TARGETS
    area = tl.zeros((TARGETS,), tl.int32)
    for start in tl.range(0, num_tiles, ROWS):
        tile = start + tl.arange(0, ROWS)
        counted = tl.load(areas + tile[:, None] * TARGETS + bit[None, :], mask=(tile < num_tiles)[:, None], other=0)
        area += tl.sum(counted, 0)
    last = bit == TARGETS - 1
    samples = tl.maximum(tl.sum(tl.where(last, area, 0), 0), 1).to(tl.float32)
    probability = tl.sum(tl.where(last[None, :], overlap, 0.0), 1)
    dice = 1.0 - (2.0 * overlap + 1.0) / (probability[:, None] + area.to(tl.float32)[None, :] + 1.0)
    label = tl.load(labels + image * stride_lb + target * stride_lt, mask=exists, other=0)
    logits = class_logits + image * stride_b + layer * stride_l + query * stride_q
    logits = tl.where(row < num_rows, logits, class_logits)
    chosen = class_probability(logits, stride_k, label, num_columns, CLASSES)
    value = mask_weight * mask / samples + dice_weight * dice - class_weight * chosen
    tl.store(place, tl.where((target < tl.load(counts + image))[None, :], value, 0.0), mask=inside)


class _Chunking(NamedTuple):
    """Division of a batch's pixels among programs."""

    row_blocks: int
    chunks: int
    chunk_tiles: int


def _chunking(images: int, blocks: int, rows: int, pixels: int) -> _Chunking:
    row_blocks = triton.cdiv(rows, ROWS)
    tiles = triton.cdiv(pixels, PIXELS)
    chunk_tiles = triton.cdiv(tiles, triton.cdiv(PROGRAMS, images * blocks * row_blocks))
    return _Chunking(row_blocks, triton.cdiv(tiles, chunk_tiles), chunk_tiles)


def matching_cost_forward(
    class_logits: Tensor,  # [L, B, Q, K+1] floating
    embeddings: Tensor,  # [L, B, Q, D] float16, bfloat16 or float32; where pixels is None mask logits [L, B, Q, h, w]
    pixels: Tensor | None,  # [B, D, h, w] of the same dtype
    labels: Tensor,  # [B, T] int64
    counts: Tensor,  # [B] int64
    masks: Tensor,  # [B, T, H, ceil(W/8)] uint8, packed
    valid_sizes: Tensor | None,  # [B, 2] int64, None counts every pixel
    input_size: tuple[int, int],
    weights: tuple[float, float, float],  # class, mask, dice
    focal: tuple[float, float, float],  # weight of mask pixels, of the others, exponent
    cost: Tensor,  # [L, B, Q, T] float32, contiguous, written
) -> None:
    """Write the costs that ``matching_cost_eager`` defines, of inputs with any strides.

    A label out of range costs NaN. The chunks of the sums depend on the number of images, layers and queries, and so do
    the last bits of the costs.

    Raises ValueError for other dtypes.
    """
    maps = embeddings if pixels is None else pixels
    if embeddings.dtype not in _ELEMENTS:
        raise ValueError(f"embeddings: expected one of {', '.join(map(str, _ELEMENTS))}, got {embeddings.dtype}")
    if maps.dtype != embeddings.dtype:
        raise ValueError(f"pixels: expected the embeddings' dtype {embeddings.dtype}, got {maps.dtype}")
    if not cost.is_contiguous():
        raise ValueError(f"cost: expected contiguous memory, got strides {cost.stride()}")
    if cost.numel() == 0:
        return
    layers, batch, num_queries, slots = cost.shape
    height, width = maps.shape[-2:]
    num_pixels, num_rows = height * width, layers * num_queries
    blocks, tiles = triton.cdiv(slots, BLOCK_TARGETS), triton.cdiv(num_pixels, SAMPLE_PIXELS)
    chunking = _chunking(batch, blocks, num_rows, num_pixels)
    words = masks.new_empty((batch, blocks, num_pixels), dtype=torch.int32)
    areas = masks.new_empty((batch, blocks, tiles, WORD_BITS), dtype=torch.int32)
    sums = cost.new_empty((batch * blocks * chunking.chunks * chunking.row_blocks, 2, ROWS, WORD_BITS))
    counts = counts.contiguous()
    valid_sizes = None if valid_sizes is None else valid_sizes.contiguous()
    rows = embeddings.flatten(3)
    columns = rows if pixels is None else pixels.flatten(2)
    with torch.cuda.device_of(cost):
        _sample_kernel[(batch * blocks * tiles,)](
            words, areas, masks, *masks.stride(), counts, counts if valid_sizes is None else valid_sizes,
            slots, blocks, tiles, num_pixels, width, *input_size, input_size[0] / height, input_size[1] / width,
            EXCLUDE=valid_sizes is not None, TARGETS=WORD_BITS, PIXELS=SAMPLE_PIXELS, **LAUNCH,
        )  # fmt: skip
        _sums_kernel[(len(sums),)](
            sums, words, counts, rows, *rows.stride(), columns, *columns.stride()[-3:],
            num_queries, num_rows, columns.shape[-2], num_pixels, blocks, chunking.chunks, chunking.chunk_tiles, *focal,
            **_constants(embeddings.dtype, None if pixels is None else pixels.shape[1], focal[2], _keeps(cost.device)),
            **LAUNCH,
        )  # fmt: skip
        _cost_kernel[(batch * blocks * triton.cdiv(num_rows, COST_ROWS),)](
            cost, sums, areas, class_logits, *class_logits.stride(), labels, *labels.stride(), counts,
            batch, num_queries, num_rows, slots, class_logits.shape[3], blocks, chunking.chunks, tiles, *weights,
            SUM_ROWS=ROWS, ROWS=COST_ROWS, TARGETS=WORD_BITS, CLASSES=CLASSES, **LAUNCH,
        )  # fmt: skip


@functools.cache
def _keeps(device: torch.device) -> bool:
    """Tell whether embeddings stay in shared memory: three programs of `MOST_WHOLE` channels must find room there."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= KEEPING


def _constants(dtype: torch.dtype, depth: int | None, gamma: float, keep: bool) -> dict[str, Any]:
    """Compile-time constants of `_sums_kernel`, for ``depth`` channels (None: mask logits) that it may keep or not."""
    whole = keep and depth is not None and dtype != torch.float32 and depth <= MOST_WHOLE
    return {
        "FACTORED": depth is not None,
        "WHOLE": whole,
        "EXPONENT": int(gamma) if gamma in (0.0, 2.0) else -1,
        "ROWS": ROWS,
        "PIXELS": PIXELS,
        "TARGETS": WORD_BITS,
        "DEPTH": max(16, triton.next_power_of_2(depth)) if whole else DEPTH_BLOCKS[dtype],
    }


def variants() -> list[KernelVariant]:
    """Specialisations to compile ahead of time: the usual exponent, 2, and any, which takes the most registers."""
    kernels = [
        _sums_variant("embeddings", torch.float32, 1.5),
        _sums_variant("embeddings", torch.bfloat16, 2.0),
        _sums_variant("embeddings", torch.bfloat16, 2.0, keep=True),
        _sums_variant("embeddings", torch.float16, 1.5, keep=True),
        _sums_variant("logits", torch.float32, 2.0),
    ]
    blocks: dict[str, Any] = {"EXCLUDE": True, "TARGETS": WORD_BITS, "PIXELS": SAMPLE_PIXELS}
    types = {"words": "*i32", "areas": "*i32", "masks": "*u8", "counts": "*i64", "valid_sizes": "*i64",
             "scale_y": "fp32", "scale_x": "fp32"}  # fmt: skip
    kernels.append(_variant("matching_cost_sample", _sample_kernel, types, blocks | {"stride_x": 1}))
    blocks = {"SUM_ROWS": ROWS, "ROWS": COST_ROWS, "TARGETS": WORD_BITS, "CLASSES": CLASSES}
    types = {"cost": "*fp32", "sums": "*fp32", "class_logits": "*fp32", "areas": "*i32", "labels": "*i64"}
    types["counts"] = "*i64"
    types |= dict.fromkeys(("class_weight", "mask_weight", "dice_weight"), "fp32")
    kernels.append(_variant("matching_cost", _cost_kernel, types, blocks | {"stride_k": 1, "stride_lt": 1}))
    return kernels


def _sums_variant(form: str, dtype: torch.dtype, gamma: float, keep: bool = False) -> KernelVariant:
    """Specialisation of `_sums_kernel` for contiguous inputs; `form` is "logits" or "embeddings"."""
    constants = _constants(dtype, MOST_WHOLE if form == "embeddings" else None, gamma, keep)
    element = _ELEMENTS[dtype]
    types = {"sums": "*fp32", "words": "*i32", "counts": "*i64", "queries": f"*{element}", "pixels": f"*{element}"}
    types |= dict.fromkeys(("on_weight", "off_weight", "gamma"), "fp32")
    exponent = "any" if constants["EXPONENT"] == -1 else constants["EXPONENT"]
    aligned = ("stride_l", "stride_b", "stride_q", "stride_pb", "stride_pd", "depth", "num_pixels")
    ones = {"stride_i": 1, "stride_pp": 1}
    name = f"matching_cost_sums_{form}_{element}_{exponent}{'_kept' * keep}"
    return _variant(name, _sums_kernel, types, constants | ones, aligned)


def _variant(
    name: str,
    kernel: Any,
    types: dict[str, str],  # of arguments that are not i32
    constants: dict[str, Any],
    aligned: tuple[str, ...] = (),  # beside the pointers
) -> KernelVariant:
    arguments = {argument: types.get(argument, "i32") for argument in kernel.arg_names if argument not in constants}
    pointers = tuple(argument for argument, kind in arguments.items() if kind.startswith("*"))
    return KernelVariant(name, kernel, arguments, constants, **LAUNCH, aligned=(*pointers, *aligned))


def goal_calls() -> list[GoalLaunch]:
    """Six layers of 16 images with 100 queries and 20 targets, from 256 channels of 128x128 pixels."""
    return [*_goal_call(torch.float16), *_goal_call(torch.float32)]


def _goal_call(dtype: torch.dtype) -> list[GoalLaunch]:
    with torch.device("meta"):
        class_logits, embeddings = torch.empty(6, 16, 100, 151, dtype=dtype), torch.empty(6, 16, 100, 256, dtype=dtype)
        maps, masks = torch.empty(16, 256, 128, 128, dtype=dtype), torch.empty(16, 20, 512, 64, dtype=torch.uint8)
        labels, counts, sizes = (torch.empty(16, *rest, dtype=torch.int64) for rest in ((20,), (), (2,)))
        cost = torch.empty(6, 16, 100, 20)
    chunking = _chunking(16, 1, 600, 16384)
    sums: dict[str, float] = {"num_pixels), PIXELS)": chunking.chunk_tiles}
    if dtype == torch.float32:
        sums["range(0, depth, DEPTH)"] = 256 // DEPTH_BLOCKS[dtype]
    costs = {"range(num_chunks)": chunking.chunks, "range(0, num_tiles, ROWS)": 16384 / SAMPLE_PIXELS / COST_ROWS}
    products = 16 * 600 * 16384 * 256 * (3 if dtype == torch.float32 else 1)
    works = [
        Work("sample", {}, masks.numel() + 16 * 16384 * 4),
        Work("sums", sums, maps.numel() * dtype.itemsize, products),
        Work("cost", costs | {"range(0, num_columns, CLASSES)": triton.cdiv(151, CLASSES)}),
    ]
    arguments = (class_logits, embeddings, maps, labels, counts, masks, sizes, (512, 512), (1.0, 20.0, 1.0))
    launcher = functools.partial(matching_cost_forward, *arguments, (0.25, 0.75, 2.0), cost)
    return goal_launches(f"matching cost L=6 B=16 Q=100 T=20 {_ELEMENTS[dtype]}", launcher, works)
