"""Specialisations of kernels for compilation ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KernelVariant:
    """A Triton kernel with the types of its arguments and the values of its compile-time constants."""

    name: str
    """Name, unique among all kernels. The symbol in the cubin is the function's name."""
    kernel: Any
    """Function decorated with ``triton.jit``."""
    arguments: dict[str, str]
    """Run-time arguments in the function's order -> Triton's name of the type: ``*fp16``, ``i32``, ``fp32``."""
    constants: dict[str, Any] = field(default_factory=dict)
    """``tl.constexpr`` arguments and their values."""
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    """Run-time arguments that are always multiples of 16: addresses in bytes, integers by value."""
