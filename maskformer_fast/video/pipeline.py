"""From a video to results of its frames: decoding, inference and the caller's work at the same time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import TracebackType

import numpy as np

from maskformer_fast.config import Task
from maskformer_fast.core.results import InstanceResult, Result, SemanticResult
from maskformer_fast.inference.batches import infer_each
from maskformer_fast.inference.bundle_predictor import BundlePredictor
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.video.channel import Channel, Closed
from maskformer_fast.video.options import VideoOptions
from maskformer_fast.video.reader import Picture, Sound, VideoReader
from maskformer_fast.video.sources import Source, source_of
from maskformer_fast.video.tracker import Tracker


@dataclass
class SegmentedFrame:
    """Results of a frame."""

    index: int
    """Number of the frame from the start time, also counting frames that are not segmented."""
    time: float
    """Time stamp in seconds: a file's as stored, a camera's or stream's from its first frame."""
    image: np.ndarray  # [H, W, 3] uint8 RGB, upright
    results: dict[Task, Result]
    """Result of each task, on the host; none if inference failed for the frame."""
    tracks: dict[Task, list[int]]
    """Track id of each segment of the panoptic result, and of each instance."""
    offset: Fraction
    """Seconds from the start of what is segmented."""
    error: Exception | None = None
    """Reason why there are no results."""


def segment_video(
    predictor: Predictor | BundlePredictor,
    source: str | os.PathLike[str],
    tasks: Sequence[Task] = ("panoptic",),
    options: VideoOptions | None = None,
) -> Iterator[SegmentedFrame]:
    """Segment a video -> its frames with results and track ids, one after another, in constant memory.

    A thread decodes frames and another runs the predictor, while the caller works on the frame before. Batches have the
    predictor's ``test.batch_size``. A damaged frame is left out; a stream that breaks off is taken up again.

    Args:
        source: path of a file, a camera (``/dev/video0``, ``camera:0``) or an address (``rtsp://...``).
        tasks: any of semantic, panoptic, instance.

    Raises:
        VideoError: the source cannot be opened, or has no video stream.
        ModuleNotFoundError: PyAV is not installed.
        ValueError: a task that the predictor cannot do.
    """
    for task in tasks:
        predictor.check_task(task)
    reader = VideoReader(source_of(source), options or VideoOptions(), with_sound=False)
    return _frames(predictor, reader, tasks)


def _frames(
    predictor: Predictor | BundlePredictor, reader: VideoReader, tasks: Sequence[Task]
) -> Iterator[SegmentedFrame]:
    with Pipeline(predictor, reader, tasks) as items:
        for item in items:
            if isinstance(item, SegmentedFrame):
                yield item


class Pipeline:
    """Frames with results, and packets of sound, of an open video, in order. A context manager; one iteration.

    A live source does not wait: frames that come faster than they are segmented are dropped, the oldest first.

    Attributes:
        dropped: number of such frames.
        failed: number of frames for which inference failed.
    """

    def __init__(self, predictor: Predictor | BundlePredictor, reader: VideoReader, tasks: Sequence[Task]) -> None:
        self.reader, self.tasks = reader, tuple(tasks)
        self.dropped = self.failed = 0
        self._predictor = predictor
        self._batch = predictor.test.batch_size
        # Sound packets, two a frame or so, take places too.
        self._decoded: Channel[Picture | Sound] = Channel(4 * self._batch + 16)
        self._done: Channel[SegmentedFrame | Sound] = Channel(2 * self._batch + 8)
        self._errors: list[BaseException] = []
        self._trackers = {task: Tracker(reader.options.gap) for task in tasks if task != "semantic"}
        self._threads = [threading.Thread(target=self._guarded, args=(work, channel), name=f"video-{name}", daemon=True)
                         for name, work, channel in (("decode", self._decode, self._decoded),
                                                     ("infer", self._infer, self._done))]  # fmt: skip

    def __enter__(self) -> Pipeline:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the threads, after the batch that is under way, and close the video."""
        self.reader.stop()
        self._decoded.close()
        self._done.close()
        for thread in self._threads:
            thread.join()
        self.reader.close()

    def __iter__(self) -> Iterator[SegmentedFrame | Sound]:
        """Frames and sound. Raises what a thread raised, which no video's content causes."""
        while True:
            try:
                item = self._done.get()
            except Closed:
                if self._errors:
                    raise self._errors[0] from None
                return
            if isinstance(item, SegmentedFrame):
                if item.error is not None:
                    self.failed += 1
                for task, tracker in self._trackers.items():
                    if task in item.results:
                        item.tracks[task] = tracker.update(item.results[task])  # type: ignore[arg-type]
            yield item

    def finish(self) -> None:
        """End the iteration with the frames that are done, at once; a signal's handler may call it."""
        self.reader.stop()
        self._decoded.end()
        self._done.end()

    def _guarded(self, work: object, channel: Channel[object]) -> None:
        """Run a thread's work; its error is kept for the reader of the results."""
        try:
            work()  # type: ignore[operator]
        except Closed:
            pass
        except BaseException as error:
            self._errors.append(error)
        finally:
            channel.end()

    def _decode(self) -> None:
        live = self.reader.source.is_live
        for item in self.reader:
            if live:
                is_picture = isinstance(item, Picture)
                if self._decoded.put_newest(item, lambda old: isinstance(old, Picture)) and is_picture:
                    self.dropped += 1
            else:
                self._decoded.put(item)

    def _infer(self) -> None:
        """Run batches. Sound keeps its place among the frames."""
        live = self.reader.source.is_live
        group: list[Picture | Sound] = []
        waiting = 0
        while True:
            try:
                item = self._decoded.get()
            except Closed:
                break
            group.append(item)
            waiting += isinstance(item, Picture)
            # A live source's frame does not wait for others.
            if waiting == self._batch or (waiting and live and self._decoded.is_empty()) or len(group) > 64:
                self._run(group)
                group, waiting = [], 0
        self._run(group)

    def _run(self, group: Sequence[Picture | Sound]) -> None:
        images = [item.image for item in group if isinstance(item, Picture)]
        results = iter(infer_each(self._predictor, images, self.tasks) if images else ())
        for item in group:
            if isinstance(item, Sound):
                self._done.put(item)
                continue
            result = next(results)
            error = result if isinstance(result, Exception) else None
            of_tasks = {} if isinstance(result, Exception) else {task: self._kept(one) for task, one in result.items()}
            self._done.put(SegmentedFrame(item.number, item.time, item.image, of_tasks, {}, item.offset, error))

    def _kept(self, result: Result) -> Result:
        """A result without instances below the least score."""
        if isinstance(result, InstanceResult):
            keep = result.scores >= self.reader.options.min_score
            parts = {name: getattr(result, name)[keep] for name in ("labels", "scores", "masks", "boxes")}
            return replace(result, **parts)
        if isinstance(result, SemanticResult) and result.scores is not None:
            return replace(result, scores=None)
        return result


def open_pipeline(
    predictor: Predictor | BundlePredictor, source: Source, tasks: Sequence[Task], options: VideoOptions
) -> Pipeline:
    """The pipeline of a source, with its sound. Raises ``VideoError`` for one that cannot be opened."""
    return Pipeline(predictor, VideoReader(source, options), tasks)
