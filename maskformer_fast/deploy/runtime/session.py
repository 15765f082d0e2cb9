"""Runs a bundle: frames in, results out, several frames in flight. It needs only NumPy and the backend's libraries.

    with load("bundle") as runtime:
        result = runtime.predict(frame)                              # one frame, or a sequence of any sizes
        for result in runtime.stream(camera, task="panoptic"):       # in order, `in_flight` frames at once
            ...

Backends: ``tensorrt`` (an engine and compiled kernels for this GPU), ``openvino`` and ``onnxruntime`` (any CPU).
Results are NumPy arrays at the frames' own sizes (`maskformer_fast.core.results`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from maskformer_fast.config import TASKS, Task
from maskformer_fast.core.checks import check, check_choice
from maskformer_fast.core.image_resize import check_image
from maskformer_fast.core.results import Result
from maskformer_fast.core.stages import StageSeconds
from maskformer_fast.deploy.bundle.folder import Bundle, naming
from maskformer_fast.deploy.bundle.manifest import OPENVINO, Precision
from maskformer_fast.deploy.runtime.backend import Backend
from maskformer_fast.deploy.runtime.selection import Backend as BackendOption
from maskformer_fast.deploy.runtime.selection import BackendName, Choice, choose_backend

logger = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Default number of frames that are worked on at once: while the network runs for one, another is prepared."""


def load(
    bundle: str | Path | Bundle,
    backend: BackendOption = "auto",
    *,
    digest: str | None = None,
    device: int | None = 0,
    in_flight: int | None = None,
    precision: Precision | None = None,
) -> Runtime:
    """Verify a bundle and make it ready to run.

    Args:
        bundle: its folder, or an open bundle.
        backend: ``auto`` takes TensorRT where the bundle has an engine for this GPU and the libraries are installed,
            else on the CPU openvino where it is installed, else onnxruntime; it logs the choice and its reason. A
            backend given by name is used, or an error tells why it cannot be.
        digest: expected `Bundle.digest`, see `Bundle.open`.
        device: number of the CUDA device; None for the CPU.
        in_flight: number of frames (or batches) that are worked on at once. None: `IN_FLIGHT`, for the least latency of
            a single frame. With a given number above 1, openvino divides the threads among the frames, for the most
            frames a second.
        precision: of the network: ``fp32``, ``bf16`` (openvino, on a processor that has it) or ``int8`` (openvino, of a
            bundle with such an engine); on a GPU that of one of the engines. None: see `selection.choose_backend`.

    Raises:
        FileNotFoundError: no such folder.
        BundleError: a damaged or changed bundle, another digest, or no engine for this GPU or of this precision.
        ModuleNotFoundError: a library that the backend needs is not installed.
        ValueError: a wrong value of another argument, or a precision that backend or processor do not have.
    """
    check(in_flight is None or in_flight > 0, "in_flight", "> 0", in_flight)
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle, digest)
    elif digest is not None:
        check(bundle.digest == digest, "digest", f"{digest}, which was asked for", bundle.digest)
    with naming(bundle.folder):
        choice = choose_backend(bundle.manifest, backend, device, precision)
    return Runtime(bundle, choice, device or 0, in_flight)


