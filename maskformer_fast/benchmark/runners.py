"""What ``python -m maskformer_fast.benchmark`` times: a bundle, and the same network in PyTorch, eager and compiled.

``python -m maskformer_fast.benchmark.runners`` is the process of one contestant: it reads commands as lines of JSON and
answers each with one. A process of its own gives each a peak memory, and keeps one's failure from the others.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Protocol, TextIO

import numpy as np

from maskformer_fast.config import Amp, Task
from maskformer_fast.core.metadata import VOID
from maskformer_fast.deploy.bundle.folder import read_manifest
from maskformer_fast.deploy.runtime.backend import StageSeconds
from maskformer_fast.deploy.runtime.selection import tensorrt_obstacle

Kind = Literal["bundle", "eager", "compile"]

FRAMES = 8
"""Different frames at least, taken in turn."""
WARM_UP_CALLS = 3
STAGE_CALLS = 8
COMPARED_FRAMES = 4
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Setting:
    """One contestant at one batch size."""

    kind: Kind
    path: str  # bundle or checkpoint
    batch: int
    size: tuple[int, int]  # of the frames: height, width
    task: Task
    device: str  # a bundle: the backend asked for; PyTorch: cpu or cuda:N
    device_index: int
    in_flight: int
    amp: Amp
    digest: str | None = None
    pictures: str | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Setting:
        return cls(**{**data, "size": tuple(data["size"])})


class Contestant(Protocol):
    """One of those that are compared; every call ends with results in the host's memory."""

    backend: str

    def predict(self, frames: Sequence[np.ndarray]) -> list[Any]:
        """Results as NumPy arrays."""

    def timed(self, frames: Sequence[np.ndarray]) -> StageSeconds:
        """One batch, by stages."""

    def stream(self, frames: Iterator[np.ndarray]) -> Iterator[Any] | None:
        """Results of single frames with several in flight; None where there is no such thing."""


class BundleContestant:
    """By `deploy.runtime`."""

    def __init__(self, setting: Setting) -> None:
        from maskformer_fast.deploy.runtime.session import load

        backend: Any = setting.device
        self.task = setting.task
        self.runtime = load(
            setting.path, backend, digest=setting.digest, device=setting.device_index, in_flight=setting.in_flight
        )
        self.backend: str = self.runtime.backend

    def predict(self, frames: Sequence[np.ndarray]) -> list[Any]:
        results: list[Any] = self.runtime.predict(list(frames), self.task)
        return results

    def timed(self, frames: Sequence[np.ndarray]) -> StageSeconds:
        return self.runtime.timed(frames, self.task)[1]

    def stream(self, frames: Iterator[np.ndarray]) -> Iterator[Any] | None:
        return self.runtime.stream(frames, self.task)


class TorchContestant:
    """By `Predictor`, from the checkpoint that the bundle was made of."""

    def __init__(self, setting: Setting) -> None:
        from maskformer_fast.inference.load import load, load_network
        from maskformer_fast.inference.predictor import Predictor

        self.task = setting.task
        compiled = setting.kind == "compile"
        # the compiler is to have the network as it is
        predictor = load_network(setting.path, setting.device) if compiled else load(
            setting.path, setting.device, amp=setting.amp
        )  # fmt: skip
        if not isinstance(predictor, Predictor):
            raise ValueError(f"checkpoint: expected a checkpoint, got the bundle {setting.path}")
        config = predictor.config
        predictor.config = replace(
            config, test=replace(config.test, batch_size=setting.batch, multi_scale=(), flip=False)
        )
        predictor.amp = setting.amp
        self.predictor = predictor
        self.backend = str(predictor.device)
        self.network = timed_network(predictor, compiled)
        predictor.network = self.network

    def predict(self, frames: Sequence[np.ndarray]) -> list[Any]:
        return [on_host(result) for result in self.predictor.predict(list(frames), self.task)]

    def timed(self, frames: Sequence[np.ndarray]) -> StageSeconds:
        self.network.watched = True
        try:
            start = perf_counter()
            self.predict(frames)
            end = perf_counter()
        finally:
            self.network.watched = False
        begun, done = self.network.begun, self.network.done
        return StageSeconds(begun - start, done - begun, end - done, end - start)

    def stream(self, frames: Iterator[np.ndarray]) -> Iterator[Any] | None:
        return None


def timed_network(predictor: Any, compiled: bool) -> Any:
    """The predictor's network, which notes when it begins and ends while it is ``watched``."""
    import torch

    from maskformer_fast.modeling.compile import compile_single_graph

    class TimedNetwork(torch.nn.Module):
        watched, begun, done = False, 0.0, 0.0

        def __init__(self) -> None:
            super().__init__()
            self.inner = predictor.network
            self.call = compile_single_graph(self.inner) if compiled else self.inner

        def forward(self, *arguments: Any) -> Any:
            if not self.watched:
                return self.call(*arguments)
            self.begun = self.now()
            found = self.call(*arguments)
            self.done = self.now()
            return found

        @staticmethod
        def now() -> float:
            if predictor.device.type == "cuda":
                torch.cuda.synchronize(predictor.device)
            return perf_counter()

    return TimedNetwork().eval()


def on_host(result: Any) -> Any:
    """A result of `structures` with its tensors as NumPy arrays."""
    import torch

    parts = vars(result).items()
    return replace(result, **{key: value.cpu().numpy() for key, value in parts if isinstance(value, torch.Tensor)})


def open_contestant(setting: Setting) -> Contestant:
    return BundleContestant(setting) if setting.kind == "bundle" else TorchContestant(setting)


