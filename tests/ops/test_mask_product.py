"""Mask logits in either order of products, against float64 convolution and product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.ops import mask_product as mask_product_module
from maskformer_fast.ops.mask_product import mask_product
from maskformer_fast.structures import Projection


def random_case(
    seed: int, batch: int, queries: int, dim: int, channels: int, size: tuple[int, int], kernel: int = 3
) -> tuple[Tensor, Tensor, Projection]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = normal(dim, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    return normal(batch, queries, dim), normal(batch, channels, *size), Projection(weight, normal(dim))


def oracle(embeddings: Tensor, features: Tensor, projection: Projection) -> Tensor:
    weight, bias = (t.double() for t in projection)
    pixels = F.conv2d(features.double(), weight, bias, padding=weight.shape[-1] // 2)
    return torch.einsum("bnd,bdhw->bnhw", embeddings.double(), pixels)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(0, 3),
    queries=st.one_of(st.integers(0, 40), st.sampled_from([100, 112, 170])),  # 7 and 11 blocks of 16, and neither
    dim=st.integers(1, 40),
    channels=st.integers(1, 20),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.sampled_from([1, 3, 5]),
    channels_last=st.booleans(),
)
def test_either_order_is_the_product_of_embeddings(channels_last: bool, **case: Any) -> None:
    embeddings, features, projection = random_case(**case)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    expected = oracle(embeddings, features, projection)
    got = mask_product(embeddings, features, projection)
    assert got.shape == expected.shape and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mask_product(embeddings, projection.embed(features), None), got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("queries", "size", "orders"),
    [
        (25, (16, 16), ["folded 25"]), (112, (16, 16), ["folded 112"]), (200, (64, 64), ["folded 200"]),
        (200, (16, 16), ["embedded"]), (500, (64, 64), ["embedded"]),
    ],
)  # fmt: skip
def test_the_cheaper_order_is_taken(
    queries: int, size: tuple[int, int], orders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    embed, convolve_folded = Projection.embed, mask_product_module.conv3x3_winograd

    def recording_embed(projection: Projection, pixels: Tensor) -> Tensor:
        taken.append("embedded")
        return embed(projection, pixels)

    def recording_folded(image: Tensor, packed: Tensor, bias: Tensor, channels: int) -> Tensor:
        taken.append(f"folded {channels}")
        return convolve_folded(image, packed, bias, channels)

    monkeypatch.setattr(Projection, "embed", recording_embed)
    monkeypatch.setattr(mask_product_module, "conv3x3_winograd", recording_folded)
    embeddings, features, projection = random_case(1, 1, queries, 256, 64, size)
    mask_product(embeddings, features, projection)
    assert taken == orders


@pytest.mark.parametrize("queries", [3, 70])  # folded, and not folded
def test_gradients_agree_with_the_plain_order(queries: int) -> None:
    embeddings, features, projection = random_case(2, 2, queries, 8, 5, (6, 7))
    leaves = [t.double().requires_grad_() for t in (embeddings, features, *projection)]
    weights = torch.randn(2, queries, 6, 7, dtype=torch.float64)

    got = torch.autograd.grad((mask_product(leaves[0], leaves[1], Projection(*leaves[2:])) * weights).sum(), leaves)
    expected = torch.autograd.grad((oracle(leaves[0], leaves[1], Projection(*leaves[2:])) * weights).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_bias_has_a_gradient_where_only_it_is_trained() -> None:
    embeddings, features, (weight, bias) = random_case(4, 1, 3, 32, 16, (8, 9))
    bias = bias.clone().requires_grad_()
    mask_product(embeddings, features, Projection(weight, bias)).sum().backward()
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, embeddings.sum((0, 1)) * 72)


def test_result_has_the_dtype_of_embeddings_and_features_not_of_weights() -> None:
    embeddings, features, projection = random_case(3, 1, 4, 16, 8, (5, 5))
    assert projection.embed(features.bfloat16()).dtype == torch.bfloat16
    assert mask_product(embeddings.bfloat16(), features.bfloat16(), projection).dtype == torch.bfloat16
    assert mask_product(embeddings.bfloat16(), features, projection).dtype == torch.float32
    assert mask_product(embeddings.repeat(1, 9, 1), features.bfloat16(), projection).dtype == torch.float32
    half = Projection(*(t.bfloat16() for t in projection))
    got = mask_product(embeddings, features, half)  # weights of a model in half precision, masks in float32
    torch.testing.assert_close(
        got.double(), oracle(embeddings, features, Projection(*(t.float() for t in half))), rtol=1e-4, atol=1e-4
    )
