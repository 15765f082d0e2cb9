"""The network and its parts on one image of 512x512 beside Hugging Face's with the same weights, and beside ours in
OpenVINO and onnxruntime, as an exported graph, and compiled by Inductor with frozen weights.

bfloat16 is by autocast in both implementations, as `Predictor` and most others do it. Parts get the same input in both,
which is made by our own part before. Ours is prepared as `Predictor` does it, and leaves the last convolution of the
pixel decoder for the wanted masks, so the rows of the complete network are of mask logits of all queries.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases.engines import INDUCTOR, ONNXRUNTIME, OPENVINO, Run, export_graph, open_engine, open_inductor
from benchmarks.cases.inputs import Size, as_tensors, relative_error
from benchmarks.harness.case import Bound, Case, Work
from maskformer_fast.config import BackboneConfig, Config, ModelConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.fuse_for_cpu import convolves_bfloat16, fuse_for_cpu
from maskformer_fast.ops.mask_product import layer_mask_logits

CLASSES, SIZE = 150, (512, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RATES = {"float32": "fp32", "bfloat16": "bf16"}
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.15}
"""Largest difference over the largest value. Halves of eight bits differ by chance, and more in every layer: at random
weights the mask logits of each implementation are up to 0.08 from those in float32."""
HUGGINGFACE = "Hugging Face"
PARTS = ("network", "backbone", "pixel decoder", "transformer decoder")
COMPILE_SECONDS, EXPORT_SECONDS = 400.0, 120.0


def class_metadata(count: int) -> Metadata:
    """Metadata of `count` classes, all things, of different colours as far as these go."""
    colors = tuple((k * 37 % 256, k * 91 % 256, k * 151 % 256) for k in range(count))
    names = tuple(f"class {k}" for k in range(count))
    return Metadata("benchmark", names, (True,) * count, tuple(range(count)), colors)


def huggingface_model(network: nn.Module, model: ModelConfig, training: bool) -> Any:
    """Hugging Face's model with the weights of ours: to train with auxiliary losses, or to infer."""
    import transformers

    from maskformer_fast.interop.huggingface import write_folder

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_folder(path, network.state_dict(), Config(model=model), class_metadata(model.num_classes))
        theirs = transformers.MaskFormerForInstanceSegmentation.from_pretrained(path, use_auxiliary_loss=training)
    return theirs.train(training)


def network_work(model: ModelConfig, size: Size, training: bool = False) -> tuple[float, float]:
    """Parameters of a network, multiplications and additions of its forward pass on one image.

    On the meta device, without numbers. In training the pixel embeddings are computed, for the losses; in inference
    mask logits, of all queries.
    """
    with torch.device("meta"), torch.no_grad():
        network = build_model(model).train(training).requires_grad_(False)  # the counter wants no leaves with one
        images = torch.zeros((1, 3, *size), dtype=torch.uint8)
        count = sum(parameter.numel() for parameter in network.parameters())
        if training:
            return count, count_operations(lambda: network(images))
        return count, count_operations(lambda: layer_mask_logits(network(images)))


def count_operations(run: Callable[[], object]) -> float:
    """Multiplications and additions of the convolutions and matrix products that PyTorch runs in a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


class Pair(NamedTuple):
    """Our implementation of a part and Hugging Face's, with their inputs."""

    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any]
    our_input: Any
    their_input: Any
    weights: nn.Module  # ours, for their bytes


@cache
def networks(model: ModelConfig) -> tuple[Any, Any]:
    """Our network and Hugging Face's, with the same weights, for inference."""
    torch.manual_seed(0)
    network = build_model(model).eval()
    for module in network.modules():  # biases by chance: zeros would hide a mistake
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.normal_(module.bias, std=0.1)
    return network, huggingface_model(network, model, training=False)


@cache
def prepared(model: ModelConfig, dtype: str) -> Any:
    """Our network as `Predictor` runs it."""
    network = copy.deepcopy(networks(model)[0])
    fuse_for_cpu(network, DTYPES[dtype])
    return network


@torch.no_grad()
def pair(model: ModelConfig, part: str, size: Size, dtype: str | None = None, batch: int = 1) -> Pair:
    """Both implementations of one part; ours prepared for inference in `dtype`, or as it is. Inputs are float32."""
    plain, peer = networks(model)
    network = plain if dtype is None else prepared(model, dtype)
    pixel_level, decoder = peer.model.pixel_level_module, peer.model.transformer_module
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=generator)
    pixels = network.normalize(images, torch.tensor([size] * batch))
    if part == "network":

        def ours(images: Tensor) -> tuple[Tensor, Tensor]:
            outputs = network(images)
            return outputs.class_logits[-1], layer_mask_logits(outputs)

        def theirs(pixels: Tensor) -> tuple[Tensor, Tensor]:
            outputs = peer(pixels, output_auxiliary_logits=False)
            return outputs.class_queries_logits, outputs.masks_queries_logits

        return Pair(ours, theirs, images, pixels, network)
    if part == "backbone":
        return Pair(network.backbone, lambda x: pixel_level.encoder(x).feature_maps, pixels, pixels, network.backbone)
    features = plain.backbone(pixels)
    if part == "pixel decoder":
        return Pair(
            lambda x: network.pixel_decoder(x)[0], lambda x: pixel_level.decoder(x).last_hidden_state,
            features, features, network.pixel_decoder,
        )  # fmt: skip

    def their_queries(memory: Tensor) -> tuple[Tensor, Tensor]:
        states = decoder(memory).last_hidden_state
        return peer.class_predictor(states), peer.mask_embedder(states)

    def our_queries(memory: Tensor) -> tuple[Tensor, Tensor]:
        classes, embeddings = network.predictor(memory, False)
        return classes[-1], embeddings[-1]

    return Pair(our_queries, their_queries, features[-1], features[-1], network.predictor)


