"""Pictures of the results: SVG files for the README, drawn from the JSON files of the other benchmarks.

    python -m benchmarks.plots [--results FOLDER] [--output FOLDER]

| from            | pictures                                                                                        |
| --------------- | ----------------------------------------------------------------------------------------------- |
| scaling.json    | latency_by_classes, latency_by_resolution, latency_by_batch, latency_by_queries, memory, scaling |
| cpu.json        | speedups                                                                                        |
| end_to_end.json | stages                                                                                          |

A file that is missing leaves its pictures as they are. The same results and version of matplotlib give the same bytes.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Row
from maskformer_fast.benchmark.report import require_matplotlib
from maskformer_fast.cli import parse, run_command
from maskformer_fast.core.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
WIDTH = 8.4  # inches: 806 pixels, what a README has
OURS = "ours"
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
    "svg.hashsalt": "maskformer_fast", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9,
    "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "legend.frameon": False,
    "legend.fontsize": 8, "lines.markersize": 4.5, "lines.linewidth": 1.6, "figure.facecolor": "white",
    "savefig.facecolor": "white",
}  # fmt: skip

logger = logging.getLogger("benchmarks.plots")


@dataclass(frozen=True)
class PlotOptions:
    """Draw the results of the benchmarks as SVG files."""

    results: Path = RESULTS
    """Folder with scaling.json, cpu.json and end_to_end.json, each optional."""
    output: Path | None = None
    """Folder of the SVG files; by default plots in the folder of the results."""


Content = dict[str, Any]
Picture = Callable[[Content], "Figure | None"]


def latency(axis: str) -> Picture:
    """A panel for each curve along `axis`: milliseconds of both sides, with the fitted power laws."""

    def draw(content: Content) -> Figure | None:
        chosen = [curve for curve in content["curves"] if curve["axis"] == axis and timed(curve)]
        return panels(chosen, lambda axes, curve: draw_curve(axes, curve, "ms", "ms"))

    return draw


def queries_and_targets(content: Content) -> Figure | None:
    """As `latency`."""
    chosen = [curve for curve in content["curves"] if curve["axis"] in ("queries", "targets") and timed(curve)]
    return panels(chosen, lambda axes, curve: draw_curve(axes, curve, "ms", "ms"))


def memory(content: Content) -> Figure | None:
    """A panel for each curve with measured peaks."""
    chosen = [curve for curve in content["curves"] if len(known(curve, OURS, "peak_mib")) > 1]
    return panels(chosen, lambda axes, curve: draw_curve(axes, curve, "peak_mib", "MiB a call adds"))


def known(curve: Row, side: str, key: str) -> list[tuple[float, float]]:
    """The points (x, value) of one side that were measured."""
    pairs = [(point["x"], point.get(f"{side}_{key}")) for point in curve["points"]]
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
    """Both sides over the points, on logarithmic axes."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    names = []
    for side, name in ((OURS, OURS), ("peer", curve["peer"])):
        points = known(curve, side, key)
        if not points:
            continue
        style = side_style(side, curve["peer"])
        # a peak of nothing cannot be shown on a logarithmic axis; 0.1 MiB is what can be told from nothing
        xs, ys = [x for x, _ in points], [max(y, 0.1) if key == "peak_mib" else y for _, y in points]
        exponent = curve.get(f"{side}_exponent") if key == "ms" else None
        names.append(name)
        axes.plot(xs, ys, label=name if exponent is None else f"{name}: ~ n$^{{{exponent:.2f}}}$", **style)
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
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper left", ncols=columns, columnspacing=1.2, handlelength=2.4)


def side_style(side: str, peer: str) -> Row:
    """Ours, or that of the peer, the same for a peer in every picture."""
    if side == OURS:
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
        for side, shift in ((OURS, -0.14), ("peer", 0.14)):
            value = curve.get(f"{side}_exponent")
            if value is None:
                continue
            name = OURS if side == OURS else curve["peer"]
            style = {**side_style(side, curve["peer"]), "linestyle": "none"}
            error = curve.get(f"{side}_exponent_error") or 0.0
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


def speedups(content: Content) -> Figure | None:
    """Every row of the suite: how many times faster, and how many times less memory, by subject and peer."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in content["rows"]:
        if row.get("ratio") is not None:
            groups.setdefault((row.get("subject", "operators"), row["peer"]), []).append(row)
    if not groups:
        return None
    figure = new_figure(1.2 + 0.36 * len(groups))
    names = [two_lines(f"{subject.replace('_', ' ')}: {peer}") for subject, peer in groups]
    first = None
    for place, (title, ratio) in enumerate((("time", time_ratio), ("peak memory", memory_ratio))):
        axes = figure.add_subplot(1, 2, place + 1, sharey=first)
        first = first or axes
        for line, rows in enumerate(groups.values()):
            values = [value for value in map(ratio, rows) if value is not None]
            axes.plot(values, [line] * len(values), "o", color=OUR_STYLE["color"], alpha=0.55, markersize=5)
        axes.axvline(1.0, color="#888888", linewidth=0.8)
        axes.set(xscale="log", title=f"{title}: peer's / ours", xlabel="times; each dot is a row")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", labelleft=place == 0)
    axes.invert_yaxis()
    return figure


def two_lines(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 38, max_lines=2, placeholder=" …"))


def time_ratio(row: Row) -> float | None:
    value: float | None = row["ratio"]
    return value


def memory_ratio(row: Row) -> float | None:
    """None where one side was not measured, or ours is too small to be told from nothing."""
    ours, peer = row.get("ours_peak_mib"), row.get("peer_peak_mib")
    return peer / ours if ours is not None and peer is not None and ours >= 0.3 else None


def stages(content: Content) -> Figure | None:
    """Milliseconds an image of every side, in stages, each with its share."""
    bars = [(row["name"], side, figures["stages_ms"]) for row in content["rows"]
            for side, figures in row.get("sides", {}).items() if figures.get("stages_ms")]  # fmt: skip
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
    axes.set_yticks(range(len(bars)), [f"{name}, {side}" for name, side, _ in bars])
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
    "cpu.json": {"speedups": speedups},
    "end_to_end.json": {"stages": stages},
}


def read(path: Path) -> Content:
    """A file of results.

    Raises:
        ValueError: not JSON, or not such a file.
    """
    key = "curves" if path.name == "scaling.json" else "rows"
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f"{path}: expected an object with the list {key!r}, got {str(content)[:80]}")
    return content


def draw_all(results: Path, output: Path) -> list[Path]:
    """Draw the pictures of the files that are there -> the files written.

    Raises:
        ValueError: none of the files is there, or one is not what it should be.
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
        content = read(paths[name])
        for picture, draw in pictures.items():
            with style.context(["default", STYLE]):
                try:
                    figure = draw(content)
                except (KeyError, TypeError) as error:
                    raise ValueError(f"{paths[name]}: expected what its benchmark writes, got {error!r}") from error
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
