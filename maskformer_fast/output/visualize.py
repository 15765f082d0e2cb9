"""Pictures of results and truth: coloured segments, outlines, class names, grids."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maskformer_fast.config import TASKS, Task
from maskformer_fast.core.checks import check_choice
from maskformer_fast.core.display import as_display
from maskformer_fast.core.metadata import VOID, Metadata
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult, unpack_mask_array
from maskformer_fast.output.host import on_host
from maskformer_fast.output.id_maps import result_rows, segment_rows
from maskformer_fast.structures import Example

__all__ = [
    "MIN_SCORE",
    "class_rows",
    "display_scale",
    "draw_instances",
    "draw_panoptic",
    "draw_result",
    "draw_semantic",
    "draw_truth",
    "grid",
    "segment_colors",
]

MIN_SCORE = 0.5
"""Lowest score of an instance that is drawn."""
_OPACITY = 0.55  # opacity of a segment's colour over the image
_MIN_EDGE = 320  # pixels of the longer edge below which an image is enlarged, so that names are readable
_CELL_EDGE = 768  # pixels of the longest edge of a picture in a grid
_MARGIN = 6  # pixels between the pictures of a grid

Color = tuple[int, int, int]


def display_scale(size: tuple[int, int]) -> int:
    """Integer factor by which an image of this height and width is enlarged for display; 1 unless it is tiny."""
    return max(1, -(-_MIN_EDGE // max(1, *size)))


def class_rows(
    labels: np.ndarray,  # [H, W] integers from VOID
) -> tuple[list[int], np.ndarray]:
    """The classes present, ascending, and each pixel's index into them -> [H, W] int64; VOID stays VOID."""
    # Counting is faster than `np.unique`, which sorts all pixels.
    present = np.bincount(labels.ravel().astype(np.int64) - VOID) > 0
    table = np.append(VOID, np.cumsum(present[1:]) - 1)
    return np.flatnonzero(present[1:]).tolist(), table[labels.astype(np.int64) - VOID]


def draw_semantic(
    image: np.ndarray,  # [H, W, 3] uint8 RGB
    result: SemanticResult | np.ndarray | Tensor,  # or labels, [H, W] integers, VOID for unlabelled pixels
    metadata: Metadata,
) -> np.ndarray:
    """Colour and name the classes over the image; void is darkened.

    Returns:
        uint8 [s*H, s*W, 3] with s = `display_scale` of the image's size, a new array.

    Raises:
        ValueError: the labels have another size than the image, or are no classes.
    """
    labels = result.labels if isinstance(result, SemanticResult) else result
    labels = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    _check_size("labels", labels.shape, image)
    lowest, highest = (int(labels.min()), int(labels.max())) if labels.size else (VOID, VOID)
    if not VOID <= lowest <= highest < metadata.num_classes:
        raise ValueError(f"labels: expected {VOID}..{metadata.num_classes - 1}, got {lowest}..{highest}")
    present, rows = class_rows(labels)
    return _paint(image, rows, [metadata.colors[c] for c in present], [metadata.class_names[c] for c in present])


def draw_panoptic(
    image: np.ndarray,  # [H, W, 3] uint8 RGB
    result: PanopticResult,
    metadata: Metadata,
    tracks: Sequence[int] | None = None,
) -> np.ndarray:
    """Colour and name the segments over the image; things of one class have shades of its colour; void is darkened.

    Args:
        tracks: track id of each segment, which is written and decides about a thing's shade.

    Returns:
        As `draw_semantic`.

    Raises:
        ValueError: the id map has another size than the image, or disagrees with the list of segments.
    """
    _check_size("id_map", tuple(result.id_map.shape), image)
    rows = result_rows(result)
    categories = [segment.category for segment in result.segments]
    names = [metadata.class_names[c] for c in categories]
    if tracks is None:
        return _paint(image, rows, segment_colors(categories, metadata), names)
    shown = [number if segment.is_thing else 0 for number, segment in zip(tracks, result.segments, strict=True)]
    return _paint(image, rows, _track_colors(categories, shown, metadata), _with_tracks(names, shown))


