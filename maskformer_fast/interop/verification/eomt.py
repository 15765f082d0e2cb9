"""Verification of a converted EoMT, as `verify` does it for a MaskFormer.

A recording is a folder with a `case.pt` (a batch of images with the outputs of the official network at several
probabilities of masked attention, and results) and, optionally, `train.pt` (targets, random points, matchings, losses,
gradients) and `f64.pt` (predictions in float64). Boolean masks are ``{"bits": packed, "shape": shape}``.

Each tolerance is about ten times the distance of the recorded float32 numbers from the official code's in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.config import LossConfig, ModelConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import PanopticResult
from maskformer_fast.inference import postprocess
from maskformer_fast.interop.eomt import official_rules
from maskformer_fast.interop.files import load_torch
from maskformer_fast.interop.names import ConvertError, to_ours
from maskformer_fast.interop.verification.difference import Difference, Report, relative
from maskformer_fast.interop.verification.mask2former import boolean_masks, recorded_draws
from maskformer_fast.interop.verification.recording import CASE_NAME
from maskformer_fast.interop.verification.verify import evaluation_mode, given, gradient_norms, packed_targets
from maskformer_fast.modeling import EoMT
from maskformer_fast.modeling.backbone import resolve_backbone
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.resized_semantic import windowed_semantic_inference
from maskformer_fast.structures import LayerPredictions, Predictions
from maskformer_fast.training.criterion import Criterion

TRAIN_NAME, EXACT_NAME = "train.pt", "f64.pt"
PROBABILITIES = {"p1": 1.0, "p05": 0.5, "p0": 0.0}
"""Recorded probabilities of masked attention."""
BLOCK_TOLERANCE, LOGIT_TOLERANCE = 4e-5, 5e-5
"""Tolerances of tokens and of logits, relative to the largest recorded magnitude."""
LOSS_TOLERANCE = 2e-5
"""Relative tolerance of losses."""
GRADIENT_TOLERANCE = 1e-3
"""Relative tolerance of gradients in float32: the choice of uncertain points has kinks."""
SCORE_TOLERANCE = 2e-4
"""Absolute tolerance of scores of instances."""
MARGIN = 1e-3
"""Lead of the best class over the second best below which rounding may change a label."""
LAYER_THRESHOLDS = (0.8, 0.8)
"""Of the recorded panoptic maps of the layers before the last: least score, least share of a mask that is visible."""
FEW_PIXELS = 4
"""Number of pixels of a panoptic map that rounding may change."""


def verify_eomt(
    network: nn.Module, things: Metadata | Sequence[bool], path: str | Path, loss: LossConfig | None = None
) -> Report:
    """Compare an EoMT with recorded outputs of the official implementation; arguments as of `verify`.

    Raises:
        FileNotFoundError: there is no such recording.
        ValueError: another network, or a recording that is damaged or of another layout or number of classes.
    """
    if not isinstance(network, EoMT):
        raise ValueError(f"network: expected EoMT, got {type(network).__name__}")
    is_thing = things.is_thing if isinstance(things, Metadata) else tuple(things)
    contents = read_eomt_recording(path, network.config)
    quantities: dict[str, Difference] = {}
    before = network.probabilities
    try:
        with evaluation_mode(network):
            case = contents[CASE_NAME]
            for mode in case["modes"]:
                quantities |= _mode(network, case, contents.get(EXACT_NAME, {}), mode, is_thing)
            for mode, recorded in contents.get(TRAIN_NAME, {}).get("train", {}).items():
                trained = _trained(network, case, contents[TRAIN_NAME], mode, recorded, loss or LossConfig())
                quantities |= {f"train.{mode}.{name}": value for name, value in trained.items()}
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a recording of this EoMT: {type(error).__name__}: {error}") from error
    finally:
        network.set_mask_probability(before)
    return Report(quantities)


def recorded_heads(path: str | Path) -> int | None:
    """Attention heads of the network that a recording is of, where it tells them.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: a damaged file.
    """
    hyper = _read_files(Path(path))[CASE_NAME].get("hyper")
    heads = hyper.get("num_heads") if isinstance(hyper, Mapping) else None
    return heads if isinstance(heads, int) and heads > 0 else None


def read_eomt_recording(path: str | Path, model: ModelConfig) -> dict[str, Any]:
    """Read the files of a recording -> content by file name.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: a damaged file, or one of another network.
    """
    contents = _read_files(Path(path))
    case = contents[CASE_NAME]
    logits = case["modes"]["p1"]["class_logits"][-1]
    check(logits.shape[-1] == model.num_classes + 1, f"{path}: class_logits",
          f"the network's {model.num_classes} classes and no-object", tuple(logits.shape))
    heads, recorded = resolve_backbone(model.backbone).heads, recorded_heads(path)
    fits = recorded is None or heads == recorded
    check(fits, "num-heads", f"{recorded}, as of the network that {path} recorded", heads)
    return contents


def _read_files(path: Path) -> dict[str, Any]:
    """Content by file name; the case is there, and is a mapping."""
    names = (CASE_NAME, TRAIN_NAME, EXACT_NAME)
    files = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files) or (path.is_dir() and files[0].name != CASE_NAME):
        raise FileNotFoundError(f"{path}: expected a recording, {CASE_NAME}")
    contents: dict[str, Any] = {}
    for file in files:
        try:
            contents[file.name if path.is_dir() else CASE_NAME] = load_torch(file)
        except ConvertError as error:
            raise ValueError(f"{file}: not a recording of tensors and plain containers: {error}") from error
    case = contents[CASE_NAME]
    fits = isinstance(case, Mapping) and {"padded_images", "image_sizes", "modes"} <= case.keys()
    check(fits, f"{path}", "a recording with padded_images, image_sizes and modes", type(case).__name__)
    return contents


def _mode(
    network: EoMT, case: Mapping[str, Any], exact: Mapping[str, Any], mode: str, is_thing: Sequence[bool]
) -> dict[str, Difference]:
    """Compare logits of all layers, attention masks, tokens and results at a probability of masked attention."""
    recorded = case["modes"][mode]
    visible: list[Tensor] = []
    tokens: dict[str, Tensor] = {}
    with _draws(network, mode, recorded.get("rand", ())), torch.no_grad():
        handles = _record(network, tokens, visible)
        layers = _predict(network, case["padded_images"], case["image_sizes"])
        for handle in handles:
            handle.remove()
    quantities: dict[str, Difference] = {}
    for kind in ("mask_logits", "class_logits"):
        for name, source in (("", recorded), ("f64.", exact.get(mode, {}))):
            for expected, layer in zip(reversed(source.get(kind, ())), reversed(layers), strict=False):
                got = layer_mask_logits(layer) if kind == "mask_logits" else layer.class_logits[0]
                index = len(layers) - 1 - [one is layer for one in reversed(layers)].index(True)
                quantities[f"{name}{mode}.{kind}.{index}"] = relative(got, expected, LOGIT_TOLERANCE)
    for index, mask in enumerate(recorded.get("attn_mask", ())):
        theirs = boolean_masks(mask)
        ours = visible[index].cpu() if index < len(visible) else torch.ones_like(theirs)
        quantities[f"{mode}.attn_mask.{index}"] = Difference(int((ours != theirs).sum()), 0)
    if mode == "p1":
        for name, expected in case.get("blocks", {}).items():
            quantities[f"blocks.{name}"] = relative(tokens.get(name), expected, BLOCK_TOLERANCE)
        if "upscaled_final_image0" in case:
            features = layers[-1].pixel_features[0]
            quantities["upscaled"] = relative(features, case["upscaled_final_image0"], BLOCK_TOLERANCE)
    for name, result in case.get("eval", {}).get(mode, {}).items():
        if name == "panoptic":
            for entry in result if result and "thresholds" in result[0] else ():
                quantities |= _panoptic(layers[-1], case, mode, entry["thresholds"], entry["maps"], is_thing)
        elif name == "panoptic_layers":
            for index, maps in enumerate(result):
                where = f"{mode}.layer_{index}"
                quantities |= _panoptic(layers[index], case, where, LAYER_THRESHOLDS, maps, is_thing)
        elif name == "semantic":
            quantities |= _semantic(network, case, mode, result)
        elif name == "instance":
            quantities |= _instances(layers[-1], case, mode, result)
    return quantities


def _predict(network: EoMT, images: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[Predictions, ...]:
    device = network.pixel_mean.device
    predictions = network(images.to(device), torch.tensor(sizes, device=device), all_layers=True)
    assert isinstance(predictions, LayerPredictions)
    return predictions.layers


@contextmanager
def _draws(network: EoMT, mode: str, draws: Sequence[Tensor]) -> Iterator[None]:
    """Set the probability of a mode, and let the network draw recorded numbers."""
    network.set_mask_probability([PROBABILITIES.get(mode, 0.0)] * len(network.probabilities))
    queue = iter(draws)
    drawn = network.draw
    network.draw = lambda batch, device: next(queue).to(device)  # type: ignore[method-assign]
    try:
        yield
    finally:
        network.draw = drawn  # type: ignore[method-assign]


def _record(network: EoMT, tokens: dict[str, Tensor], visible: list[Tensor]) -> list[Any]:
    """Let the blocks write their inputs under the recorded names, and the masks of the attention."""

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, inputs: Any) -> None:
            tokens[f"block_in.{index}"] = inputs[0]
            if len(inputs) > 2 and inputs[2] is not None:
                visible.append(inputs[2])

        return hook

    blocks = network.backbone.blocks
    handles = [block.register_forward_pre_hook(keep(index)) for index, block in enumerate(blocks)]
    handles.append(blocks[-1].register_forward_hook(
        lambda _module, _inputs, output: tokens.__setitem__("block_out.final", output)
    ))  # fmt: skip
    handles.append(network.backbone.norm.register_forward_hook(
        lambda _module, _inputs, output: tokens.__setitem__("norm.final", output)
    ))  # fmt: skip
    return handles


def _panoptic(
    predictions: Predictions, case: Mapping[str, Any], where: str, thresholds: Sequence[float],
    maps: Sequence[Mapping[str, Any]], is_thing: Sequence[bool],
) -> dict[str, Difference]:  # fmt: skip
    """Compare panoptic maps at the images' own sizes, segment by segment."""
    stuff = set(case["hyper"]["stuff_classes"])
    flags = [index not in stuff for index in range(len(is_thing))]
    # The recorded maps are of images at their own size, to which the official code resizes from the input.
    outputs = [(image.shape[-2], image.shape[-1]) for image in case["images"]]
    first, second = thresholds
    results = postprocess.panoptic(
        _at_input(predictions, case), outputs, flags, first, second, "official", "mask2former"
    )
    quantities: dict[str, Difference] = {}
    for image, (result, theirs) in enumerate(zip(results, maps, strict=True)):
        different = _differing(result, theirs["segment"], theirs["classes"])
        quantities[f"{where}.panoptic@{first:g},{second:g}.{image}"] = Difference(different, FEW_PIXELS)
    return quantities


