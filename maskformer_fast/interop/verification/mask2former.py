"""Verification of a converted Mask2Former, as `verify` does it for a MaskFormer.

A recording is a folder with a `case.pt` (a batch of images with all outputs of the official network, results, random
points, matchings, losses and gradients) and, optionally, `extra.pt` (more targets for the same images), `f64.pt`
(predictions in float64) and `synth.pt` (post-processing of given predictions). Boolean masks are
``{"bits": packed, "shape": shape}``, as ``numpy.packbits`` packs them.

Each tolerance is about ten times the distance of the recorded float32 numbers from the official code's in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.results import InstanceResult
from maskformer_fast.inference import postprocess
from maskformer_fast.interop.files import load_torch
from maskformer_fast.interop.names import ConvertError
from maskformer_fast.interop.verification.difference import (
    Difference,
    Report,
    differing_pairs,
    differing_pixels,
    differing_segments,
    official_ids,
    relative,
)
from maskformer_fast.interop.verification.recording import CASE_NAME, SYNTH_NAME
from maskformer_fast.interop.verification.verify import evaluation_mode, given, gradient_norms, packed_targets
from maskformer_fast.modeling import Mask2Former
from maskformer_fast.ops import matching_cost_at_points
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.ops.points import PointDraws
from maskformer_fast.structures import Predictions, unpack_masks
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.matcher import match

EXTRA_NAME, EXACT_NAME = "extra.pt", "f64.pt"
OUTPUT_TOLERANCES = (
    (re.compile(r"features\.res[2-5]"), 5e-6),
    (re.compile(r"encoder\.\d+|mask_features"), 1e-5),
    (re.compile(r"hs\.\d+|(aux\.\d+\.)?pred_(logits|masks)"), 5e-5),
)
"""Tolerances of outputs by name, relative to the largest recorded magnitude."""
SCORE_TOLERANCE = 3e-4
"""Absolute tolerance of semantic scores."""
INSTANCE_TOLERANCE = 2e-4
"""Absolute tolerance of scores of instances."""
COST_TOLERANCE = 5e-4
"""Absolute tolerance of matching costs."""
LOSS_TOLERANCE = 2e-5
"""Relative tolerance of losses."""
GRADIENT_TOLERANCE = 1e-3
"""Relative tolerance of gradients in float32: the choice of uncertain points has kinks."""
MARGIN = 1e-3
"""Lead of the best class over the second best below which rounding may change a label."""
FEW_PIXELS = 4
"""Number of pixels of a panoptic map that rounding may change."""


def verify_mask2former(
    network: nn.Module, things: Metadata | Sequence[bool], path: str | Path, loss: LossConfig | None = None
) -> Report:
    """Compare a Mask2Former with recorded outputs of the official implementation; arguments as of `verify`.

    Raises:
        FileNotFoundError: there is no such recording.
        ValueError: another network, or a recording that is damaged or of another layout or number of classes.
    """
    if not isinstance(network, Mask2Former):
        raise ValueError(f"network: expected Mask2Former, got {type(network).__name__}")
    is_thing = things.is_thing if isinstance(things, Metadata) else tuple(things)
    contents = read_mask2former(path, network.config.num_classes)
    quantities: dict[str, Difference] = {}
    try:
        with evaluation_mode(network):
            if CASE_NAME in contents:
                quantities |= _case(network, is_thing, contents, loss or LossConfig())
            for index, post in enumerate(contents.get(SYNTH_NAME, [])):
                quantities |= {f"post.{index}.{name}": value for name, value in _post(is_thing, post).items()}
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a recording of this Mask2Former: {type(error).__name__}: {error}") from error
    return Report(quantities)


def read_mask2former(path: str | Path, num_classes: int) -> dict[str, Any]:
    """Read the files of a recording -> content by file name.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: a damaged file, or one of another network.
    """
    path = Path(path)
    names = (CASE_NAME, EXTRA_NAME, EXACT_NAME, SYNTH_NAME)
    files = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise FileNotFoundError(f"{path}: expected a recording, {CASE_NAME} or {SYNTH_NAME}")
    contents: dict[str, Any] = {}
    for file in files:
        try:
            content = load_torch(file)
        except ConvertError as error:
            raise ValueError(f"{file}: not a recording of tensors and plain containers: {error}") from error
        name = SYNTH_NAME if isinstance(content, list) else (file.name if path.is_dir() else CASE_NAME)
        if name == CASE_NAME:
            fits = isinstance(content, Mapping) and {"images", "image_sizes", "padded_size", "f32"} <= content.keys()
            check(fits, f"{file}", "a recording with images, image_sizes, padded_size and f32", type(content).__name__)
            logits = content["f32"]["pred_logits"]
            check(logits.shape[-1] == num_classes + 1, f"{file}: f32.pred_logits",
                  f"the network's {num_classes} classes and no-object", tuple(logits.shape))
        contents[name] = content
    return contents


def _case(
    network: Mask2Former, is_thing: Sequence[bool], contents: Mapping[str, Any], loss: LossConfig
) -> dict[str, Difference]:
    case, device = contents[CASE_NAME], network.pixel_mean.device
    images = torch.zeros(len(case["images"]), 3, *case["padded_size"], dtype=torch.uint8)
    for padded, image in zip(images, case["images"], strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    outputs: dict[str, Tensor] = {}
    visible: list[Tensor] = []
    handles = _record(network, outputs, visible)
    with torch.enable_grad():
        predictions = network(images.to(device), torch.tensor(case["image_sizes"], device=device), all_layers=True)
    for handle in handles:
        handle.remove()
    outputs["mask_features"] = predictions.pixel_embeddings
    last = len(predictions.class_logits) - 1
    for layer in range(last + 1):
        prefix = "" if layer == last else f"aux.{layer}."
        outputs[f"{prefix}pred_logits"] = predictions.class_logits[layer]
        outputs[f"{prefix}pred_masks"] = layer_mask_logits(predictions, layer)
    quantities = {name: relative(outputs.get(name), value, _tolerance(name)) for name, value in case["f32"].items()}
    for name, value in contents.get(EXACT_NAME, {}).items():
        if isinstance(value, Tensor):
            quantities[f"f64.{name}"] = relative(outputs.get(name), value, _tolerance(name))
    for name, value in case.get("attn_mask", {}).items():
        quantities[f"attn_mask.{name}"] = Difference(int((~visible[int(name)].cpu() != boolean_masks(value)).sum()), 0)
    if "thing_ids" in case:
        flags = [category in case["thing_ids"] for category in range(len(is_thing))]
        different = sum(got != recorded for got, recorded in zip(is_thing, flags, strict=True))
        quantities["thing_ids"] = Difference(different, 0)
    quantities |= _evaluated(predictions, is_thing, case)
    for name, recorded in {"": case, **contents.get(EXTRA_NAME, {})}.items():
        if "targets" in recorded:
            compared = _trained(network, predictions, recorded, loss)
            quantities |= {f"{name}.{key}" if name else key: value for key, value in compared.items()}
    return quantities


def _record(network: Mask2Former, outputs: dict[str, Tensor], visible: list[Tensor]) -> list[Any]:
    """Let the network's parts write their outputs under the recorded names."""

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    def keep_features(_module: nn.Module, _inputs: Any, features: Sequence[Tensor]) -> None:
        outputs.update({f"features.res{index + 2}": feature for index, feature in enumerate(features)})

    states: list[Tensor] = []

    def keep_states(_module: nn.Module, _inputs: Any, state: Tensor) -> None:
        outputs[f"hs.{len(states)}"] = state
        states.append(state)

    layers: Any = network.pixel_decoder.transformer.encoder.layers
    return [
        network.backbone.register_forward_hook(keep_features),
        network.predictor.decoder_norm.register_forward_hook(keep_states),
        *(layer.register_forward_hook(keep(f"encoder.{index}")) for index, layer in enumerate(layers)),
        *(
            layer.register_forward_pre_hook(lambda _module, inputs: visible.append(inputs[4]))
            for layer in network.predictor.transformer_cross_attention_layers
        ),
    ]


