"""Pictures of the results: SVG files for the documentation, drawn from the JSON files of the studies.

    python -m benchmarks.plots [--results FOLDER] [--output FOLDER]

| from            | pictures                                                                                         |
| --------------- | ------------------------------------------------------------------------------------------------ |
| scaling.json    | latency_by_classes, latency_by_resolution, latency_by_batch, latency_by_queries, memory, scaling |
| end_to_end.json | stages                                                                                           |

A file that is missing leaves its pictures as they are. The same results and version of matplotlib give the same bytes.
Text stays text, which the reader's fonts draw: paths would make the files four times as large.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.case import OURS, Row
from benchmarks.studies import OUTPUT
from maskformer_fast.benchmark.report import require_matplotlib
from maskformer_fast.cli import parse, run_command
from maskformer_fast.core.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.4  # inches: 806 pixels, what a page on the web has
# Colours of Okabe and Ito, which colour-blind people tell apart; a marker and a line style each say it again.
OUR_STYLE: Row = {"color": "#0072B2", "marker": "o", "linestyle": "-"}
PEER_STYLES: tuple[Row, ...] = (
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#CC79A7", "marker": "^", "linestyle": "-."},
    {"color": "#000000", "marker": "D", "linestyle": ":"},
)
STAGE_COLORS = {
    "decode": "#999999", "resize": "#F0E442", "backbone": "#0072B2", "pixel_decoder": "#56B4E9",
    "transformer": "#009E73", "heads": "#CC79A7", "postprocess": "#D55E00", "write": "#E69F00",
}  # fmt: skip
STYLE: Row = {
    "svg.hashsalt": "maskformer_fast", "svg.fonttype": "none",
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9,
    "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "legend.frameon": False,
    "legend.fontsize": 8, "lines.markersize": 4.5, "lines.linewidth": 1.6, "figure.facecolor": "white",
    "savefig.facecolor": "white",
}  # fmt: skip

logger = logging.getLogger("benchmarks.plots")


@dataclass(frozen=True)
class PlotOptions:
    """Draw the results of the benchmarks as SVG files."""

    results: Path = OUTPUT
    """Folder with scaling.json and end_to_end.json, each optional."""
    output: Path | None = None
    """Folder of the SVG files; by default plots in the folder of the results."""


Content = dict[str, Any]
Picture = Callable[[Content], "Figure | None"]


def latency(axis: str) -> Picture:
    """A panel for each curve along `axis`: milliseconds of both implementations, with the fitted power laws."""

    def draw(content: Content) -> Figure | None:
        chosen = [curve for curve in content["curves"] if curve["axis"] == axis and timed(curve)]
        return panels(chosen, lambda axes, curve: draw_curve(axes, curve, "ms", "ms"))

    return draw


def queries_and_targets(content: Content) -> Figure | None:
    """A panel for each curve along queries or targets, as those of `latency`."""
    chosen = [curve for curve in content["curves"] if curve["axis"] in ("queries", "targets") and timed(curve)]
    return panels(chosen, lambda axes, curve: draw_curve(axes, curve, "ms", "ms"))


def memory(content: Content) -> Figure | None:
    """A panel for each curve with measured peaks."""
    chosen = [curve for curve in content["curves"] if len(known(curve, OURS, "peak_mib")) > 1]
    return panels(chosen, lambda axes, curve: draw_curve(axes, curve, "peak_mib", "MiB a call adds"))


def known(curve: Row, who: str, key: str) -> list[tuple[float, float]]:
    """The points (x, value) that were measured of one implementation, "ours" or "peer"."""
    pairs = [(point["x"], point.get(f"{who}_{key}")) for point in curve["points"]]
    return [(x, value) for x, value in pairs if value is not None]


def timed(curve: Row) -> bool:
    return len(known(curve, OURS, "ms")) > 1


def panels(curves: Sequence[Row], draw: Callable[[Axes, Row], None]) -> Figure | None:
    """A figure of two columns; None without curves."""
    if not curves:
        return None
    rows = math.ceil(len(curves) / 2)
    figure = new_figure(2.7 * rows)
    for index, curve in enumerate(curves):
        draw(figure.add_subplot(rows, 2, index + 1), curve)
    return figure


def new_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def draw_curve(axes: Axes, curve: Row, key: str, unit: str) -> None:
    """Draw both implementations over the points, on logarithmic axes."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    names = []
    for who, name in ((OURS, OURS), ("peer", curve["peer"])):
        points = known(curve, who, key)
        if not points:
            continue
        style = line_style(who, curve["peer"])
        # a peak of nothing cannot be shown on a logarithmic axis; 0.1 MiB is what can be told from nothing
        xs, ys = [x for x, _ in points], [max(y, 0.1) if key == "peak_mib" else y for _, y in points]
        exponent = curve.get(f"{who}_exponent") if key == "ms" else None
        names.append(name)
        axes.plot(xs, ys, label=name if exponent is None else f"{name}: ~ n^{exponent:.2f}", **style)
    axes.set(xscale="log", yscale="log", title=curve["name"], ylabel=unit, xlabel=curve["unit"])
    ticks = [point["x"] for point in curve["points"]]
    texts = [str(point.get("label", point["x"])) for point in curve["points"]]
    axes.set_xticks(ticks, [text.replace("x", "\n×") for text in texts])  # sizes side by side would not fit
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    low = min(low, high / 8)  # a narrow range would make much of little
    columns = 2 if sum(map(len, names)) < 24 else 1
    axes.set_ylim(low / 1.2, high * (high / low) ** (0.4 / columns) * 2)  # room for the legend above the lines
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(loc="upper left", ncols=columns, columnspacing=1.2, handlelength=2.4)


