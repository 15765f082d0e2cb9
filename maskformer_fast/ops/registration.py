"""Registration of the operators with PyTorch: one call an operator, so that every file of this folder reads alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Arguments = TypeVar("Arguments")
Result = TypeVar("Result")

_library = torch.library.Library("maskformer_fast", "FRAGMENT")


def register_operator(
    schema: str,  # "NAME(Tensor x, float[2] extent) -> Tensor"
    arguments: Callable[..., Arguments],
    *,
    check: Callable[[Arguments], None],
    cpu: Callable[[Arguments], Result],
    cuda: Callable[[Arguments], Result] | None = None,
    fake: Callable[[Arguments], Result],
) -> Callable[..., Result]:
    """Define ``torch.ops.maskformer_fast.NAME`` -> the operator, a function of the schema's arguments.

    Args:
        arguments: makes one object of the schema's arguments: a NamedTuple with the same fields and defaults. Lists
            (``float[2]``, ``Tensor[]``) come as tuples.
        check: raises TypeError or ValueError for arguments that do not fit. It takes that object and runs in every
            call, also of ``torch.ops.maskformer_fast.NAME``. That all tensors are on one device is checked here.
        cpu: implementation for CPU tensors; takes that object.
        cuda: implementation for CUDA tensors; without it they raise NotImplementedError.
        fake: makes empty results of the right shapes and types, for torch.compile and torch.export.
    """
    # `define` and `impl` cost 3.6 us a call, `torch.library.custom_op` 10.5 us.
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _with_one_argument(cpu, arguments, check), "CPU")
    if cuda is not None:
        _library.impl(name, _with_one_argument(cuda, arguments, check), "CUDA")
    torch.library.register_fake(f"maskformer_fast::{name}", _with_one_argument(fake, arguments, check), lib=_library)
    operator: Callable[..., Result] = getattr(torch.ops.maskformer_fast, name).default
    return operator


def register_gradient(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """Make an operator differentiable; the functions are those of `torch.library.register_autograd`."""
    torch.library.register_autograd(f"maskformer_fast::{name}", backward, setup_context=setup_context, lib=_library)


def _with_one_argument(
    implementation: Callable[[Arguments], Result],
    arguments: Callable[..., Arguments],
    check: Callable[[Arguments], None],
) -> Callable[..., Result]:
    def call(*values: Any) -> Result:
        made = arguments(*[tuple(value) if type(value) is list else value for value in values])
        check(made)
        device = None
        for value in values:
            if isinstance(value, Tensor):
                if device is None:
                    device = value.device
                elif value.device != device:
                    raise ValueError(f"tensors: expected all on one device, got {device} and {value.device}")
        return implementation(made)

    return call
