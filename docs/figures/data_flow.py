"""Draw data_flow.svg, the flow of data through the code: ``python docs/figures/data_flow.py [FILE]``, in any format.

Needs Matplotlib. Each box is a step with its files; a test checks that these files exist.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INPUT, NETWORK, TRAINING, RESULT = "#e8eef7", "#dcebdd", "#f8e6d3", "#ece4f4"
GREY = "#444444"


class Box(NamedTuple):
    """A step: position of its centre, size, colour, title, and files below ``maskformer_fast/``."""

    x: float
    y: float
    width: float
    color: str
    title: str
    files: tuple[str, ...]
    height: float = 0.95


BOXES = {
    "data": Box(1.4, 6.5, 2.6, INPUT, "image and truth", ("data/datasets/", "data/transforms.py")),
    "batch": Box(1.4, 4.5, 2.6, INPUT, "padded batch, uint8", ("data/loader.py", "ops/resize.py")),
    "targets": Box(5.0, 6.5, 2.6, INPUT, "targets, one bit a pixel", ("structures.py",)),
    "backbone": Box(5.0, 4.5, 2.6, NETWORK, "normalise, backbone", ("modeling/resnet.py", "modeling/swin.py")),
    "pixels": Box(9.0, 5.3, 3.2, NETWORK, "pixel decoder: features", ("modeling/pixel_decoder.py",), 0.8),
    "queries": Box(9.0, 3.7, 3.2, NETWORK, "transformer decoder: queries", ("modeling/mask_head.py",), 0.8),
    "predictions": Box(13.0, 4.5, 3.0, NETWORK, "predictions, as factors", ("structures.py", "ops/mask_product.py")),
    "cost": Box(
        13.0, 6.5, 3.0, TRAINING, "cost, assignment",
        ("training/matcher.py", "ops/matching_cost.py", "ops/assignment.py"), 1.2,
    ),
    "loss": Box(13.0, 8.3, 3.0, TRAINING, "losses", ("training/criterion.py", "ops/mask_loss.py")),
    "step": Box(
        9.0, 8.3, 3.2, TRAINING, "update, or a skipped step", ("training/train_step.py", "training/skipped_steps.py"),
    ),
    "run": Box(5.0, 8.3, 2.6, TRAINING, "checkpoints, log", ("training/checkpoints.py", "training/run_log.py")),
    "post": Box(
        13.0, 2.2, 3.0, RESULT, "pruning, fused inference",
        ("inference/postprocess.py", "ops/semantic.py", "ops/semantic_pruned.py", "ops/segments.py"), 1.4,
    ),
    "result": Box(9.0, 2.2, 3.2, RESULT, "labels, segments, instances", ("inference/predictor.py", "ops/rle.py")),
    "files": Box(
        5.0, 2.2, 2.6, RESULT, "files, pictures, metrics", ("output/writer.py", "output/visualize.py", "evaluation/"),
        1.2,
    ),
}  # fmt: skip
ARROWS = (
    ("data", "batch", ""),
    ("data", "targets", "training"),
    ("targets", "cost", ""),
    ("batch", "backbone", ""),
    ("backbone", "pixels", "strides 4 to 32"),
    ("backbone", "queries", "stride 32"),
    ("pixels", "predictions", ""),
    ("queries", "predictions", ""),
    ("predictions", "cost", "training: every layer"),
    ("cost", "loss", "query of each target"),
    ("loss", "step", "gradients"),
    ("step", "run", ""),
    ("predictions", "post", "inference: last layer"),
    ("post", "result", ""),
    ("result", "files", ""),
)


def edge(a: Box, b: Box) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the start and the end of an arrow between two boxes, on the sides that face each other."""
    if abs(a.x - b.x) > (a.width + b.width) / 2:
        side = 1 if b.x > a.x else -1
        return (a.x + side * a.width / 2, a.y), (b.x - side * b.width / 2, b.y)
    side = 1 if b.y > a.y else -1
    return (a.x, a.y + side * a.height / 2), (b.x, b.y - side * b.height / 2)


def draw(path: Path) -> None:
    """Write the figure."""
    pyplot.rcParams.update({"svg.hashsalt": "data_flow", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, axes = pyplot.subplots(figsize=(13, 7.2))
    axes.set(xlim=(0, 14.7), ylim=(1.3, 8.9))
    axes.axis("off")
    for box in BOXES.values():
        corner = (box.x - box.width / 2, box.y - box.height / 2)
        shape = FancyBboxPatch(corner, box.width, box.height, boxstyle="round,pad=0,rounding_size=0.1",
                               facecolor=box.color, edgecolor="#555555", linewidth=1)  # fmt: skip
        axes.add_patch(shape)
        top = box.y + box.height / 2
        axes.text(box.x, top - 0.2, box.title, ha="center", va="center", fontsize=9, weight="bold")
        axes.text(box.x, top - 0.36, "\n".join(box.files), ha="center", va="top", fontsize=8.5, family="monospace",
                  color="#333333", linespacing=1.35)  # fmt: skip
    for start, end, label in ARROWS:
        tail, head = edge(BOXES[start], BOXES[end])
        arrow = FancyArrowPatch(tail, head, arrowstyle="-|>", mutation_scale=14, color=GREY, shrinkA=1, shrinkB=1)
        axes.add_patch(arrow)
        x, y = (tail[0] + head[0]) / 2, (tail[1] + head[1]) / 2
        if tail[0] == head[0]:  # beside a vertical arrow
            place, alignment = (x + 0.1, y), {"ha": "left", "va": "center"}
        elif tail[1] == head[1]:  # above a horizontal arrow
            place, alignment = (x, y + 0.06), {"ha": "center", "va": "bottom"}
        else:  # outside the fork
            place, alignment = (x, y + (0.22 if head[1] > tail[1] else -0.22)), {"ha": "right", "va": "center"}
        axes.text(*place, label, fontsize=8.5, style="italic", color=GREY, **alignment)
    figure.savefig(path, bbox_inches="tight", facecolor="white", dpi=80,
                   metadata={"Date": None} if path.suffix == ".svg" else None)  # fmt: skip


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
