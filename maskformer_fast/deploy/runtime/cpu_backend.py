"""Backend of the CPU: a library such as onnxruntime runs the graph, the package's C++ operators do the rest.

A few threads work on batches, each on one batch from pixels to results. The library, Pillow and the operators release
Python's lock. So while the network runs for one batch, the next is prepared and the one before is post-processed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from maskformer_fast.config import TASKS, Task
from maskformer_fast.core.checks import check
from maskformer_fast.core.image_resize import resize_picture
from maskformer_fast.core.results import Result
from maskformer_fast.core.stages import StageSeconds, Stopwatch
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.bundle.manifest import Engine, Graph, expect
from maskformer_fast.deploy.runtime.cpu_postprocess import CpuPostprocessor, ImageLogits
from maskformer_fast.deploy.runtime.cpu_session import FLAVOUR, INPUT, OUTPUTS, CpuSession, OpenSession
from maskformer_fast.deploy.runtime.onnxruntime_session import OnnxruntimeSession

_Outcome = tuple[list[Result], StageSeconds]


class CpuBackend:
    """A `maskformer_fast.deploy.runtime.backend.Backend` that needs no GPU."""

    max_tasks = len(TASKS)
    graph_obstacle: str | None = None

    def __init__(
        self,
        bundle: Bundle,
        in_flight: int,
        threads: int | None = None,
        open_session: OpenSession = OnnxruntimeSession,
        engine: Engine | None = None,
        streams: int = 1,
    ) -> None:
        """Load the graph.

        Args:
            bundle: the bundle.
            in_flight: number of batches that are worked on at once.
            threads: number of threads; None takes OMP_NUM_THREADS, or the cores of this process.
            open_session: the library that runs the graph.
            engine: one of OpenVINO's to run in place of the graph.
            streams: number of batches among which the threads are divided, where the library can; a batch has one
                thread at least.

        Raises:
            BundleError: the bundle has no graph of the flavour ``raw``, or one that the library refuses.
            ModuleNotFoundError: the library is not installed.
            ImportError: the package's extension is not built.
        """
        check(in_flight > 0, "in_flight", "> 0", in_flight)
        check(threads is None or threads > 0, "threads", "> 0", threads)
        manifest = bundle.manifest
        threads = threads or default_threads()
        streams = min(streams, threads)
        self._preprocess = manifest.preprocess
        self._input = np.dtype(np.float32 if manifest.channels else np.uint8)
        self._postprocess = CpuPostprocessor(manifest.postprocess, manifest.metadata.is_thing, threads // streams)
        expect(FLAVOUR in manifest.graphs, "graphs", f"one of the flavour {FLAVOUR}", sorted(manifest.graphs))
        graph = manifest.graphs[FLAVOUR]
        self._batch, self._size = _fixed_sizes(graph)
        self._queries, self._classes = manifest.num_queries, manifest.num_classes
        files = (graph.file, None) if engine is None else (engine.file, engine.weights)
        content, weights = (None if name is None else bundle.read(name) for name in files)
        assert content is not None
        self._session = open_session(content, threads, weights, streams)
        _check_session(self._session, manifest.channels, self._queries, self._classes)
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="maskformer_fast")
        self._tickets = itertools.count()
        self._batches: dict[int, Future[_Outcome]] = {}

    def max_batch(self, height: int, width: int, task: Task) -> int:
        """One, unless the graph was exported for a batch: on a CPU, frames at once take as long as one by one."""
        return self._batch or 1

    def submit(self, frames: Sequence[np.ndarray], *tasks: Task) -> int:
        """Begin a batch of frames of one size -> a ticket."""
        ticket = next(self._tickets)
        self._batches[ticket] = self._pool.submit(self._run, list(frames), tasks)
        return ticket

    def collect(self, ticket: int) -> _Outcome:
        """Wait for a batch -> results, seconds of the stages. Raises the batch's error."""
        return self._batches.pop(ticket).result()

    def close(self) -> None:
        """Wait for batches that have begun and drop the others."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._batches.clear()

    def _run(self, frames: list[np.ndarray], tasks: Sequence[Task]) -> _Outcome:
        stopwatch = Stopwatch()
        images = self._prepare(frames)
        stopwatch.lap("preprocess")
        class_logits, mask_logits = self._session.run(images)
        stopwatch.lap("network")
        self._check_outputs(class_logits, mask_logits, len(images))
        size = (frames[0].shape[0], frames[0].shape[1])
        extent = self._extent(images.shape[2:], mask_logits.shape[2:])
        results = [
            self._postprocess(ImageLogits(class_logits[row], mask_logits[row], extent, size), task)
            for task in tasks
            for row in range(len(frames))
        ]
        stopwatch.lap("postprocess")
        return results, stopwatch.stage_seconds()

    def _prepare(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Resize frames and fill the graph's batch -> uint8 [B, 3, h, w], or bands float32 [B, C, h, w]."""
        most = self._batch or len(frames)
        check(0 < len(frames) <= most, "frames", f"1 to {most} of them", len(frames))
        sizes = {frame.shape for frame in frames}
        check(len(sizes) == 1, "frames", "frames of one size", sorted(sizes))
        images: np.ndarray | None = None
        for row, frame in enumerate(frames):
            image = resize_picture(frame, self._preprocess.short_edge, self._preprocess.max_size)
            if images is None:
                self._check_size(image, frame)
                images = np.zeros((most, image.shape[2], *image.shape[:2]), dtype=self._input)
            images[row] = image.transpose(2, 0, 1)
        assert images is not None  # there is a frame
        return images

    def _check_size(self, image: np.ndarray, frame: np.ndarray) -> None:
        for got, expected in zip(image.shape, self._size, strict=False):
            check(expected in (0, got), "frames", f"a size that becomes {self._size} (height, width; 0: any), which "
                  "the graph was exported for", f"{frame.shape[:2]}, which becomes {image.shape[:2]}")

    def _check_outputs(self, class_logits: np.ndarray, mask_logits: np.ndarray, batch: int) -> None:
        """Raise `BundleError` unless the outputs are as the manifest says: C++ reads them by these sizes."""
        rows = (batch, self._queries)
        fits = class_logits.shape == (*rows, self._classes + 1) and class_logits.dtype == np.float32
        expect(fits, f"graphs.{FLAVOUR}, class_logits", f"float32 {(*rows, self._classes + 1)}",
               f"{class_logits.dtype} {class_logits.shape}")
        fits = mask_logits.ndim == 4 and mask_logits.shape[:2] == rows and mask_logits.size > 0
        expect(fits and mask_logits.dtype == np.float32, f"graphs.{FLAVOUR}, mask_logits",
               f"float32 [{batch}, {self._queries}, h, w]", f"{mask_logits.dtype} {mask_logits.shape}")

    def _extent(self, size: tuple[int, ...], mask_size: tuple[int, ...]) -> tuple[float, float]:
        """Height and width of the images in mask pixels: the graph pads at the bottom and the right."""
        step = max(1, self._preprocess.size_divisibility)
        pairs = zip(size, mask_size, strict=True)
        height, width = (length * cells / (-(-length // step) * step) for length, cells in pairs)
        return height, width


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set, as in other libraries of this kind, else the cores that this process may use."""
    number = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if number.isdecimal() and int(number) > 0:
        return int(number)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fixed_sizes(graph: Graph) -> tuple[int, tuple[int, int]]:
    """Batch, (height, width) that the graph takes; 0 stands for any."""
    shape = graph.inputs[0].shape if graph.inputs else ()
    expect(len(shape) == 4, f"graphs.{FLAVOUR}.inputs", "images [B, C, H, W]", graph.inputs)
    batch, _, height, width = (0 if isinstance(size, str) else size for size in shape)
    return batch, (height, width)


def _check_session(session: CpuSession, channels: int, queries: int, classes: int) -> None:
    """Raise `BundleError` unless inputs and outputs have the names, types and known sizes that the manifest says."""
    inputs, outputs = ([tensor.name for tensor in part] for part in (session.inputs, session.outputs))
    expect(inputs == [INPUT] and set(OUTPUTS) <= set(outputs), f"graphs.{FLAVOUR}",
           f"a graph from {INPUT} to {' and '.join(OUTPUTS)}", f"one from {inputs} to {outputs}")  # fmt: skip
    expected = {
        INPUT: ("tensor(float)" if channels else "tensor(uint8)", (None, channels or 3, None, None)),
        OUTPUTS[0]: ("tensor(float)", (None, queries, classes + 1)),
        OUTPUTS[1]: ("tensor(float)", (None, queries, None, None)),
    }
    for tensor in (*session.inputs, *session.outputs):
        if tensor.name not in expected:
            continue
        kind, sizes = expected[tensor.name]
        expect(tensor.type == kind, f"graphs.{FLAVOUR}, {tensor.name}", kind, tensor.type)
        shape = tensor.shape or sizes  # there are no sizes for an output of any rank
        known = [size if isinstance(size, int) else None for size in shape]
        fits = len(known) == len(sizes) and all(
            size is None or size == wanted or (wanted is None and size > 0)
            for size, wanted in zip(known, sizes, strict=True)
        )
        expect(fits, f"graphs.{FLAVOUR}, {tensor.name}", f"shape {sizes} (None: any)", tuple(shape))
