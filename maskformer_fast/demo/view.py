"""A result as HTML of the demo's page: a picture, the segment and score of every pixel, and tables.

Nothing here needs gradio. Names come from checkpoints and files, and are escaped.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from maskformer_fast.config import Task
from maskformer_fast.core.metadata import VOID, Metadata
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult, unpack_mask_array
from maskformer_fast.output.id_maps import result_rows
from maskformer_fast.output.visualize import MIN_SCORE, class_rows, draw_result, segment_colors

__all__ = [
    "Segment",
    "View",
    "error_html",
    "hover_png",
    "make_view",
    "result_html",
    "times_html",
    "view_html",
]

DRAWN_EDGE = 640
"""Longer edge in pixels below which an image is enlarged by an integer factor before drawing, for readable names."""
_JPEG_QUALITY = 92
_NOTHING = {"semantic": "no class", "instance": "no instance", "panoptic": "no segment"}
_SCORES = {
    "semantic": "mean over the pixels; of mask classification a sum over queries, which may be above 1",
    "instance": "class probability x mean mask probability",
    "panoptic": "class probability",
}


class Segment(NamedTuple):
    """One segment, or one class of a semantic result, in the page's legend."""

    name: str
    color: tuple[int, int, int]
    kind: str  # thing or stuff
    score: float | None  # None if the result has none
    share: float  # of the image's pixels that show it


@dataclass(frozen=True)
class View:
    """A result with its picture and its legend."""

    task: Task
    picture: np.ndarray  # [h, w, 3] uint8 RGB: the image, or an enlarged one, with the segments drawn over it
    rows: np.ndarray  # [H, W] int: index into `segments` of every pixel of the image, or VOID
    segments: tuple[Segment, ...]
    pixel_scores: np.ndarray | None  # [H, W] float32 of a semantic result, whose scores are of pixels, not segments


