"""EoMT at 640x640 with 133 classes: network, image file to panoptic map, and training step.

Beside Hugging Face's with the same weights; files also beside OpenVINO, which runs our graph of one size between
Hugging Face's processor and its post-processing.

Networks have random weights. In inference attention is plain, as after
annealing; in bfloat16 Hugging Face's network is converted to it. Our training
step takes points and losses of `Criterion`, theirs those of its model; both mask the attention of every query.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.cases.end_to_end import prepare_images
from benchmarks.cases.engines import OPENVINO, Run, export_graph, open_engine
from benchmarks.cases.inputs import Size, random_targets, relative_error
from benchmarks.cases.mask2former import make_confident
from benchmarks.cases.matching_cost import float_masks
from benchmarks.cases.network import class_metadata, network_work
from benchmarks.cases.train_step import optimizer_step
from benchmarks.harness.case import Bound, Case, Work
from benchmarks.harness.runner import shared
from maskformer_fast.config import Config, ModelConfig
from maskformer_fast.data.images import read_image
from maskformer_fast.inference.load import load, load_network
from maskformer_fast.interop.huggingface import write_folder
from maskformer_fast.modeling import EoMT, build_model
from maskformer_fast.modeling.fuse_for_cpu import convolves_bfloat16, fuse_for_cpu
from maskformer_fast.modeling.weights import save_weights
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.points import draw_points
from maskformer_fast.recipes import load_recipe
from maskformer_fast.structures import Targets
from maskformer_fast.training.criterion import Criterion

CLASSES, SIDE, TARGETS = 133, 640, 14
HUGGINGFACE = "Hugging Face"
RECIPE = "eomt/coco_panoptic_{size}_640_2x"
GOALS = {torch.float32: 2.0, torch.bfloat16: 3.0}
FILE_GOALS = {torch.float32: 1.3, torch.bfloat16: 1.5}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Largest difference of logits over the largest value; two networks in bfloat16 round at different places."""
RATES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
STEP_SIDE, STEP_GOAL, STEP_MEMORY_GOAL = 512, 1.8, 0.6
STEP_SECONDS, EXPORT_SECONDS = 200.0, 120.0


def model_of(size: str, image_side: int = SIDE) -> ModelConfig:
    """The published configuration of COCO panoptic, for square images of another side."""
    model = load_recipe(RECIPE.format(size=size)).model
    backbone = replace(model.backbone, image_size=(image_side, image_side))
    return replace(model, num_classes=CLASSES, backbone=backbone, size_divisibility=16)


def build(model: ModelConfig, probability: float) -> EoMT:
    """Network with random weights; positions and queries differ, so that masks have edges."""
    torch.manual_seed(0)
    network = build_model(model)
    assert isinstance(network, EoMT)
    network.set_mask_probability([probability] * model.decoder.layers)
    return network


