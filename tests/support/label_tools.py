"""Labelling tools' own readers, as far as they are installed, without the parts that need a screen or torchvision."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest


def ultralytics_utils() -> Any:
    """``ultralytics.data.utils``: it asks for torchvision's version, which its label reader does not need."""
    pytest.importorskip("cv2")
    version = importlib.metadata.version

    def with_torchvision(name: str) -> str:
        return "0.0.0" if name == "torchvision" else version(name)

    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
    with patch("importlib.metadata.version", with_torchvision):
        return pytest.importorskip("ultralytics.data.utils", exc_type=ImportError)


def labelme_tools() -> tuple[Any, Any]:
    """labelme's reader of label files and its ``shapes_to_label``; Qt is a stand-in if it is missing."""
    stand_ins = {}
    for name in ("PyQt5", "PyQt5.QtGui", "PyQt5.QtCore", "PyQt5.QtWidgets"):
        if name not in sys.modules and importlib.util.find_spec("PyQt5") is None:
            stand_ins[name] = MagicMock()
    with patch.dict(sys.modules, stand_ins):
        files = pytest.importorskip("labelme._label_file", exc_type=ImportError)
        shape = pytest.importorskip("labelme.utils.shape", exc_type=ImportError)
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
