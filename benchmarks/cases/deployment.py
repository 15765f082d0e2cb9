"""A bundle beside PyTorch, eager and compiled, and Hugging Face: a frame of 512x512 in the host's memory becomes a map
of labels there.

The network is R50 with 150 classes and weights by chance, which is exported here. On the CPU it runs in float32 by
onnxruntime and our post-processing. On a GPU it runs in FP16 by a TensorRT engine that is built for it, which takes
minutes; without onnx, onnxruntime, or TensorRT (also that for RTX) the row names what is missing. Peak memory on a GPU
is what PyTorch allocates, in which TensorRT has no part.

A row of the GPU compares labels with those of FP32. With weights by chance many labels are close calls: halves,
emulated on the CPU, kept 98.8 to 99.6 % of them. MASKFORMER_FAST_CHECKPOINT names a trained checkpoint, for which the
goal of 99.5 % applies.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases.inputs import Size
from benchmarks.cases.network import class_metadata, network_work
from benchmarks.harness.case import Bound, Case, Operation, Work, beside
from benchmarks.harness.runner import shared
from maskformer_fast.benchmark.runners import BundleRunner, Setting, TorchRunner, draw_frame
from maskformer_fast.config import BackboneConfig, Config, ModelConfig, TestConfig
from maskformer_fast.interop.huggingface import write_folder
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import load_into, load_weights, save_weights
from maskformer_fast.ops.mask_product import layer_mask_logits

EAGER, COMPILED, HUGGINGFACE, FP32 = "PyTorch eager", "torch.compile", "Hugging Face", "PyTorch eager, FP32"
VARIABLE = "MASKFORMER_FAST_CHECKPOINT"
CLASSES, SIZE = 150, (512, 512)
MODEL = ModelConfig(num_classes=CLASSES, backbone=BackboneConfig("resnet50"))
CPU_LEAST_EQUAL = {EAGER: 0.999, COMPILED: 0.999, HUGGINGFACE: 0.8}
"""Share of the pixels with one label; Hugging Face resizes in another order, which moves the labels at edges."""
LEAST_TRAINED, LEAST_BY_CHANCE = 0.995, 0.95
"""Share of the pixels with the label of FP32."""
EXTRA_SECONDS = {"cpu": 400.0, "cuda": 240.0}
"""For the export, the engine's build, or a compiler."""
SPREAD = 4.0
"""Standard deviation of the logits with weights by chance."""
GMACS = 53.0
"""Billion multiplications and additions of R50 MaskFormer for a frame of 512x512, by the count of the paper."""
WEIGHT_BYTES = 2 * 41e6
"""Size of its weights in FP16."""


def write_checkpoint(path: Path, model: ModelConfig) -> None:
    """Write the checkpoint that the environment names, else one of weights by chance; it takes frames as they are."""
    test = TestConfig(short_edge=None)
    if VARIABLE in os.environ:
        config, metadata, weights, _ = load_weights(os.environ[VARIABLE])
        network = build_model(config.model)
        load_into(network, weights, os.environ[VARIABLE])
        save_weights(path, network, replace(config, test=replace(config.test, short_edge=None)), metadata, 0)
        return
    torch.manual_seed(0)
    network = build_model(model).eval()
    spread_queries(network)
    save_weights(path, network, Config(model=model, test=test), class_metadata(model.num_classes), 0)


@torch.no_grad()
def spread_queries(network: Any) -> None:
    """Rescale and shift the two heads so that queries differ in class and mask, and not one class wins everywhere."""
    frame = torch.from_numpy(draw_frame(np.random.default_rng(0), (128, 128))).permute(2, 0, 1).unsqueeze(0)
    sizes = torch.tensor([[128, 128]])
    classes, masks = network.predictor.class_embed, network.predictor.mask_embed.layers[-1]
    for layer in (classes, masks):
        seen: list[Tensor] = []
        hook = layer.register_forward_hook(lambda _1, _2, output, seen=seen: seen.append(output.flatten(0, -2)))
        network(frame, sizes)
        hook.remove()
        mean = seen[-1].mean(0)
        scale = SPREAD / (seen[-1] - mean).std()
        layer.weight.mul_(scale)
        layer.bias.sub_(mean).mul_(scale)
    scale = SPREAD / layer_mask_logits(network(frame, sizes)).std()
    masks.weight.mul_(scale)
    masks.bias.mul_(scale)


def tensorrt_api() -> str:
    """The name of the installed TensorRT: that for RTX where there is no other.

    Raises:
        ModuleNotFoundError: neither is installed.
    """
    for api in ("tensorrt", "tensorrt_rtx"):
        if importlib.util.find_spec(api) is not None:
            return api
    raise ModuleNotFoundError("No module named 'tensorrt' or 'tensorrt_rtx'", name="tensorrt")


def export_arguments(path: Path, folder: Path, shape: str, target: str | None) -> list[str]:
    """Arguments of the export: the graph of a checkpoint, and for a GPU engine and kernels for this shape."""
    arguments = [str(path), "--output", str(folder), "--flavours", "raw", "--sizes", shape]
    if target is not None:
        arguments += ["--target", target, "--frames", shape, "--tasks", "semantic", "--with-engine"]
        arguments += ["--engine.precision", "fp16", "--engine.api", tensorrt_api()]
        for end in ("min", "opt", "max"):
            arguments += [f"--engine.{end}-shape", *shape.split("x")]
    return arguments


def write_bundle(path: Path, folder: Path, shape: str, device: torch.device) -> None:
    """Export a checkpoint as a user does."""
    target = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    arguments = export_arguments(path, folder, shape, target)  # raises without TensorRT
    from maskformer_fast import export

    if export.main(arguments) != 0:
        raise RuntimeError("the export failed; the log says why")