def draw_instances(
    image: np.ndarray,  # [H, W, 3] uint8 RGB
    result: InstanceResult,
    metadata: Metadata,
    min_score: float = MIN_SCORE,
    tracks: Sequence[int] | None = None,
) -> np.ndarray:
    """Colour, name and score the instances of at least `min_score` over the image, the best on top.

    Args:
        tracks: track id of each instance, which is written and decides about its shade.

    Returns:
        As `draw_semantic`.

    Raises:
        ValueError: the result has another size than the image.
    """
    _check_size("result", result.size, image)
    result = on_host([result])[0]
    scores = result.scores.float()
    keep = (scores >= min_score).nonzero()[:, 0]
    keep = keep[scores[keep].argsort(descending=True, stable=True)]
    masks = unpack_mask_array(result.masks[keep].numpy(), result.size[1])
    categories = result.labels[keep].tolist()
    if tracks is None:
        names = [f"{metadata.class_names[c]} {s:.2f}" for c, s in zip(categories, scores[keep].tolist(), strict=True)]
        return _paint_masks(image, masks, segment_colors(categories, metadata), names)
    shown = [tracks[place] for place in keep.tolist()]
    names = _with_tracks([metadata.class_names[c] for c in categories], shown)
    return _paint_masks(image, masks, _track_colors(categories, shown, metadata), names)


def draw_result(
    image: np.ndarray, result: Result, metadata: Metadata, tracks: Sequence[int] | None = None
) -> np.ndarray:
    """Draw a result of any task; see `draw_semantic`, `draw_panoptic` and `draw_instances`.

    All of them show a picture of bands as `core.display.as_display` does.
    """
    if isinstance(result, SemanticResult):
        return draw_semantic(image, result, metadata)
    if isinstance(result, PanopticResult):
        return draw_panoptic(image, result, metadata, tracks)
    return draw_instances(image, result, metadata, tracks=tracks)


def draw_truth(example: Example, metadata: Metadata, task: Task) -> np.ndarray:
    """Draw the truth of one task: the classes, all segments, or the thing segments.

    Returns:
        As `draw_semantic`.

    Raises:
        ValueError: the task is unknown.
    """
    check_choice("task", task, TASKS)
    if task == "semantic":
        return draw_semantic(example.image, example.semantic_map(), metadata)
    segments = example.segments if task == "panoptic" else [
        segment for segment in example.segments if metadata.is_thing[segment.category]]
    colors = segment_colors([segment.category for segment in segments], metadata)
    names = [metadata.class_names[segment.category] + " (crowd)" * segment.is_crowd for segment in segments]
    if task == "panoptic" and example.id_map is not None:
        return _paint(example.image, segment_rows(example.id_map, segments), colors, names)
    masks = example.segment_masks(segments) if segments else np.zeros((0, *example.size), dtype=bool)
    return _paint_masks(example.image, masks, colors, names)


