"""Tensors and arrays as C++ takes them: an address and the name of a type. Serves PyTorch and NumPy alike."""

from __future__ import annotations

from typing import Any


def address_of(
    array: Any,  # torch.Tensor, numpy.ndarray or None
) -> int:
    """Address of the first element in bytes, 0 for None.

    The caller keeps a reference to the array while the address is in use: a temporary's memory is reused.
    """
    if array is None:
        return 0
    address: int = array.data_ptr() if hasattr(array, "data_ptr") else array.__array_interface__["data"][0]
    return address


def dtype_name(
    array: Any,  # torch.Tensor or numpy.ndarray
) -> str:
    """Element type as C++ and NumPy spell it: ``float32``, ``bfloat16``, ``uint8``."""
    return str(array.dtype).removeprefix("torch.")
