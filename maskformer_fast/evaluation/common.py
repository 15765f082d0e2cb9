"""Protocol of the three evaluators, and the checks of their arguments."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from maskformer_fast.config import Task
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import InstanceResult, Result
from maskformer_fast.output.host import on_host
from maskformer_fast.structures import Example

MAIN_METRICS: dict[Task, str] = {"semantic": "miou", "panoptic": "pq", "instance": "ap"}
"""Metric of each task by which checkpoints and images are compared."""
_R = TypeVar("_R", bound=Result)


class Evaluator(Protocol):
    """Adds up one task's metrics image by image.

    An evaluator has NumPy arrays and plain lists only, so it can be pickled to another rank and merged there.
    """

    metadata: Metadata

    def reset(self) -> None:
        """Forget every image."""

    def process(self, example: Example, result: Result) -> None:
        """Count one image: its truth, and the result at the truth's size.

        Raises:
            TypeError: the result is another task's.
            ValueError: sizes or classes do not agree.
        """

    def merge(self, other: Evaluator) -> None:
        """Add the images of another evaluator of the same kind and classes, as if they had been processed here.

        Evaluators of consecutive shares of a data set, merged in order, give exactly the metrics of the complete one.

        Raises:
            TypeError: other is another kind of evaluator.
            ValueError: other has other classes.
        """

    def evaluate(self) -> dict[str, Any]:
        """Metrics of the processed images as fractions, ``None`` for an undefined metric. Valid as JSON."""


def expect_result(example: Example, result: Result, kind: type[_R]) -> _R:
    """The result on the host, after checking its kind and size against the example."""
    if not isinstance(result, kind):
        raise TypeError(f"result: expected {kind.__name__}, got {type(result).__name__}")
    if isinstance(result, InstanceResult):
        size: tuple[int, ...] = tuple(result.size)
    else:
        size = tuple(getattr(result, "labels" if hasattr(result, "labels") else "id_map").shape)
    if size != example.size:
        raise ValueError(f"result: expected size {example.size} as the example's, got {size} ({where(example)})")
    return on_host([result])[0]


def check_merge(this: Evaluator, other: Evaluator) -> None:
    """Raise unless the two can be added up."""
    if type(this) is not type(other):
        raise TypeError(f"other: expected {type(this).__name__}, got {type(other).__name__}")
    if this.metadata.class_names != other.metadata.class_names:
        raise ValueError(f"other: expected the classes of {this.metadata.name!r}, got {other.metadata.name!r}")


def where(example: Example) -> str:
    """Name of an example in an error."""
    return f"image {example.image_id!r}" + (f", {example.path}" if example.path else "")


def check_truth(example: Example, num_classes: int) -> None:
    """Raise if a segment of the truth has a class that does not exist."""
    for segment in example.segments:
        if not 0 <= segment.category < num_classes:
            raise ValueError(f"example: expected categories in 0..{num_classes - 1}, got {segment.category} "
                             f"({where(example)})")


def class_keys(metadata: Metadata) -> list[str]:
    """One distinct key a class: its name, with the index added where two classes share the name."""
    names = metadata.class_names
    shared = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return [f"{name} #{index}" if name in shared else name for index, name in enumerate(names)]
