"""Labelling tools' own readers, as far as they are installed, without the parts that need a screen or torchvision."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np


def ultralytics_utils() -> Any:
    """``ultralytics.data.utils``: it asks for torchvision's version, which its label reader does not need.

    Raises:
        ImportError: ultralytics or OpenCV is not installed.
    """
    version = importlib.metadata.version

    def with_torchvision(name: str) -> str:
        return "0.0.0" if name == "torchvision" else version(name)

    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
    with patch("importlib.metadata.version", with_torchvision):
        return importlib.import_module("ultralytics.data.utils")


def labelme_tools() -> tuple[Any, Any]:
    """labelme's reader of label files and its ``shapes_to_label``; Qt is a stand-in if it is missing.

    Raises:
        ImportError: labelme is not installed.
    """
    stand_ins = {}
    for name in ("PyQt5", "PyQt5.QtGui", "PyQt5.QtCore", "PyQt5.QtWidgets"):
        if name not in sys.modules and importlib.util.find_spec("PyQt5") is None:
            stand_ins[name] = MagicMock()
    with patch.dict(sys.modules, stand_ins):
        files = importlib.import_module("labelme._label_file")
        importlib.import_module("loguru").logger.disable("labelme")
        shape = importlib.import_module("labelme.utils.shape")
    return files.read_label_file, shape.shapes_to_label


def yolo_masks(image: Path, labels: Path, classes: int) -> tuple[list[int], np.ndarray]:
    """Classes, and masks [N, H, W] as ultralytics fills them, of a label file."""
    utils = ultralytics_utils()
    _, boxes, (height, width), segments, *_, corrupt, message = utils.verify_image_label(
        (str(image), str(labels), "", False, classes, 0, 0, False)
    )
    assert not corrupt, message
    scaled = [(segment * np.float32((width, height))).astype(np.float32) for segment in segments]
    masks = [utils.polygon2mask((height, width), [one.reshape(-1)]) > 0 for one in scaled]
    return boxes[:, 0].astype(int).tolist(), np.array(masks, bool).reshape(-1, height, width)
