"""Processor time of `predict` by one process and by two that share the images, beside each other.

    python -m benchmarks.studies.shared_predict [--images 32] [--side 256] [--output FOLDER]

Images are of random pixels, the network is MaskFormer with a ResNet-50 of random weights, and tasks are semantic and
instance, without overlays. The processes are forked when the network is loaded, have one thread each, and do what the
ranks of torchrun do: read, segment, write files and parts. Time is the processor's, of all processes together,
without that of the start; the merge is timed by itself. The elapsed time is written too, and means something on a quiet
machine only. Rows are written to shared_predict.json. The files of both runs are compared.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.__main__ import OUTPUT
from maskformer_fast.config import TestConfig
from maskformer_fast.core.files import write_json
from maskformer_fast.core.machine import describe_machine
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.inference.load import load, with_classes
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import save_weights
from maskformer_fast.output.parts import PartsWriter, Share
from maskformer_fast.predict import Input, PredictOptions, find_images, predict_images
from maskformer_fast.recipes import load_recipe

RECIPE = "ade20k_150/maskformer_r50"
CLASSES = 150
TASKS = ("semantic", "instance")


def make_inputs(folder: Path, count: int, side: int) -> Path:
    """Write random images, named by their numbers, and a checkpoint -> the checkpoint."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(count):
        pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    names = tuple(f"class {index}" for index in range(CLASSES))
    colors = tuple((index, 255 - index, 100) for index in range(CLASSES))
    metadata = Metadata("random", names, (True,) * CLASSES, tuple(range(1, CLASSES + 1)), colors)
    config = with_classes(load_recipe(RECIPE), metadata)
    save_weights(folder / "model.safetensors", build_model(config.model), config, metadata, 0)
    return folder / "model.safetensors"


def measure(predictor: Predictor, inputs: Sequence[Input], output: Path, ranks: int) -> dict[str, Any]:
    """Segment all images by so many processes -> a row."""
    names = [image.name for image in inputs]
    options = PredictOptions("model", (), task=TASKS, overlays=False, test=predictor.test)

    def writer() -> PartsWriter:
        return PartsWriter(output, predictor.metadata, False, names, names, TASKS)

    first = writer()
    session, finished = first.start({}, False)
    started, seconds = time.monotonic(), []
    readers = []
    for rank in range(ranks):
        reader, sink = os.pipe()
        if os.fork() == 0:
            before = time.process_time()
            each = writer()
            each.join(session, rank)
            predict_images(predictor, options, inputs, range(1, len(inputs) + 1), each,
                           Share(finished, predictor.test.batch_size, rank, ranks))  # fmt: skip
            each.finish()
            os.write(sink, str(time.process_time() - before).encode())
            os._exit(0)
        os.close(sink)
        readers.append(reader)
    for reader in readers:
        seconds.append(float(os.read(reader, 100)))
        os.close(reader)
        os.wait()
    first.wait(session, ranks)
    elapsed, before = time.monotonic() - started, time.process_time()
    first.merge()
    return {
        "processes": ranks, "images": len(inputs), "processor_seconds": [round(value, 2) for value in seconds],
        "processor_seconds_per_image": round(sum(seconds) / len(inputs), 4),
        "elapsed_seconds_per_image": round(elapsed / len(inputs), 4),
        "merge_processor_seconds": round(time.process_time() - before, 4),
    }  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Files of results."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="number of images")
    parser.add_argument("--side", type=int, default=256, help="height and width of the images, in pixels")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        checkpoint = make_inputs(folder, options.images, options.side)
        predictor = load(checkpoint, "cpu", TestConfig(short_edge=options.side, batch_size=1))
        assert isinstance(predictor, Predictor)
        inputs, _ = find_images([str(folder / "images")])
        measure(predictor, inputs[:1], folder / "first", 1)
        predictor.predict(inputs[0].path)  # measures convolutions, which the processes inherit
        rows = [measure(predictor, inputs, folder / str(ranks), ranks) for ranks in (1, 2)]
        if contents(folder / "1") != contents(folder / "2"):
            raise RuntimeError("files of one and of two processes differ")
    for row in rows:
        print(row)
    content = {"machine": describe_machine(), "side": options.side, "recipe": RECIPE, "tasks": TASKS, "rows": rows}
    write_json(options.output / "shared_predict.json", content)


if __name__ == "__main__":
    main()
