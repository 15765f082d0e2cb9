"""End to end: a folder of photographs -> label PNGs, beside Hugging Face's processor, model and post-processing.

    python -m benchmarks.end_to_end [--images FOLDER] [--classes 150 847] [--output FILE]

Both read the same JPEGs and write indexed PNGs, with the same weights: a ResNet-50 MaskFormer with random weights, as
it is ("random") and with its class and mask heads rescaled so that 20 of 100 queries are live and sure of their masks
("confident"; a trained network's masks are smoother, which spares ours more work). Sides take turns image by image in
one process; the peak resident memory is that of a process which runs one side alone. Writes
benchmarks/results/end_to_end.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.bounds import Bound, network_work
from benchmarks.harness import ROOT, Case, Sides, environment, shared
from benchmarks.machine import describe_machine
from benchmarks.train_step import class_metadata
from maskformer_fast.benchmark.runners import draw_frame
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import BackboneConfig, Config, ModelConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.files import atomic_write
from maskformer_fast.core.machine import peak_resident_bytes
from maskformer_fast.data.images import IMAGE_SUFFIXES, read_image
from maskformer_fast.inference.load import load
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.interop.huggingface import write_folder
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import save_weights
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.output.formats import write_index_png
from maskformer_fast.output.writer import ResultWriter

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
SIDE, THREADS = 512, 2
LIVE = 0.2
"""Share of the queries of a "confident" network that are not "no object"."""
GOALS = {(150, "float32"): 1.6, (150, "bfloat16"): 2.6, (847, "float32"): 3.0, (847, "bfloat16"): 5.0}
"""Times as fast as their float32."""
THEIRS = "Hugging Face, float32"
SIDES = ("ours, float32", "ours, bfloat16", THEIRS, "Hugging Face, bfloat16")

Kind = Literal["random", "confident"]
Stages = dict[str, float]


@dataclass(frozen=True)
class EndToEndOptions:
    """Segment photographs by this project and by Hugging Face's code, from files to files."""

    images: Path | None = None
    """Folder of photographs, cropped to squares and resized to 512x512; without it, drawn scenes."""
    count: int = 8
    """Photographs."""
    classes: tuple[int, ...] = (150, 847)
    kinds: tuple[Kind, ...] = ("random", "confident")
    output: Path = RESULTS
    """JSON file."""

    def __post_init__(self) -> None:
        check(self.count >= 1, "count", ">= 1", self.count)
        check(len(self.classes) > 0 and min(self.classes) >= 1, "classes", "positive numbers", self.classes)


class Clock:
    """Seconds between named moments, added up."""

    def __init__(self) -> None:
        self.stages: Stages = {}
        self.last = time.perf_counter()

    def mark(self, name: str) -> None:
        """What happened since the last mark was `name`."""
        now = time.perf_counter()
        self.stages[name] = self.stages.get(name, 0.0) + now - self.last
        self.last = now

    def watch(self, module: nn.Module, name: str, before: str | None = None) -> None:
        """Mark the end of a module's calls, and with `before` their start."""
        if before is not None:
            module.register_forward_pre_hook(lambda *_: self.mark(before))
        module.register_forward_hook(lambda *_: self.mark(name))


class Ours:
    """As ``python -m maskformer_fast.predict`` does it."""

    def __init__(self, checkpoint: Path, dtype: str, order: str = "direct") -> None:
        predictor = load(checkpoint, "cpu", amp="bf16" if dtype == "bfloat16" else "off")
        assert isinstance(predictor, Predictor)
        config = predictor.config
        predictor.config = replace(config, test=replace(config.test, semantic_order=order))  # type: ignore[arg-type]
        self.predictor, self.clock = predictor, Clock()
        network: Any = predictor.network
        network.register_forward_pre_hook(lambda *_: self.clock.mark("resize"))
        self.clock.watch(network.backbone, "backbone", before="normalize")
        # between the backbone and the head there is the pixel decoder alone
        self.clock.watch(network.predictor, "transformer", before="pixel_decoder")

    def segment(self, file: Path, folder: Path) -> np.ndarray:
        """File -> label PNG in `folder`, and the labels."""
        self.clock.last = time.perf_counter()
        image = read_image(file)
        self.clock.mark("decode")
        results = self.predictor.infer([image], ("semantic",))["semantic"]
        self.clock.mark("postprocess")
        ResultWriter(folder, self.predictor.metadata, overlays=False).write(Path(file.name), 1, image, {
            "semantic": results[0]
        })  # fmt: skip
        self.clock.mark("write")
        labels: np.ndarray = results[0].labels.numpy()  # type: ignore[union-attr]
        return labels


