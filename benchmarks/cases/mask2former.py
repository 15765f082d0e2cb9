"""Mask2Former at 512x512 with 150 classes: network, image file to results, and a training step.

Beside Hugging Face's model with the same weights where the backbone is a Swin-T. It has no ResNet, so that one's peer
is the same network in eager PyTorch: deformable attention by transformers' function, masks of full size in each layer,
layers that are not fused. Files are drawn scenes of 640x480 and 1600x1200, which both sides stretch to 512x512, and
results have the file's size. Theirs are by Hugging Face's processor, model and post-processing. Both networks' heads
are rescaled so that a fifth of the queries is sure of its class and mask.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.cases.end_to_end import LIVE
from benchmarks.cases.inputs import Size, random_targets, relative_error
from benchmarks.cases.matching_cost import float_masks
from benchmarks.cases.network import class_metadata, network_work
from benchmarks.cases.train_step import optimizer_step
from benchmarks.harness.case import Bound, Case, Work
from benchmarks.harness.runner import shared
from maskformer_fast.benchmark.runners import draw_frame
from maskformer_fast.config import Config, ModelConfig, Task
from maskformer_fast.inference.load import load
from maskformer_fast.interop.huggingface import write_folder
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.deformable_encoder import LEVELS, POINTS, DeformableAttention
from maskformer_fast.modeling.fuse_for_cpu import fuse_for_cpu
from maskformer_fast.modeling.weights import save_weights
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.points import draw_points
from maskformer_fast.ops.rle import encode_packed_masks
from maskformer_fast.recipes import load_recipe
from maskformer_fast.structures import Targets
from maskformer_fast.training.criterion import Criterion

CLASSES, SIZE, TARGETS = 150, (512, 512), 14
HUGGINGFACE, EAGER = "Hugging Face", "eager PyTorch"
TOLERANCE = 1e-3
"""Largest difference of logits over the largest value."""
TASK_GOALS: dict[Task, float] = {"semantic": 3.0, "panoptic": 3.0, "instance": 4.0}
PHOTOGRAPHS: tuple[Size, ...] = ((480, 640), (1200, 1600))
"""Height and width of the image files."""
OUTCOMES: dict[Task, str] = {"semantic": "labels", "panoptic": "panoptic map", "instance": "instances as RLE"}
STEP_SECONDS = 300.0
"""A training step takes many seconds on a slow core."""


def recipe(backbone: str) -> Config:
    """Configuration of ADE20K semantic, without what is random in training."""
    config = load_recipe(f"mask2former/ade20k_semantic_{backbone}")
    changed = replace(config.model.backbone, drop_path_rate=0.0 if "swin" in backbone else None)
    return replace(config, model=replace(config.model, num_classes=CLASSES, backbone=changed))


def build(model: ModelConfig) -> Any:
    """Network with random weights; deformable attention looks and weighs differently at each pixel."""
    torch.manual_seed(0)
    network = build_model(model).eval()
    for module in network.modules():
        if isinstance(module, DeformableAttention):
            nn.init.normal_(module.sampling_offsets.weight, std=0.05)
            nn.init.normal_(module.attention_weights.weight, std=0.05)
    return network


def huggingface_model(network: nn.Module, model: ModelConfig, folder: Path | None = None) -> Any:
    """Hugging Face's model with the weights of ours, read from a folder that is written first."""
    import transformers

    with tempfile.TemporaryDirectory() as temporary:
        path = folder or Path(temporary) / "model"
        write_folder(path, network.state_dict(), Config(model=model), class_metadata(model.num_classes))
        return transformers.Mask2FormerForUniversalSegmentation.from_pretrained(path).eval()


def eager_network(network: nn.Module) -> Any:
    """The network with transformers' deformable attention and masks of full size in each layer."""
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    def attend(
        self: DeformableAttention, located: Tensor, x: Tensor, references: Tensor, sizes: list[Size]
    ) -> Tensor:
        value = self.value_proj(x).unflatten(-1, (self.num_heads, -1))
        offsets = self.sampling_offsets(located).unflatten(-1, (self.num_heads, LEVELS, POINTS, 2))
        logits = self.attention_weights(located).unflatten(-1, (self.num_heads, LEVELS, POINTS))
        weights = logits.flatten(3).softmax(-1).view(logits.shape)
        sides = torch.tensor([[width, height] for height, width in sizes])[:, None]
        locations = references[:, :, None, :, None] + offsets / sides
        return self.output_proj(multi_scale_deformable_attention(value, sizes, locations, weights))

    eager: Any = copy.deepcopy(network)
    eager.predictor.direct_masks = True
    for module in eager.modules():
        if isinstance(module, DeformableAttention):
            module.forward = MethodType(attend, module)
    return eager


def network_setup(device: torch.device, model: ModelConfig, peer: str, size: Size = SIZE) -> Work:
    """Image to class and mask logits of all queries."""
    network = build(model)
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = network.normalize(images, torch.tensor([size]))
    theirs = huggingface_model(network, model) if peer == HUGGINGFACE else eager_network(network)
    fused = copy.deepcopy(network)
    fuse_for_cpu(fused)

    @torch.no_grad()
    def ours(run: Any = fused) -> tuple[Tensor, Tensor]:
        outputs = run(images)
        return outputs.class_logits[-1], layer_mask_logits(outputs)

    @torch.no_grad()
    def huggingface() -> tuple[Tensor, Tensor]:
        outputs = theirs(pixels, output_auxiliary_logits=False)
        return outputs.class_queries_logits, outputs.masks_queries_logits

    def agreement(ours: tuple[Tensor, ...], peer: tuple[Tensor, ...]) -> float:
        return 1 - max(map(relative_error, ours, peer))

    run = huggingface if peer == HUGGINGFACE else partial(ours, theirs)
    return Work(ours, {peer: run}, agreement=agreement, least={peer: 1 - TOLERANCE})