class Implementations:
    """The bundle and its peers, each made when it is first called: one that is missing does not stop the others."""

    def __init__(self, device: torch.device, batch: int, size: Size, model: ModelConfig) -> None:
        self.device, self.batch, self.size = device, batch, size
        self.checkpoint = shared("checkpoint", partial(self._write_checkpoint, model=model)) / "model.safetensors"
        self.opened = cache(self._open)
        self.huggingface = cache(self._huggingface)

    @staticmethod
    def _write_checkpoint(folder: Path, model: ModelConfig) -> None:
        folder.mkdir()
        write_checkpoint(folder / "model.safetensors", model)

    def _open(self, kind: Any, amp: Any) -> BundleRunner | TorchRunner:
        index = self.device.index or 0
        if kind != "bundle":
            path = str(self.checkpoint)
            return TorchRunner(Setting(kind, path, self.batch, self.size, "semantic", str(self.device), index, 1, amp))
        shape = f"{self.batch}x{self.size[0]}x{self.size[1]}"
        folder = shared(f"bundle_{shape}", lambda path: write_bundle(self.checkpoint, path, shape, self.device))
        backend, in_flight = ("tensorrt", 2) if self.device.type == "cuda" else ("onnxruntime", 1)
        path = str(folder)
        return BundleRunner(Setting(kind, path, self.batch, self.size, "semantic", backend, index, in_flight, "off"))

    def labels(self, kind: str, amp: str, frames: Tensor) -> np.ndarray:
        results = self.opened(kind, amp).predict(list(frames.numpy()))
        return np.stack([result.labels for result in results])

    def shares(self, frames: Tensor) -> dict[str, float]:
        """Shares of the bundle's stages in the time of a call."""
        stages = self.opened("bundle", "off").timed(list(frames.numpy()))
        return {name: getattr(stages, name) / stages.total for name in ("preprocess", "network", "postprocess")}

    def _huggingface(self) -> tuple[Any, Any]:
        """Hugging Face's processor, and its model with the checkpoint's weights, which are written beside it."""
        import transformers
        from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil

        folder = self.checkpoint.with_name("huggingface")
        if not folder.exists():
            config, metadata, weights, _ = load_weights(self.checkpoint)
            write_folder(folder, weights, config, metadata)
        network = transformers.MaskFormerForInstanceSegmentation.from_pretrained(folder).eval().to(self.device)
        return MaskFormerImageProcessorPil(do_resize=False), network

    @torch.no_grad()
    def huggingface_labels(self, frames: Tensor) -> np.ndarray:
        images: Sequence[np.ndarray] = list(frames.numpy())
        processor, network = self.huggingface()
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            outputs = network(pixel_values=pixels)
        labels = processor.post_process_semantic_segmentation(outputs, [image.shape[:2] for image in images])
        return np.stack([one.cpu().numpy() for one in labels])


def setup(device: torch.device, batch: int = 1, size: Size = SIZE, model: ModelConfig = MODEL) -> Work:
    implementations = Implementations(device, batch, size, model)
    amp = "off" if device.type == "cpu" else "fp16"

    def draw(seed: int) -> tuple[Tensor]:
        rng = np.random.default_rng(seed)
        return (torch.from_numpy(np.stack([draw_frame(rng, size) for _ in range(batch)])),)

    peers: dict[str, Operation] = {
        EAGER: partial(implementations.labels, "eager", amp),
        COMPILED: partial(implementations.labels, "compile", amp),
        HUGGINGFACE: implementations.huggingface_labels,
        FP32: partial(implementations.labels, "eager", "off"),
    }
    cuda_least = {FP32: LEAST_TRAINED if VARIABLE in os.environ else LEAST_BY_CHANCE}
    return Work(
        partial(implementations.labels, "bundle", "off"), peers, draw,
        lambda ours, theirs: float(np.mean(ours == theirs)),
        CPU_LEAST_EQUAL if device.type == "cpu" else cuda_least,
        None if device.type == "cpu" else implementations.shares,
    )  # fmt: skip


def cpu_bound() -> Bound:
    """Work of the network: weights and a frame read, labels written."""
    parameters, operations = network_work(MODEL, SIZE)
    return Bound(4 * parameters + 4 * SIZE[0] * SIZE[1], operations)


def cases(device: str) -> list[Case]:
    """Cases of a device; on a GPU no call is captured, as each waits for the device."""
    if device == "cpu":
        return [
            Case(f"bundle resnet50 {SIZE[0]}x{SIZE[1]}, K={CLASSES}, B=1, float32, vs {peer}", peer, None, setup,
                 rank=rank, bound=cpu_bound, extra_seconds=EXTRA_SECONDS["cpu"])
            for peer, rank in ((EAGER, 1), (HUGGINGFACE, 1), (COMPILED, 2))
        ]  # fmt: skip
    rows = []
    goals = {EAGER: 6.0, COMPILED: 2.0, HUGGINGFACE: 8.0}
    for batch in (1, 8):
        name, make = f"bundle resnet50 {SIZE[0]}x{SIZE[1]}, K={CLASSES}, B={batch}, fp16", partial(setup, batch=batch)
        bound = Bound(WEIGHT_BYTES + 4 * batch * SIZE[0] * SIZE[1], 2e9 * GMACS * batch, "fp16")
        options: dict[str, Any] = {"bound": bound, "captured": False, "peer_captured": False, "rank": 1,
                   "extra_seconds": EXTRA_SECONDS["cuda"]}  # fmt: skip
        rows += beside(name, goals, make, share_goals={"postprocess": 0.1}, **options)
        if batch == 1:
            rows += beside(name, {FP32: None}, make, **options)
    return rows