def _tolerance(name: str) -> float:
    return next((tolerance for pattern, tolerance in OUTPUT_TOLERANCES if pattern.fullmatch(name)), math.nan)


def _evaluated(predictions: Predictions, is_thing: Sequence[bool], case: Mapping[str, Any]) -> dict[str, Difference]:
    """Compare results at the recorded sizes."""
    recorded, sizes = case.get("eval", {}), case.get("sizes", ())
    quantities: dict[str, Difference] = {}
    scores = postprocess.semantic_scores(predictions, sizes, "official_panoptic") if "labels.0" in recorded else []
    for image, score in enumerate(scores):
        clear = recorded[f"margin.{image}"].float() > MARGIN
        labels, small = recorded[f"labels.{image}"], recorded[f"sem_seg_small.{image}"]
        quantities[f"eval.labels.{image}"] = differing_pixels(score.argmax(0), labels, clear)
        step = next(step for step in range(1, 64) if score[0, ::step, ::step].shape == small.shape[1:])
        quantities[f"eval.sem_seg_small.{image}"] = _absolute(score[:, ::step, ::step], small, SCORE_TOLERANCE)
    for thresholds, panoptic in zip(case.get("thresholds", ()), recorded.get("panoptic", ()), strict=False):
        results = postprocess.panoptic(
            predictions, sizes, is_thing, thresholds[0], thresholds[1], "official", "mask2former"
        )
        for image, result in enumerate(results):
            where = f"eval.panoptic@{thresholds[0]:g},{thresholds[1]:g}.{image}"
            pixels = differing_pixels(official_ids(result), panoptic["map"][image])
            quantities[where] = replace(pixels, tolerance=FEW_PIXELS)
            quantities[f"{where}.info"] = differing_segments(result, panoptic["info"][image])
    for image in range(len(recorded.get("instances_all", ()))):
        masks = layer_mask_logits(predictions)[image : image + 1].detach()
        height, width = predictions.valid_sizes[image].tolist()
        masks = F.interpolate(masks, predictions.input_size, mode="bilinear", align_corners=False)
        one = given(predictions.class_logits[-1, image : image + 1], masks[..., :height, :width], (height, width))
        for name, value in _instances(one, sizes[image], is_thing, recorded, image).items():
            quantities[f"eval.{name}.{image}"] = value
    counts = case.get("n_kept", {})
    probabilities, categories = predictions.class_logits[-1].detach().softmax(-1).max(-1)
    for threshold, expected in counts.items():
        kept = (categories < len(is_thing)) & (probabilities > float(threshold))
        quantities[f"n_kept@{threshold}"] = _absolute(kept.sum(1), torch.tensor(expected), 0)
    return quantities


