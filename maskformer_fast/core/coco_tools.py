"""pycocotools, imported when it is first needed."""

from __future__ import annotations

from typing import Any


def coco_tools() -> Any:
    """The pycocotools package with `mask`, `coco` and `cocoeval`, imported on first use.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    try:
        import pycocotools.coco
        import pycocotools.cocoeval
        import pycocotools.mask
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pycocotools is needed for AP and for COCO run-length encoding; "
            "install it with: pip install pycocotools", name=error.name
        ) from error
    return pycocotools
