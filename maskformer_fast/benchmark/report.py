"""The report of ``python -m maskformer_fast.benchmark``: JSON, a Markdown page and a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from maskformer_fast.core.files import atomic_write

Row = dict[str, Any]

STAGES = {"preprocess": "#7aa6c2", "network": "#3b5b75", "postprocess": "#e08e45"}
COLORS = {"bundle": "#c0392b", "PyTorch eager": "#7f8c8d", "torch.compile": "#2c3e50"}
EAGER = "PyTorch eager"
NOTE = """\
Times are of one call, from a batch of frames in the host's memory to results there: resizing, network and
post-processing. *p50*, *p95*, *p99*: percentiles of the calls. *Speed-up*: the median of PyTorch eager divided by this
median. *pre / net / post*: shares of the stages in a batch's time, measured in separate calls. *In flight*: frames a
second of a stream of single frames. *RSS*: peak resident memory of the runner's process, libraries included. *GPU*: GPU
memory in use, less that of an empty context. *Labels*: share of pixels with the label of the first PyTorch runner.
"""


def require_matplotlib() -> None:
    """Raise ModuleNotFoundError with the command that installs matplotlib, if it is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "matplotlib is needed to plot; install it with: pip install maskformer_fast[deploy]", name="matplotlib"
        )


def write_report(content: dict[str, Any], folder: Path) -> str:
    """Write ``benchmark.json``, ``.md`` and ``.png``, each atomically -> the text of the page."""
    text = markdown(content)
    for name, data in (("json", (json.dumps(content, indent=2) + "\n").encode()), ("md", text.encode())):
        with atomic_write(folder / f"benchmark.{name}") as file:
            file.write(data)
    with atomic_write(folder / "benchmark.png") as file:
        draw(content["rows"]).print_png(file)
    return text


def markdown(content: dict[str, Any]) -> str:
    """The page as Markdown."""
    options, rows = content["options"], content["rows"]
    machine = [(key, ", ".join(value) if isinstance(value, list) else str(value))
               for key, value in content["machine"].items() if value]  # fmt: skip
    heads = ("batch", "runner", "p50 ms", "p95 ms", "p99 ms", "frames/s", "in flight", "speed-up",
             "pre / net / post", "RSS MiB", "GPU MiB", "labels", "remarks")  # fmt: skip
    title = f"# {content['bundle']['name']}: {options['task']}, frames of {options['size']}"
    parts = [title, table(("", ""), [("bundle", content["bundle"]["digest"]), *machine])]
    parts += [table(heads, [cells(row, rows) for row in rows]), NOTE]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def cells(row: Row, rows: Iterable[Row]) -> tuple[str, ...]:
    """A row's cells in the page's table."""
    eager = next((r for r in rows if r["runner"] == EAGER and r["batch"] == row["batch"]), {})
    remarks = f"FAILED: {row['error']}" if "error" in row else f"{row['backend']}, {row['calls']} calls"
    speed = eager["p50_ms"] / row["p50_ms"] if "p50_ms" in eager and "p50_ms" in row else None
    return (
        str(row["batch"]), row["runner"],
        *(number(row.get(key)) for key in ("p50_ms", "p95_ms", "p99_ms", "images_per_s", "frames_per_s")),
        "" if speed is None else f"{speed:.2f}x",
        " / ".join(f"{100 * share:.0f}" for share in shares(row)) + " %" if "stages" in row else "",
        number(row.get("peak_rss_mib")), number(row.get("gpu_mib")),
        f"{100 * row['labels_equal']:.3f} %" if "labels_equal" in row else "", remarks,
    )  # fmt: skip


def shares(row: Row) -> list[float]:
    """Shares of the three stages in their sum."""
    seconds = [row["stages"][stage] for stage in STAGES]
    return [part / sum(seconds) for part in seconds]


def number(value: float | None) -> str:
    """A number with at least three digits; empty for None."""
    return "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def table(heads: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""

    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"

    return "\n".join([line(heads), line("---" for _ in heads), *(line(texts) for texts in lines)])


def draw(rows: Iterable[Row]) -> Any:
    """A canvas with latency, throughput and the stages' shares over the batch sizes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in rows if "p50_ms" in row]
    batches = sorted({row["batch"] for row in measured})
    names = [name for name in COLORS if any(row["runner"] == name for row in measured)]
    figure = Figure(figsize=(13, 4), layout="constrained")
    latency, throughput, stages = figure.subplots(1, 3)
    for place, name in enumerate(names):
        of_runner = [row for row in measured if row["runner"] == name]
        x = [row["batch"] for row in of_runner]
        medians = [row["p50_ms"] for row in of_runner]
        errors = [[0.0] * len(of_runner), [row["p99_ms"] - row["p50_ms"] for row in of_runner]]
        latency.errorbar(x, medians, errors, label=name, color=COLORS[name], marker="o", capsize=3)
        throughput.plot(x, [row["images_per_s"] for row in of_runner], label=name, color=COLORS[name], marker="o")
        for row in (row for row in of_runner if "stages" in row):
            at, bottom = batches.index(row["batch"]) + (place - (len(names) - 1) / 2) * 0.27, 0.0
            for share, (stage, color) in zip(shares(row), STAGES.items(), strict=True):
                first = place == 0 and row is of_runner[0]
                stages.bar(at, 100 * share, 0.24, bottom, color=color, label=stage if first else None)
                bottom += 100 * share
            stages.annotate(name, (at, 2), rotation=90, ha="center", va="bottom", fontsize=7, color="white")
    for axes, label in ((latency, "ms a call: median, up to p99"), (throughput, "frames a second")):
        axes.set(xlabel="batch", ylabel=label, xticks=batches)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if has_legend(axes):
            axes.legend(fontsize=8)
    stages.set(xlabel="batch", ylabel="% of a call", xticks=range(len(batches)), xticklabels=batches, ylim=(0, 100))
    if has_legend(stages):
        stages.legend(fontsize=8, ncols=len(STAGES), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return FigureCanvasAgg(figure)


def has_legend(axes: Any) -> bool:
    """Whether a legend of the axes would have entries."""
    return bool(axes.get_legend_handles_labels()[0])
