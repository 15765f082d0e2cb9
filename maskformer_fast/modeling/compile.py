"""`torch.compile` as training uses it: whole graphs, one for each of few shapes (`data.buckets`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

COMPILED_SHAPES = 256
"""Nine sizes of images and a few numbers of targets as a rule, more where a recipe does not bound the sizes. PyTorch's
own limit, 8, is there to stop code that never settles."""


def compile_single_graph(module: nn.Module, backend: str | Callable[..., Any] = "inductor") -> Any:
    """A module that is compiled as one graph for each shape of its input, never in pieces.

    What cannot be traced raises instead of running uncompiled; so does a shape beyond `COMPILED_SHAPES`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
    return torch.compile(module, fullgraph=True, dynamic=False, backend=backend)
