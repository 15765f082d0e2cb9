"""Semantic inference on a GPU beside the official formula, eager and compiled, with nothing that could be pruned but
where a row says so; and the product with pixel embeddings inside the kernel beside a matrix product before it.

Ours reads mask logits with queries innermost, as the matrix product that makes them can write them; the peers read the
same values as planes, which is what their network writes, and a row of ours does so too. The bound counts the product
of masks and class probabilities, and where the logits are multiplied out of embeddings that product too, once a
low-resolution pixel.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.cpu_semantic import official, peaky_logits
from benchmarks.gpu_harness import OURS, Bound, Case, Peer, Work
from maskformer_fast.ops import semantic_inference
from maskformer_fast.ops.semantic import label_dtype, semantic_inference_eager

QUERIES, DEPTH = 100, 256
SCALE = 4
EAGER, COMPILED, TWIN = "eager formula", "torch.compile of it", "our eager twin, float32"
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
AGREEMENT = {torch.float16: 0.95, torch.bfloat16: 0.85, torch.float32: 0.999}
"""Least share of equal labels: the formula rounds scores to its dtype, and many classes are close to the best."""
Size = tuple[int, int]


def same_labels(ours: Tensor, theirs: Tensor) -> float:
    return (ours.long() == theirs.long()).float().mean().item()


def as_queries_innermost(planes: Tensor) -> Tensor:
    return planes.contiguous(memory_format=torch.channels_last)


def labels_setup(
    device: torch.device, batch: int, classes: int, size: Size, dtype: torch.dtype, peaky: bool = False,
    planes: bool = False,
) -> Work:  # fmt: skip
    output = (SCALE * size[0], SCALE * size[1])

    def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        if peaky:
            masks, logits = (torch.cat(parts) for parts in zip(*(peaky_logits(classes, size) for _ in range(batch)),
                                                               strict=True))  # fmt: skip
        else:
            masks = torch.randn(batch, QUERIES, *size, device=device)
            logits = torch.randn(batch, QUERIES, classes + 1, device=device)
        masks, logits = masks.to(device, dtype), logits.to(device, dtype)
        return masks if planes else as_queries_innermost(masks), masks, logits

    def ours(masks: Tensor, _: Tensor, logits: Tensor) -> Tensor:
        return semantic_inference(masks, logits, size, output).labels

    def pruned(masks: Tensor, _: Tensor, logits: Tensor) -> Tensor:
        return torch.ops.maskformer_fast.semantic_inference(masks, logits, size, output, path="pruned")[0]

    def dense(masks: Tensor, _: Tensor, logits: Tensor) -> Tensor:
        return torch.ops.maskformer_fast.semantic_inference(masks, logits, size, output, path="dense")[0]

    def eager(_: Tensor, masks: Tensor, logits: Tensor) -> Tensor:
        return official(masks, logits, output)

    compiled_formula = torch.compile(partial(official, size=output), dynamic=False)

    def compiled(_: Tensor, masks: Tensor, logits: Tensor) -> Tensor:
        return compiled_formula(masks, logits)

    def twin(_: Tensor, masks: Tensor, logits: Tensor) -> Tensor:
        return semantic_inference_eager(masks, logits, size, output).labels

    sides = {OURS: ours, EAGER: eager, COMPILED: compiled, TWIN: twin, "pruned": pruned, "dense": dense}
    return Work(draw, sides, same_labels, AGREEMENT[dtype])


def embeddings_setup(
    device: torch.device, batch: int, classes: int, size: Size, scale: int, dtype: torch.dtype, depth: int = DEPTH
) -> Work:
    from maskformer_fast.kernels.semantic import semantic_from_embeddings  # needs Triton, as only CUDA has it

    output = (scale * size[0], scale * size[1])

    def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        shapes = ((batch, QUERIES, depth), (batch, depth, *size), (batch, QUERIES, classes + 1))
        embeddings, pixels, logits = (torch.randn(shape, device=device) for shape in shapes)
        return embeddings.to(dtype), as_queries_innermost(pixels.to(dtype) / depth**0.5), logits.to(dtype)

    def side(fused: bool | None, embeddings: Tensor, pixels: Tensor, logits: Tensor) -> Tensor:
        labels = torch.empty(batch, *output, dtype=label_dtype(classes), device=device)
        semantic_from_embeddings(embeddings, pixels, logits, size, labels, fused=fused)
        return labels

    sides = {OURS: partial(side, True), "matrix product first": partial(side, False), "chosen": partial(side, None)}
    return Work(draw, sides, same_labels, AGREEMENT[dtype])


def labels_bound(batch: int, classes: int, size: Size, dtype: torch.dtype) -> Bound:
    pixels = size[0] * size[1]
    read = batch * QUERIES * (pixels + classes + 1) * dtype.itemsize
    written = batch * SCALE**2 * pixels * label_dtype(classes).itemsize
    return Bound(read + written, 2.0 * batch * QUERIES * classes * SCALE**2 * pixels, rate(dtype))


def embeddings_bound(batch: int, classes: int, size: Size, scale: int, dtype: torch.dtype) -> Bound:
    low = size[0] * size[1]
    read = batch * (QUERIES * DEPTH + DEPTH * low + QUERIES * (classes + 1)) * dtype.itemsize
    operations = 2.0 * batch * QUERIES * low * (DEPTH + scale**2 * classes)
    return Bound(read + batch * scale**2 * low * label_dtype(classes).itemsize, operations, rate(dtype))


def rate(dtype: torch.dtype) -> str:
    """Of the matrix unit that multiplies this dtype; float32 goes in three products of halves."""
    return "fp16" if dtype == torch.float32 else NAMES[dtype]


def labels_case(
    batch: int, classes: int, size: Size, dtype: torch.dtype = torch.float16, *, kind: str = "random",
    peers: tuple[Peer, ...], rank: int = 0, max_us: float | None = None, bound_share: float | None = None,
) -> Case:  # fmt: skip
    name = f"semantic {size[0]}x{size[1]} -> {SCALE * size[0]}x{SCALE * size[1]}, K={classes}, B={batch}, "
    setup = partial(labels_setup, batch=batch, classes=classes, size=size, dtype=dtype, peaky=kind == "peaky",
                    planes=kind == "planes")  # fmt: skip
    bound = labels_bound(batch, classes, size, dtype)
    return Case(f"{name}{NAMES[dtype]}, {kind}", setup, peers, bound, max_us, bound_share, rank=rank)


def cases() -> list[Case]:
    small, large = (128, 128), (256, 512)
    goal, lesser = (Peer(EAGER, 10.0), Peer(COMPILED, 5.0)), (Peer(EAGER, 8.0), Peer(COMPILED, rank=2))
    half, eager = torch.float16, (Peer(EAGER),)
    rows = [
        labels_case(1, 150, small, peers=goal, max_us=45.0),
        labels_case(8, 150, small, peers=goal, bound_share=0.6),
        labels_case(1, 19, small, peers=lesser),
        labels_case(1, 847, small, peers=lesser),
        labels_case(1, 150, large, peers=lesser),
        labels_case(1, 19, large, peers=(Peer(EAGER), Peer(COMPILED, rank=2)), rank=1),
        labels_case(1, 150, small, kind="peaky", peers=(*eager, Peer("dense"), Peer("pruned")), rank=1),
        labels_case(8, 150, small, kind="peaky", peers=(Peer("dense"), Peer("pruned")), rank=1),
        labels_case(1, 150, large, kind="peaky", peers=(Peer("dense"), Peer("pruned")), rank=1),
        labels_case(1, 847, small, kind="peaky", peers=(Peer("dense"), Peer("pruned")), rank=1),
        labels_case(8, 150, small, kind="planes", peers=eager, rank=2),
        labels_case(1, 150, small, torch.bfloat16, peers=eager, rank=1),
        labels_case(1, 150, small, torch.float32, peers=(*eager, Peer(TWIN)), rank=2),
    ]
    shapes = (*product((1, 8), (small,), (1, 2, 4)), (1, large, 4), (8, (32, 32), 4), (1, (64, 64), 8))
    for batch, size, scale in shapes:
        output = f"{scale * size[0]}x{scale * size[1]}"
        rows.append(Case(
            f"semantic from embeddings {size[0]}x{size[1]} -> {output}, K=150, B={batch}, fp16, fused",
            partial(embeddings_setup, batch=batch, classes=150, size=size, scale=scale, dtype=half),
            (Peer("matrix product first"), Peer("chosen")),
            embeddings_bound(batch, 150, size, scale, half),
            rank=1,
        ))  # fmt: skip
    return rows