class HuggingFace:
    """As their documentation does it, in the precision asked for."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import transformers
        from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil

        self.dtype = getattr(torch, dtype)
        self.processor = MaskFormerImageProcessorPil.from_pretrained(folder)
        model = transformers.MaskFormerForInstanceSegmentation.from_pretrained(folder, dtype=self.dtype)
        self.model, self.clock = model.eval(), Clock()
        level = model.model.pixel_level_module
        self.clock.watch(level.encoder, "backbone", before="normalize")
        self.clock.watch(level.decoder, "pixel_decoder")
        self.clock.watch(model.model.transformer_module, "transformer")

    def segment(self, file: Path, folder: Path) -> np.ndarray:
        self.clock.last = time.perf_counter()
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        self.clock.mark("decode")
        inputs = self.processor(images=image, return_tensors="pt")
        self.clock.mark("resize")  # and normalisation
        with torch.inference_mode():
            outputs = self.model(inputs["pixel_values"].to(self.dtype), pixel_mask=inputs["pixel_mask"])
        self.clock.mark("masks")
        sizes = [(image.height, image.width)]
        labels = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0].numpy()
        self.clock.mark("postprocess")
        write_index_png(folder / f"{file.stem}.png", labels)
        self.clock.mark("write")
        return np.asarray(labels)


def open_side(name: str, network: Path) -> Ours | HuggingFace:
    who, dtype = name.split(", ")
    return Ours(network / "ours.safetensors", dtype) if who == "ours" else HuggingFace(network / "theirs", dtype)


def network_config(classes: int) -> ModelConfig:
    return ModelConfig(num_classes=classes, backbone=BackboneConfig("resnet50", norm="batch"))


def make_network(folder: Path, classes: int, kind: Kind, files: Sequence[Path]) -> None:
    """Our checkpoint and their folder, of the same weights."""
    torch.manual_seed(0)
    config = Config(model=network_config(classes))
    network: Any = build_model(config.model).eval()
    if kind == "confident":
        with torch.no_grad():
            make_confident(network, torch.from_numpy(read_image(files[0])).permute(2, 0, 1)[None])
    metadata = class_metadata(classes)
    folder.mkdir()
    save_weights(folder / "ours.safetensors", network, config, metadata, step=0)
    write_folder(folder / "theirs", network.state_dict(), config, metadata)


def make_confident(network: Any, images: Tensor) -> None:
    """Rescale the heads: classes of a few queries certain, the rest "no object"; mask logits of deviation 5."""
    head = network.predictor
    last = head.mask_embed.layers[-1]
    scale = 5 / layer_mask_logits(network(images)).std()
    last.weight.mul_(scale), last.bias.mul_(scale)
    states = head.decode(network.embed(images, torch.tensor([images.shape[-2:]]))[1], False)[0, 0]
    weight = head.class_embed.weight
    # queries differ little before training: of their classes, what tells them apart counts
    weight.mul_(8 / (states - states.mean(0)).matmul(weight.T).std())
    head.class_embed.bias.copy_(-weight @ states.mean(0))
    logits = head.class_embed(states)
    margins = logits[:, :-1].amax(1) - logits[:, -1]
    head.class_embed.bias[-1] += margins.quantile(1 - LIVE)


def prepare_images(source: Path | None, count: int, folder: Path) -> list[Path]:
    """`count` JPEGs of 512x512: photographs cropped to squares, or drawn scenes."""
    folder.mkdir()
    names = [folder / f"{number:03}.jpg" for number in range(count)]
    if source is None:
        pictures = [Image.fromarray(draw_frame(np.random.default_rng(k), (SIDE, SIDE))) for k in range(count)]
    else:
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        check(len(files) >= count, "images", f"a folder with at least {count} images", f"{len(files)} in {source}")
        chosen = files[:: len(files) // count][:count]
        pictures = [square(Image.fromarray(read_image(file))) for file in chosen]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(name, quality=95)
    return names


def square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def measure(network: Path, files: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Each side's images per second, stages and labels that equal those of their float32."""
    torch.set_num_threads(THREADS)
    sides = {name: open_side(name, network) for name in SIDES}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    labels: dict[str, list[np.ndarray]] = {name: [] for name in SIDES}
    for name, side in sides.items():  # warm-up
        side.segment(files[0], folder / name)
        side.clock.stages.clear()
    for number, file in enumerate(files):
        for name in SIDES[number % len(SIDES) :] + SIDES[: number % len(SIDES)]:
            start = time.perf_counter()
            labels[name].append(sides[name].segment(file, folder / name))
            seconds[name].append(time.perf_counter() - start)
    same_order = Ours(network / "ours.safetensors", "float32", "huggingface")
    ordered = [same_order.segment(file, folder / "ordered") for file in files]
    theirs = labels[THEIRS]
    found: dict[str, Any] = {}
    for name in SIDES:
        found[name] = {
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "quartiles_ms": [1e3 * float(q) for q in np.quantile(seconds[name], (0.25, 0.75))],
            "images_per_second": 1 / statistics.median(seconds[name]),
            "stages_ms": {stage: 1e3 * value / len(files) for stage, value in sides[name].clock.stages.items()},
            "identical_labels": identical(labels[name], theirs),
        }
    found["ours, float32"]["identical_labels_in_their_order"] = identical(ordered, theirs)
    return found


