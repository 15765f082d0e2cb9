"""Results of the three tasks, with tensors from PyTorch or NumPy arrays from a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from maskformer_fast.core import exchange, label_formats
from maskformer_fast.core.checks import check
from maskformer_fast.core.exchange import Polygon, as_array
from maskformer_fast.core.label_formats import LabelledObject, Transform
from maskformer_fast.core.metadata import VOID, SegmentInfo

ArrayT = TypeVar("ArrayT")
"""Type of the arrays of one result: ``torch.Tensor`` or ``numpy.ndarray``."""


ResultT = TypeVar("ResultT", bound="_Exchanged")


class _Exchanged:
    """Conversions that all results have by way of instances; results that come back have NumPy arrays."""

    def to_instances(self) -> InstanceResult[Any]:
        """The result as instances, one for each class or segment."""
        raise NotImplementedError

    @classmethod
    def from_instances(cls: type[ResultT], instances: InstanceResult[Any]) -> ResultT:
        """The result of instances; of pixels in several the first, which is the best, counts."""
        raise NotImplementedError

    def to_supervision(self) -> Any:
        """``supervision.Detections`` with boxes, boolean masks, confidence and class_id.

        Raises:
            ModuleNotFoundError: supervision is not installed.
        """
        instances = self.to_instances()
        return exchange.to_supervision(instances.arrays(), instances.size)

    @classmethod
    def from_supervision(cls: type[ResultT], detections: Any) -> ResultT:
        """Inverse of `to_supervision`; ``ValueError`` for detections without masks."""
        arrays = exchange.from_supervision(detections)
        return cls.from_instances(InstanceResult(*arrays, detections.mask.shape[1:]))

    def to_coco(
        self, image_id: int | str = 0, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """COCO's annotations with compressed run lengths, boxes as x, y, width, height, areas and scores.

        Args:
            category_ids: category of each class; without them the class's index.
        """
        instances = self.to_instances()
        return exchange.to_coco(instances.arrays(), instances.size, image_id, category_ids)

    @classmethod
    def from_coco(
        cls: type[ResultT],
        annotations: Sequence[dict[str, Any]],
        size: tuple[int, int],
        category_ids: Sequence[int] | None = None,
    ) -> ResultT:
        """Inverse of `to_coco`; also takes run lengths that are not compressed, and polygons.

        Raises:
            ModuleNotFoundError: pycocotools is not installed.
        """
        return cls.from_instances(InstanceResult(*exchange.from_coco(annotations, size, category_ids), size))

    def to_polygons(self) -> list[list[Polygon]]:
        """Outlines of each instance's parts along the edges of pixels, with their holes."""
        return [one.polygons for one in self.to_objects()]

    def to_objects(self) -> list[LabelledObject]:
        """Class, score and `to_polygons` of each instance."""
        instances = self.to_instances()
        return label_formats.objects_of_arrays(instances.arrays(), instances.size)

    def to_yolo(self, tolerance: float = 0) -> list[str]:
        """Lines of YOLO's label file, one for each instance: class, then corners relative to the image's size.

        Parts and holes are joined to one ring by bridges without width.

        Args:
            tolerance: leave corners out that are so near to the outline without them, in pixels; 0 leaves out none.
        """
        return label_formats.yolo_lines(label_formats.with_fewer_corners(self.to_objects(), tolerance), self._size())

    def to_labelme(self, class_names: Sequence[str], image_path: str, tolerance: float = 0) -> dict[str, Any]:
        """Content of labelme's JSON file, with polygons; holes are joined to them by bridges without width.

        Args:
            class_names: label of each class.
            image_path: path of the image relative to the JSON file.
            tolerance: as of `to_yolo`.
        """
        objects = label_formats.with_fewer_corners(self.to_objects(), tolerance)
        return label_formats.labelme_document(objects, class_names, image_path, self._size())

    def to_geojson(
        self, class_names: Sequence[str], transform: Transform | None = None, crs: str | None = None,
        tolerance: float = 0,
    ) -> dict[str, Any]:
        """GeoJSON with a polygon or multipolygon for each instance, holes included.

        Args:
            class_names: name of each class, the property ``class``.
            transform, crs: as of `label_formats.geojson_document`; without them coordinates are pixels.
            tolerance: as of `to_yolo`.
        """
        objects = label_formats.with_fewer_corners(self.to_objects(), tolerance)
        return label_formats.geojson_document(objects, class_names, transform, crs)

    def _size(self) -> tuple[int, int]:
        """Height, width."""
        raise NotImplementedError

    @classmethod
    def from_polygons(
        cls: type[ResultT],
        polygons: Sequence[Sequence[Polygon]],
        labels: Sequence[int],
        size: tuple[int, int],
        scores: Sequence[float] | None = None,
    ) -> ResultT:
        """Inverse of `to_polygons`: pixels whose centre is inside; polygons may have any corners."""
        check(len(labels) == len(polygons), "labels", f"{len(polygons)} classes", len(labels))
        masks = np.zeros((len(polygons), *size), np.bool_)
        for mask, parts in zip(masks, polygons, strict=True):
            mask[:] = exchange.mask_of_polygons(parts, size)
        values = np.ones(len(masks)) if scores is None else scores
        return cls.from_instances(InstanceResult(*exchange.instances_of_masks(labels, values, masks), size))


