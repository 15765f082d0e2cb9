"""Runners of ``python -m maskformer_fast.benchmark``: a bundle, and the same network in PyTorch, eager or compiled."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from maskformer_fast.config import Amp, Task
from maskformer_fast.core.image_files import IMAGE_FORMATS, IMAGE_SUFFIXES, list_files, picture_suffixes
from maskformer_fast.core.image_resize import resize_bands
from maskformer_fast.core.metadata import VOID
from maskformer_fast.core.results import unpack_mask_array
from maskformer_fast.core.stages import StageSeconds
from maskformer_fast.deploy.bundle.manifest import Precision

Kind = Literal["bundle", "eager", "compile"]


@dataclass(frozen=True)
class Setting:
    """One runner at one batch size."""

    kind: Kind
    path: str  # bundle or checkpoint
    batch: int
    size: tuple[int, int]  # height, width of the frames
    task: Task
    device: str  # for a bundle: name of a backend, or auto; for PyTorch: cpu or cuda:N
    device_index: int
    in_flight: int | None
    amp: Amp
    digest: str | None = None
    pictures: str | None = None
    precision: Precision | None = None  # of a bundle
    channels: int = 0  # bands of the frames, as `data.channels`; 0 for RGB of 8 bits

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Setting:
        """Inverse of ``dataclasses.asdict`` after a round trip through JSON."""
        return cls(**{**data, "size": tuple(data["size"])})


class Runner(Protocol):
    """One way to run a network on frames; every call ends with results in the host's memory."""

    backend: str

    def predict(self, frames: Sequence[np.ndarray]) -> list[Any]:
        """Results as NumPy arrays."""

    def timed(self, frames: Sequence[np.ndarray]) -> StageSeconds:
        """Seconds of the stages of one batch."""

    def stream(self, frames: Iterator[np.ndarray]) -> Iterator[Any] | None:
        """Results of single frames with several in flight; None where the runner has no such mode."""


class BundleRunner:
    """A bundle, by `deploy.runtime`."""

    def __init__(self, setting: Setting) -> None:
        from maskformer_fast.deploy.runtime.session import load

        backend: Any = setting.device
        self.task = setting.task
        self.runtime = load(
            setting.path, backend, digest=setting.digest, device=setting.device_index, in_flight=setting.in_flight,
            precision=setting.precision,
        )  # fmt: skip
        precision = self.runtime.precision
        self.backend: str = self.runtime.backend + (f" {precision}" if precision not in (None, "fp32") else "")

    def predict(self, frames: Sequence[np.ndarray]) -> list[Any]:
        results: list[Any] = self.runtime.predict(list(frames), self.task)
        return results

    def timed(self, frames: Sequence[np.ndarray]) -> StageSeconds:
        return self.runtime.timed(frames, self.task)[1]

    def stream(self, frames: Iterator[np.ndarray]) -> Iterator[Any] | None:
        return self.runtime.stream(frames, self.task)


class TorchRunner:
    """The checkpoint that the bundle was exported from, by `Predictor`, eager or compiled."""

    def __init__(self, setting: Setting) -> None:
        from maskformer_fast.inference.load import load, load_network
        from maskformer_fast.inference.predictor import Predictor
        from maskformer_fast.modeling.compile import compile_single_graph

        self.task = setting.task
        if setting.kind == "compile":  # the compiler gets the network as it was trained, not rebuilt for a CPU
            predictor = load_network(setting.path, setting.device)
            predictor.network = compile_single_graph(predictor.network)
            predictor.amp = setting.amp
        else:
            loaded = load(setting.path, setting.device, amp=setting.amp)
            assert isinstance(loaded, Predictor)  # `load` takes no amp for a bundle
            predictor = loaded
        test = replace(predictor.config.test, batch_size=setting.batch, multi_scale=(), flip=False, windows=False)
        predictor.config = replace(predictor.config, test=test)
        self.predictor = predictor
        self.backend = str(predictor.device)

    def predict(self, frames: Sequence[np.ndarray]) -> list[Any]:
        return [on_host(result) for result in self.predictor.predict(list(frames), self.task)]

    def timed(self, frames: Sequence[np.ndarray]) -> StageSeconds:
        stopwatch = self.predictor.stopwatch()
        for result in self.predictor.infer(frames, (self.task,), stopwatch)[self.task]:
            on_host(result)
        stopwatch.lap("postprocess")
        return stopwatch.stage_seconds()

    def stream(self, frames: Iterator[np.ndarray]) -> Iterator[Any] | None:
        return None


def open_runner(setting: Setting) -> Runner:
    """Load what the setting names."""
    return BundleRunner(setting) if setting.kind == "bundle" else TorchRunner(setting)


def on_host(result: Any) -> Any:
    """A result with its tensors as NumPy arrays."""
    import torch

    parts = vars(result).items()
    return replace(result, **{key: value.cpu().numpy() for key, value in parts if isinstance(value, torch.Tensor)})


def label_map(result: Any, task: Task, size: tuple[int, int]) -> np.ndarray:
    """Class of every pixel in a result of any task -> int32 [H, W], to compare results; the best instance is on top."""
    if task == "semantic":
        return np.asarray(result.labels, dtype=np.int32)
    labels = np.full(size, VOID, dtype=np.int32)
    if task == "panoptic":
        for segment in result.segments:
            labels[result.id_map == segment.id] = segment.category
        return labels
    masks = unpack_mask_array(result.masks, size[1])
    for category, mask in zip(result.labels[::-1], masks[::-1], strict=True):
        labels[mask] = category
    return labels


def make_frames(count: int, size: tuple[int, int], pictures: str | None, channels: int = 0) -> list[np.ndarray]:
    """Frames [H, W, 3] uint8, the same in each process: pictures of a folder, resized, or random rectangles.

    With ``channels`` frames are of so many bands, [H, W, channels] uint16 (or uint8, of pictures of 8 bits).

    Raises ValueError for a folder without a picture.
    """
    if pictures is None:
        frames = [draw_frame(np.random.default_rng(seed), size, channels or 3) for seed in range(count)]
        return [frame.astype(np.uint16) * 257 for frame in frames] if channels else frames
    from PIL import Image

    folder = Path(pictures)
    suffixes = picture_suffixes(channels) if channels else IMAGE_SUFFIXES
    files = [folder / name for name in list_files(folder, suffixes)[:count]] if folder.is_dir() else []
    if not files:
        raise ValueError(f"pictures: expected a folder with images, got {pictures}")
    frames = []
    for file in files:
        if channels:
            from maskformer_fast.data.bands import read_picture  # needs torch

            picture = read_picture(file, channels=channels)
            frames.append(resize_bands(picture, size).round().astype(picture.dtype))
            continue
        with Image.open(file, formats=sorted(set(IMAGE_FORMATS.values()))) as image:
            frames.append(np.array(image.convert("RGB").resize((size[1], size[0]))))
    return [frame for frame, _ in zip(itertools.cycle(frames), range(count), strict=False)]


def draw_frame(rng: np.random.Generator, size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """A frame [H, W, channels] uint8 of random rectangles over noise."""
    height, width = size
    frame = rng.integers(0, 64, (height, width, channels), dtype=np.uint8)
    for _ in range(24):
        y, x = rng.integers(0, height), rng.integers(0, width)
        h, w = rng.integers(1, height // 2 + 2), rng.integers(1, width // 2 + 2)
        color = rng.integers(0, 192, channels, dtype=np.uint8)
        frame[y : y + h, x : x + w] = frame[y : y + h, x : x + w] // 4 + color
    return frame