def _instances(
    predictions: Predictions, size: tuple[int, int], is_thing: Sequence[bool], recorded: Mapping[str, Any], image: int
) -> dict[str, Difference]:
    """Compare instances of one image: of all classes, and the things among them.

    The official code takes the best pairs of all classes, then leaves out stuff; here stuff takes no place.
    """
    result = postprocess.instances(predictions, [size], (True,) * len(is_thing), 100)[0]
    flags = torch.tensor(is_thing)
    quantities = {}
    for name, chosen in (("instances_all", None), ("instances_things", flags[result.labels.cpu()])):
        if name in recorded:
            entries = recorded[name]
            quantities[name] = _instance_difference(result, chosen, entries[image] if image >= 0 else entries)
    return quantities


def _instance_difference(result: InstanceResult, chosen: Tensor | None, recorded: Mapping[str, Any]) -> Difference:
    """Largest difference of scores, matched by class and rank; infinite where numbers or masks differ."""
    labels, scores = result.labels.cpu(), result.scores.cpu()
    masks = unpack_masks(result.masks.cpu(), result.size[1])
    rows = torch.arange(len(labels)) if chosen is None else chosen.nonzero()[:, 0]
    theirs = (recorded["area"] > 0).nonzero()[:, 0]  # here an empty mask gives no result
    if len(rows) != len(theirs):
        return Difference(math.inf, INSTANCE_TOLERANCE, f"{len(rows)} instances, recorded {len(theirs)}")
    rows = rows[_by_class_and_score(labels[rows], scores[rows])]
    theirs = theirs[_by_class_and_score(recorded["classes"][theirs], recorded["scores"][theirs])]
    areas = masks.flatten(1).sum(1)[rows]
    pixels = int((areas - recorded["area"][theirs]).abs().max()) if len(rows) else 0
    if not torch.equal(labels[rows], recorded["classes"][theirs]) or pixels > FEW_PIXELS:
        return Difference(math.inf, INSTANCE_TOLERANCE, f"other classes, or masks that differ by {pixels} pixels")
    if "masks" in recorded and len(rows):
        different = (masks[rows] != boolean_masks(recorded["masks"])[theirs]).flatten(1).sum(1).max()
        if different > FEW_PIXELS:
            return Difference(math.inf, INSTANCE_TOLERANCE, f"masks that differ in {int(different)} pixels")
    return _absolute(scores[rows], recorded["scores"][theirs], INSTANCE_TOLERANCE)


def _by_class_and_score(labels: Tensor, scores: Tensor) -> Tensor:
    return (labels.double() - scores.double() / 2).argsort(stable=True)


