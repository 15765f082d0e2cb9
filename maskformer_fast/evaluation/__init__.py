"""Evaluators of the three tasks behind one protocol: mIoU, panoptic quality, average precision."""

from __future__ import annotations

from maskformer_fast.config import TASKS, Task
from maskformer_fast.core.checks import check_choice
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.evaluation.common import Evaluator
from maskformer_fast.evaluation.instance import InstanceEvaluator
from maskformer_fast.evaluation.panoptic import PanopticEvaluator
from maskformer_fast.evaluation.semantic import SemanticEvaluator
from maskformer_fast.evaluation.table import format_table

__all__ = [
    "Evaluator", "InstanceEvaluator", "PanopticEvaluator", "SemanticEvaluator", "build_evaluator", "format_table",
]


def build_evaluator(task: Task, metadata: Metadata) -> Evaluator:
    """The evaluator of a task over the given classes.

    Raises:
        ValueError: the task is unknown.
        ModuleNotFoundError: instance evaluation without pycocotools.
    """
    check_choice("task", task, TASKS)
    if task == "semantic":
        return SemanticEvaluator(metadata)
    return PanopticEvaluator(metadata) if task == "panoptic" else InstanceEvaluator(metadata)
