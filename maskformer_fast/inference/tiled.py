"""Segmentation of pictures of any size by overlapping tiles.

Each tile is segmented as an image of its own, resized as the test configuration says. Semantic labels come from the
weighted mean of the tiles' class scores (`inference.tile_scores`), panoptic segments and instances are joined where
they overlap (`inference.tile_segments`). Arrays of tiles are kept in a dictionary or, to bound memory and to resume, in
files (`TileFiles`); of semantic results only those of tiles whose neighbours are not done.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from maskformer_fast.config import Task, TestConfig
from maskformer_fast.core.exchange import as_array, pack
from maskformer_fast.core.files import atomic_write
from maskformer_fast.core.metadata import Metadata, SegmentInfo
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult
from maskformer_fast.inference.tile_grid import Block, Box, TileGrid
from maskformer_fast.inference.tile_scores import block_labels, score_arrays
from maskformer_fast.inference.tile_segments import (
    Arrays,
    CroppedInstance,
    merge_instances,
    merge_panoptic,
    panoptic_arrays,
)
from maskformer_fast.ops.semantic import label_dtype

Store = MutableMapping[str, Arrays]
"""Arrays of tiles, by task and number."""
Progress = Callable[[int, int], object]
"""Gets the number of tiles that are done since its last call, and that of all."""
ArrayMaker = Callable[[str, tuple[int, int], "np.dtype[Any]"], np.ndarray]
"""Makes an array from its name, size and dtype."""


class Picture(Protocol):
    """A picture that can be read in parts."""

    @property
    def size(self) -> tuple[int, int]:
        """Height, width."""

    def read(self, box: Box) -> np.ndarray:
        """Pixels of a rectangle -> uint8 [h, w, 3] RGB, or [h, w, C] of bands."""


class TiledPredictor(Protocol):
    """What segments tiles: `Predictor`, or a bundle's predictor."""

    @property
    def metadata(self) -> Metadata: ...

    @property
    def test(self) -> TestConfig: ...

    @property
    def channels(self) -> int: ...

    def infer(self, images: Sequence[np.ndarray], tasks: Sequence[Task]) -> dict[Task, list[Result]]: ...


@runtime_checkable
class ScoringPredictor(TiledPredictor, Protocol):
    """A predictor that gives the network's predictions too."""

    @property
    def device(self) -> torch.device: ...

    def run_network(self, images: Sequence[np.ndarray]) -> Any: ...

    def postprocess(
        self, predictions: Any, sizes: Sequence[tuple[int, int]], tasks: Sequence[Task]
    ) -> dict[Task, list[Result]]: ...