def _trained(
    network: Mask2Former, predictions: Predictions, recorded: Mapping[str, Any], loss: LossConfig
) -> dict[str, Difference]:
    """Compare matching, weighted losses and gradients for the recorded targets and points."""
    targets = packed_targets([{**t, "masks": boolean_masks(t["masks"])} for t in recorded["targets"]], predictions)
    draws = recorded_draws(recorded, tuple(targets.labels.shape), len(predictions.class_logits))
    loss = replace(loss, padding="include", mask_loss="bce", points=draws.match.shape[2])
    detached = predictions._replace(
        class_logits=predictions.class_logits.detach(), mask_embeddings=predictions.mask_embeddings.detach(),
        pixel_features=predictions.pixel_features.detach(),
    )  # fmt: skip
    device = predictions.class_logits.device
    draws = PointDraws(*(points.to(device) for points in draws))
    cost = matching_cost_at_points(detached, targets, draws.match, loss).cpu()
    query = match(detached, targets, loss, draws.match).query.cpu()
    quantities: dict[str, Difference] = {}
    for name, matches in recorded["match"].items():
        layer = len(cost) - 1 if name == "final" else int(name)
        for image, pairs in enumerate(matches):
            where = f"match.{name}.{image}"
            quantities[f"{where}.C"] = _absolute(
                cost[layer, image, :, : targets.counts[image]], pairs["C"], COST_TOLERANCE
            )
            quantities[where] = differing_pairs(query[layer, image], pairs)
    criterion = Criterion(network.config.num_classes, loss).to(device)
    losses = criterion(predictions, targets, draws=draws)
    for key in ("losses", "losses64"):
        for name, value in recorded.get(key, {}).items():
            quantities[f"{key}.{name}"] = relative(losses.terms.get(name), torch.as_tensor(value), LOSS_TOLERANCE)
    if "grad_norm" not in recorded:
        return quantities
    parameters = {name: value for name, value in network.named_parameters() if value.requires_grad}
    gradients = dict(zip(parameters, torch.autograd.grad(losses.total, list(parameters.values()), retain_graph=True),
                         strict=True))  # fmt: skip
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    official = {name.removeprefix("sem_seg_head."): float(norm) for name, norm in recorded["grad_norm"].items()}
    quantities |= gradient_norms(norms, official)
    for name, value in recorded.get("grads", {}).items():
        ours = gradients.get(name.removeprefix("sem_seg_head."))
        quantities[f"grads.{name}"] = relative(ours, value, GRADIENT_TOLERANCE)
    return quantities


def recorded_draws(recorded: Mapping[str, Any], shape: tuple[int, ...], layers: int) -> PointDraws:
    """Points of every layer, image and pair; pairs without a match get zeros, which count nowhere."""
    points, final = recorded["points"], recorded["points"]["final"]
    match_points, candidates, random = (
        torch.zeros(layers, *lead, *tail) for lead, tail in (
            ((shape[0],), final["match"][0].shape),
            (shape, final["oversample"].shape[1:]),
            (shape, final["random"].shape[1:]),
        )
    )  # fmt: skip
    for name, drawn in points.items():
        layer = layers - 1 if name == "final" else int(name)
        match_points[layer] = torch.stack(list(drawn["match"]))
        pairs = recorded["match"][name]
        image = torch.cat([torch.full_like(pair["j"], index) for index, pair in enumerate(pairs)])
        column = torch.cat([pair["j"] for pair in pairs])
        candidates[layer, image, column], random[layer, image, column] = drawn["oversample"], drawn["random"]
    return PointDraws(match_points, candidates, random)


def _post(is_thing: Sequence[bool], post: Mapping[str, Any]) -> dict[str, Difference]:
    """Compare results for given logits, without resizing."""
    masks = post["mask_pred"].float()[None]
    size = (masks.shape[2], masks.shape[3])
    predictions = given(post["mask_cls"].float()[None], masks, size)
    labels = postprocess.semantic(predictions, [size])[0].labels
    quantities = {"semantic": replace(differing_pixels(labels, post["semantic"]), tolerance=FEW_PIXELS)}
    for panoptic in post["panoptic"]:
        thresholds = panoptic["thresholds"]
        result = postprocess.panoptic(
            predictions, [size], is_thing, thresholds[0], thresholds[1], "direct", "mask2former"
        )[0]
        where = f"panoptic@{thresholds[0]:g},{thresholds[1]:g}"
        quantities[where] = differing_pixels(official_ids(result), panoptic["map"])
        quantities[f"{where}.info"] = differing_segments(result, panoptic["info"])
    return quantities | _instances(predictions, size, is_thing, post, -1)


def _absolute(got: Tensor, recorded: Tensor, tolerance: float) -> Difference:
    if got.shape != recorded.shape:
        return Difference(math.nan, tolerance, f"shape {list(got.shape)}, recorded {list(recorded.shape)}")
    difference = (got.detach().cpu().double() - recorded.double()).abs()
    return Difference(float(difference.max()) if difference.numel() else 0.0, tolerance)


def boolean_masks(packed: Mapping[str, Any]) -> Tensor:
    """Unpack ``{"bits", "shape"}`` -> bool."""
    shape = tuple(packed["shape"])
    bits = np.unpackbits(packed["bits"].numpy())[: math.prod(shape)]
    return torch.from_numpy(bits.reshape(shape).astype(bool))
