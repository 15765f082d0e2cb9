"""Masks from factors against PyTorch's convolution and product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from maskformer_fast.deploy.runtime.mask_factors import FactoredMasks, Projection, pack_winograd
from maskformer_fast.ops.convolution import pack_winograd_weights

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize(
    ("queries", "dim", "channels", "size"), [(9, 24, 16, (7, 11)), (17, 8, 32, (5, 4)), (1, 16, 16, (1, 1))]
)
def test_masks_of_any_queries_are_those_of_a_convolution_and_a_product(
    queries: int, dim: int, channels: int, size: tuple[int, int]
) -> None:
    embeddings, features = normal(2, queries, dim), normal(2, *size, channels)
    projection = Projection(normal(dim, channels, 3, 3), normal(dim))
    pixels = F.conv2d(
        torch.from_numpy(features).permute(0, 3, 1, 2).double(), torch.from_numpy(projection.weight).double(),
        torch.from_numpy(projection.bias).double(), padding=1,
    )  # fmt: skip
    expected = torch.einsum("bqd,bdhw->bqhw", torch.from_numpy(embeddings).double(), pixels).numpy()
    masks = FactoredMasks(embeddings, features, projection, threads=2)
    assert masks.shape == expected.shape and masks.ndim == 4 and masks.size == expected.size
    tolerance = 2e-6 * np.abs(expected).max()
    for row in (0, 1):
        assert masks[row].shape == expected[row].shape and len(masks[row]) == queries
        np.testing.assert_allclose(np.asarray(masks[row]), expected[row], rtol=0, atol=tolerance)
        some = RNG.permutation(queries)[: max(1, queries // 2)]
        np.testing.assert_allclose(masks[row][some], expected[row][some], rtol=0, atol=tolerance)
        assert masks[row][some[:0]].shape == (0, *size)


def test_masks_of_folded_embeddings_are_those_of_a_product() -> None:
    embeddings, features = normal(2, 9, 13), normal(2, 7, 5, 12)
    expected = np.einsum("bqc,bhwc->bqhw", embeddings[:, :, :-1].astype(np.float64), features)
    expected += embeddings[:, :, -1, None, None]
    masks = FactoredMasks(embeddings, features, None, threads=1)
    some = np.array([8, 0, 3])
    np.testing.assert_allclose(np.array(masks), expected, rtol=0, atol=1e-5)
    assert masks.shape == expected.shape
    for row in (0, 1):
        np.testing.assert_allclose(np.asarray(masks[row]), expected[row], rtol=0, atol=1e-5)
        np.testing.assert_allclose(masks[row][some], expected[row][some], rtol=0, atol=1e-5)
        assert masks[row][some[:0]].shape == (0, 7, 5)


@pytest.mark.parametrize("count", [1, 16, 21])
def test_weights_are_packed_as_for_the_networks_convolutions(count: int) -> None:
    weight = normal(count, 32, 3, 3)
    expected = pack_winograd_weights(torch.from_numpy(weight)).numpy()
    np.testing.assert_allclose(pack_winograd(weight), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
