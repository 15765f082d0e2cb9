"""The operator on CUDA against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from maskformer_fast.core import extension
from maskformer_fast.ops import semantic_inference
from maskformer_fast.ops.semantic import SemanticMap, semantic_inference_eager
from tests.support.oracles import assert_semantic_map, random_logits, semantic_scores

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}


def random_case(seed: int, batch: int, queries: int, classes: int, size, dtype: torch.dtype):
    masks, logits = random_logits(seed, batch, queries, classes, size)
    return masks.to("cuda", dtype), logits.to("cuda", dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "batch, queries, classes, size, extent, output",
    [
        (8, 100, 150, (32, 32), (32.0, 32.0), (128, 128)),
        (1, 100, 19, (20, 24), (18.3, 24.0), (80, 93)),
        (2, 130, 200, (9, 9), (9.0, 9.0), (33, 37)),
        (1, 256, 847, (16, 12), (16.0, 12.0), (50, 45)),
        (1, 300, 97, (6, 40), (6.0, 40.0), (24, 150)),
        (1, 5, 3000, (8, 8), (8.0, 8.0), (32, 32)),
        (1, 7, 1, (1, 1), (0.4, 1.0), (3, 40)),
        (1, 20, 12, (90, 130), (88.7, 130.0), (30, 41)),
    ],
)
def test_operator_equals_definition(dtype, batch, queries, classes, size, extent, output) -> None:
    masks, logits = random_case(queries, batch, queries, classes, size, dtype)
    expected = semantic_scores(masks, logits, extent, output)
    views = (masks, masks.contiguous(memory_format=torch.channels_last), masks.mT.contiguous().mT)
    for view in views:
        result = semantic_inference(view, logits, extent, output, True, True)
        assert_semantic_map(result, expected, TOLERANCES[dtype])
    again = semantic_inference(views[-1], logits, extent, output, True, True)
    assert all(torch.equal(a, b) for a, b in zip(again, result, strict=True))


@pytest.mark.parametrize("fused", [True, False, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries, depth", [(100, 256), (200, 65)])
def test_embeddings_equal_definition(fused, dtype, queries: int, depth: int) -> None:
    kernels = extension.load_kernels("semantic_embeddings")
    generator = torch.Generator().manual_seed(depth)
    _, logits = random_case(0, 2, queries, 33, (1, 1), torch.float32)
    embeddings = torch.randn(2, queries, depth, generator=generator).to("cuda", dtype)
    pixels = (4 / depth**0.5 * torch.randn(2, depth, 15, 18, generator=generator)).to("cuda", dtype)
    masks = torch.einsum("bqd,bdhw->bqhw", embeddings.double(), pixels.double())
    result = SemanticMap(
        torch.empty(2, 60, 70, dtype=torch.uint8, device="cuda"), *torch.empty(2, 2, 60, 70, device="cuda")
    )
    kernels.semantic_from_embeddings(embeddings, pixels, logits, (15.0, 17.5), *result, fused=fused)
    rounding = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype] if not fused else 0
    assert_semantic_map(result, semantic_scores(masks, logits, (15.0, 17.5), (60, 70)), TOLERANCES[dtype] + rounding)


@pytest.mark.parametrize("value, name", [(math.nan, "pixel"), (math.nan, "class"), (math.inf, "class")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_is_label_0_and_nan_score(dtype, value: float, name: str) -> None:
    masks, logits = random_case(3, 1, 9, 7, (12, 40), dtype)
    clean = semantic_inference(masks, logits, (12.0, 40.0), (48, 160), True, True)
    (masks[0, 3] if name == "pixel" else logits[0, 3]).view(-1)[-1 if name == "class" else 20] = value
    result = semantic_inference(masks, logits, (12.0, 40.0), (48, 160), True, True)
    bad = semantic_inference_eager(masks, logits, (12.0, 40.0), (48, 160), True, True).scores.isnan()
    assert bad.any() and torch.equal(bad, result.scores.isnan()) and torch.equal(bad, result.margins.isnan())
    labels = semantic_inference(masks, logits, (12.0, 40.0), (48, 160)).labels
    assert (labels[bad] == 0).all() and torch.equal(labels[~bad], clean.labels[~bad])


def test_infinite_masks_are_absent_or_present() -> None:
    masks = torch.tensor([[[[-math.inf, -math.inf, 2.0, 2.0]], [[1.0, 1.0, math.inf, -math.inf]]]], device="cuda")
    logits = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]], device="cuda")
    result = semantic_inference(masks, logits, (1.0, 4.0), (1, 9), True, True)
    expected = semantic_inference_eager(masks, logits, (1.0, 4.0), (1, 9), True, True)
    assert torch.equal(result.labels, expected.labels)
    torch.testing.assert_close(result.scores, expected.scores)


def test_opcheck_compile_and_graph() -> None:
    masks, logits = random_case(1, 2, 12, 9, (6, 7), torch.float32)
    operator = torch.ops.maskformer_fast.semantic_inference.default
    torch.library.opcheck(operator, (masks, logits, [6.0, 7.0], [17, 20], True, True))

    def infer(masks: torch.Tensor) -> torch.Tensor:
        return semantic_inference(masks * 2, logits, (6.0, 7.0), (24, 28)).labels + 1

    assert torch.equal(torch.compile(infer, fullgraph=True)(masks), infer(masks))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = infer(masks)
    masks.copy_(masks.flip(1))
    graph.replay()
    assert torch.equal(replayed, infer(masks))
