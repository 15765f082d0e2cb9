"""A bundle's engine and kernels, end to end, beside PyTorch, eager and compiled, and Hugging Face.

The network is R50 with 150 classes in FP16, weights by chance; frames lie in the host's memory, and so do their labels
in the end, on every side. Each side's call waits for the device, so none is captured as a graph. The bundle is exported
here, and its engine built for this GPU, which takes minutes; without onnx, onnxruntime, or TensorRT (also that for RTX)
its units say what is missing. That it runs answers whether TensorRT for RTX serves this GPU. Peak memory is what
PyTorch allocates, in which TensorRT has no part.

Labels are compared with those of FP32. With weights by chance many labels are close calls: halves, emulated on the CPU,
kept 98.8 to 99.6 % of them. MASKFORMER_FAST_CHECKPOINT names a trained checkpoint, for which the goal of 99.5 % holds.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu_harness import OURS, Bound, Case, Peer, Work
from benchmarks.train_step import class_metadata
from maskformer_fast.benchmark.runners import BundleRunner, Setting, TorchRunner, draw_frame
from maskformer_fast.config import BackboneConfig, Config, ModelConfig, TestConfig
from maskformer_fast.interop.huggingface import write_folder
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import load_into, load_weights, save_weights
from maskformer_fast.ops.mask_product import layer_mask_logits

EAGER, COMPILED, HUGGING_FACE, FP32 = "PyTorch eager", "torch.compile", "Hugging Face", "PyTorch eager, FP32"
VARIABLE = "MASKFORMER_FAST_CHECKPOINT"
CLASSES, SIZE = 150, (512, 512)
LEAST_TRAINED, LEAST_BY_CHANCE = 0.995, 0.95
"""Share of the pixels with the label of FP32."""
PATIENCE_SECONDS = 240.0
"""For the export and the engine's build."""
MODEL = ModelConfig(num_classes=CLASSES, backbone=BackboneConfig("resnet50"))
SPREAD = 4.0
"""Standard deviation of the logits with weights by chance."""
GMACS = 53.0
"""Billion multiplications and additions of R50 MaskFormer for a frame of 512x512, by the count of the paper."""
BYTES = 2 * 41e6
"""Of its weights in FP16."""

Size = tuple[int, int]


@cache
def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gpu_deploy")  # removed when the process ends


@cache
def checkpoint(model: ModelConfig) -> Path:
    """The checkpoint that is named, else one of weights by chance. It takes frames as they are."""
    path = Path(temporary_folder().name) / "checkpoint.safetensors"
    write_checkpoint(path, model)
    return path


def write_checkpoint(path: Path, model: ModelConfig) -> None:
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
def spread_queries(network: nn.Module) -> None:
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
    """The installed TensorRT, that for RTX where there is no other. Raises ModuleNotFoundError without either."""
    for api in ("tensorrt", "tensorrt_rtx"):
        if importlib.util.find_spec(api) is not None:
            return api
    raise ModuleNotFoundError("No module named 'tensorrt' or 'tensorrt_rtx'", name="tensorrt")


def export_arguments(path: Path, folder: Path, shape: str, target: str | None) -> list[str]:
    """Of the command: the graph of a checkpoint, and for a GPU engine and kernels for this shape."""
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
    arguments = export_arguments(path, folder, shape, target)  # says so where there is no TensorRT
    from maskformer_fast import export

    if export.main(arguments) != 0:
        raise RuntimeError("the export failed; the log says why")


@cache
def bundle(model: ModelConfig, batch: int, size: Size, device: torch.device) -> BundleRunner:
    folder = Path(temporary_folder().name) / f"bundle_{batch}_{size[0]}x{size[1]}"
    write_bundle(checkpoint(model), folder, f"{batch}x{size[0]}x{size[1]}", device)
    backend = "tensorrt" if device.type == "cuda" else "onnxruntime"
    setting = Setting("bundle", str(folder), batch, size, "semantic", backend, device.index or 0, 2, "off")
    return BundleRunner(setting)


@cache
def in_pytorch(
    model: ModelConfig, batch: int, size: Size, device: torch.device, kind: Any, amp: Any
) -> TorchRunner:
    return TorchRunner(Setting(kind, str(checkpoint(model)), batch, size, "semantic", str(device), 0, 1, amp))


