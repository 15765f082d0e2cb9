"""Lazy loading of the compiled module ``maskformer_fast._C`` and of the Triton kernels."""

from __future__ import annotations

import functools
import importlib
import sysconfig
from pathlib import Path
from types import ModuleType

BUILD_COMMAND = "pip install -e . --no-build-isolation --no-deps"


@functools.cache
def load_extension() -> ModuleType:
    """Import ``maskformer_fast._C``, once.

    Raises ImportError with the reason and the command that builds it; there is no silent fallback.
    """
    try:
        return importlib.import_module("maskformer_fast._C")
    except ImportError as error:
        raise ImportError(
            f"maskformer_fast._C, the compiled part of maskformer_fast, cannot be loaded: {_reason(error)}. "
            f"Build it from the repository with: {BUILD_COMMAND}"
        ) from error


def load_cuda_extension() -> ModuleType:
    """Import ``maskformer_fast._C`` with its CUDA operators.

    Raises ImportError with the command that builds them where it was built without.
    """
    extension = load_extension()
    if not extension.has_cuda:
        raise ImportError(
            "maskformer_fast._C, the compiled part of maskformer_fast, was built without its CUDA operators. With nvcc "
            f"(CUDA 12 or newer) on the PATH, build them from the repository with: MF_CUDA=ON {BUILD_COMMAND}"
        )
    return extension


@functools.cache
def load_kernels(name: str) -> ModuleType:
    """Import ``maskformer_fast.kernels.NAME``, once.

    Raises ImportError with the command that installs Triton where it is missing; there is no silent fallback.
    """
    try:
        return importlib.import_module(f"maskformer_fast.kernels.{name}")
    except ImportError as error:
        raise ImportError(
            f"maskformer_fast.kernels.{name} cannot be loaded: {error}. On CUDA devices maskformer_fast needs Triton, "
            "which comes with PyTorch's CUDA builds for Linux; install it with: pip install triton"
        ) from error


def _reason(error: ImportError) -> str:
    """Explain why ``maskformer_fast._C`` cannot be loaded."""
    if not isinstance(error, ModuleNotFoundError):
        return str(error)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    others = sorted(path.name for path in Path(__file__).parents[1].glob("_C.*") if path.suffix in (".so", ".pyd"))
    if others:
        return f"it was built for another Python ({', '.join(others)}), this one needs _C{suffix}"
    return f"it was not built (no _C{suffix} in {Path(__file__).parents[1]})"
