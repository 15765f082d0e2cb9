"""Results in other tools' file formats: index PNG, COCO panoptic PNG + JSON, COCO RLE JSON. All writes are atomic."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.files import atomic_write, write_json
from maskformer_fast.core.metadata import VOID, Metadata
from maskformer_fast.core.results import InstanceResult, PanopticResult
from maskformer_fast.ops.rle import encode_packed_masks
from maskformer_fast.output.host import on_host
from maskformer_fast.output.id_maps import result_rows

__all__ = ["coco_categories", "instances_to_coco", "panoptic_png", "write_index_png", "write_panoptic_json",
           "write_panoptic_png"]


def write_index_png(
    path: str | os.PathLike[str],
    labels: np.ndarray | Tensor,  # [H, W] integers, VOID or 0..65534
    palette: Sequence[tuple[int, int, int]] | None = None,
) -> None:
    """Write a PNG whose values are class indices.

    It has 8 bits (void 255) if no label and no index of the palette is above 254, else 16 bits (void 65535). Files of
    one data set written with its palette thus have the same depth.

    Args:
        path: the file.
        labels: class index of each pixel, or `VOID`.
        palette: RGB of each class, for viewers; written to 8-bit files only, as PNG has no 16-bit palettes.

    Raises:
        TypeError: labels are not integers.
        ValueError: labels are not of rank 2, empty, or out of range.
        OSError: as `files.atomic_write`.
    """
    values = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers, got {values.dtype}")
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"labels: expected [H, W] with at least one pixel, got shape {values.shape}")
    low, high = int(values.min()), int(values.max())
    if low < VOID or high > 65534:
        raise ValueError(f"labels: expected {VOID} (void) or 0..65534, got values in {low}..{high}")
    if high <= 254 and (palette is None or len(palette) <= 255):
        image = Image.fromarray(np.where(values == VOID, 255, values).astype(np.uint8))
        if palette is not None:
            # All 256 entries: with fewer, Pillow stores fewer bits a pixel, too few for void (255).
            image.putpalette(list(np.array([*palette, *[(0, 0, 0)] * (256 - len(palette))], dtype=np.uint8).tobytes()))
    else:
        image = Image.fromarray(np.where(values == VOID, 65535, values).astype(np.uint16))
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def panoptic_png(result: PanopticResult, metadata: Metadata) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A panoptic result in COCO's format.

    Returns:
        uint8 [H, W, 3], the segment's id as R + 256 G + 65536 B, 0 for void; and the list ``segments_info`` with id,
        category_id (of the data set), area in pixels, bbox (x, y, width, height) and iscrowd.

    Raises:
        TypeError, ValueError: the id map and the list of segments disagree, or an id is not in 1..2^24-1.
    """
    for segment in result.segments:
        if not 1 <= segment.id < 2**24:
            raise ValueError(f"segments: expected ids in 1..{2**24 - 1}, got {segment.id}")
    rows = result_rows(result)
    count = len(result.segments)
    # The last entry, number `count`, is for the void pixels, as VOID is -1.
    in_row = np.zeros((count + 1, rows.shape[0]), dtype=bool)
    in_column = np.zeros((count + 1, rows.shape[1]), dtype=bool)
    in_row[rows, np.arange(rows.shape[0])[:, None]] = True
    in_column[rows, np.arange(rows.shape[1])] = True
    areas = np.bincount(rows.ravel() + 1, minlength=count + 1)[1:]
    infos = []
    for index, segment in enumerate(result.segments):
        ys, xs = np.flatnonzero(in_row[index]), np.flatnonzero(in_column[index])
        infos.append({
            "id": segment.id,
            "category_id": metadata.category_ids[segment.category],
            "area": int(areas[index]),
            "bbox": [int(xs[0]), int(ys[0]), int(xs[-1] - xs[0]) + 1, int(ys[-1] - ys[0]) + 1],
            "iscrowd": int(segment.is_crowd),
        })
    ids = np.array([*(segment.id for segment in result.segments), 0], dtype=np.uint32)
    table = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
    return table[rows], infos


def write_panoptic_png(
    path: str | os.PathLike[str], result: PanopticResult, image_id: int | str, metadata: Metadata
) -> dict[str, Any]:
    """Write a COCO panoptic PNG and return its entry for `write_panoptic_json`.

    Raises:
        TypeError, ValueError: as `panoptic_png`.
        OSError: as `files.atomic_write`.
    """
    rgb, infos = panoptic_png(result, metadata)
    with atomic_write(path) as file:
        Image.fromarray(rgb).save(file, format="PNG")
    return {"image_id": image_id, "file_name": Path(path).name, "segments_info": infos}


def write_panoptic_json(
    path: str | os.PathLike[str],
    images: Sequence[dict[str, Any]],
    annotations: Sequence[dict[str, Any]],
    metadata: Metadata,
) -> None:
    """Write the JSON that goes with COCO panoptic PNGs.

    Args:
        path: the file.
        images: COCO image entries: id, file_name, height, width.
        annotations: results of `write_panoptic_png`, one an image.
        metadata: the classes, for the list of categories.

    Raises:
        ValueError: the image id of an annotation is not among the images.
        OSError: as `files.atomic_write`.
    """
    unknown = {annotation["image_id"] for annotation in annotations} - {image["id"] for image in images}
    if unknown:
        raise ValueError(f"annotations: expected image ids from images, got {sorted(unknown, key=str)[:8]}")
    content = {"images": list(images), "annotations": list(annotations), "categories": coco_categories(metadata)}
    write_json(path, content, indent=None)


def coco_categories(metadata: Metadata) -> list[dict[str, Any]]:
    """The classes as COCO's list of categories: id, name, isthing and color."""
    return [
        {"id": category, "name": name, "isthing": int(is_thing), "color": list(color)}
        for category, name, is_thing, color in zip(
            metadata.category_ids, metadata.class_names, metadata.is_thing, metadata.colors, strict=True)
    ]


def instances_to_coco(result: InstanceResult, image_id: int | str, metadata: Metadata) -> list[dict[str, Any]]:
    """Instances as entries of a COCO results file, in their order.

    There is no ``bbox``: pycocotools would take the box's area for the object's size, which decides about AP of small,
    medium and large objects. It adds the box of the mask itself.

    Returns:
        image_id, category_id (of the data set), segmentation (compressed RLE, its counts a str), area (pixels), box (x,
        y, width, height; zeros for an empty mask) and score.

    Raises:
        TypeError, ValueError: the masks do not have the packed shape of the result's size.
        ModuleNotFoundError: pycocotools is missing.
    """
    result = on_host([result])[0]
    rles = encode_packed_masks(result.masks.numpy(), result.size[1])
    entries = []
    area = coco_tools().mask.area
    for rle, label, score, (x0, y0, x1, y1) in zip(
        rles, result.labels.tolist(), result.scores.tolist(), result.boxes.tolist(), strict=True
    ):
        entries.append({
            "image_id": image_id,
            "category_id": metadata.category_ids[label],
            "segmentation": {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")},
            "area": int(area(rle)),
            "box": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
        })
    return entries
