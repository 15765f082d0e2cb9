"""Attention and its gradients against the eager twin in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.ops.attention import attention, attention_eager
from tests.support.instruction_sets import ALL_SETS, instruction_set

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2}  # of the largest value, at least 1


@pytest.fixture(params=ALL_SETS)
def isa(request):
    """Each instruction set of this processor, those of products in bfloat16 too."""
    with instruction_set(request.param):
        yield request.param


def random_case(seed, batch, queries, keys, heads, dim, masked, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        (scale * torch.randn((batch, tokens, heads, dim), generator=generator)).to(dtype)
        for tokens in (queries, keys, keys)
    )
    visible = torch.rand((batch, *masked), generator=generator) < 0.3 if masked else None
    return query, key, value, visible


def assert_close(got, arguments, tolerance=None):
    query, key, value, visible = arguments
    wanted = attention_eager(query.double(), key.double(), value.double(), visible)
    assert got.dtype == query.dtype and got.shape == wanted.shape and got.is_contiguous()
    if wanted.numel():
        tolerance = tolerance or TOLERANCE[query.dtype]
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


SHAPES = [
    (1, 70, 330, 2, 64, None), (2, 57, 65, 3, 64, (20, 60)), (1, 113, 600, 1, 64, (113, 600)),
    (2, 1, 1, 2, 1, None), (1, 9, 257, 2, 33, (3, 5)), (1, 130, 64, 1, 128, (130, 64)), (1, 5, 300, 2, 24, (5, 1)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "queries", "keys", "heads", "dim", "masked"), SHAPES)
def test_every_instruction_set_equals_float64(batch, queries, keys, heads, dim, masked, dtype, isa):
    arguments = random_case(0, batch, queries, keys, heads, dim, masked, dtype)
    assert_close(attention(*arguments), arguments)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), batch=st.integers(0, 2), queries=st.integers(0, 120), keys=st.integers(1, 300),
    heads=st.integers(1, 3), dim=st.integers(1, 70), rows=st.integers(0, 120), columns=st.integers(0, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), threads=st.integers(1, 4),
)  # fmt: skip
def test_random_shapes_equal_float64(seed, batch, queries, keys, heads, dim, rows, columns, dtype, threads):
    masked = (min(rows, queries), min(columns, keys)) if rows else None
    arguments = random_case(seed, batch, queries, keys, heads, dim, masked, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_close(attention(*arguments), arguments)
    finally:
        torch.set_num_threads(before)


def gradients(function, arguments, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in arguments[:3]]
    return torch.autograd.grad(function(*leaves, arguments[3]), leaves, upstream)


@pytest.mark.parametrize(("batch", "queries", "keys", "heads", "dim", "masked"), SHAPES)
def test_gradients_equal_float64(batch, queries, keys, heads, dim, masked, isa):
    query, key, value, visible = random_case(1, batch, queries, keys, heads, dim, masked)
    upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(2))
    got = gradients(attention, (query, key, value, visible), upstream)
    exact = (query.double(), key.double(), value.double(), visible)
    for ours, wanted in zip(got, gradients(attention_eager, exact, upstream.double()), strict=True):
        row_errors = (ours - wanted).abs().amax(-1)
        assert (row_errors <= 1e-5 * wanted.abs().max().clamp(min=1)).all()


def test_results_and_gradients_do_not_depend_on_threads():
    arguments = random_case(3, 2, 150, 320, 3, 64, (40, 300))
    upstream = torch.randn(arguments[0].shape)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append((attention(*arguments), *gradients(attention, arguments, upstream)))
    finally:
        torch.set_num_threads(before)
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_one_product_and_transposed_tensors_are_read_in_place(dtype):
    qkv = torch.randn(2, 90, 3, 2, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    query, key, value = qkv.unbind(2)
    assert torch.equal(attention(query, key, value), attention(*(x.contiguous() for x in (query, key, value))))
    moved = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(attention(moved, key, value), attention(query, key, value))
    strided = query.transpose(1, 3).contiguous().transpose(1, 3)  # channels are not adjacent
    assert torch.equal(attention(strided, key, value), attention(query, key, value))


def test_a_query_that_sees_no_key_attends_to_all_alike(isa):
    query, key, value, _ = random_case(5, 1, 10, 300, 2, 64, None)
    visible = torch.ones(1, 10, 300, dtype=torch.bool)
    visible[0, 3] = False
    got = attention(query, key, value, visible)
    torch.testing.assert_close(got[0, 3], value[0].mean(0), rtol=1e-4, atol=1e-5)
    upstream = torch.randn(query.shape)
    exact = (query.double(), key.double(), value.double(), visible)
    ours = gradients(attention, (query, key, value, visible), upstream)
    wanted = gradients(attention_eager, exact, upstream.double())[2]
    torch.testing.assert_close(ours[2].double(), wanted, rtol=1e-5, atol=1e-6)


def test_large_scores_and_scores_that_are_not_finite(isa):
    arguments = random_case(6, 1, 60, 400, 2, 64, None, scale=30.0)
    assert_close(attention(*arguments), arguments, 1e-4)  # the scores themselves are rounded at 7,000
    query, key, value, _ = random_case(7, 1, 60, 400, 2, 64, None)
    query[0, 7, 1, 3] = float("nan")
    query[0, 9, 0, 3] = float("inf")
    got = attention(query, key, value).isnan().all(-1)
    wanted = torch.zeros(1, 60, 2, dtype=torch.bool)
    wanted[0, 7, 1] = wanted[0, 9, 0] = True
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.zeros(1, 4, 2, 8).double()}, TypeError, r"query: expected torch.float32 or torch.bfloat16"),
        ({"key": torch.zeros(1, 4, 2, 8).bfloat16()}, TypeError, r"key: expected torch.float32, got torch.bfloat16"),
        ({"query": torch.zeros(4, 2, 8)}, ValueError, r"query: expected shape \[B, N, heads, d\], got \(4, 2, 8\)"),
        ({"key": torch.zeros(1, 0, 2, 8)}, ValueError, r"key: expected shape \[1, M, 2, 8\], got \(1, 0, 2, 8\)"),
        ({"value": torch.zeros(1, 5, 2, 8)}, ValueError, r"value: expected shape \(1, 4, 2, 8\), got \(1, 5, 2, 8\)"),
        ({"visible": torch.ones(1, 4, 4)}, TypeError, r"visible: expected torch.bool, got torch.float32"),
        ({"visible": torch.ones(1, 5, 4).bool()}, ValueError, r"visible: expected shape \[1, at most 4, at most 4\]"),
    ],
)
@pytest.mark.parametrize("raw", [False, True])
def test_what_does_not_fit_is_an_error(changes, error, message, raw):
    arguments = dict(zip(("query", "key", "value", "visible"), random_case(0, 1, 4, 4, 2, 8, None), strict=True))
    function = torch.ops.maskformer_fast.attention if raw else attention
    with pytest.raises(error, match=message):
        function(**(arguments | changes))


def test_a_gradient_in_bfloat16_is_refused():
    arguments = random_case(0, 1, 4, 4, 2, 8, None, torch.bfloat16)
    with pytest.raises(TypeError, match=r"query: expected torch.float32, got torch.bfloat16"):
        gradients(attention, arguments, torch.ones(1, 4, 2, 8).bfloat16())


@pytest.mark.parametrize("masked", [None, (5, 7)])
def test_it_is_registered_for_export_and_compilation(masked):
    query, key, value, visible = random_case(0, 2, 9, 11, 2, 8, masked)
    arguments = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), visible)
    torch.library.opcheck(torch.ops.maskformer_fast.attention.default, arguments)