def identical(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """Share of pixels."""
    return float(np.mean([(a == b).mean() for a, b in zip(ours, theirs, strict=True)]))


def peak_of(name: str, network: Path, images: Path) -> float:
    """Peak resident MiB of a process that segments all images by one side."""
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--alone", name, str(network), str(images)]
    process = subprocess.run(
        command, cwd=ROOT, env=environment("time", THREADS), check=True, stdout=subprocess.PIPE, text=True
    )
    return float(process.stdout.splitlines()[-1])


def run_alone(name: str, network: str, images: str) -> None:
    torch.set_num_threads(THREADS)
    side = open_side(name, Path(network))
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(Path(images).iterdir()):
            side.segment(file, Path(folder))
    print(peak_resident_bytes() / 2**20)


def build_row(classes: int, kind: Kind, sides: dict[str, Any], peaks: dict[str, float]) -> dict[str, Any]:
    """What the JSON has of one network: sides with their ratios and peaks, and the goals."""
    theirs = sides[THEIRS]["milliseconds"]
    goals = []
    for name in SIDES:
        sides[name] |= {"ratio": theirs / sides[name]["milliseconds"], "peak_mib": peaks[name]}
        goal = GOALS.get((classes, name.split(", ")[1])) if name.startswith("ours") else None
        if goal is not None:
            reached = sides[name]["ratio"] >= goal and peaks[name] < peaks[THEIRS]
            goals.append({"side": name, "goal": goal, "ratio": sides[name]["ratio"], "reached": reached})
    return {"name": f"K={classes}, {kind}", "classes": classes, "kind": kind, "sides": sides, "goals": goals}


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    heads = ("network", "side", "ms", "images/s", "ratio", "goal", "MiB", "same labels")
    widths = (18, 24, 7, 9, 6, 5, 6, 12)
    lines = [heads]
    for row in rows:
        goals = {goal["side"]: f"{goal['goal']:g}" for goal in row["goals"]}
        for name, side in row["sides"].items():
            lines.append((
                row["name"], name, f"{side['milliseconds']:.0f}", f"{side['images_per_second']:.2f}",
                f"{side['ratio']:.2f}", goals.get(name, ""), f"{side['peak_mib']:.0f}",
                f"{side['identical_labels']:.5f}",
            ))  # fmt: skip
    return "\n".join(
        " ".join(
            f"{cell:{'<' if k < 2 else '>'}{width}}" for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


@contextmanager
def prepared(images: Path | None, count: int) -> Iterator[tuple[Path, list[Path]]]:
    """A temporary folder and the photographs in its ``images``."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name), prepare_images(images, count, Path(name) / "images")


def cases() -> list[Case]:
    """For the suite: one drawn image, ours beside their float32; memory is this file's own business."""
    return [
        Case(f"image file -> label PNG, ResNet-50 512x512, K={classes}, {dtype}", THEIRS, goal,
             partial(file_sides, classes, dtype), threads=THREADS, memory=False,
             bound=partial(network_bound, classes, dtype))
        for (classes, dtype), goal in GOALS.items()
    ]  # fmt: skip


def file_sides(classes: int, dtype: str) -> Sides:
    def make(folder: Path) -> None:
        folder.mkdir()
        make_network(folder / "network", classes, "random", prepare_images(None, 1, folder / "images"))

    folder = shared(f"end_to_end_{classes}", make)
    (file,) = (folder / "images").iterdir()
    ours, theirs = (open_side(name, folder / "network") for name in (f"ours, {dtype}", THEIRS))
    return Sides(partial(ours.segment, file, folder / "ours"), partial(theirs.segment, file, folder / "theirs"))


def network_bound(classes: int, dtype: str) -> Bound:
    """The network's alone: weights read, and its multiplications by the plain sum."""
    parameters, operations = network_work(network_config(classes), (SIDE, SIDE))
    size, rate = (2, "bf16") if dtype == "bfloat16" else (4, "fp32")
    return Bound(size * parameters, operations, rate)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--alone"]:
        run_alone(*arguments[1:])
        return 0
    options = parse(EndToEndOptions, arguments, prog="python -m benchmarks.end_to_end")
    rows = []
    with prepared(options.images, options.count) as (folder, files):
        for classes in options.classes:
            for kind in options.kinds:
                network = folder / f"{classes}_{kind}"
                make_network(network, classes, kind, files)
                sides = measure(network, files, folder / "labels")
                peaks = {name: peak_of(name, network, folder / "images") for name in SIDES}
                rows.append(build_row(classes, kind, sides, peaks))
    report = {
        "machine": describe_machine(), "images": options.count, "size": [SIDE, SIDE],
        "source": "drawn scenes" if options.images is None else "photographs", "rows": rows,
    }  # fmt: skip
    with atomic_write(options.output) as file:
        file.write((json.dumps(report, indent=2) + "\n").encode())
    print(format_rows(rows))
    return 0


if __name__ == "__main__":
    run_command(main)
