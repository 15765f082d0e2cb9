"""Specialisations of kernels for compilation ahead of time, and the calls whose cost is predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TRITON_TARGET = 80
"""Compute capability that Triton's rules of specialisation are given. They do not depend on it, but demand one."""


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


@dataclass(frozen=True)
class Work:
    """What the machine code of a launch does not tell."""

    name: str
    """Name of the launch within its call."""
    runs: Mapping[str, float] = field(default_factory=dict)
    """Part of a line of source -> mean iterations of its loop, or how often the longer side of its branch runs; see
    `disassembly`."""
    bytes: float = 0.0
    """Least bytes that the launch must read and write in memory."""
    products: float = 0.0
    """Least multiply-adds of float16 that the launch must do on tensor cores."""


@dataclass(frozen=True)
class GoalLaunch:
    """A launch of a call that the performance goals name, specialised as a real launch is."""

    name: str
    variant: KernelVariant
    programs: int
    work: Work


def goal_launches(call: str, launcher: Callable[[], object], works: Sequence[Work]) -> list[GoalLaunch]:
    """Launches that `launcher` makes, with their `works` in the same order.

    The launcher is run on tensors of the device "meta", and launches are recorded and not made. Raises ValueError for
    another number of launches than `works`.
    """
    launches = recorded_launches(launcher)
    if len(launches) != len(works):
        names = [variant.name for variant, _ in launches]
        raise ValueError(f"{call}: expected {len(works)} launches, as many as works, got {names}")
    return [
        GoalLaunch(f"{call}: {work.name}", variant, programs, work)
        for (variant, programs), work in zip(launches, works, strict=True)
    ]


def recorded_launches(launcher: Callable[[], object]) -> list[tuple[KernelVariant, int]]:
    """Kernels that a function launches, as Triton specialises them for the arguments, and their numbers of programs."""
    from triton.runtime.jit import JITFunction

    launches = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound, specialised, options = bind_launch(kernel, args, kwargs)
        arguments, constants, aligned = {}, {}, []
        for (name, value), (kind, attribute) in zip(bound.items(), specialised, strict=True):
            if kind == "constexpr":
                constants[name] = value
                continue
            arguments[name] = kind
            if attribute == "D":
                aligned.append(name)
        blocks = (*grid, 1, 1)[:3]
        name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
        variant = KernelVariant(
            name, kernel, arguments, constants, options["num_warps"], options["num_stages"], tuple(aligned)
        )
        launches.append((variant, blocks[0] * blocks[1] * blocks[2]))

    launch = JITFunction.run
    JITFunction.run = record
    try:
        launcher()
    finally:
        JITFunction.run = launch
    return launches


def bind_launch(
    kernel: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """Arguments of a launch by name, Triton's type and attribute of each, and the options with their defaults."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", TRITON_TARGET, 32))
    bound, specialised, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs
    )
    defaults = backend.parse_options({})
    return bound, specialised, {"num_warps": defaults.num_warps, "num_stages": defaults.num_stages} | options