class Runtime:
    """A bundle that is ready to run, made by `load`. It is a context manager, and any thread may use it.

    `backend` and `precision` are those chosen; a precision of None is that of the TensorRT engine.
    """

    tasks: tuple[Task, ...] = TASKS

    def __init__(self, bundle: Bundle, choice: Choice, device: int, in_flight: int | None) -> None:
        logger.info("%s runs %s", bundle.folder, choice.reason)
        self.manifest = bundle.manifest
        self._channels = bundle.manifest.channels
        self.backend: BackendName = choice.backend
        self.precision = choice.precision
        self.in_flight = in_flight or IN_FLIGHT
        with naming(bundle.folder):
            self._backend: Backend | None = _open_backend(bundle, choice, device, in_flight)
        self._jobs: deque[_Job] = deque()  # batches that the backend may still hold, oldest first
        self._lock = threading.Lock()
        self._process = os.getpid()

    def predict(self, images: np.ndarray | Sequence[np.ndarray], task: Task = "semantic") -> Any:
        """Segment one image (-> one result) or several (-> a list of results, in order).

        Images of one size are batched where the backend can. Results do not depend on the other images.

        Args:
            images: uint8 RGB arrays [H, W, 3] of any sizes; one or a sequence. A network of bands takes arrays
                [H, W, C] of its number of bands, uint8 or uint16, on the scale on which it was trained.
            task: "semantic" -> `SemanticResult`, "panoptic" -> `PanopticResult`, "instance" -> `InstanceResult`.

        Raises:
            TypeError, ValueError: an argument that is no such image, an unknown task, or a size that the bundle does
                not take.
            RuntimeError: the runtime is closed, or belongs to the process that this one was forked from.
        """
        check_choice("task", task, self.tasks)
        if isinstance(images, np.ndarray) and images.ndim == 3:
            return self.predict([images], task)[0]
        return self.predict_tasks(list(images), (task,))[task]

    def predict_tasks(self, images: Sequence[np.ndarray], tasks: Sequence[Task]) -> dict[Task, list[Result]]:
        """Results of several tasks, each as `predict` gives them. On a CPU the network runs once for all tasks."""
        for task in tasks:
            check_choice("task", task, self.tasks)
        frames = list(images)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, frame in enumerate(frames):
            check_image(frame, f"images[{index}]", self._channels)
            by_size.setdefault(frame.shape[:2], []).append(index)
        results: dict[Task, dict[int, Result]] = {task: {} for task in tasks}
        under_way: deque[tuple[Sequence[Task], list[int], _Job]] = deque()

        def finish() -> None:
            group, indices, job = under_way.popleft()
            places = ((task, index) for task in group for index in indices)
            for (task, index), result in zip(places, self._finish(job)[0], strict=True):
                results[task][index] = result

        backend = self._open_backend()
        distinct = list(results)
        for first in range(0, len(distinct), backend.max_tasks):
            group = distinct[first : first + backend.max_tasks]
            for (height, width), indices in by_size.items():
                most = min(backend.max_batch(height, width, task) for task in group)
                for start in range(0, len(indices), most):
                    part = indices[start : start + most]
                    under_way.append((group, part, self._start([frames[index] for index in part], group)))
                    if len(under_way) == self.in_flight:
                        finish()
        while under_way:
            finish()
        return {task: [by_index[index] for index in range(len(frames))] for task, by_index in results.items()}

    def stream(self, frames: Iterable[np.ndarray], task: Task = "semantic") -> Iterator[Result]:
        """Results of a camera's or video's frames, in order, with `in_flight` frames at once.

        Frames are taken from the iterable while earlier ones are worked on, and not before they are needed. An error
        of one frame is raised in its place; ``next`` then continues with the frame after it.

        Args:
            frames: images as for `predict`; they must not be changed before their result is there.
            task: as for `predict`.

        Raises:
            ValueError: an unknown task.
        """
        check_choice("task", task, self.tasks)
        return _Stream(self, iter(frames), task)

    @property
    def graph_obstacle(self) -> str | None:
        """Reason why a GPU launches batches piece by piece and not as a CUDA graph; known after the first batch."""
        return self._open_backend().graph_obstacle

    def timed(self, frames: Sequence[np.ndarray], task: Task = "semantic") -> tuple[list[Result], StageSeconds]:
        """Run one batch of frames of one size -> results, seconds of its stages. Arguments are those of `predict`."""
        results, seconds = self.timed_tasks(frames, (task,))
        return results[task], seconds

    def timed_tasks(
        self, frames: Sequence[np.ndarray], tasks: Sequence[Task]
    ) -> tuple[dict[Task, list[Result]], StageSeconds]:
        """Do as `timed` for several tasks. Where the network runs once for each (TensorRT), the seconds are sums."""
        check(len(tasks) > 0, "tasks", "at least one", tasks)
        for task in tasks:
            check_choice("task", task, self.tasks)
        for index, frame in enumerate(frames):
            check_image(frame, f"frames[{index}]", self._channels)
        results: dict[Task, list[Result]] = {}
        seconds: list[StageSeconds] = []
        at_once = self._open_backend().max_tasks
        for first in range(0, len(tasks), at_once):
            group = tasks[first : first + at_once]
            batch, batch_seconds = self._finish(self._start(frames, group))
            results |= {task: batch[at * len(frames) : (at + 1) * len(frames)] for at, task in enumerate(group)}
            seconds.append(batch_seconds)
        return results, StageSeconds(*(sum(stage) for stage in zip(*seconds, strict=True)))

    def close(self) -> None:
        """Wait for batches that have begun, and release everything.

        A second call does nothing. Neither does a call of a forked process, which has neither the threads nor the GPU.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            backend, self._backend = self._backend, None
            jobs = list(self._jobs)
            self._jobs.clear()
        for job in jobs:  # streams that are still read get the results of batches that have begun
            job.settle()
        if backend is not None:
            backend.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open_backend(self) -> Backend:
        if os.getpid() != self._process:
            raise RuntimeError("runtime: expected to be used by the process that loaded it, got one forked from it; "
                               "load the bundle there")
        if self._backend is None:
            raise RuntimeError("runtime: expected an open one, but it was closed")
        return self._backend

    def _start(self, frames: Sequence[np.ndarray], tasks: Sequence[Task]) -> _Job:
        """Hand a batch to the backend. If the backend is full, wait for the oldest batch first, whoever began it."""
        self._open_backend()  # before the lock, which a fork may have copied in its locked state
        with self._lock:
            backend = self._open_backend()
            while len(self._jobs) >= self.in_flight:
                self._jobs.popleft().settle()
            job = _Job(backend, frames, tasks)
            self._jobs.append(job)
        return job

    def _finish(self, job: _Job) -> tuple[list[Result], StageSeconds]:
        job.settle()
        with self._lock, contextlib.suppress(ValueError):  # `_start` may have removed it to make room
            self._jobs.remove(job)
        return job.outcome()


class _Job:
    """A batch in the backend. Its outcome is fetched once, by the first thread that needs the outcome or the room."""

    def __init__(self, backend: Backend, frames: Sequence[np.ndarray], tasks: Sequence[Task]) -> None:
        self._backend = backend
        self._ticket = backend.submit(frames, *tasks)
        self._lock = threading.Lock()
        self._outcome: tuple[list[Result], StageSeconds] | Exception | None = None

    def settle(self) -> None:
        """Wait for the outcome, results or error."""
        with self._lock:
            if self._outcome is None:
                try:
                    self._outcome = self._backend.collect(self._ticket)
                except Exception as error:  # raised in the thread that began the batch
                    self._outcome = error

    def outcome(self) -> tuple[list[Result], StageSeconds]:
        """Results and seconds of a settled batch. Raises the batch's error."""
        assert self._outcome is not None  # `settle` was called
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class _Stream(Iterator[Result]):
    """Results of a stream's frames. The runtime clears batches away that nobody reads."""

    def __init__(self, runtime: Runtime, frames: Iterator[np.ndarray], task: Task) -> None:
        self._runtime = runtime
        self._frames: Iterator[np.ndarray] | None = frames
        self._task: Task = task
        self._under_way: deque[_Job | Exception] = deque()

    def __next__(self) -> Result:
        while self._frames is not None and len(self._under_way) < self._runtime.in_flight:
            self._under_way.append(self._start_next(self._frames))
        job = self._under_way.popleft()
        if isinstance(job, StopIteration):
            self._under_way.append(job)  # every later call ends too
        if isinstance(job, Exception):
            raise job
        return self._runtime._finish(job)[0][0]

    def _start_next(self, frames: Iterator[np.ndarray]) -> _Job | Exception:
        """The next frame's job, or its error, which is raised after the results of the frames before it."""
        try:
            frame = next(frames)
        except Exception as error:  # the end, or an error of the camera
            self._frames = None if isinstance(error, StopIteration) else frames
            return error
        try:
            check_image(frame, "frame", self._runtime._channels)
            return self._runtime._start([frame], (self._task,))
        except Exception as error:
            return error


def _open_backend(bundle: Bundle, choice: Choice, device: int, in_flight: int | None) -> Backend:
    if choice.backend == "tensorrt":
        from maskformer_fast.deploy.runtime.cuda_backend import TensorRTBackend

        return TensorRTBackend(bundle, device, in_flight or IN_FLIGHT, choice.precision)
    from maskformer_fast.deploy.runtime.cpu_backend import CpuBackend

    if choice.backend == "onnxruntime":
        return CpuBackend(bundle, in_flight or IN_FLIGHT)
    from maskformer_fast.deploy.runtime.openvino_session import OpenvinoSession

    open_session = partial(OpenvinoSession, precision=choice.precision or "fp32")
    engines = [engine for engine in bundle.manifest.engines if engine.api == OPENVINO and choice.precision == "int8"]
    return CpuBackend(bundle, in_flight or IN_FLIGHT, None, open_session, next(iter(engines), None), in_flight or 1)