def _semantic(
    network: EoMT, case: Mapping[str, Any], mode: str, recorded: Sequence[Mapping[str, Any]]
) -> dict[str, Difference]:
    """Compare logits of the windows along the longer side of each image, and the labels of their mean scores."""
    evaluation = case["eval"]
    crops, origins = evaluation["crops"], evaluation["origins"]
    window = (crops.shape[2], crops.shape[3])
    with _draws(network, mode, ()), torch.no_grad():
        final = _predict(network, crops, [window] * len(crops))[-1]
    masks, classes = layer_mask_logits(final), final.class_logits[0]
    quantities = {}
    if mode == "p1":  # of which the logits are recorded
        quantities[f"{mode}.crops.mask_logits"] = relative(masks, evaluation["crop_mask_logits_final"], LOGIT_TOLERANCE)
        quantities[f"{mode}.crops.class_logits"] = relative(
            classes, evaluation["crop_class_logits_final"], LOGIT_TOLERANCE
        )
    for index, (image, theirs) in enumerate(zip(case["images"], recorded, strict=True)):
        height, width = image.shape[-2:]
        rows = [row for row, origin in enumerate(origins) if origin[0] == index]
        starts = [origins[row][1] for row in rows]
        length = max(origins[row][2] for row in rows)
        tall = height > width
        labels = windowed_semantic_inference(
            masks[rows], classes[rows].softmax(-1)[..., :-1], [(start, 0) if tall else (0, start) for start in starts],
            window, (length, window[1]) if tall else (window[0], length), (height, width),
        )  # fmt: skip
        sure = theirs["margin"].float() > MARGIN
        different = (labels.cpu() != theirs["labels"].long()) & sure
        quantities[f"{mode}.semantic.{index}"] = Difference(int(different.sum()), 0)
    return quantities


