"""Results of large pictures as files, written in strips: index and panoptic PNGs or GeoTIFFs, and COCO's instances."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.files import atomic_write
from maskformer_fast.core.metadata import VOID, Metadata, SegmentInfo
from maskformer_fast.output.formats import write_index_png

STRIP_ROWS = 512
"""Rows that are converted and written at a time; a multiple of the sides of a TIFF's tiles."""


def write_label_file(
    path: Path,  # without the ending
    labels: np.ndarray,  # [H, W] uint8 or int16
    metadata: Metadata,
    georeference: Mapping[str, Any] | None,
) -> None:
    """Write the class of each pixel: a PNG, or a TIFF where there is a georeference.

    Raises:
        OSError: the file cannot be written.
    """
    if georeference is None:
        write_index_png(path.with_name(f"{path.name}.png"), labels, metadata.colors)
        return
    colors = dict(enumerate((*color, 255) for color in metadata.colors)) if labels.dtype == np.uint8 else None
    _write_tiff(path.with_name(f"{path.name}.tif"), labels, 255 if labels.dtype == np.uint8 else VOID, georeference,
                colors)  # fmt: skip


def write_id_file(
    path: Path,  # without the ending
    id_map: np.ndarray,  # [H, W] int32
    georeference: Mapping[str, Any] | None,
) -> str:
    """Write the segment of each pixel: COCO's panoptic PNG, or a TIFF of ids, 0 for none -> the file's name.

    Raises:
        OSError: the file cannot be written.
    """
    if georeference is not None:
        target = path.with_name(f"{path.name}.tif")
        _write_tiff(target, id_map, 0, georeference)
        return target.name
    image = Image.new("RGB", (id_map.shape[1], id_map.shape[0]))
    for rows in _strips(len(id_map)):
        ids = np.maximum(id_map[rows], 0).astype(np.uint32)
        image.paste(Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)),
                    (0, rows.start))  # fmt: skip
    target = path.with_name(f"{path.name}.png")
    with atomic_write(target) as file:
        image.save(file, format="PNG")
    return target.name


def segment_entries(id_map: np.ndarray, segments: Sequence[SegmentInfo], metadata: Metadata) -> list[dict[str, Any]]:
    """Entries of COCO's ``segments_info``, with boxes."""
    count = len(segments)
    low = np.full((count + 1, 2), np.iinfo(np.int64).max)
    high = np.full((count + 1, 2), -1)
    columns = np.arange(id_map.shape[1])
    for y in range(len(id_map)):
        ids = np.maximum(id_map[y], 0)
        np.minimum.at(low[:, 0], ids, columns)
        np.maximum.at(high[:, 0], ids, columns)
        present = np.unique(ids)
        low[present, 1] = np.minimum(low[present, 1], y)
        high[present, 1] = y
    return [
        {"id": segment.id, "category_id": metadata.category_ids[segment.category], "area": segment.area,
         "bbox": [*low[segment.id].tolist(), *(high[segment.id] - low[segment.id] + 1).tolist()], "iscrowd": 0}
        for segment in segments
    ]  # fmt: skip


def instance_entry(
    image_id: int | str,
    label: int,
    score: float,
    corner: tuple[int, int],  # row and column of the mask's first pixel
    mask: np.ndarray,  # [h, w] bool
    size: tuple[int, int],
    metadata: Metadata,
) -> dict[str, Any]:
    """An entry of a COCO results file as of `formats.instances_to_coco`, from the mask of a box only."""
    rle = coco_tools().mask.frPyObjects({"size": list(size), "counts": _run_lengths(corner, mask, size)}, *size)
    return {
        "image_id": image_id,
        "category_id": metadata.category_ids[label],
        "segmentation": {"size": list(size), "counts": rle["counts"].decode("ascii")},
        "area": int(mask.sum()),
        "box": [float(corner[1]), float(corner[0]), float(mask.shape[1]), float(mask.shape[0])],
        "score": score,
    }


def _run_lengths(corner: tuple[int, int], mask: np.ndarray, size: tuple[int, int]) -> list[int]:
    """COCO's run lengths, down the columns, of a mask in a larger image."""
    down = np.zeros((mask.shape[1], mask.shape[0] + 2), np.int8)
    down[:, 1:-1] = mask.T
    steps = np.diff(down, axis=1)
    columns, starts = np.nonzero(steps == 1)
    stops = np.nonzero(steps == -1)[1]
    first = (corner[1] + columns) * size[0] + corner[0]
    bounds = np.stack([first + starts, first + stops], 1).ravel()
    joined = np.flatnonzero(bounds[1:-1:2] == bounds[2::2])  # a run to the bottom, and one from the next column's top
    bounds = np.delete(bounds, np.concatenate([2 * joined + 1, 2 * joined + 2]))
    counts = np.diff(bounds, prepend=0, append=size[0] * size[1])
    return [int(count) for count in (counts[:-1] if counts[-1] == 0 else counts)]


def _write_tiff(
    path: Path, values: np.ndarray, nodata: int, georeference: Mapping[str, Any], colors: dict[int, Any] | None = None
) -> None:
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.windows import Window

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    height, width = values.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": values.dtype.name,
               "nodata": nodata, "tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate",
               "bigtiff": "if_safer", **georeference}  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(temporary, "w", **profile) as file:
                for rows in _strips(height):
                    strip = values[rows]
                    strip = np.where(strip == VOID, values.dtype.type(nodata), strip) if nodata != VOID else strip
                    file.write(strip, 1, window=Window(0, rows.start, width, len(strip)))
                if colors is not None:
                    file.write_colormap(1, colors)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _strips(height: int) -> Iterator[slice]:
    for start in range(0, height, STRIP_ROWS):
        yield slice(start, min(start + STRIP_ROWS, height))
