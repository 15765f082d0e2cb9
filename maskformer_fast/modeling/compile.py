"""Compilation for training by `torch.compile`: a single graph for each of a few shapes (`data.buckets`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

MAX_COMPILED_SHAPES = 256
"""Largest number of shapes that a module is compiled for. Usually these are nine sizes of images times a few numbers of
targets, but more if a recipe does not bound the sizes. PyTorch's default of 8 is too low."""


def compile_single_graph(module: nn.Module, backend: str | Callable[..., Any] = "inductor") -> Any:
    """Compile a module as a single graph for each shape of its input, when it is first called with that shape.

    Code that cannot be traced raises an error instead of running uncompiled, and so does a shape beyond the first
    `MAX_COMPILED_SHAPES`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_SHAPES)
    return torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