def make_view(
    image: np.ndarray,  # [H, W, 3] uint8 RGB
    result: Result,
    metadata: Metadata,
    pixel_scores: np.ndarray | None = None,  # [H, W] float32, of a semantic result
) -> View:
    """Draw a result and list its segments, the largest first, or the instances that are drawn, the best first.

    The score of a class is the mean over its pixels. A pixel of several instances belongs to the best of them.
    """
    scores: Sequence[float | None]
    if isinstance(result, SemanticResult):
        task: Task = "semantic"
        categories, rows = class_rows(result.labels.cpu().numpy())
        colors = [metadata.colors[category] for category in categories]
        scores = [None] * len(categories)
        if pixel_scores is not None:
            total = np.bincount(rows.ravel(), weights=pixel_scores.ravel())
            scores = (total / np.bincount(rows.ravel())).tolist()
    elif isinstance(result, PanopticResult):
        task, rows = "panoptic", result_rows(result)
        categories = [segment.category for segment in result.segments]
        scores = [segment.score for segment in result.segments]
        colors = segment_colors(categories, metadata)
    else:
        task = "instance"
        rows, kept = _instance_rows(result)
        categories, scores = result.labels[kept].tolist(), result.scores[kept].tolist()
        colors = segment_colors(categories, metadata)
    areas = np.bincount(rows.ravel() + 1, minlength=len(categories) + 1)[1:]
    segments = [
        Segment(metadata.class_names[category], color, "thing" if metadata.is_thing[category] else "stuff", score,
                int(area) / rows.size)
        for category, color, score, area in zip(categories, colors, scores, areas, strict=True)
    ]  # fmt: skip
    if task != "instance":
        order = np.argsort(-areas, kind="stable")
        place = np.append(np.argsort(order), VOID)  # new row of each old one; the last entry is VOID's (-1)
        segments, rows = [segments[row] for row in order], place[rows]
    factor = max(1, -(-DRAWN_EDGE // max(image.shape[:2])))
    picture = draw_result(_enlarged_image(image, factor), _enlarged_result(result, factor), metadata)
    return View(task, picture, rows, tuple(segments), pixel_scores if task == "semantic" else None)


def _instance_rows(result: InstanceResult) -> tuple[np.ndarray, torch.Tensor]:
    """Row of every pixel -> [H, W] int64, and the indices of the drawn instances, the best first."""
    scores = result.scores.float().cpu()
    kept = (scores >= MIN_SCORE).nonzero()[:, 0]
    kept = kept[scores[kept].argsort(descending=True, stable=True)]
    rows = np.full(result.size, VOID, dtype=np.int64)
    packed = result.masks.cpu()[kept].numpy()
    for row in range(len(kept) - 1, -1, -1):
        rows[unpack_mask_array(packed[row], result.size[1])] = row
    return rows, kept.to(result.labels.device)


def _enlarged_image(image: np.ndarray, factor: int) -> np.ndarray:
    """The image, enlarged by bicubic interpolation."""
    if factor == 1:
        return image
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _enlarged_result(result: Result, factor: int) -> Result:
    """The result with every pixel repeated in both directions."""
    if factor == 1:
        return result
    if isinstance(result, SemanticResult):
        return SemanticResult(_repeated(result.labels, factor))
    if isinstance(result, PanopticResult):
        return replace(result, id_map=_repeated(result.id_map, factor))
    height, width = result.size
    masks = unpack_mask_array(result.masks.cpu().numpy(), width)
    packed = np.packbits(masks.repeat(factor, 1).repeat(factor, 2), axis=-1, bitorder="little")
    return replace(result, masks=torch.from_numpy(packed), size=(height * factor, width * factor))


def _repeated(pixels: torch.Tensor, factor: int) -> torch.Tensor:
    return pixels.repeat_interleave(factor, 0).repeat_interleave(factor, 1)


# The map that the page's script reads at the pointer


def hover_png(view: View) -> tuple[bytes, float]:
    """Rows and scores of every pixel for the page's script -> an RGB PNG [H, W], and the score that 255 stands for.

    Red + 256 green is the row plus 1, or 0 for VOID; blue is the pixel's score in 255ths of that score.
    """
    numbers = view.rows + 1
    pixels = np.zeros((*numbers.shape, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = numbers & 255, numbers >> 8
    unit = 1.0
    if view.pixel_scores is not None:
        unit = max(1.0, float(view.pixel_scores.max(initial=0.0)))
        pixels[..., 2] = np.rint(view.pixel_scores.clip(0.0) * (255 / unit)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue(), unit


# HTML


def view_html(view: View) -> tuple[str, str]:
    """HTML of the picture, with the data that `page.js` reads, and of the legend; `result_html` puts them together."""
    hover, unit = hover_png(view)
    facts = {
        "nothing": _NOTHING[view.task],
        "unit": None if view.pixel_scores is None else unit,
        "segments": [segment._asdict() for segment in view.segments],
    }
    picture = io.BytesIO()
    Image.fromarray(view.picture).save(picture, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    height, width = view.rows.shape
    return (
        f'<div class="mf-stage" data-facts="{html.escape(json.dumps(facts))}" style="--ratio: {width / height:.5f}">'
        f'<img class="mf-picture" alt="{view.task} segmentation" draggable="false" '
        f'src="{_data_url("image/jpeg", picture.getvalue())}">'
        f'<img class="mf-map" alt="" hidden src="{_data_url("image/png", hover)}">'
        '<canvas class="mf-shade"></canvas><div class="mf-tip" role="tooltip" hidden></div></div>'
    ), _legend(view)


def result_html(task: Task, stage: str, legend: str, times: str) -> str:
    """HTML of a complete result, from the parts of `view_html` and `times_html`."""
    return f'<div class="mf-view" data-task="{task}">{stage}<div class="mf-side">{legend}{times}</div></div>'


def _legend(view: View) -> str:
    """HTML of the table of segments."""
    if not view.segments:
        return f'<p class="mf-note">{_NOTHING[view.task]} found</p>'
    lines = "".join(
        f'<tr data-row="{row}"><td><span class="mf-swatch" style="background: rgb{segment.color}"></span>'
        f"{html.escape(segment.name)}</td><td>{segment.kind}</td>"
        + _number("–" if segment.score is None else f"{segment.score:.2f}")
        + _number(f"{segment.share * 100:.1f} %")
        + "</tr>"
        for row, segment in enumerate(view.segments)
    )
    head = f"<tr><th>{'class' if view.task == 'semantic' else 'segment'}</th><th>kind</th>"
    head += _number(f'<span title="{_SCORES[view.task]}">score</span>', "th") + _number("area", "th") + "</tr>"
    return f'<div class="mf-scroll"><table class="mf-legend"><thead>{head}</thead><tbody>{lines}</tbody></table></div>'


def _number(text: str, tag: str = "td") -> str:
    """HTML of a table's cell, aligned to the right."""
    return f'<{tag} class="mf-number">{text}</{tag}>'


def times_html(seconds: Mapping[str, float], kept: Sequence[str] = (), note: str = "") -> str:
    """HTML of a table of the stages' times with bars, and their sum.

    ``kept`` names the stages that did not run again for this result; they are listed, but not in the sum.
    """
    longest = max(seconds.values(), default=0.0) or 1.0
    lines = "".join(
        f'<tr class="{"mf-kept" if stage in kept else "mf-new"}" data-stage="{html.escape(stage)}">'
        f"<td>{html.escape(stage)}</td>{_number(_milliseconds(took))}"
        f'<td><span class="mf-bar" style="width: {took / longest * 100:.1f}%"></span></td></tr>'
        for stage, took in seconds.items()
    )
    total = _number(_milliseconds(sum(took for stage, took in seconds.items() if stage not in kept)))
    return (
        f'<div><table class="mf-times"><thead><tr><th>stage</th>{_number("ms", "th")}<th></th></tr></thead>'
        f"<tbody>{lines}</tbody><tfoot><tr><td>{'sum of the new' if kept else 'sum'}</td>{total}<td></td></tr></tfoot>"
        f'</table><p class="mf-note">{html.escape(note)}</p></div>'
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def error_html(message: str) -> str:
    """HTML of an error message in place of a result."""
    return f'<div class="mf-error" role="alert">{html.escape(message)}</div>'


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
