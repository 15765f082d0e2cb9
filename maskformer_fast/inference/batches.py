"""Results of a batch image by image, on the host, with or without the rest of a batch in which one image fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from maskformer_fast.config import Task
from maskformer_fast.core.results import Result
from maskformer_fast.inference.bundle_predictor import BundlePredictor
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.output.host import on_host

logger = logging.getLogger(__name__)


def infer_all(
    predictor: Predictor | BundlePredictor,
    images: Sequence[np.ndarray],  # each [H, W, 3] uint8 RGB
    tasks: Sequence[Task],
) -> list[dict[Task, Result]]:
    """Each image's results by task, on the host. Raises what the predictor raises."""
    results = predictor.infer(images, tasks) if images else {}
    count = len(images)
    moved = on_host([results[task][index] for task in tasks for index in range(count)])
    return [{task: moved[row * count + index] for row, task in enumerate(tasks)} for index in range(count)]


def infer_each(
    predictor: Predictor | BundlePredictor,
    images: Sequence[np.ndarray],  # each [H, W, 3] uint8 RGB
    tasks: Sequence[Task],
) -> Sequence[dict[Task, Result] | Exception]:
    """Each image's results by task, on the host, or the error that it caused.

    A batch that fails is repeated image by image.
    """
    try:
        return infer_all(predictor, images, tasks)
    except Exception as error:  # whatever an image can cause
        logger.debug("inference failed for a batch of %d", len(images), exc_info=True)
        if len(images) == 1:
            return [error]
    return [result for image in images for result in infer_each(predictor, [image], tasks)]
