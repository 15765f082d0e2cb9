"""The operator on CUDA against its eager twin in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from maskformer_fast.config import LossConfig
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.matching_cost import matching_cost, matching_cost_eager, matching_cost_from_logits
from maskformer_fast.structures import Predictions, Targets

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_batch(
    counts: list[int],
    queries: int,
    depth: int,
    size: tuple[int, int],
    input_size: tuple[int, int],
    layers: int = 2,
    classes: int = 5,
    dtype: torch.dtype = torch.float32,
) -> tuple[Predictions, Targets]:
    """Logits of about 3; image b is shorter than the padded input by b rows and 2b columns, with targets there too."""
    rng = torch.Generator().manual_seed(queries * depth)
    batch, slots, (height, width) = len(counts), max(counts), input_size
    valid = torch.tensor([[height - b, width - 2 * b] for b in range(batch)]).clamp(min=0)
    masks = torch.randint(256, (batch, slots, height, (width + 7) // 8), generator=rng, dtype=torch.uint8)
    labels = torch.randint(classes, (batch, slots), generator=rng)
    targets = Targets(labels, torch.tensor(counts), masks, valid, input_size)
    predictions = Predictions(
        torch.randn(layers, batch, queries, classes + 1, generator=rng).to("cuda", dtype),
        torch.randn(layers, batch, queries, depth, generator=rng).to("cuda", dtype),
        (3 / depth**0.5 * torch.randn(batch, depth, *size, generator=rng)).to("cuda", dtype),
        valid.cuda(),
        input_size,
    )
    return predictions, targets.to("cuda")


def converted(predictions: Predictions, dtype: torch.dtype) -> Predictions:
    names = ("class_logits", "mask_embeddings", "pixel_features")
    return predictions._replace(**{name: getattr(predictions, name).to(dtype) for name in names})


def check(predictions: Predictions, targets: Targets, loss: LossConfig) -> Tensor:
    cost = matching_cost(predictions, targets, loss)
    expected = matching_cost_eager(converted(predictions, torch.float64), targets, loss)
    assert cost.dtype == torch.float32 and expected.dtype == torch.float64
    tolerance = 1e-5 * max(1.0, float(expected.abs().amax()))
    torch.testing.assert_close(cost.double(), expected, rtol=0, atol=tolerance)
    assert torch.equal(matching_cost(predictions, targets, loss), cost), "another run gives other costs"
    return cost


GRID = [
    # counts, queries, depth, map, input, layers, classes
    ([3, 0, 2], 5, 24, (6, 7), (24, 28), 2, 5),
    ([20, 7], 100, 256, (64, 64), (256, 256), 6, 150),
    ([33, 2, 70], 9, 65, (37, 29), (150, 113), 3, 19),
    ([31, 62], 64, 64, (16, 16), (64, 64), 1, 847),
    ([1], 1, 1, (1, 1), (3, 5), 1, 1),
    ([3], 300, 20, (11, 13), (7, 9), 1, 5),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_equals_double_precision(dtype: torch.dtype, case: tuple) -> None:
    predictions, targets = random_batch(*case, dtype=dtype)
    for padding, mask_loss, gamma in (("exclude", "focal", 2.0), ("include", "focal", 1.5), ("exclude", "bce", 2.0)):
        check(predictions, targets, LossConfig(padding=padding, mask_loss=mask_loss, focal_gamma=gamma))


def test_equals_cpu() -> None:
    predictions, targets = random_batch([3, 5], 5, 6, (10, 14), (40, 56))
    names = ("class_logits", "mask_embeddings", "pixel_features")
    moved = predictions._replace(**{name: getattr(predictions, name).cpu() for name in names})
    cost = matching_cost(predictions, targets, LossConfig())
    torch.testing.assert_close(cost.cpu(), matching_cost(moved, targets.to("cpu"), LossConfig()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_from_logits(dtype: torch.dtype) -> None:
    predictions, targets = random_batch([5, 40], 70, 16, (33, 21), (130, 84), dtype=dtype)
    logits = torch.stack([layer_mask_logits(predictions, layer) for layer in range(2)])
    for view in (logits, logits.mT.contiguous().mT):
        cost = matching_cost_from_logits(predictions.class_logits, view, targets, LossConfig())
        exact = matching_cost_from_logits(predictions.class_logits, view.double(), targets, LossConfig())
        torch.testing.assert_close(cost.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().amax()))


def test_mixed_precision_under_autocast() -> None:
    """Half embeddings with float32 pixels are computed in float32."""
    predictions, targets = random_batch([5, 2], 30, 64, (20, 20), (80, 80))
    half = predictions._replace(mask_embeddings=predictions.mask_embeddings.bfloat16())
    with torch.autocast("cuda", torch.bfloat16):
        cost = check(half, targets, LossConfig())
    assert torch.equal(cost, matching_cost(converted(half, torch.float32), targets, LossConfig()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["class_logits", "mask_embeddings", "pixel_features"])
def test_broken_predictions_break_their_own_query(field: str, value: float) -> None:
    predictions, targets = random_batch([2, 0, 33], 35, 24, (16, 17), (64, 68))
    clean = matching_cost(predictions, targets, LossConfig())
    getattr(predictions, field)[(2, 1, 0, 1) if field == "pixel_features" else (1, 2, 33, 3)] = value
    broken = torch.zeros(2, 3, 35, dtype=torch.bool, device="cuda")
    if field == "pixel_features":
        broken[:, 2] = True
    elif value != -math.inf or field != "class_logits":  # a class logit of -inf is a probability of 0
        broken[1, 2, 33] = True
    cost = matching_cost(predictions, targets, LossConfig())
    assert not cost[broken].isfinite().any() and cost[~broken].isfinite().all()
    assert torch.equal(cost[~broken], clean[~broken]) or field == "class_logits"


@pytest.mark.parametrize("mask_loss", ["focal", "bce"])
def test_steep_logits(mask_loss: str) -> None:
    predictions, targets = random_batch([3, 4], 20, 16, (32, 36), (128, 144))
    for steepness in (1e-20, 20.0, 1e5, 1e20):
        steep = predictions._replace(mask_embeddings=predictions.mask_embeddings * steepness)
        check(steep, targets, LossConfig(mask_loss=mask_loss))


def test_nothing_to_match() -> None:
    predictions, targets = random_batch([2, 1], 5, 8, (8, 8), (32, 32))
    no_targets = targets._replace(counts=torch.zeros_like(targets.counts))
    assert (matching_cost(predictions, no_targets, LossConfig()) == 0).all()
    no_slots = targets._replace(
        counts=torch.zeros_like(targets.counts), labels=targets.labels[:, :0], masks=targets.masks[:, :0]
    )
    no_layers = predictions._replace(
        class_logits=predictions.class_logits[:0], mask_embeddings=predictions.mask_embeddings[:0]
    )
    assert matching_cost(predictions, no_slots, LossConfig()).shape == (2, 2, 5, 0)
    assert matching_cost(no_layers, targets, LossConfig()).shape == (0, 2, 5, 2)
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_opcheck_compile_and_graph(dtype: torch.dtype) -> None:
    predictions, targets = random_batch([3, 0, 2], 12, 16, (10, 11), (40, 44), dtype=dtype)
    operator = torch.ops.maskformer_fast.matching_cost.default
    class_logits = predictions.class_logits.to(torch.promote_types(dtype, torch.float32))
    floats = (class_logits, predictions.mask_embeddings, predictions.pixel_embeddings)
    rest = (*targets[:4], [40, 44], [1.0, 20.0, 1.0], [0.25, 0.75, 2.0])
    torch.library.opcheck(operator, (*floats, *rest))

    def cost(predictions: Predictions) -> Tensor:
        return matching_cost(predictions, targets, LossConfig()) + 1

    expected = cost(predictions)
    assert torch.equal(torch.compile(cost, fullgraph=True)(predictions), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = cost(predictions)
    predictions.mask_embeddings.copy_(predictions.mask_embeddings.flip(2))
    graph.replay()
    assert torch.equal(replayed, cost(predictions)) and not torch.equal(replayed, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_a_tenth_of_eager(dtype: torch.dtype) -> None:
    predictions, targets = random_batch([20] * 16, 100, 256, (128, 128), (512, 512), 6, 150, dtype)
    peaks = []
    for function in (matching_cost, matching_cost_eager):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(predictions, targets, LossConfig())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert 10 * peaks[0] <= peaks[1], peaks