def line_style(who: str, peer: str) -> Row:
    """The style of ours, or of a peer, the same in every picture."""
    if who == OURS:
        return OUR_STYLE
    return PEER_STYLES[0 if "Hugging Face" in peer else 1 if "official" in peer else 2]


def exponents(content: Content) -> Figure | None:
    """The fitted exponents of all curves with their standard errors."""
    curves = [curve for curve in content["curves"] if curve.get("ours_exponent") is not None]
    if not curves:
        return None
    figure = new_figure(1.2 + 0.27 * len(curves))
    axes = figure.add_subplot()
    labelled: set[str] = set()
    for place, curve in enumerate(curves):
        for who, shift in ((OURS, -0.14), ("peer", 0.14)):
            value = curve.get(f"{who}_exponent")
            if value is None:
                continue
            name = OURS if who == OURS else curve["peer"]
            style = {**line_style(who, curve["peer"]), "linestyle": "none"}
            error = curve.get(f"{who}_exponent_error") or 0.0
            label = None if name in labelled else name
            axes.errorbar(value, place + shift, xerr=error, capsize=2.5, label=label, **style)
            labelled.add(name)
    axes.set_yticks(range(len(curves)), [curve["name"] for curve in curves])
    axes.invert_yaxis()
    for value, text in ((0.0, "constant"), (1.0, "proportional")):
        axes.axvline(value, color="#888888", linewidth=0.8)
        axes.annotate(text, (value, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                      textcoords="offset points", ha="center", va="bottom", fontsize=8, color="#555555")  # fmt: skip
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("exponent of the time, with its standard error")
    figure.legend(loc="outside lower center", ncols=len(labelled))
    return figure


def stages(content: Content) -> Figure | None:
    """Milliseconds an image of every implementation, in stages, each with its share."""
    bars = [(row["name"], who, figures["stages_ms"]) for row in content["rows"]
            for who, figures in row["implementations"].items()]  # fmt: skip
    if not bars:
        return None
    known_stages = [*STAGE_COLORS, *sorted({stage for *_, own in bars for stage in own} - set(STAGE_COLORS))]
    figure = new_figure(1.3 + 0.36 * len(bars))
    axes = figure.add_subplot()
    longest = max(sum(own.values()) for *_, own in bars)
    for place, (_, _, own) in enumerate(bars):
        total, left = sum(own.values()), 0.0
        for stage in known_stages:
            width = own.get(stage) or 0.0
            color = STAGE_COLORS.get(stage, "#444444")
            axes.barh(place, width, 0.72, left, color=color, edgecolor="white", linewidth=0.6)
            if width > 0.045 * longest:
                text = "white" if stage in ("backbone", "postprocess", "transformer") else "black"
                axes.text(left + width / 2, place, f"{100 * width / total:.0f} %", ha="center", va="center",
                          fontsize=7.5, color=text)  # fmt: skip
            left += width
        axes.text(left + 0.008 * longest, place, f"{total:.0f} ms", ha="left", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [f"{name}, {who}" for name, who, _ in bars])
    axes.invert_yaxis()
    axes.set(xlabel="ms an image", xlim=(0, 1.1 * longest))
    axes.grid(axis="y", visible=False)
    from matplotlib.patches import Patch

    present = [stage for stage in known_stages if any(own.get(stage) for *_, own in bars)]
    handles = [Patch(color=STAGE_COLORS.get(s, "#444444"), label=s.replace("_", " ")) for s in present]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.0, handlelength=1.0)
    return figure


PICTURES: dict[str, dict[str, Picture]] = {
    "scaling.json": {
        "latency_by_classes": latency("classes"),
        "latency_by_resolution": latency("pixels"),
        "latency_by_batch": latency("batch"),
        "latency_by_queries": queries_and_targets,
        "memory": memory,
        "scaling": exponents,
    },
    "end_to_end.json": {"stages": stages},
}


def draw_all(results: Path, output: Path) -> list[Path]:
    """Draw the pictures of the files that are there -> the pictures' paths.

    Raises:
        ValueError: none of the files is there.
    """
    from matplotlib import style

    paths = {name: results / name for name in PICTURES}
    if not any(path.exists() for path in paths.values()):
        raise ValueError(f"results: expected a folder with one of {', '.join(PICTURES)}, got {results}")
    written = []
    for name, pictures in PICTURES.items():
        if not paths[name].exists():
            logger.info("%s is missing: %s stay as they are", paths[name], ", ".join(pictures))
            continue
        content = json.loads(paths[name].read_text())
        for picture, draw in pictures.items():
            with style.context(["default", STYLE]):
                figure = draw(content)
                if figure is None:
                    logger.info("%s has nothing for %s, which stays as it is", paths[name], picture)
                    continue
                target = output / f"{picture}.svg"
                with atomic_write(target) as file:
                    figure.savefig(file, format="svg", metadata={"Date": None})
            written.append(target)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(PlotOptions, sys.argv[1:] if argv is None else argv, prog="python -m benchmarks.plots")
    require_matplotlib()
    for path in draw_all(options.results, options.output or options.results / "plots"):
        print(path)
    return 0


if __name__ == "__main__":
    run_command(main)