def make_confident(network: Any, images: Tensor) -> None:
    """Rescale the heads: classes of a few queries certain, the rest "no object"; mask logits of deviation 5."""
    head = network.predictor
    states: list[Tensor] = []
    hook = head.class_embed.register_forward_pre_hook(lambda _, given: states.append(given[0].flatten(0, -3)[-1]))
    scale = 5 / layer_mask_logits(network(images)).std()
    hook.remove()
    head.mask_embed.layers[-1].weight.mul_(scale), head.mask_embed.layers[-1].bias.mul_(scale)
    weight, (state,) = head.class_embed.weight, states
    weight.mul_(8 / (state - state.mean(0)).matmul(weight.T).std())
    head.class_embed.bias.copy_(-weight @ state.mean(0))
    logits = head.class_embed(state)
    head.class_embed.bias[-1] += (logits[:, :-1].amax(1) - logits[:, -1]).quantile(1 - LIVE)


def file_setup(device: torch.device, task: Task, photograph: Size, config: Config | None = None) -> Work:
    """An image file to a result, by `Predictor` and by Hugging Face as its documentation does it."""
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    config = config or recipe("swin_tiny")
    config = replace(config, test=replace(config.test, size=SIZE))

    def make(folder: Path) -> None:
        folder.mkdir()
        network = build(config.model)
        scene = Image.fromarray(draw_frame(np.random.default_rng(0), PHOTOGRAPHS[-1]))
        image = torch.from_numpy(np.array(scene.resize(SIZE[::-1], Image.Resampling.BILINEAR)))
        with torch.no_grad():
            make_confident(network, image.permute(2, 0, 1)[None])
        save_weights(folder / "ours.safetensors", network, config, class_metadata(config.model.num_classes), step=0)
        huggingface_model(network, config.model, folder / "theirs")
        for size in PHOTOGRAPHS:  # of one scene, because the heads are rescaled for it
            scene.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{size[0]}.jpg", quality=95)

    folder = shared("mask2former", make)
    file = folder / f"{photograph[0]}.jpg"
    predictor: Any = load(folder / "ours.safetensors", "cpu")
    import transformers

    height, width = SIZE
    processor = Mask2FormerImageProcessorPil.from_pretrained(
        folder / "theirs", size={"height": height, "width": width}
    )
    model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(folder / "theirs").eval()

    def ours() -> Any:
        result = predictor.predict(file, task)
        return encode_packed_masks(result.masks.numpy(), result.size[1]) if task == "instance" else result

    @torch.inference_mode()
    def theirs() -> Any:
        image = Image.open(file).convert("RGB")
        outputs = model(**processor(images=image, return_tensors="pt"))
        options: dict[str, Any] = {"target_sizes": [(image.height, image.width)]}
        if task == "instance":
            options |= {"return_coco_annotation": True, "threshold": 0.0}
        return getattr(processor, f"post_process_{task}_segmentation")(outputs, **options)

    return Work(ours, {HUGGINGFACE: theirs})


def step_setup(device: torch.device, model: ModelConfig, batch: int = 2, size: Size = SIZE) -> Work:
    """Forward, ten predictions matched and compared at points, backward, clipping, fused AdamW."""
    loss_config = load_recipe("mask2former/ade20k_semantic_swin_tiny").loss
    network = build(model).train()
    peer = huggingface_model(network, model).train()
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
def bound(backbone: str) -> Bound:
    """Weights read; multiplications by the plain sum, without those of the masks for the attention."""
    parameters, operations = network_work(recipe(backbone).model, SIZE)
    return Bound(4 * parameters, operations)


@cache
def step_bound(backbone: str, batch: int = 2) -> Bound:
    """The optimiser's traffic; forward and twice as many operations backward."""
    parameters, operations = network_work(recipe(backbone).model, SIZE)
    return Bound(28 * parameters, 3 * batch * operations)


def cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    setup: Callable[..., Work] = network_setup
    networks = [
        Case(f"Mask2Former {backbone}, network 512x512, B=1, float32", peer, 2.5,
             partial(setup, model=recipe(backbone).model, peer=peer), threads=1, rank=1, bound=partial(bound, backbone))
        for backbone, peer in (("swin_tiny", HUGGINGFACE), ("r50", EAGER))
    ]  # fmt: skip
    files = [
        Case(f"Mask2Former swin_tiny, file of {width}x{height} -> {OUTCOMES[task]}, network 512x512, float32",
             HUGGINGFACE, goal, partial(file_setup, task=task, photograph=(height, width)), threads=1, rank=1,
             memory=False, bound=partial(bound, "swin_tiny"))
        for height, width in PHOTOGRAPHS for task, goal in TASK_GOALS.items()
    ]  # fmt: skip
    step = Case("Mask2Former swin_tiny, training step 2x3x512x512, 10 predictions, float32", HUGGINGFACE, 2.0,
                partial(step_setup, model=recipe("swin_tiny").model), threads=1, memory_goal=0.5, rank=2,
                bound=partial(step_bound, "swin_tiny"), extra_seconds=STEP_SECONDS)  # fmt: skip
    return [*networks, *files, step]