def label_map(result: Any, task: Task, size: tuple[int, int]) -> np.ndarray:
    """One class a pixel of any task's result -> int32 [H, W], to compare results by; the best instance is on top."""
    if task == "semantic":
        return np.asarray(result.labels, dtype=np.int32)
    labels = np.full(size, VOID, dtype=np.int32)
    if task == "panoptic":
        for segment in result.segments:
            labels[result.id_map == segment.id] = segment.category
        return labels
    masks = np.unpackbits(result.masks, axis=-1, count=size[1], bitorder="little").astype(bool)
    for category, mask in zip(result.labels[::-1], masks[::-1], strict=True):
        labels[mask] = category
    return labels


def make_frames(count: int, size: tuple[int, int], pictures: str | None) -> list[np.ndarray]:
    """Frames [H, W, 3] uint8: pictures of a folder, resized, or rectangles drawn by chance, the same in each process.

    Raises ValueError where the folder holds no picture.
    """
    if pictures is None:
        return [draw_frame(np.random.default_rng(seed), size) for seed in range(count)]
    from PIL import Image

    folder = Path(pictures)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)[:count]
    if not files:
        raise ValueError(f"pictures: expected a folder with images, got {pictures}")
    frames = []
    for file in files:
        with Image.open(file) as image:
            frames.append(np.array(image.convert("RGB").resize((size[1], size[0]))))
    return [frame for frame, _ in zip(itertools.cycle(frames), range(count), strict=False)]


def draw_frame(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    frame = rng.integers(0, 64, (height, width, 3), dtype=np.uint8)
    for _ in range(24):
        y, x = rng.integers(0, height), rng.integers(0, width)
        h, w = rng.integers(1, height // 2 + 2), rng.integers(1, width // 2 + 2)
        frame[y : y + h, x : x + w] = frame[y : y + h, x : x + w] // 4 + rng.integers(0, 192, 3, dtype=np.uint8)
    return frame


def peak_rss_mib() -> float | None:
    """Most memory that this process ever had resident, in MiB; None where the system does not tell."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
    return None


class Worker:
    """Answers commands about one contestant."""

    def __init__(self) -> None:
        self.commands: dict[str, Callable[..., dict[str, Any]]] = {
            "open": self.open, "calls": self.calls, "stages": self.stages, "stream": self.stream, "finish": self.finish,
        }  # fmt: skip

    def open(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Load and warm up, which compiles what is to be compiled."""
        self.setting = Setting.from_json(setting)
        frames = make_frames(max(FRAMES, self.setting.batch), self.setting.size, self.setting.pictures)
        self.turn = itertools.cycle(frames)
        self.first = frames[:COMPARED_FRAMES]
        before = device_bytes(self.setting)
        start = perf_counter()
        self.contestant = open_contestant(self.setting)
        for _ in range(WARM_UP_CALLS):
            self.contestant.predict(self.batch())
        ready = perf_counter() - start
        after = device_bytes(self.setting)
        return {
            "backend": self.contestant.backend,
            "ready_s": ready,
            "gpu_mib": None if after is None or before is None else (after - before) / 2**20,
        }

    def batch(self) -> list[np.ndarray]:
        return [next(self.turn) for _ in range(self.setting.batch)]

    def calls(self, seconds: float) -> dict[str, Any]:
        """Seconds of each call, one call at least."""
        found: list[float] = []
        end = perf_counter() + seconds
        while not found or perf_counter() < end:
            frames = self.batch()
            start = perf_counter()
            self.contestant.predict(frames)
            found.append(perf_counter() - start)
        return {"seconds": found}

    def stages(self) -> dict[str, Any]:
        """Mean seconds of a batch's stages."""
        found = [self.contestant.timed(self.batch()) for _ in range(STAGE_CALLS)]
        return {"stages": StageSeconds(*(float(np.mean(column)) for column in zip(*found, strict=True)))._asdict()}

    def stream(self, seconds: float) -> dict[str, Any]:
        """Frames a second, several in flight."""
        end = perf_counter() + seconds

        def frames() -> Iterator[np.ndarray]:
            yield next(self.turn)
            while perf_counter() < end:
                yield next(self.turn)

        start = perf_counter()
        results = self.contestant.stream(frames())
        count = None if results is None else sum(1 for _ in results)
        return {"frames_per_s": None if count is None else count / (perf_counter() - start)}

    def finish(self, maps: str) -> dict[str, Any]:
        """Peak memory, and the label maps of a few frames in a file."""
        results = self.contestant.predict(self.first)
        np.save(maps, np.stack([label_map(result, self.setting.task, self.setting.size) for result in results]))
        return {"peak_rss_mib": peak_rss_mib()}


def device_bytes(setting: Setting) -> int | None:
    """Memory in use on the GPU, the context of this process included; None for a contestant that needs no GPU."""
    if setting.kind != "bundle":
        if not setting.device.startswith("cuda"):
            return None
        import torch

        free, total = torch.cuda.mem_get_info(torch.device(setting.device))
        return int(total - free)
    manifest, _ = read_manifest(setting.path)
    if setting.device == "onnxruntime" or tensorrt_obstacle(manifest, setting.device_index) is not None:
        return None  # not even a context is made, which would count as its memory
    from cuda.bindings import runtime as cuda

    cuda.cudaSetDevice(setting.device_index)
    status, free, total = cuda.cudaMemGetInfo()
    return int(total - free) if status == cuda.cudaError_t.cudaSuccess else None


def serve(commands: TextIO, answers: TextIO) -> None:
    """Answer each line ``{"do": NAME, ...}`` by one, ``{"error": ...}`` where it fails, until there are no more."""
    worker = Worker()
    for line in commands:
        request = json.loads(line)
        try:
            answer = worker.commands[request.pop("do")](**request)
        except Exception as error:  # the report's reader is told, whatever it is
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    serve(sys.stdin, answers)
