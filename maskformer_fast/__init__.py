"""MaskFormer to train, evaluate and deploy: one mask-classification network for three segmentation tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskformer_fast.inference.load import load
    from maskformer_fast.inference.predictor import Predictor

__all__ = ["Predictor", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the API on first use: parts of the package work without torch."""
    if name == "load":
        from maskformer_fast.inference.load import load

        return load
    if name == "Predictor":
        from maskformer_fast.inference.predictor import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
