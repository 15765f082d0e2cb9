"""Identities across frames with a trained network, and the processor time of a video's frames.

    python -m benchmarks.studies.video RUN [--scenes N] [--frames N] [--figure FILE] [--output FILE]

RUN is trained on the synthetic scenes (`make demo`). Its classes move over a ground at rest, cross, hide one another,
come and go; IDF1 and VPQ compare its panoptic results, with track ids, with the truth. Time is the processor's on one
thread: of `predict` on a video, with and without overlays, and on the same frames as PNG files, a frame.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import maskformer_fast
from maskformer_fast.config import ShapesConfig
from maskformer_fast.core.files import write_json
from maskformer_fast.core.machine import describe_machine
from maskformer_fast.core.results import PanopticResult
from maskformer_fast.data.datasets.scene import (
    EXTENT,
    GROUNDS,
    KINDS,
    ground_texture,
    light_field,
    region_map,
    signed_distance,
)
from maskformer_fast.data.datasets.shapes import ShapesDataset, _draw, _jittered, _Shape
from maskformer_fast.inference.batches import infer_each
from maskformer_fast.output.visualize import draw_panoptic, grid
from maskformer_fast.output.writer import ResultWriter
from maskformer_fast.predict import Input, PredictOptions, predict_images
from maskformer_fast.video import Tracker, VideoOptions
from maskformer_fast.video.command import predict_videos
from maskformer_fast.video.sources import source_of
from tests.support.clips import write_clip
from tests.support.moving_scene import MovingScene
from tests.support.tracking_metrics import Labels, idf1, vpq

WINDOWS = (1, 5, 10, 15)


class MovingShapes:
    """The synthetic scenes' classes on the ways of a `MovingScene`."""

    def __init__(self, config: ShapesConfig, seed: int, frames: int) -> None:
        self.dataset = ShapesDataset(config, "val")
        self.size, self.frames = config.size, frames
        self._ways = MovingScene(seed, frames, config.size, 5)
        make = np.random.default_rng([seed, 7])
        self._things = make.integers(0, config.num_things, 5).tolist()
        self._angles = make.uniform(0, 2 * np.pi, 5)
        self._sun = float(make.uniform(0, 2 * np.pi))
        self._seed = seed
        stuff = self.dataset._stuff
        chosen = make.choice(len(stuff), min(3, len(stuff)), replace=False)
        where = region_map(make, self.size, len(chosen))
        relief = np.empty(self.size, np.float32)
        palette = np.empty((len(chosen), 3), np.float32)
        for region, number in enumerate(chosen):
            np.copyto(relief, ground_texture(make, GROUNDS[stuff[number].ground], self.size), where=where == region)
            palette[region] = _jittered(make, stuff[number].color, hue=0.02, value=0.08)
        self._ground = palette[where] * (1 + np.float32(0.28) * relief)[..., None]
        self._where = (where + 1).astype(np.int32)
        self._kinds = {region + 1: config.num_things + int(number) for region, number in enumerate(chosen)}
        self._light = light_field(make, self.size)[..., None] * np.float32(255)

    def frame(self, time: int) -> tuple[np.ndarray, Labels]:
        """Picture uint8 [H, W, 3] and truth of a frame; later objects lie in front."""
        canvas, id_map, kinds = self._ground.copy(), self._where.copy(), dict(self._kinds)
        for number, moving in enumerate(self._ways.objects):
            if not moving.first <= time < moving.last:
                continue
            thing = self.dataset._things[self._things[number]]
            shape = self._shape(KINDS[thing.kind], self._ways.place(moving, time), 1.35 * moving.radius,
                                float(self._angles[number]))  # fmt: skip
            if not shape.distance.size:
                continue
            identity = number + 10
            id_map[shape.box][shape.distance < 0] = identity
            kinds[identity] = self._things[number]
            _draw(np.random.default_rng([self._seed, number]), shape, thing, canvas, self._sun)
        grain = np.random.default_rng([self._seed, time, 3]).standard_normal(canvas.shape, dtype=np.float32) * 5
        present = set(np.unique(id_map).tolist())
        picture = np.rint(canvas * self._light + grain).clip(0, 255).astype(np.uint8)
        return picture, (id_map, {number: kind for number, kind in kinds.items() if number in present})

    def _shape(self, kind: str, place: tuple[float, float], radius: float, angle: float) -> _Shape:
        reach = radius * EXTENT + 2
        top, left = (max(0, int(middle - reach)) for middle in place)
        bottom, right = (min(side, int(middle + reach) + 1) for side, middle in zip(self.size, place, strict=True))
        v = (np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - place[0])) / np.float32(radius)
        u = (np.arange(left, right, dtype=np.float32)[None] + np.float32(0.5 - place[1])) / np.float32(radius)
        x, y = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
        return _Shape(top, left, x, y, signed_distance(kind, x, y) * np.float32(radius), radius, angle)


