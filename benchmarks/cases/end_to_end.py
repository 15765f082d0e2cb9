"""An image file -> a label PNG, beside Hugging Face's processor, model and post-processing; and `Predictor.predict`.

All read the same JPEGs and write indexed PNGs, with the same weights: a ResNet-50 MaskFormer with random weights, as it
is ("random") and with its class and mask heads rescaled so that 20 of 100 queries are live and sure of their masks
("confident"; a trained network's masks are smoother, which spares ours more work). OpenVINO and onnxruntime run our
exported graph that ends in labels, and Inductor compiles the same. Where the time goes, on several photographs:
`benchmarks.studies.end_to_end`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.cases.engines import (
    INDUCTOR,
    ONNXRUNTIME,
    OPENVINO,
    PRECISIONS,
    Run,
    export_graph,
    open_engine,
    open_inductor,
)
from benchmarks.cases.network import class_metadata, network_work
from benchmarks.harness.case import Bound, Case, Work
from benchmarks.harness.runner import shared
from maskformer_fast.benchmark.runners import draw_frame
from maskformer_fast.config import TASKS, BackboneConfig, Config, DataConfig, ModelConfig, ShapesConfig, Task
from maskformer_fast.core.checks import check
from maskformer_fast.core.image_files import list_files
from maskformer_fast.core.stages import Stopwatch
from maskformer_fast.data import build_dataset
from maskformer_fast.data.images import read_image
from maskformer_fast.inference.load import load, load_network
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.interop.huggingface import write_folder
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import save_weights
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.output.formats import write_index_png
from maskformer_fast.output.writer import ResultWriter

SIDE = 512
LIVE = 0.2
"""Share of the queries of a "confident" network that are not "no object"."""
GOALS = {(150, "float32"): 1.6, (150, "bfloat16"): 2.6, (847, "float32"): 3.0, (847, "bfloat16"): 5.0}
"""Goals beside Hugging Face in float32, by classes and our dtype."""
HUGGINGFACE = "Hugging Face, float32"
IMPLEMENTATIONS = (
    "ours, float32", "ours, bfloat16", HUGGINGFACE, "Hugging Face, bfloat16",
    *(f"{engine}, {dtype}" for engine in (OPENVINO, INDUCTOR) for dtype in PRECISIONS), f"{ONNXRUNTIME}, float32",
)  # fmt: skip
PHOTOGRAPH = (480, 640)

Kind = Literal["random", "confident"]


class Implementation:
    """Segments a file; `watch` has the seconds of the last image's stages, by `clock`."""

    def __init__(self) -> None:
        self.clock = perf_counter
        self.watch = Stopwatch()

    def time_module(self, module: nn.Module, stage: str, before: str | None = None) -> None:
        """End a stage with each call of a module, and with `before` another at its start."""
        if before is not None:
            module.register_forward_pre_hook(lambda *_: self.watch.lap(before))
        module.register_forward_hook(lambda *_: self.watch.lap(stage))

    def segment(self, file: Path, folder: Path) -> np.ndarray:
        """Write the labels of a file as PNG in `folder` -> the labels."""
        raise NotImplementedError


class Ours(Implementation):
    """Segments as ``python -m maskformer_fast.predict`` does it."""

    def __init__(self, checkpoint: Path, dtype: str, order: str = "direct") -> None:
        super().__init__()
        predictor = load(checkpoint, "cpu", amp="bf16" if dtype == "bfloat16" else "off")
        assert isinstance(predictor, Predictor)
        config = predictor.config
        predictor.config = replace(config, test=replace(config.test, semantic_order=order))  # type: ignore[arg-type]
        self.predictor = predictor
        network: Any = predictor.network
        network.register_forward_pre_hook(lambda *_: self.watch.lap("resize"))
        self.time_module(network.backbone, "backbone", before="normalize")
        # between the backbone and the head there is the pixel decoder alone
        self.time_module(network.predictor, "transformer", before="pixel_decoder")

    def segment(self, file: Path, folder: Path) -> np.ndarray:
        self.watch = Stopwatch(clock=self.clock)
        image = read_image(file)
        self.watch.lap("decode")
        results = self.predictor.infer([image], ("semantic",))["semantic"]
        self.watch.lap("postprocess")
        ResultWriter(folder, self.predictor.metadata, overlays=False, names=[file.name]).write(0, 1, image, {
            "semantic": results[0]
        })  # fmt: skip
        self.watch.lap("write")
        labels: np.ndarray = results[0].labels.numpy()  # type: ignore[union-attr]
        return labels