class ArrayPicture:
    """A picture in memory."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]

    def read(self, box: Box) -> np.ndarray:
        return np.ascontiguousarray(self.image[box.slices])


class TileFiles(MutableMapping[str, Arrays]):
    """A `Store` in a folder, a file an entry, each written completely or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"

    def __getitem__(self, key: str) -> Arrays:
        if key not in self:
            raise KeyError(key)
        path = self._path(key)
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except Exception as error:  # whatever a damaged file causes
            raise ValueError(f"{path}: expected arrays of an earlier run, which cannot be read; without the folder "
                             f"{self.folder} the picture begins anew") from error

    def __setitem__(self, key: str, arrays: Arrays) -> None:
        # Logits hardly shrink by compression, which would take longer than the network.
        save = np.savez if key.startswith("semantic") else np.savez_compressed
        with atomic_write(self._path(key)) as file:
            save(file, **arrays)  # type: ignore[arg-type]

    def __delitem__(self, key: str) -> None:
        os.unlink(self._path(key))

    def __contains__(self, key: object) -> bool:
        return self._path(str(key)).is_file()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in self.folder.glob("*.npz"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def is_tiled(test: TestConfig, size: tuple[int, int]) -> bool:
    """Whether an image of a height and width is larger than a tile, if there are tiles."""
    return test.tile is not None and max(size) > test.tile


def tile_grid(test: TestConfig, size: tuple[int, int]) -> TileGrid:
    """Tiles of an image of a height and width."""
    assert test.tile is not None
    return TileGrid(*size, test.tile, test.tile_overlap)


class TiledSegmentation:
    """Results of one picture: `run` computes the tiles that are not in the store, then the properties are valid."""

    def __init__(
        self,
        predictor: TiledPredictor,
        picture: Picture,
        tasks: Sequence[Task],
        store: Store,
        make_array: ArrayMaker = lambda name, size, dtype: np.zeros(size, dtype),
    ) -> None:
        """Compute nothing yet.

        Args:
            store: arrays of tiles; those of an earlier run of the same picture and options are used.
            make_array: makes, or opens again, the array of a task's result: ``labels`` or ``id_map``.
        """
        self.predictor, self.picture, self.tasks, self.store = predictor, picture, tasks, store
        self.grid = tile_grid(predictor.test, picture.size)
        self._network = predictor if isinstance(predictor, ScoringPredictor) else None
        self.labels: np.ndarray | None = None
        """Semantic: class of each pixel [H, W], uint8 or int16."""
        self.id_map: np.ndarray | None = None
        """Panoptic: id of each pixel's segment [H, W] int32."""
        self.segments: list[SegmentInfo] = []
        """Panoptic: the segments."""
        self.instances: list[CroppedInstance] = []
        """Instances, best first."""
        # A bundle gives no scores: each pixel has the label of the tile whose middle is nearest.
        owned = [Block(box, (number,)) for number, box in enumerate(self.grid.owned)]
        self._blocks = owned if self._network is None else self.grid.blocks
        self._open_blocks = Counter(number for block in self._blocks for number in block.tiles)
        self._labelled: set[int] = set()
        if "semantic" in tasks:
            dtype = torch.empty(0, dtype=label_dtype(predictor.metadata.num_classes)).numpy().dtype
            self.labels = make_array("labels", picture.size, dtype)
        if "panoptic" in tasks:
            self.id_map = make_array("id_map", picture.size, np.dtype(np.int32))

    def run(self, progress: Progress = lambda count, total: None) -> None:
        """Segment all tiles and merge them."""
        test, boxes = self.predictor.test, self.grid.boxes
        remaining = [number for number in range(len(boxes)) if not self._is_stored(number)]
        progress(len(boxes) - len(remaining), len(boxes))
        if "semantic" in self.tasks:
            self._label_blocks(range(len(boxes)))  # of an earlier run
        for start in range(0, len(remaining), test.batch_size):
            batch = remaining[start : start + test.batch_size]
            self._segment(batch)
            if "semantic" in self.tasks:
                self._label_blocks(batch)
            progress(len(batch), len(boxes))
        is_thing = self.predictor.metadata.is_thing
        if self.id_map is not None:
            self.segments = merge_panoptic(self.grid, lambda n: self.store[f"panoptic-{n}"], is_thing, self.id_map)
        if "instance" in self.tasks:
            self.instances = merge_instances(self.grid, lambda n: self.store[f"instance-{n}"])

    def _is_stored(self, number: int) -> bool:
        return all(f"{task}-{number}" in self.store for task in self.tasks)

    def _segment(self, batch: Sequence[int]) -> None:
        """Segment some tiles and store what is kept of them."""
        images = [self.picture.read(self.grid.boxes[number]) for number in batch]
        scores: list[Arrays] = [{} for _ in batch]
        if self._network is not None:
            predictions = self._network.run_network(images)
            results = self._network.postprocess(predictions, [image.shape[:2] for image in images], self.tasks)
            if "semantic" in self.tasks:
                scores = score_arrays(predictions)
        else:
            results = self.predictor.infer(images, self.tasks)
        for task in self.tasks:
            for number, result, kept in zip(batch, results[task], scores, strict=True):
                self.store[f"{task}-{number}"] = _arrays_of(result, kept)

    def _label_blocks(self, numbers: Sequence[int]) -> None:
        """Label the blocks of some tiles of which all tiles are done, and drop what no other block needs.

        The entry of a tile without blocks to label is empty, which tells a later run that they are labelled.
        """
        assert self.labels is not None
        touched, loaded = set(numbers), dict[int, Arrays]()
        for index, block in enumerate(self._blocks):
            ready = all(f"semantic-{number}" in self.store for number in block.tiles)
            if index in self._labelled or not ready or touched.isdisjoint(block.tiles):
                continue
            for number in block.tiles:
                if number not in loaded:
                    loaded[number] = self.store[f"semantic-{number}"]
            tiles = [loaded[number] for number in block.tiles]
            if all(tiles):
                self.labels[block.box.slices] = self._block_labels(block, tiles)
            self._labelled.add(index)
            for number in block.tiles:
                self._open_blocks[number] -= 1
        if isinstance(self.labels, np.memmap):
            self.labels.flush()
        for number in loaded:
            if self._open_blocks[number] == 0 and loaded[number]:
                self.store[f"semantic-{number}"] = {}

    def _block_labels(self, block: Block, tiles: Sequence[Arrays]) -> np.ndarray:
        if len(block.tiles) == 1:
            return tiles[0]["labels"][block.box.within(self.grid.boxes[block.tiles[0]])]
        assert self._network is not None  # else a block has one tile
        return block_labels(self.grid, block, tiles, self.predictor.test.tile_blend, self._network.device)


def _arrays_of(result: Result, scores: Arrays) -> Arrays:
    """What is kept of a tile's result; of a semantic one with the scores, if there are any."""
    if isinstance(result, SemanticResult):
        return {"labels": as_array(result.labels), **scores}
    if isinstance(result, PanopticResult):
        return panoptic_arrays(as_array(result.id_map), result.segments)
    labels, confidences, masks, boxes = result.arrays()
    return {"labels": labels, "scores": confidences, "masks": masks, "boxes": boxes}


def infer_tiled(predictor: TiledPredictor, image: np.ndarray, tasks: Sequence[Task]) -> dict[Task, Result]:
    """Each task's result for an image in memory, [H, W, 3] uint8 RGB, as tensors on the CPU.

    Masks of instances are of the image's size, which takes a lot of memory for many instances of a large image:
    `TiledSegmentation.instances` has them by their boxes.
    """
    tiled = TiledSegmentation(predictor, ArrayPicture(image), tasks, {})
    tiled.run()
    results: dict[Task, Result] = {}
    for task in tasks:
        if task == "semantic":
            assert tiled.labels is not None
            results[task] = SemanticResult(torch.from_numpy(tiled.labels))
        elif task == "panoptic":
            assert tiled.id_map is not None
            results[task] = PanopticResult(torch.from_numpy(tiled.id_map), tiled.segments)
        else:
            results[task] = full_size(tiled.instances, tiled.picture.size)
    return results


def with_tile(test: TestConfig, tile: int) -> TestConfig:
    """The configuration with another side of tiles.

    Raises:
        TypeError, ValueError: something that is no side in pixels.
    """
    if isinstance(tile, bool) or not isinstance(tile, Integral):
        raise TypeError(f"tile: expected a whole number of pixels or None, got {tile!r}")
    return replace(test, tile=int(tile))


def infer_some_tiled(
    predictor: TiledPredictor, images: Sequence[np.ndarray], tasks: Sequence[Task]
) -> dict[Task, list[Result]] | None:
    """Each task's results for images of which one or more are cut into tiles; None if none is."""
    if not any(is_tiled(predictor.test, image.shape[:2]) for image in images):
        return None
    results: dict[Task, list[Result]] = {task: [] for task in tasks}
    for image in images:
        if is_tiled(predictor.test, image.shape[:2]):
            of_image = infer_tiled(predictor, image, tasks)
        else:
            of_image = {task: found[0] for task, found in predictor.infer([image], tasks).items()}
        for task in tasks:
            results[task].append(of_image[task])
    return results


def full_size(instances: Sequence[CroppedInstance], size: tuple[int, int]) -> InstanceResult[torch.Tensor]:
    """Instances with masks of a picture's height and width."""
    height, width = size
    masks = np.zeros((len(instances), height, -(-width // 8)), np.uint8)
    boxes = np.zeros((len(instances), 4), np.float32)
    for packed, row, instance in zip(masks, boxes, instances, strict=True):
        top, left, bottom, right = instance.box
        first = left // 8
        bits = np.pad(instance.mask, ((0, 0), (left - 8 * first, 0)))
        packed[top:bottom, first : -(-right // 8)] = pack(bits)
        row[:] = left, top, right, bottom
    labels = torch.tensor([instance.label for instance in instances], dtype=torch.int64)
    scores = torch.tensor([instance.score for instance in instances], dtype=torch.float32)
    return InstanceResult(labels, scores, torch.from_numpy(masks), torch.from_numpy(boxes), (height, width))