def _at_input(predictions: Predictions, case: Mapping[str, Any]) -> Predictions:
    """Predictions whose valid sizes are those of the images in the network's input."""
    side = predictions.input_size
    sizes = []
    for image in case["images"]:
        height, width = image.shape[-2:]
        factor = min(side[0] / height, side[1] / width)
        sizes.append((round(height * factor), round(width * factor)))
    return predictions._replace(valid_sizes=torch.tensor(sizes))


def _differing(result: PanopticResult, segment: Tensor, classes: Sequence[int]) -> int:
    """Number of pixels whose class differs, or which another segment of the class has."""
    ids = torch.as_tensor(result.id_map).cpu().long()
    ours = torch.full_like(ids, -1)
    for number, one in enumerate(result.segments):
        ours[ids == one.id] = number
    categories = torch.tensor([*(one.category for one in result.segments), -1])
    theirs = segment.long()
    different = categories[ours] != torch.tensor([*classes, -1])[theirs]
    pairs = torch.stack((ours, theirs))[:, ~different]
    mismatched = 0
    for number in range(len(result.segments)):
        counts = pairs[1, pairs[0] == number].bincount() if (pairs[0] == number).any() else torch.zeros(1)
        mismatched += int(counts.sum() - counts.max())
    return int(different.sum()) + mismatched