def identities(result: PanopticResult, ids: Sequence[int]) -> Labels:
    """A frame's map of track ids, and their categories."""
    table = np.zeros(max((segment.id for segment in result.segments), default=0) + 1, np.int64)
    for segment, number in zip(result.segments, ids, strict=True):
        table[segment.id] = number
    return table[np.maximum(result.id_map.numpy(), 0)], {
        number: segment.category for segment, number in zip(result.segments, ids, strict=True)}


def by_truth(result: PanopticResult, truth: Labels) -> list[int]:
    """Ids that a tracker without mistakes gives: those of the objects that segments overlap most."""
    ids: list[int] = []
    for segment in result.segments:
        mask = result.id_map.numpy() == segment.id
        shares = {
            number: (mask & (truth[0] == number)).sum() / (mask | (truth[0] == number)).sum()
            for number, kind in truth[1].items()
            if kind == segment.category and number not in ids
        }
        best = max(shares, key=shares.__getitem__, default=None)
        ids.append(best if best is not None and shares[best] > 0.05 else 1000 + len(ids))
    return ids


def scores(truth: list[Labels], results: list[Labels], things: int) -> dict[str, float]:
    return {"IDF1": idf1(truth, results, things)} | {f"VPQ {k}": vpq(truth, results, k) for k in WINDOWS}


def processor_ms(work: Callable[[], object], frames: int) -> float:
    """Processor time of a frame in milliseconds."""
    started = time.process_time()
    work()
    return (time.process_time() - started) / frames * 1e3


def speed(predictor: object, run: str, scene: MovingShapes) -> dict[str, float]:
    """Processor time a frame of a video and of its frames as images."""
    images = [scene.frame(number)[0] for number in range(scene.frames)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = write_clip(folder / "clip.mp4", len(images), scene.size, image=images.__getitem__)
        files = [Input(folder / f"{number}.png", f"{number}.png") for number in range(len(images))]
        for image, file in zip(images, files, strict=True):
            Image.fromarray(image).save(file.path)

        def video(overlays: bool) -> Callable[[], object]:
            return lambda: predict_videos(predictor, [source_of(clip)], ("panoptic",), VideoOptions(),  # type: ignore
                                          folder / f"video{overlays}", overlays)  # fmt: skip

        def pictures(overlays: bool) -> Callable[[], object]:
            def work() -> None:
                output = folder / f"images{overlays}"
                writer = ResultWriter(output, scene.dataset.metadata, overlays, [file.name for file in files])
                options = PredictOptions(run, (), task=("panoptic",), test=predictor.test)  # type: ignore
                predict_images(predictor, options, files, range(len(files)), writer)  # type: ignore
                writer.close()

            return work

        for image in images[:10]:  # the first frames of a process take longer
            predictor.infer([image], ("panoptic",))  # type: ignore
        times = {
            f"{what}, {'overlays' if overlays else 'no overlays'}": processor_ms(make(overlays), len(images))
            for overlays in (False, True) for what, make in (("video", video), ("images", pictures))}
        alone = processor_ms(lambda: [predictor.infer([image], ("panoptic",)) for image in images],  # type: ignore
                             len(images))  # fmt: skip
        return times | {"inference alone": alone}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--scenes", type=int, default=3)
    parser.add_argument("--frames", type=int, default=90)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    predictor = maskformer_fast.load(options.run, "cpu")
    rows: list[dict[str, dict[str, float]]] = []
    pictures = []
    for seed in range(options.scenes):
        scene = MovingShapes(predictor.config.data.shapes, seed, options.frames)
        tracker, things = Tracker(), sum(predictor.metadata.is_thing)
        truth, found, best = [], [], []
        for number in range(scene.frames):
            image, labels = scene.frame(number)
            result = infer_each(predictor, [image], ("panoptic",))[0]
            assert isinstance(result, dict)
            panoptic = result["panoptic"]
            assert isinstance(panoptic, PanopticResult)
            ids = tracker.update(panoptic)
            truth.append(labels)
            found.append(identities(panoptic, ids))
            best.append(identities(panoptic, by_truth(panoptic, labels)))
            if seed == 0 and number % 15 == 0 and len(pictures) < 5:
                pictures.append(draw_panoptic(image, panoptic, predictor.metadata, ids))
        rows.append({"tracker": scores(truth, found, things), "truth": scores(truth, best, things)})
        print(seed, {side: {name: round(value, 3) for name, value in row.items()} for side, row in rows[-1].items()})
    means = {side: {name: float(np.mean([row[side][name] for row in rows])) for name in rows[0][side]}
             for side in rows[0]}  # fmt: skip
    times = speed(predictor, options.run, MovingShapes(predictor.config.data.shapes, 0, options.frames))
    for side, row in means.items():
        print(f"ids by {side}:", ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
    for name, value in times.items():
        print(f"{name}: {value:.1f} ms a frame")
    if options.figure and pictures:
        titles = [f"frame {15 * place}" for place in range(len(pictures))]
        Image.fromarray(grid([pictures], titles)).save(options.figure, optimize=True)
    if options.output:
        write_json(options.output, {"machine": describe_machine(), "scenes": rows, "means": means,
                                    "processor_ms": times})  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
