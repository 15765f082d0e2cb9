"""Page and pictures of an evaluation's report: one HTML file without scripts that loads nothing else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_EDGE = 320  # longest side of a picture on the page, in pixels
_MATRIX_EDGE = 900  # longest side of the cells of a confusion matrix, in pixels
_MAX_NAMED = 60  # classes above which the matrix has no names
_MAX_NAME = 24  # characters of a class's name on the matrix
_STYLE = """body{font-family:sans-serif;margin:2em}td{padding:.2em .8em}h3{margin:1em 0 0;overflow-wrap:anywhere}
figure{display:inline-block;margin:.3em}figcaption{font-size:.8em;color:#555}"""


class WorstImage(NamedTuple):
    """An image of a low score, for the page."""

    name: str
    score: float
    pictures: tuple[bytes, ...]  # JPEG files: image, truth, results


def reduced_jpeg(
    picture: np.ndarray,  # [H, W, 3] uint8
) -> bytes:
    """JPEG file of a picture, reduced to at most 320 pixels a side."""
    image = Image.fromarray(picture)
    image.thumbnail((_EDGE, _EDGE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def png_bytes(
    picture: np.ndarray,  # [H, W, 3] uint8
) -> bytes:
    """PNG file of a picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def normalised(
    counts: np.ndarray,  # [K, K] integers: truth, prediction
) -> np.ndarray:
    """Share of each true class's pixels -> float64 [K, K]; rows of classes without pixels are 0."""
    total = counts.sum(1, keepdims=True)
    return np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)


def confusion_picture(
    counts: np.ndarray,  # [K, K] integers: truth, prediction
    names: Sequence[str],
) -> np.ndarray:
    """Draw a normalised confusion matrix -> [H, W, 3] uint8: rows are true classes, dark cells large shares.

    Up to 60 classes have their names at the rows, in the order of the columns. Sides are at most about 1,100 pixels,
    but for more than 900 classes, which have a pixel each.
    """
    classes = len(names)
    cell = max(1, min(32, _MATRIX_EDGE // max(classes, 1)))
    shade = np.rint(255 * (1.0 - normalised(counts))).astype(np.uint8)
    colours = np.stack([shade, shade, np.maximum(shade, 96)], -1)
    matrix = Image.fromarray(np.ascontiguousarray(colours.repeat(cell, 0).repeat(cell, 1)))
    if classes > _MAX_NAMED or cell < 8:
        return np.asarray(matrix)
    font = ImageFont.load_default(size=min(14, cell))
    margin = 200
    picture = Image.new("RGB", (margin + matrix.width, matrix.height), "white")
    picture.paste(matrix, (margin, 0))
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        text = "".join(letter if letter.isprintable() else "?" for letter in name[:_MAX_NAME])
        draw.text((4, row * cell + cell / 2), f"{row} {text}", fill="black", font=font, anchor="lm")
    return np.asarray(picture)


def page(
    title: str,
    metrics: Mapping[str, float | None],
    confusion: bytes | None,
    worst: Sequence[WorstImage],
    captions: Sequence[str],
    score_name: str,
) -> str:
    """HTML of a report; all names are escaped, and pictures are part of the text.

    Args:
        metrics: fractions by name; ``None`` is shown as "-".
        confusion: PNG file of the confusion matrix, if there is one.
        captions: titles of each image's pictures.
        score_name: name of the score of ``worst``.
    """
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{_percent(value)}</td></tr>"
                   for name, value in metrics.items())
    parts = [f"<h1>{html.escape(title)}</h1><table>{rows}</table>"]
    if confusion is not None:
        parts.append("<h2>Confusion matrix</h2><p>Rows: true classes; columns: predicted ones, in the same order; a "
                     f"row adds up to 1.</p>{_embedded(confusion, 'png', 'confusion matrix')}")
    parts.append(f"<h2>The {len(worst)} images of the lowest {html.escape(score_name)}</h2>")
    for image in worst:
        figures = "".join(
            f"<figure>{_embedded(picture, 'jpeg', caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"
            for picture, caption in zip(image.pictures, captions, strict=True)
        )
        parts.append(f"<h3>{html.escape(image.name)}: {_percent(image.score)}</h3>{figures}")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n")


def _embedded(data: bytes, kind: str, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