class HuggingFace(Implementation):
    """Segments as Hugging Face's documentation does it, in the precision asked for."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import transformers
        from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil

        super().__init__()
        self.dtype = getattr(torch, dtype)
        self.processor = MaskFormerImageProcessorPil.from_pretrained(folder)
        model = transformers.MaskFormerForInstanceSegmentation.from_pretrained(folder, dtype=self.dtype)
        self.model = model.eval()
        level = model.model.pixel_level_module
        self.time_module(level.encoder, "backbone", before="normalize")
        self.time_module(level.decoder, "pixel_decoder")
        self.time_module(model.model.transformer_module, "transformer")

    def segment(self, file: Path, folder: Path) -> np.ndarray:
        self.watch = Stopwatch(clock=self.clock)
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        self.watch.lap("decode")
        inputs = self.processor(images=image, return_tensors="pt")
        self.watch.lap("resize")  # and normalisation
        with torch.inference_mode():
            outputs = self.model(inputs["pixel_values"].to(self.dtype), pixel_mask=inputs["pixel_mask"])
        self.watch.lap("masks")
        sizes = [(image.height, image.width)]
        labels = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0].numpy()
        self.watch.lap("postprocess")
        write_index_png(folder / f"{file.stem}.png", labels)
        self.watch.lap("write")
        return np.asarray(labels)


class OtherEngine(Implementation):
    """Segments by the complete graph, with labels as outputs, in an engine of `benchmarks.cases.engines`."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def segment(self, file: Path, folder: Path) -> np.ndarray:
        self.watch = Stopwatch(clock=self.clock)
        image = read_image(file)
        self.watch.lap("decode")
        (labels,) = self.run(np.ascontiguousarray(image.transpose(2, 0, 1))[None])
        self.watch.lap("network")  # and post-processing
        write_index_png(folder / f"{file.stem}.png", labels[0])
        self.watch.lap("write")
        return labels[0]


def open_implementation(name: str, network: Path) -> Implementation:
    """One of `IMPLEMENTATIONS` with the weights of `write_network`."""
    who, dtype = name.split(", ")
    if who == INDUCTOR:
        checkpoint = load_network(network / "ours.safetensors", "cpu")
        return OtherEngine(open_inductor(checkpoint.network, "complete", dtype))
    if who in (OPENVINO, ONNXRUNTIME):
        return OtherEngine(open_engine(who, (network / "complete.onnx").read_bytes(), dtype))
    return Ours(network / "ours.safetensors", dtype) if who == "ours" else HuggingFace(network / "theirs", dtype)


def network_config(classes: int) -> ModelConfig:
    return ModelConfig(num_classes=classes, backbone=BackboneConfig("resnet50", norm="batch"))


def write_network(folder: Path, classes: int, kind: Kind, files: Sequence[Path]) -> None:
    """Write our checkpoint, Hugging Face's folder and the graph for other engines, of the same weights."""
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
    (folder / "complete.onnx").write_bytes(export_graph(network, "complete", (SIDE, SIDE)))


