"""Metrics as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maskformer_fast.config import TASKS, Task
from maskformer_fast.core.checks import check_choice

__all__ = ["format_table"]

_HEADLINES: dict[Task, dict[str, str]] = {
    "semantic": {"miou": "mIoU", "fwiou": "fwIoU", "mean_accuracy": "mAcc", "pixel_accuracy": "pAcc"},
    "panoptic": {
        key + suffix: key.upper() + label
        for suffix, label in (("", ""), ("_things", " things"), ("_stuff", " stuff"))
        for key in ("pq", "sq", "rq")
    },
    "instance": {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "AP small", "ap_medium": "AP medium",
                 "ap_large": "AP large"},
}
_PER_CLASS: dict[Task, dict[str, str]] = {
    "semantic": {"per_class_iou": "IoU"},
    "panoptic": {"per_class_pq": "PQ", "per_class_sq": "SQ", "per_class_rq": "RQ"},
    "instance": {"per_class_ap": "AP"},
}


def format_table(task: Task, metrics: dict[str, Any]) -> str:
    """An evaluator's metrics as two Markdown tables, in percent: the headline figures, then one row a class.

    Args:
        task: task of the metrics.
        metrics: result of `Evaluator.evaluate`; other keys are left out, undefined values show as "-".

    Returns:
        Text of aligned lines, readable without rendering, with no line break at the end.

    Raises:
        ValueError: task is unknown, or metrics lack one of the task's keys.
    """
    check_choice("task", task, TASKS)
    for key in (*_HEADLINES[task], *_PER_CLASS[task]):
        if key not in metrics:
            raise ValueError(f"metrics: expected {task} metrics with {key!r}, got the keys {sorted(metrics)}")
    headline = _table(list(_HEADLINES[task].values()), [[_percent(metrics[key]) for key in _HEADLINES[task]]], left=0)
    columns = [metrics[key] for key in _PER_CLASS[task]]
    rows = [[name.replace("|", "\\|"), *(_percent(column[name]) for column in columns)] for name in columns[0]]
    return headline + "\n\n" + _table(["class", *_PER_CLASS[task].values()], rows, left=1)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table with padded cells; the first `left` columns are aligned left, the others right."""
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