def grid(
    rows: Sequence[Sequence[np.ndarray]],  # of [H, W, 3] uint8 RGB
    titles: Sequence[str],
) -> np.ndarray:
    """Pictures in rows and columns under the columns' titles.

    Tiny pictures are enlarged by an integer factor; pictures with an edge above 768 pixels are reduced. Pictures of
    one image in a row get the same height.

    Returns:
        uint8 [H', W', 3].

    Raises:
        ValueError: there is no picture, or a row has another length than the titles.
    """
    if not rows or not titles:
        raise ValueError(f"rows: expected at least one row and one title, got {len(rows)} and {len(titles)}")
    lengths = {len(row) for row in rows}
    if lengths != {len(titles)}:
        raise ValueError(f"rows: expected {len(titles)} pictures in each row, one a title, got {sorted(lengths)}")
    cells = [[_fit(picture) for picture in row] for row in rows]
    widths = [max(line[column].width for line in cells) for column in range(len(titles))]
    heights = [max(cell.height for cell in line) for line in cells]
    font = _font(max(14, min(28, min(widths) // 14)))
    header = int(font.size * 1.5) + _MARGIN
    sheet = Image.new("RGB", (sum(widths) + _MARGIN * (len(widths) + 1),
                              header + sum(heights) + _MARGIN * (len(heights) + 1)), "white")
    draw = ImageDraw.Draw(sheet)
    x = _MARGIN
    for column, (title, width) in enumerate(zip(titles, widths, strict=True)):
        draw.text((x + width / 2, _MARGIN + header / 2), title, fill="black", font=font, anchor="mm")
        y = header + _MARGIN
        for line, height in zip(cells, heights, strict=True):
            cell = line[column]
            sheet.paste(cell, (x + (width - cell.width) // 2, y + (height - cell.height) // 2))
            y += height + _MARGIN
        x += width + _MARGIN
    return np.array(sheet)


def _fit(picture: np.ndarray) -> Image.Image:
    """A picture in the size that it has in a grid."""
    scale = display_scale((picture.shape[0], picture.shape[1]))
    cell = Image.fromarray(_enlarge(picture, scale))
    if max(cell.size) > _CELL_EDGE:
        cell.thumbnail((_CELL_EDGE, _CELL_EDGE), Image.Resampling.LANCZOS)
    return cell


def _paint(
    image: np.ndarray,  # [H, W, 3] uint8
    rows: np.ndarray,  # [H, W] int, index of each pixel's segment, or VOID
    colors: Sequence[Color],
    names: Sequence[str],
) -> np.ndarray:
    """Draw segments without overlap; void is darkened."""
    scale = display_scale((image.shape[0], image.shape[1]))
    base, rows = _enlarge(as_display(image), scale).astype(np.float32), _enlarge(rows, scale)
    table = np.array([*colors, (0, 0, 0)], dtype=np.float32)  # the last row is VOID's (-1): black
    picture = base * (1 - _OPACITY) + table[rows] * _OPACITY
    edge = np.zeros(rows.shape, dtype=bool)
    edge[:, 1:] |= rows[:, 1:] != rows[:, :-1]
    edge[1:] |= rows[1:] != rows[:-1]
    picture[_thicken(edge)] = 255
    points = [_inner_point(rows == row) for row in range(len(names))]
    areas = np.bincount(rows.ravel() + 1, minlength=len(names) + 1)[1:]
    return _write_names(picture, points, areas, colors, names)


def _paint_masks(
    image: np.ndarray,  # [H, W, 3] uint8
    masks: np.ndarray,  # [N, H, W] bool, may overlap
    colors: Sequence[Color],
    names: Sequence[str],
) -> np.ndarray:
    """Draw segments that may overlap, the first on top; other pixels of the image stay unchanged."""
    scale = display_scale((image.shape[0], image.shape[1]))
    picture = _enlarge(as_display(image), scale).astype(np.float32)
    points: list[tuple[int, int] | None] = []
    areas = []
    for small, color in zip(masks[::-1], colors[::-1], strict=True):
        mask = _enlarge(small, scale)
        picture[mask] = picture[mask] * (1 - _OPACITY) + np.array(color, dtype=np.float32) * _OPACITY
        inner = mask.copy()  # pixels whose four neighbours are in the mask too
        inner[1:] &= mask[:-1]
        inner[:-1] &= mask[1:]
        inner[:, 1:] &= mask[:, :-1]
        inner[:, :-1] &= mask[:, 1:]
        picture[_thicken(mask & ~inner) & mask] = 255
        points.append(_inner_point(mask))
        areas.append(int(mask.sum()))
    return _write_names(picture, points[::-1], np.array(areas[::-1], dtype=np.int64), colors, names)


def _thicken(edge: np.ndarray) -> np.ndarray:
    """Widen the lines of a large picture, as lines of one pixel vanish when it is reduced to fit a screen."""
    thick = edge.copy()
    for _ in range(max(edge.shape) // 1000):
        thick[1:] |= thick[:-1]
        thick[:, 1:] |= thick[:, :-1]
    return thick


def segment_colors(categories: Sequence[int], metadata: Metadata) -> list[Color]:
    """The class's colour for the first segment of a class, and shades of it, in hue and lightness, for later ones."""
    counts: dict[int, int] = {}
    colors: list[Color] = []
    for category in categories:
        nth = counts.get(category, 0)
        counts[category] = nth + 1
        colors.append(_shade(metadata.colors[category], nth))
    return colors


def _shade(color: Color, nth: int) -> Color:
    """The n-th shade of a colour, in hue and lightness; the colour itself for 0."""
    if not nth:
        return color
    hue, lightness, saturation = colorsys.rgb_to_hls(*(value / 255 for value in color))
    # Steps of the golden ratio fill the range evenly for any number of segments.
    hue += 0.22 * ((nth * 0.618034 + 0.5) % 1 - 0.5)
    lightness = 0.25 + (lightness - 0.25 + nth * 0.381966 * 0.6) % 0.6
    red, green, blue = colorsys.hls_to_rgb(hue % 1, lightness, max(saturation, 0.35))
    return round(red * 255), round(green * 255), round(blue * 255)


def _track_colors(categories: Sequence[int], tracks: Sequence[int], metadata: Metadata) -> list[Color]:
    """A shade of the class's colour for each track, the same in all frames; for track 0 the colour itself."""
    return [_shade(metadata.colors[category], nth) for category, nth in zip(categories, tracks, strict=True)]


def _with_tracks(names: Sequence[str], tracks: Sequence[int]) -> list[str]:
    """Names with the numbers of tracks; track 0 is not written."""
    return [f"{name} #{number}" if number else name for name, number in zip(names, tracks, strict=True)]


def _inner_point(mask: np.ndarray) -> tuple[int, int] | None:
    """x, y well inside the mask's thickest part; `None` for an empty mask.

    A centroid can lie outside. A reduced copy of the mask is eroded, and a pixel of the last erosion is taken.
    """
    step = max(1, max(mask.shape) // 96)
    small = np.pad(mask[step // 2 :: step, step // 2 :: step], 1)
    if not small.any():
        ys, xs = np.nonzero(mask)
        return (int(xs[len(xs) // 2]), int(ys[len(ys) // 2])) if len(xs) else None
    while True:
        inner = small.copy()
        inner[1:-1, 1:-1] &= small[:-2, 1:-1] & small[2:, 1:-1] & small[1:-1, :-2] & small[1:-1, 2:]
        if not inner.any():
            break
        small = inner
    ys, xs = np.nonzero(small)
    # The pixel next to the mean of the remaining ones, as the mean itself need not be in the mask.
    nearest = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
    return int((xs[nearest] - 1) * step + step // 2), int((ys[nearest] - 1) * step + step // 2)


def _write_names(
    picture: np.ndarray,  # [H, W, 3] float32, 0..255
    points: Sequence[tuple[int, int] | None],
    areas: np.ndarray,  # [N] int, pixels
    colors: Sequence[Color],
    names: Sequence[str],
) -> np.ndarray:
    """Write names at the points, those of large segments first -> uint8 [H, W, 3].

    A name is left out if it would overlap another or has more than three times the area of its segment.
    """
    canvas = Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    font = _font(max(11, min(width, height) // 32))
    taken: list[tuple[float, float, float, float]] = []
    for index in np.argsort(-areas, kind="stable").tolist():
        point = points[index]
        if point is None:
            continue
        left, top, right, bottom = draw.textbbox((0, 0), names[index], font=font, anchor="lt")
        box_width, box_height = right - left + 6, bottom - top + 6
        if areas[index] * 3 < box_width * box_height:
            continue
        x = min(max(point[0] - box_width / 2, 0), max(0, width - box_width))
        y = min(max(point[1] - box_height / 2, 0), max(0, height - box_height))
        box = (x, y, x + box_width, y + box_height)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            continue
        taken.append(box)
        # A dark box in the hue of the segment: white text on it is readable, and the hue relates it to the segment.
        draw.rectangle(box, fill=tuple(value // 4 for value in colors[index]))
        draw.text((x + 3, y + 3), names[index], fill="white", font=font, anchor="lt")
    return np.array(canvas)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's font in a size of pixels."""
    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow without FreeType cannot draw names; install a Pillow wheel from PyPI")
    return font


def _enlarge(array: np.ndarray, scale: int) -> np.ndarray:
    """Every pixel repeated in both directions."""
    return array.repeat(scale, 0).repeat(scale, 1) if scale > 1 else array


def _check_size(name: str, size: tuple[int, ...], image: np.ndarray) -> None:
    if image.dtype not in (np.uint8, np.uint16) or image.ndim != 3 or image.shape[2] == 0:
        raise ValueError(f"image: expected uint8 [H, W, 3], or bands [H, W, C] of 8 or 16 bits, got {image.dtype} "
                         f"{image.shape}")
    if tuple(size) != image.shape[:2]:
        raise ValueError(f"{name}: expected the image's size {image.shape[:2]}, got {tuple(size)}")