def make_confident(network: Any, images: Tensor) -> None:
    """Rescale the heads: classes of a few queries certain, the rest "no object"; mask logits of deviation 5."""
    head = network.predictor
    last = head.mask_embed.layers[-1]
    scale = 5 / layer_mask_logits(network(images)).std()
    last.weight.mul_(scale), last.bias.mul_(scale)
    states = head.decode(network.embed(images, torch.tensor([images.shape[-2:]]))[1], False)[0, 0]
    weight = head.class_embed.weight
    # queries differ little before training: their mean is taken out, and their differences enlarged
    weight.mul_(8 / (states - states.mean(0)).matmul(weight.T).std())
    head.class_embed.bias.copy_(-weight @ states.mean(0))
    logits = head.class_embed(states)
    margins = logits[:, :-1].amax(1) - logits[:, -1]
    head.class_embed.bias[-1] += margins.quantile(1 - LIVE)


def prepare_images(source: Path | None, count: int, folder: Path, side: int = SIDE) -> list[Path]:
    """Write `count` JPEGs of `side` x `side`: photographs cropped to squares, or drawn scenes -> their paths.

    Raises:
        ValueError: too few images in `source`.
    """
    folder.mkdir()
    names = [folder / f"{number:03}.jpg" for number in range(count)]
    if source is None:
        pictures = [Image.fromarray(draw_frame(np.random.default_rng(k), (side, side))) for k in range(count)]
    else:
        files = [source / name for name in list_files(source)]
        check(len(files) >= count, "images", f"a folder with at least {count} images", f"{len(files)} in {source}")
        chosen = files[:: len(files) // count][:count]
        pictures = [crop_to_square(Image.fromarray(read_image(file)), side) for file in chosen]
    for name, picture in zip(names, pictures, strict=True):
        picture.save(name, quality=95)
    return names


def crop_to_square(image: Image.Image, side: int) -> Image.Image:
    least = min(image.size)
    left, top = ((length - least) // 2 for length in image.size)
    return image.crop((left, top, left + least, top + least)).resize((side, side), Image.Resampling.BICUBIC)


def setup(device: torch.device, classes: int, dtype: str) -> Work:
    """One drawn image, by ours in `dtype` and Hugging Face's in float32."""

    def make(folder: Path) -> None:
        folder.mkdir()
        write_network(folder / "network", classes, "random", prepare_images(None, 1, folder / "images"))

    folder = shared(f"end_to_end_{classes}", make)
    (file,) = (folder / "images").iterdir()
    ours, theirs = (open_implementation(name, folder / "network") for name in (f"ours, {dtype}", HUGGINGFACE))
    return Work(
        partial(ours.segment, file, folder / "ours"), {HUGGINGFACE: partial(theirs.segment, file, folder / "theirs")}
    )


def bound(classes: int, dtype: str) -> Bound:
    """Work of the network alone: weights read, and its multiplications by the plain sum."""
    parameters, operations = network_work(network_config(classes), (SIDE, SIDE))
    size, rate = (2, "bf16") if dtype == "bfloat16" else (4, "fp32")
    return Bound(size * parameters, operations, rate)


def predict_setup(device: torch.device, task: Task) -> Work:
    """An image of 480x640 to a result of its size, by the demo's untrained network, so that no mask can be left out."""
    predictor: Any = load("demo", str(device))
    shapes = ShapesConfig(size=PHOTOGRAPH, train_images=1, num_stuff=8)
    image = build_dataset(DataConfig(shapes=shapes), "train")[0].image
    return Work(lambda: predictor.predict(image, task), {})


def cases(device: str) -> list[Case]:
    """Cases without peak memory, which `benchmarks.studies.end_to_end` measures, each implementation by itself."""
    rows = [
        Case(f"image file -> label PNG, ResNet-50 512x512, K={classes}, {dtype}", HUGGINGFACE, goal,
             partial(setup, classes=classes, dtype=dtype), memory=False, bound=partial(bound, classes, dtype))
        for (classes, dtype), goal in GOALS.items()
    ]  # fmt: skip
    predictions = [
        Case(f"predict {task} 480x640, network of the demo", None, None, partial(predict_setup, task=task), rank=3,
             memory=False, captured=False)
        for task in TASKS
    ]  # fmt: skip
    return rows + predictions if device == "cpu" else predictions