class _Map(_Exchanged):
    """A result with a map, in which each instance has a value."""

    def to_instances(self) -> InstanceResult[Any]:
        """One instance for each segment, in their order; for each class of a semantic result, with score 1."""
        columns = self._columns()
        return InstanceResult(*exchange.instances_of_map(columns), columns.value_map.shape)

    def to_coco(
        self, image_id: int | str = 0, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """As of all results; encoded in one pass over the map."""
        return exchange.map_to_coco(self._columns(), image_id, category_ids)

    def to_objects(self) -> list[LabelledObject]:
        """As of all results, without a mask of the map's size for each."""
        return label_formats.objects_of_map(self._columns())

    def _columns(self) -> exchange.MapColumns:
        raise NotImplementedError


@dataclass
class SemanticResult(_Map, Generic[ArrayT]):
    """Class of every pixel."""

    labels: ArrayT  # [H, W] uint8 (K <= 255) or int16
    scores: ArrayT | None = None  # [H, W] float32, sum over queries of the winning class

    def _size(self) -> tuple[int, int]:
        height, width = self.labels.shape  # type: ignore[attr-defined]
        return height, width

    def _columns(self) -> exchange.MapColumns:
        """One instance of score 1 for each class of the map, in ascending order."""
        labels = as_array(self.labels)
        classes = np.unique(labels[labels >= 0])
        return exchange.MapColumns(classes, np.ones(len(classes)), classes, labels)

    @classmethod
    def from_instances(cls, instances: InstanceResult[Any]) -> SemanticResult[Any]:
        """Class of the best instance at each pixel; pixels of none are `VOID`, in int16."""
        labels, _, packed, _ = instances.arrays()
        result = np.full(instances.size, VOID, np.int16)
        for label, mask in zip(labels[::-1], exchange.unpack(packed, instances.size[1])[::-1], strict=True):
            result[mask] = label
        return SemanticResult[Any](result)


@dataclass
class PanopticResult(_Map, Generic[ArrayT]):
    """Segments that do not overlap. Ids count from 1; pixels without a segment are `VOID`."""

    id_map: ArrayT  # [H, W] int32
    segments: list[SegmentInfo] = field(default_factory=list)

    def _size(self) -> tuple[int, int]:
        height, width = self.id_map.shape  # type: ignore[attr-defined]
        return height, width

    def _columns(self) -> exchange.MapColumns:
        """One instance for each segment, in their order."""
        id_map = as_array(self.id_map)
        ids = np.array([segment.id for segment in self.segments], np.int64)
        categories = np.array([segment.category for segment in self.segments], np.int64)
        return exchange.MapColumns(categories, np.array([s.score for s in self.segments]), ids, id_map)

    @classmethod
    def from_instances(cls, instances: InstanceResult[Any]) -> PanopticResult[Any]:
        """A segment, of a thing, for each instance that has pixels of its own."""
        labels, scores, packed, _ = instances.arrays()
        id_map = np.full(instances.size, VOID, np.int32)
        masks = exchange.unpack(packed, instances.size[1])
        for number in range(len(masks), 0, -1):
            id_map[masks[number - 1]] = number
        areas = np.bincount(id_map[id_map > 0], minlength=len(masks) + 1).tolist()
        return PanopticResult[Any](id_map, [
            SegmentInfo(number, int(labels[number - 1]), score=float(scores[number - 1]), area=areas[number])
            for number in range(1, len(masks) + 1) if areas[number] > 0
        ])  # fmt: skip


@dataclass
class InstanceResult(_Exchanged, Generic[ArrayT]):
    """Scored instances, best first; they may overlap."""

    labels: ArrayT  # [N] int64
    scores: ArrayT  # [N] float32
    masks: ArrayT  # [N, H, ceil(W/8)] uint8, 8 pixels to a byte, least significant bit first
    boxes: ArrayT  # [N, 4] float32: x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros for an empty mask
    size: tuple[int, int]  # H, W

    def arrays(self) -> exchange.InstanceArrays:
        """The tensors as NumPy arrays on the host."""
        return exchange.InstanceArrays(*map(as_array, (self.labels, self.scores, self.masks, self.boxes)))

    def to_instances(self) -> InstanceResult[ArrayT]:
        """The result itself."""
        return self

    def _size(self) -> tuple[int, int]:
        return self.size

    @classmethod
    def from_instances(cls, instances: InstanceResult[Any]) -> InstanceResult[Any]:
        """The instances themselves."""
        return cls(instances.labels, instances.scores, instances.masks, instances.boxes, instances.size)


Result = SemanticResult[Any] | PanopticResult[Any] | InstanceResult[Any]


def unpack_mask_array(
    packed: np.ndarray,  # [..., H, ceil(W/8)] uint8
    width: int,
) -> np.ndarray:
    """Masks of an `InstanceResult` of arrays -> bool [..., H, width]; for tensors see `structures.unpack_masks`."""
    return np.unpackbits(packed, axis=-1, count=width, bitorder="little").view(np.bool_)
