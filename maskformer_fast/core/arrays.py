"""Tensors and arrays as C++ takes them: an address and the name of a type. Serves PyTorch and NumPy alike."""

from __future__ import annotations

import functools
from typing import Any


def address_of(
    array: Any,  # torch.Tensor, numpy.ndarray or None
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    *,
    any_strides: bool = False,
) -> int:
    """Address of the first element in bytes, 0 for None. C++ sees nothing else, so what it relies on is checked here.

    The caller keeps a reference to the array while the address is in use: a temporary's memory is reused.

    Args:
        name: name of the array in errors.
        dtype: element type that C++ reads, as `dtype_name` spells it.
        shape: sizes that C++ reads.
        any_strides: the array need not be C-contiguous, as C++ is given its strides.

    Raises:
        TypeError: another element type.
        ValueError: another shape, or an array that is not C-contiguous.
    """
    if array is None:
        return 0
    if _name(array.dtype) != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {dtype_name(array)}")
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(array.shape)}")
    is_tensor = hasattr(array, "data_ptr")
    if not any_strides and not (array.is_contiguous() if is_tensor else array.flags.c_contiguous):
        raise ValueError(f"{name}: expected a contiguous array, got one of other strides")
    address: int = array.data_ptr() if is_tensor else array.__array_interface__["data"][0]
    return address


def dtype_name(
    array: Any,  # torch.Tensor or numpy.ndarray
) -> str:
    """Element type as C++ and NumPy spell it: ``float32``, ``bfloat16``, ``uint8``; ``>f4`` for another byte order."""
    return _name(array.dtype)


@functools.cache
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
