"""Addresses of arrays for C++: what C++ would read wrongly is refused."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from maskformer_fast.core.arrays import address_of, dtype_name


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_address_is_that_of_the_first_element(make: Any) -> None:
    values = np.array([[1.5, 2.5, 3.5]])
    array = make(values)
    place = ctypes.addressof(ctypes.c_double.from_buffer(values))
    assert address_of(array, "values", "float64", (1, 3)) == place
    assert address_of(array[:, 1:], "values", "float64", (1, 2), any_strides=True) == place + 8
    assert address_of(None, "values", "float64", (1, 3)) == 0


@pytest.mark.parametrize("make", [np.zeros, torch.zeros], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("dtype", "shape", "error", "message"),
    [
        ("float16", (4, 6), TypeError, "values: expected float16, got float32"),
        ("int32", (4, 6), TypeError, "values: expected int32, got float32"),
        ("float32", (6, 4), ValueError, r"values: expected shape \(6, 4\), got \(4, 6\)"),
        ("float32", (4, 6, 1), ValueError, r"values: expected shape \(4, 6, 1\), got \(4, 6\)"),
    ],
)
def test_another_type_or_shape_is_refused(
    make: Any, dtype: str, shape: tuple[int, ...], error: type[Exception], message: str
) -> None:
    array = make((4, 6), dtype=np.float32 if make is np.zeros else torch.float32)
    with pytest.raises(error, match=message):
        address_of(array, "values", dtype, shape)


@pytest.mark.parametrize("make", [np.zeros, torch.zeros], ids=["numpy", "torch"])
def test_gaps_in_memory_are_refused_unless_strides_are_passed_on(make: Any) -> None:
    array = make((4, 6))[:, ::2]
    with pytest.raises(ValueError, match="values: expected a contiguous array"):
        address_of(array, "values", dtype_name(array), (4, 3))
    assert address_of(array, "values", dtype_name(array), (4, 3), any_strides=True) != 0


def test_another_byte_order_is_refused() -> None:
    with pytest.raises(TypeError, match="values: expected float32, got >f4"):
        address_of(np.zeros(3, dtype=">f4"), "values", "float32", (3,))