def huggingface_model(network: nn.Module, model: ModelConfig) -> Any:
    """Hugging Face's model with the weights of ours."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_folder(path, network.state_dict(), Config(model=model), class_metadata(model.num_classes))
        return transformers.EomtForUniversalSegmentation.from_pretrained(path)


def network_setup(device: torch.device, model: ModelConfig, dtype: torch.dtype, size: Size) -> Work:
    """Image to class and mask logits of all queries."""
    network = build(model, 0.0).eval()
    theirs = huggingface_model(network, model).eval().to(dtype)
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = network.normalize(images, torch.tensor([size])).to(dtype)
    fuse_for_cpu(network, dtype)

    @torch.no_grad()
    def ours() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
            outputs = network(images)
            return outputs.class_logits[-1], layer_mask_logits(outputs)

    @torch.no_grad()
    def huggingface() -> tuple[Tensor, Tensor]:
        outputs = theirs(pixels)
        return outputs.class_queries_logits, outputs.masks_queries_logits

    def agreement(ours: tuple[Tensor, ...], peer: tuple[Tensor, ...]) -> float:
        return 1 - max(map(relative_error, ours, peer))

    return Work(ours, {HUGGINGFACE: huggingface}, agreement=agreement, least={HUGGINGFACE: 1 - TOLERANCES[dtype]})


def file_setup(device: torch.device, dtype: str, config: Config | None = None) -> Work:
    """An image file to a panoptic map; heads are rescaled so that a fifth of the queries is sure."""
    from transformers.models.eomt.image_processing_pil_eomt import EomtImageProcessorPil

    recipe = load_recipe(RECIPE.format(size="small"))
    config = config or replace(recipe, model=replace(recipe.model, num_classes=CLASSES))
    metadata = class_metadata(config.model.num_classes)

    def make(folder: Path) -> None:
        folder.mkdir()
        (file,) = prepare_images(None, 1, folder / "images")
        network = build(config.model, 0.0).eval()
        image = torch.from_numpy(read_image(file)).permute(2, 0, 1)[None]
        height, width = config.model.backbone.image_size or (SIDE, SIDE)
        padded = nn.functional.pad(image, (0, width - image.shape[3], 0, height - image.shape[2]))  # as it is in files
        with torch.no_grad():
            make_confident(network, padded)
        save_weights(folder / "ours.safetensors", network, config, metadata, step=0)
        write_folder(folder / "theirs", network.state_dict(), config, metadata)

    folder = shared("eomt", make)
    (file,) = (folder / "images").iterdir()
    predictor: Any = load(folder / "ours.safetensors", "cpu", amp="bf16" if dtype == "bfloat16" else "off")
    processor = EomtImageProcessorPil.from_pretrained(folder / "theirs", do_rescale=False, do_normalize=False)

    @cache
    def engine() -> Run:
        network = load_network(folder / "ours.safetensors", "cpu").network
        sides = config.model.backbone.image_size or (SIDE, SIDE)
        return open_engine(OPENVINO, export_graph(network, "raw", sides), dtype)

    def theirs() -> Any:
        image = Image.open(file).convert("RGB")
        pixels = processor(images=image, return_tensors="pt")["pixel_values"].to(torch.uint8)
        classes, masks = map(torch.from_numpy, engine()(pixels.numpy()))
        outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
        return processor.post_process_panoptic_segmentation(outputs, target_sizes=[(image.height, image.width)])

    return Work(lambda: predictor.predict(file, "panoptic"), {OPENVINO: theirs})


def step_setup(device: torch.device, model: ModelConfig, batch: int = 2) -> Work:
    """Forward with masked attention, all predictions matched and compared at points, backward, clipping, AdamW."""
    loss_config = load_recipe(RECIPE.format(size="small")).loss
    size = model.backbone.image_size
    assert size is not None
    network = build(model, 1.0).train()
    peer = huggingface_model(network, model).train()
    peer.attn_mask_probs.fill_(1.0)
    criterion = Criterion(model.num_classes, loss_config)

    def draw(seed: int) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
        targets = random_targets(batch, TARGETS, model.num_classes, size)
        return images, targets, network.normalize(images, targets.valid_sizes), *float_masks(targets)

    def our_loss(images: Tensor, targets: Targets) -> Tensor:
        draws = draw_points(loss_config, list(range(batch)), device)
        total: Tensor = criterion(network(images, targets.valid_sizes), targets, draws=draws).total
        return total

    def their_loss(images: Tensor, masks: list[Tensor], labels: list[Tensor]) -> Tensor:
        loss: Tensor = peer(images, mask_labels=masks, class_labels=labels).loss
        return loss

    ours = optimizer_step(network, our_loss, device, torch.float32)
    theirs = optimizer_step(peer, their_loss, device, torch.float32)
    return Work(lambda *inputs: ours(*inputs[:2]), {HUGGINGFACE: lambda *inputs: theirs(*inputs[2:])}, draw)


@cache
def work(size: str, side: int) -> tuple[float, float]:
    """Parameters, and multiplications and additions of the network without masked attention."""
    model = model_of(size, side)
    with torch.device("meta"):
        network = build_model(model)
    return sum(parameter.numel() for parameter in network.parameters()), network_work(model, (side, side))[1]


def bound(size: str, dtype: torch.dtype) -> Bound:
    """Weights read; multiplications."""
    parameters, operations = work(size, SIDE)
    return Bound(dtype.itemsize * parameters, operations, RATES[dtype])


def step_bound(size: str, side: int, batch: int = 2) -> Bound:
    """The optimiser's traffic; forward and twice as many operations backward."""
    parameters, operations = work(size, side)
    return Bound(28 * parameters, 3 * batch * operations)


def cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    setup: Callable[..., Work] = network_setup
    dtypes = [dtype for dtype in GOALS if dtype == torch.float32 or convolves_bfloat16()]
    networks = [
        Case(f"EoMT {size}, network 640x640, B=1, {DTYPES[dtype]}", HUGGINGFACE, GOALS[dtype],
             partial(setup, model=model_of(size), dtype=dtype, size=(SIDE, SIDE)), threads=1,
             rank=1 if size == "small" else 2, bound=partial(bound, size, dtype), memory=False)
        for size in ("small", "base") for dtype in dtypes
    ]  # fmt: skip
    files = [
        Case(f"EoMT small, image file -> panoptic map, 640x640, {DTYPES[dtype]}", OPENVINO, FILE_GOALS[dtype],
             partial(file_setup, dtype=DTYPES[dtype]), threads=1, rank=1, memory=False, extra_seconds=EXPORT_SECONDS,
             bound=partial(bound, "small", dtype))
        for dtype in dtypes
    ]  # fmt: skip
    step = Case(
        f"EoMT small, training step 2x3x{STEP_SIDE}x{STEP_SIDE}, float32", HUGGINGFACE, STEP_GOAL,
        partial(step_setup, model=model_of("small", STEP_SIDE)), threads=1, memory_goal=STEP_MEMORY_GOAL, rank=2,
        bound=partial(step_bound, "small", STEP_SIDE), extra_seconds=STEP_SECONDS,
    )  # fmt: skip
    return [*networks, *files, step]