def model_of(backbone: str) -> ModelConfig:
    return ModelConfig(num_classes=CLASSES, backbone=BackboneConfig(backbone))


def setup(
    device: torch.device, model: ModelConfig, part: str, dtype: str, size: Size = SIZE, batch: int = 1
) -> Work:
    both = pair(model, part, size, dtype, batch)

    def call(run: Callable[[Any], Any], given: Any) -> Any:
        low = dtype == "bfloat16"
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
            return run(given)

    def agreement(ours: Any, theirs: Any) -> float:
        return 1 - max(map(relative_error, as_tensors(ours), as_tensors(theirs)))

    peers: dict[str, Callable[[], Any]] = {HUGGINGFACE: partial(call, both.theirs, both.their_input)}
    if part == "network":
        peers |= engine_peers(model, dtype, both.our_input)
    least = dict.fromkeys(peers, 1 - TOLERANCES[dtype])
    return Work(partial(call, both.ours, both.our_input), peers, agreement=agreement, least=least)


def engine_peers(model: ModelConfig, dtype: str, images: Tensor) -> dict[str, Callable[[], Any]]:
    """Our network with logits as outputs in other engines, loaded or compiled when first run."""
    graph = cache(lambda: export_graph(networks(model)[0], "raw", (images.shape[2], images.shape[3])))
    pixels = images.numpy()

    def open_one(engine: str) -> Run:
        if engine == INDUCTOR:
            return open_inductor(networks(model)[0], "raw", dtype)
        return open_engine(engine, graph(), dtype)

    def peer(engine: str) -> Callable[[], Any]:
        opened = cache(partial(open_one, engine))
        return lambda: tuple(map(torch.from_numpy, opened()(pixels)))

    return {engine: peer(engine) for engine in engines_of(dtype)}


def engines_of(dtype: str) -> list[str]:
    """The engines that have a dtype on CPUs: onnxruntime has no bfloat16."""
    return [OPENVINO, INDUCTOR, *([ONNXRUNTIME] if dtype == "float32" else [])]


@cache
@torch.no_grad()
def least_work(model: ModelConfig, part: str, size: Size) -> tuple[int, float]:
    """Count of numbers read and written, and of multiplications and additions, by the unprepared network.

    Winograd's convolutions take fewer operations, so ours may go below the limit.
    """
    both = pair(model, part, size)
    results: list[Tensor] = []
    operations = count_operations(lambda: results.extend(as_tensors(both.ours(both.our_input))))
    if part == "network":  # our operators are not counted; what they replace is
        _, operations = network_work(model, size)
    moved = [*both.weights.parameters(), *as_tensors(both.our_input), *results]
    return sum(tensor.numel() for tensor in moved), operations


def bound(model: ModelConfig, part: str, dtype: str, size: Size = SIZE) -> Bound:
    """Weights and inputs read, results written; convolutions and matrix products."""
    numbers, operations = least_work(model, part, size)
    return Bound(numbers * DTYPES[dtype].itemsize, operations, RATES[dtype])


def demo_setup(device: torch.device, batch: int) -> Work:
    """The untrained network of the demo: images to class and mask logits."""
    from maskformer_fast.inference.load import load

    predictor: Any = load("demo", str(device))
    images = torch.randint(256, (batch, 3, 256, 256), dtype=torch.uint8).to(device)

    @torch.no_grad()
    def ours() -> tuple[Tensor, Tensor]:
        outputs = predictor.network(images)
        return outputs.class_logits[-1], layer_mask_logits(outputs)

    return Work(ours, {})


def cases(device: str) -> list[Case]:
    rows = [
        Case(f"network of the demo, {batch} x 256x256", None, None, partial(demo_setup, batch=batch), rank=3,
             memory=False, captured=False)
        for batch in (1, 4)
    ]  # fmt: skip
    return rows if device != "cpu" else cpu_cases() + rows


def cpu_cases() -> list[Case]:
    rows = []
    for name in ("resnet50", "swin_tiny"):
        model = model_of(name)
        for dtype in DTYPES if convolves_bfloat16() else ("float32",):
            for part in PARTS:
                complete = part == "network"
                for peer in (HUGGINGFACE, *(engines_of(dtype) if complete else [])):
                    eager = peer == HUGGINGFACE
                    rows.append(Case(
                        f"{part} {name} 512x512, B=1, {dtype}, vs {peer}", peer, None,
                        partial(setup, model=model, part=part, dtype=dtype),
                        rank=3 if peer == INDUCTOR else 0 if complete else 2,
                        bound=partial(bound, model, part, dtype), memory=complete and eager,
                        extra_seconds=0.0 if eager else COMPILE_SECONDS if peer == INDUCTOR else EXPORT_SECONDS,
                    ))  # fmt: skip
    return rows
