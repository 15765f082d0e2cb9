"""Videos of the command ``predict``: overlay videos and JSON lines below its output folder."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from tqdm import tqdm

from maskformer_fast.config import Task
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import atomic_write
from maskformer_fast.core.image_files import result_names
from maskformer_fast.inference.bundle_predictor import BundlePredictor
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.output import visualize
from maskformer_fast.video.lines import frame_line
from maskformer_fast.video.options import VideoOptions
from maskformer_fast.video.pipeline import Pipeline, SegmentedFrame, open_pipeline
from maskformer_fast.video.reader import Sound, VideoError
from maskformer_fast.video.sources import Source, is_result_lines
from maskformer_fast.video.writer import VideoWriter

logger = logging.getLogger(__name__)

_MAX_HELD = 4096
"""Packets of sound that are kept until the first picture has the size of the overlay videos."""


def predict_videos(
    predictor: Predictor | BundlePredictor,
    videos: Sequence[Source],
    tasks: Sequence[Task],
    options: VideoOptions,
    folder: Path,
    overlays: bool = True,
) -> list[str]:
    """Segment videos one after another -> a line for each one that failed or of which something is missing.

    Writes ``NAME.jsonl`` (`lines.frame_line`) and, with ``overlays``, ``NAME_TASK.mp4`` into the folder. Files are
    renamed when they are complete. SIGINT (Ctrl-C) and SIGTERM complete the files with what was done.

    Raises:
        KeyboardInterrupt: after such a signal, when the files are complete.
        OSError: a file cannot be written.
        ValueError: the folder has files of a result's name that are not results.
    """
    names = result_names([video.name for video in videos])
    paths = [folder / f"{name}.jsonl" for name in names]
    for name, path in zip(names, paths, strict=True):
        overlay_paths = [folder / f"{name}_{task}.mp4" for task in tasks] if overlays else []
        taken = [other for other in (path, *overlay_paths) if other.exists()]
        check(not taken or is_result_lines(path), "output", "a folder without other files of a video's results; choose "
              "an empty one", str(taken[0]) if taken else "")
    problems: list[str] = []
    for video, path in zip(videos, paths, strict=True):
        with _stop_signals() as stop:
            try:
                problem = _predict_video(predictor, video, tasks, options, path, overlays, stop)
            except VideoError as error:
                problem = str(error)
        if problem is not None:
            problems.append(problem)
            logger.error("%s", problem)
        if stop.received:
            raise KeyboardInterrupt
    return problems


def _predict_video(
    predictor: Predictor | BundlePredictor,
    video: Source,
    tasks: Sequence[Task],
    options: VideoOptions,
    lines_path: Path,
    overlays: bool,
    stop: _Stop,
) -> str | None:
    """Segment one video -> what is missing of it, if anything."""
    pipeline = open_pipeline(predictor, video, tasks, options)
    stop.then = pipeline.finish
    written = 0
    with ExitStack() as files:
        # The pipeline ends first, then files are renamed; after an error they are removed.
        lines = files.enter_context(atomic_write(lines_path))
        output = _Overlays(files, lines_path, tasks if overlays else (), predictor.metadata, pipeline)
        total = _expected_frames(pipeline)
        with pipeline as items, tqdm(total=total, unit="frame", desc=video.name.rstrip("."), dynamic_ncols=True) as bar:
            for item in items:
                if stop.received:
                    break
                if isinstance(item, Sound):
                    output.write_sound(item)
                    continue
                lines.write(frame_line(item, predictor.metadata))
                output.write(item)
                written += 1
                bar.update()
        if not written:
            raise VideoError(f"{video.shown}: {pipeline.reader.problem or 'no frame between start and end'}")
        output.close()
    return _summary(video, pipeline, written)


def _summary(video: Source, pipeline: Pipeline, written: int) -> str | None:
    """Print what became of the frames -> what is missing, if anything."""
    counts = pipeline.reader.counts
    notes = [
        f"{number} {what}"
        for number, what in ((counts.damaged, "damaged frames left out"), (counts.breaks, "breaks taken up again"),
                             (pipeline.dropped, "frames dropped, as they came too fast"),
                             (pipeline.failed, "frames could not be segmented"))
        if number
    ]  # fmt: skip
    print(f"{video.shown}: {written} frames segmented" + "".join(f", {note}" for note in notes))
    missing = [pipeline.reader.problem] if pipeline.reader.problem else []
    missing += [f"{pipeline.failed} frames could not be segmented"] if pipeline.failed else []
    return f"{video.shown}: {'; '.join(missing)}" if missing else None


def _expected_frames(pipeline: Pipeline) -> int | None:
    """Number of frames that will be segmented, about; None for a live source."""
    seconds, options = pipeline.reader.seconds, pipeline.reader.options
    if seconds is None:
        return None
    end = seconds if options.end is None else min(options.end, seconds)
    return max(1, round((end - options.start) * float(pipeline.reader.rate) / options.every))


class _Overlays:
    """Overlay videos of all tasks, begun with the first frame, which has their size."""

    def __init__(
        self, files: ExitStack, lines_path: Path, tasks: Sequence[Task], metadata: Any, pipeline: Pipeline
    ) -> None:
        self._files, self._metadata, self._pipeline = files, metadata, pipeline
        stem = lines_path.name.removesuffix(".jsonl")
        self._paths: dict[Task, Path] = {task: lines_path.with_name(f"{stem}_{task}.mp4") for task in tasks}
        self._writers: dict[Task, VideoWriter] = {}
        self._held: list[Sound] = []

    def write(self, frame: SegmentedFrame) -> None:
        """Draw a frame's results; a frame without results is shown as it is."""
        scale = visualize.display_scale((frame.image.shape[0], frame.image.shape[1]))
        for task, path in self._paths.items():
            if task in frame.results:
                drawn = visualize.draw_result(frame.image, frame.results[task], self._metadata, frame.tracks.get(task))
            else:
                drawn = frame.image.repeat(scale, 0).repeat(scale, 1)
            if task not in self._writers:
                self._writers[task] = self._open(path, (drawn.shape[0], drawn.shape[1]))
            self._writers[task].write(drawn, frame.offset)
        for sound in self._held if self._writers else ():
            self.write_sound(sound)
        self._held = []

    def _open(self, path: Path, size: tuple[int, int]) -> VideoWriter:
        reader = self._pipeline.reader
        file: BinaryIO = self._files.enter_context(atomic_write(path))
        return VideoWriter(file, size, reader.time_base, reader.rate / reader.options.every, reader.sound)

    def write_sound(self, sound: Sound) -> None:
        """Add a packet of sound to each video."""
        if self._paths and not self._writers and len(self._held) < _MAX_HELD:
            self._held.append(sound)
        for writer in self._writers.values():
            writer.write_sound(sound)

    def close(self) -> None:
        """Complete the videos."""
        for writer in self._writers.values():
            writer.close()


class _Stop:
    """Whether a signal came, and what its handler then does."""

    def __init__(self) -> None:
        self.received = False
        self.then: Callable[[], None] | None = None


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Take note of SIGINT and SIGTERM; a second signal has its previous effect. Only in the main thread."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def set_stop(number: int, frame: FrameType | None) -> None:
        stop.received = True
        signal.signal(number, previous[number])
        if stop.then is not None:
            stop.then()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.getsignal(number)
        signal.signal(number, set_stop)
    try:
        yield stop
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