def _instances(
    predictions: Predictions, case: Mapping[str, Any], mode: str, recorded: Sequence[Mapping[str, Any]]
) -> dict[str, Difference]:
    """Compare the sorted scores of the best instances, of all classes."""
    quantities = {}
    whole = _at_input(predictions, case)
    outputs = [(image.shape[-2], image.shape[-1]) for image in case["images"]]
    everything = (True,) * (predictions.class_logits.shape[-1] - 1)
    for image, theirs in enumerate(recorded):
        masks = layer_mask_logits(predictions)[image : image + 1].detach()
        masks = F.interpolate(masks, predictions.input_size, mode="bilinear", align_corners=False)
        height, width = whole.valid_sizes[image].tolist()
        one = given(predictions.class_logits[-1, image : image + 1], masks[..., :height, :width], (height, width))
        result = postprocess.instances(one, [outputs[image]], everything, len(theirs["scores"]))[0]
        expected = theirs["scores"][theirs["scores"] > 0].sort(descending=True).values
        ours = result.scores.cpu().sort(descending=True).values
        count = min(len(ours), len(expected))
        worst = float((ours[:count] - expected[:count]).abs().max()) if count else math.inf
        quantities[f"{mode}.instance_scores.{image}"] = Difference(worst, SCORE_TOLERANCE)
    return quantities


def _trained(
    network: EoMT, case: Mapping[str, Any], train: Mapping[str, Any], mode: str, recorded: Mapping[str, Any],
    loss: LossConfig,
) -> dict[str, Difference]:  # fmt: skip
    """Compare losses and gradients for the recorded targets and points."""
    with _draws(network, "p05" if mode == "p05" else "p1", recorded.get("attn_rand", ())), torch.enable_grad():
        layers = _predict(network, case["padded_images"], case["image_sizes"])
    targets = [{**t, "masks": boolean_masks(t["masks"])} for t in train["targets"]]
    if mode == "empty_second":
        targets[1] = {"labels": targets[1]["labels"][:0], "masks": targets[1]["masks"][:0]}
    packed = packed_targets(targets, layers[-1])
    names = {f"block_{index - len(layers) + 1}": str(index) for index in range(len(layers) - 1)}
    renamed = {
        key: {names.get(name, name): value for name, value in recorded[key].items()} for key in ("points", "match")
    }
    draws = recorded_draws(renamed, tuple(packed.labels.shape), len(layers))
    loss = replace(
        loss, class_weight=2.0, mask_weight=5.0, dice_weight=5.0, padding="include", mask_loss="bce",
        points=draws.match.shape[2],
    )  # fmt: skip
    criterion = Criterion(network.config.num_classes, loss)
    losses = criterion(LayerPredictions(layers), packed, draws=draws)
    ours = {"loss_total": losses.total}
    for theirs, mine, weight in (("mask", "mask", 5.0), ("dice", "dice", 5.0), ("cross_entropy", "ce", 2.0)):
        for index in range(len(layers)):
            last = index == len(layers) - 1
            suffix = "" if last else f"_block_{index - len(layers) + 1}"
            ours[f"loss_{theirs}{suffix}"] = losses.terms[f"loss_{mine}" + ("" if last else f"_{index}")] / weight
    quantities = {
        f"{key}.{name}": relative(ours.get(name), torch.as_tensor(value), LOSS_TOLERANCE)
        for key in ("losses", "losses64")
        for name, value in recorded.get(key, {}).items()
    }
    if "grad_norm" not in recorded:
        return quantities
    parameters = dict(network.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(losses.total, list(parameters.values())), strict=True))
    rules = official_rules(recorded["grad_norm"])
    official = to_ours({name: torch.tensor(float(norm))[None] for name, norm in recorded["grad_norm"].items()}, rules)
    quantities |= gradient_norms(
        {name: float(gradient.norm()) for name, gradient in gradients.items()},
        {name: float(norm) for name, norm in official.weights.items()},
    )
    for name, value in to_ours(recorded.get("grads", {}), rules).weights.items():
        quantities[f"grads.{name}"] = relative(gradients.get(name), value, GRADIENT_TOLERANCE)
    return quantities