@cache
def hugging_face(path: Path, device: torch.device) -> tuple[Any, Any]:
    """Their processor, and their model with the checkpoint's weights, which it writes beside it."""
    import transformers
    from transformers.models.maskformer.image_processing_pil_maskformer import MaskFormerImageProcessorPil

    folder = path.with_name("hugging_face")
    if not folder.exists():
        config, metadata, weights, _ = load_weights(path)
        write_folder(folder, weights, config, metadata)
    network = transformers.MaskFormerForInstanceSegmentation.from_pretrained(folder).eval().to(device)
    return MaskFormerImageProcessorPil(do_resize=False), network


@torch.no_grad()
def by_hugging_face(frames: Sequence[np.ndarray], path: Path, device: torch.device) -> list[np.ndarray]:
    processor, network = hugging_face(path, device)
    pixels = processor(images=list(frames), return_tensors="pt")["pixel_values"].to(device)
    with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
        outputs = network(pixel_values=pixels)
    sizes = [frame.shape[:2] for frame in frames]
    return [labels.cpu().numpy() for labels in processor.post_process_semantic_segmentation(outputs, sizes)]


def setup(device: torch.device, batch: int, size: Size = SIZE, model: ModelConfig = MODEL) -> Work:
    """Sides are made when they are first called: what one lacks, or takes long to build, is not the others' concern."""
    runner = partial(in_pytorch, model, batch, size, device)

    def draw(seed: int) -> tuple[Tensor]:
        rng = np.random.default_rng(seed)
        return (torch.from_numpy(np.stack([draw_frame(rng, size) for _ in range(batch)])),)

    def labels(results: Sequence[Any]) -> np.ndarray:
        return np.stack([result.labels for result in results])

    def ours(frames: Tensor) -> np.ndarray:
        return labels(bundle(model, batch, size, device).predict(list(frames.numpy())))

    def torch_side(kind: str, amp: str, frames: Tensor) -> np.ndarray:
        return labels(runner(kind, amp).predict(list(frames.numpy())))

    def theirs(frames: Tensor) -> np.ndarray:
        return np.stack(by_hugging_face(list(frames.numpy()), checkpoint(model), device))

    def shares(frames: Tensor) -> dict[str, float]:
        stages = bundle(model, batch, size, device).timed(list(frames.numpy()))
        return {name: getattr(stages, name) / stages.total for name in ("preprocess", "network", "postprocess")}

    sides = {
        OURS: ours, EAGER: partial(torch_side, "eager", "fp16"), COMPILED: partial(torch_side, "compile", "fp16"),
        HUGGING_FACE: theirs, FP32: partial(torch_side, "eager", "off"),
    }  # fmt: skip
    return Work(draw, sides, shares=shares)


def precision_setup(device: torch.device, batch: int, size: Size = SIZE, model: ModelConfig = MODEL) -> Work:
    """The bundle beside FP32, whose labels it must give."""
    work = setup(device, batch, size, model)
    least = LEAST_TRAINED if VARIABLE in os.environ else LEAST_BY_CHANCE
    sides = {name: work.sides[name] for name in (OURS, FP32)}
    return Work(work.draw, sides, lambda ours, theirs: float(np.mean(ours == theirs)), least)


def cases() -> list[Case]:
    rows = []
    for batch in (1, 8):
        name = f"deploy resnet50 {SIZE[0]}x{SIZE[1]}, K={CLASSES}, B={batch}, fp16"
        peers = (Peer(EAGER, 6.0, graph=False), Peer(COMPILED, 2.0, graph=False), Peer(HUGGING_FACE, 8.0, graph=False))
        pixels = batch * SIZE[0] * SIZE[1]
        rows.append(Case(
            name, partial(setup, batch=batch), peers, Bound(BYTES + 4 * pixels, 2e9 * GMACS * batch), graph=False,
            rank=1, max_shares={"postprocess": 0.1}, patience=PATIENCE_SECONDS,
        ))  # fmt: skip
    rows.append(Case(
        f"deploy labels resnet50 {SIZE[0]}x{SIZE[1]}, B=1, fp16", partial(precision_setup, batch=1),
        (Peer(FP32, graph=False),), rows[0].bound, graph=False, rank=1, patience=PATIENCE_SECONDS,
    ))  # fmt: skip
    return rows
