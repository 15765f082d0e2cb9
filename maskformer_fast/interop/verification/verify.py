"""Prove a converted network: run it on recorded inputs and compare everything that was recorded of the original.

Recordings of the official code are in evaluation mode (BatchNorm's own statistics, no dropout, gradients included), and
its losses count the pixels that pad the batch. Where it has more than one behaviour (semantic scores before or after
the last resize), the one that the numbers show is taken and logged.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.config import LossConfig, SemanticOrder
from maskformer_fast.core.checks import check
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.inference import postprocess
from maskformer_fast.interop.verification.difference import (
    Difference,
    Report,
    differing_pairs,
    differing_pixels,
    differing_segments,
    not_compared,
    official_ids,
    relative,
    rows_relative,
    worst,
)
from maskformer_fast.interop.verification.recording import read_recordings, synth_thresholds
from maskformer_fast.modeling import MaskFormer
from maskformer_fast.ops import matching_cost
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import Predictions, Targets, pack_masks
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.matcher import match

logger = logging.getLogger(__name__)

OUTPUT_TOLERANCE = 1e-4
"""Of the largest recorded magnitude: features, logits, costs, scores."""
LOSS_TOLERANCE = 1e-4
"""Relative."""
GRADIENT_TOLERANCE = 1e-3
"""Relative."""
VANISHING = 1e-6
"""Gradients below this share of the largest norm are rounding (queries and keys that attend to equal values)."""
MARGIN = 1e-4
"""Winners that lead the runner-up by less may change with the rounding of float32."""
N_KEPT_THRESHOLDS = (0.5, 0.8)
"""What the counts ``n_kept`` of a recording are taken at, image by image."""
DESCRIPTIONS = {
    "images", "image_sizes", "padded_size", "size_divisibility", "sizes", "thresholds", "thresholds_loose", "targets",
    "size", "seed", "torch", "match_same_in_f64",
}  # fmt: skip
"""Entries of a case that are inputs, or say how it was made."""


class _Batch(NamedTuple):
    """Inputs of a case on the network's device."""

    images: Tensor  # [B, 3, H, W] uint8
    valid_sizes: Tensor  # [B, 2] int64


def verify(
    network: torch.nn.Module, things: Metadata | Sequence[bool], path: str | Path, loss: LossConfig | None = None
) -> Report:
    """Compare a network with recorded outputs of the official implementation.

    Args:
        network: a `MaskFormer`, float32; it is run where it lies (on a GPU turn TF32 off) and keeps its mode.
        things: classes of the network, or whether each is a thing; panoptic results depend on it.
        path: a `case.pt` (network, post-processing, matching, losses, gradients), a `synth.pt` (post-processing and
            criterion alone), or a folder with either or both.
        loss: weights of a `case.pt`'s losses; ``None`` has the published ones, which a `synth.pt` always has.

    Returns:
        One difference for each recorded quantity: that of intermediates, logits, costs and scores is relative to the
        largest recorded magnitude, that of losses and gradients' norms to each recorded value; matchings, labels and
        panoptic maps count the pairs and pixels that differ. Pixels that nearly tie (`MARGIN`) do not count where
        predictions come from the network. Quantities that are recorded but unknown here are listed as not compared.

    Raises:
        FileNotFoundError: there is no such recording.
        ValueError: a network without queries, or a recording that does not fit it; the message says what lacks.
    """
    if not isinstance(network, MaskFormer):
        raise ValueError(f"network: expected MaskFormer, as recordings are of, got {type(network).__name__}")
    is_thing = things.is_thing if isinstance(things, Metadata) else tuple(things)
    num_classes = network.config.num_classes
    check(len(is_thing) == num_classes, "things", f"a flag for each of {num_classes} classes", len(is_thing))
    recordings = read_recordings(path, num_classes)
    quantities: dict[str, Difference] = {}
    if recordings.case is not None:
        with _evaluation(network):
            quantities |= _case(network, is_thing, recordings.case, loss or LossConfig())
    if recordings.synth is not None:
        quantities |= _synth(is_thing, recordings.synth)
    return Report(quantities)


def _case(
    network: MaskFormer, is_thing: Sequence[bool], case: Mapping[str, Any], loss: LossConfig
) -> dict[str, Difference]:
    device = network.pixel_mean.device
    images = torch.zeros(len(case["images"]), 3, *case["padded_size"], dtype=torch.uint8)
    for padded, image in zip(images, case["images"], strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    batch = _Batch(images.to(device), torch.tensor([tuple(s) for s in case["image_sizes"]], device=device))
    with torch.enable_grad():
        predictions = network(*batch, all_layers=True)
    found = _outputs(network, batch, predictions, case["f32"])
    for key in ("eval", "eval_loose"):
        if case.get(key):
            thresholds = case.get(key.replace("eval", "thresholds"))
            found |= _evaluated(predictions, is_thing, case[key], case["sizes"], thresholds, key)
    if "thing_ids" in case:
        flags = [category in case["thing_ids"] for category in range(len(is_thing))]
        different = [c for c, (got, recorded) in enumerate(zip(is_thing, flags, strict=True)) if got != recorded]
        found["thing_ids"] = Difference(len(different), 0, f"differs for classes {different}" if different else "")
    if "n_kept" in case:
        found["n_kept"] = _kept(predictions, case["n_kept"])
    if "targets" in case:
        found |= _trained(network, predictions, case, loss)
    handled = DESCRIPTIONS | {"f32", "eval", "eval_loose", "thing_ids", "n_kept", "match", "losses", "losses64",
                              "grad_norm", "no_grad_params"}  # fmt: skip
    return found | not_compared(name for name in case if name not in handled)


@torch.no_grad()
def _outputs(
    network: MaskFormer, batch: _Batch, predictions: Predictions, recorded: Mapping[str, Tensor]
) -> dict[str, Difference]:
    """Intermediates and logits of every layer."""
    features = network.backbone(network.normalize(*batch))
    pixel_embeddings, memory = network.pixel_decoder(features)
    ours = {f"features.res{index + 2}": feature for index, feature in enumerate(features)}
    ours |= {"mask_features": pixel_embeddings, "hs": network.predictor.decode(memory, all_layers=True)}
    if network.pixel_decoder.has_encoder:
        ours["transformer_encoder"] = memory
    layers = len(predictions.class_logits)
    for layer in range(layers):
        prefix = "" if layer == layers - 1 else f"aux.{layer}."
        ours[f"{prefix}pred_logits"] = predictions.class_logits[layer]
        ours[f"{prefix}pred_masks"] = layer_mask_logits(predictions, layer)
    known = re.compile(r"features\.res[2-5]|mask_features|transformer_encoder|hs|(aux\.\d+\.)?pred_(logits|masks)")
    compared = {name: value for name, value in recorded.items() if known.fullmatch(name)}
    found = {name: relative(ours.get(name), value, OUTPUT_TOLERANCE) for name, value in compared.items()}
    wrong = {name for name, quantity in found.items() if not quantity.ok}
    if wrong & {"transformer_encoder", "hs"} and not any(name.startswith("features") for name in wrong):
        heads = network.config.decoder.num_heads, network.config.pixel_decoder.encoder_heads
        logger.warning("the backbone agrees, the transformer does not: are %d decoder and %d encoder heads right? "
                       "Weights do not show them", *heads)  # fmt: skip
    return found | not_compared(name for name in recorded if name not in compared)


def _evaluated(
    predictions: Predictions,
    is_thing: Sequence[bool],
    recorded: Mapping[str, Any],
    sizes: Sequence[tuple[int, int]],
    thresholds: tuple[float, float] | None,
    key: str,
) -> dict[str, Difference]:
    """Semantic and panoptic results at the sizes asked for."""
    found: dict[str, Difference] = {}
    parts = {part: f"{key}.{part}" for part in recorded}
    if any(re.match(r"(labels|sem_seg_small)\.", part) for part in parts):
        # Models with panoptic inference resize logits, the others scores; then the one whose numbers these are.
        orders: list[SemanticOrder] = ["official", "official_panoptic"]
        if any(part.startswith("panoptic.") for part in parts):
            orders.reverse()
        for order in orders:
            trial = _semantic(postprocess.semantic_scores(predictions, sizes, order), recorded, key)
            if not found or all(quantity.ok for quantity in trial.values()):
                found, chosen = trial, order
            if all(quantity.ok for quantity in found.values()):
                break
        logger.info("%s: semantic order %s", key, chosen)
    if thresholds is not None and any(part.startswith("panoptic") for part in parts):
        results = postprocess.panoptic(predictions, sizes, is_thing, *thresholds, order="official")
        for image, result in enumerate(results):
            ids, info = (f"{part}.{image}" for part in ("panoptic", "panoptic_info"))
            if ids in recorded:
                sure = _panoptic_margin(predictions, image, sizes[image], thresholds[0]) > MARGIN
                found[f"{key}.{ids}"] = differing_pixels(official_ids(result), recorded[ids], sure)
            if info in recorded:
                found[f"{key}.{info}"] = differing_segments(result, recorded[info])
    margins = {name for part, name in parts.items() if part.startswith("margin.")}
    return found | not_compared(name for name in parts.values() if name not in found and name not in margins)


def _semantic(scores: Sequence[Tensor], recorded: Mapping[str, Any], key: str) -> dict[str, Difference]:
    found: dict[str, Difference] = {}
    for image, score in enumerate(scores):
        if f"labels.{image}" in recorded:
            sure = recorded[f"margin.{image}"].float() > MARGIN
            found[f"{key}.labels.{image}"] = differing_pixels(score.argmax(0), recorded[f"labels.{image}"], sure)
        if f"sem_seg_small.{image}" in recorded:
            small = recorded[f"sem_seg_small.{image}"]
            found[f"{key}.sem_seg_small.{image}"] = relative(score[:, ::7, ::7], small, OUTPUT_TOLERANCE)
    return found


def _panoptic_margin(predictions: Predictions, image: int, size: tuple[int, int], threshold: float) -> Tensor:
    """Lead of the winning query's score times mask over the next one's -> [H, W]."""
    height, width = predictions.valid_sizes[image].tolist()
    scores, categories = predictions.class_logits[-1, image].detach().softmax(-1).max(-1)
    kept = (categories < predictions.class_logits.shape[-1] - 1) & (scores > threshold)
    if kept.sum() < 2:
        return torch.full(size, math.inf)
    masks = layer_mask_logits(predictions)[image, kept].detach()
    masks = F.interpolate(masks[None], predictions.input_size, mode="bilinear")[..., :height, :width]
    masks = F.interpolate(masks, size, mode="bilinear")[0]
    best = (scores[kept, None, None] * masks.sigmoid()).topk(2, dim=0).values
    return best[0] - best[1]


def _kept(predictions: Predictions, recorded: Sequence[int]) -> Difference:
    """Queries with an object's class above each threshold, image by image."""
    scores, categories = predictions.class_logits[-1].detach().softmax(-1).max(-1)
    objects = categories < predictions.class_logits.shape[-1] - 1
    counts = [int((row & (s > t)).sum()) for row, s in zip(objects, scores, strict=True) for t in N_KEPT_THRESHOLDS]
    return relative(torch.tensor(counts), torch.tensor(recorded), 0)


def _trained(
    network: MaskFormer, predictions: Predictions, case: Mapping[str, Any], loss: LossConfig
) -> dict[str, Difference]:
    """Matching, weighted losses and gradients of the case's targets."""
    targets = _targets(case["targets"], predictions)
    found: dict[str, Difference] = {}
    paddings: tuple[Literal["include", "exclude"], ...] = ("include", "exclude")
    for padding in paddings:
        total, trial = _compared_losses(predictions, targets, replace(loss, padding=padding), case)
        if not found or all(quantity.ok for quantity in trial.values()):
            found, chosen, chosen_total = trial, padding, total
        if all(quantity.ok for quantity in found.values()):
            break
    logger.info("losses: padding %s", chosen)
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(chosen_total, list(parameters.values()), allow_unused=True)
    norms = {
        name: 0.0 if gradient is None else float(gradient.norm())
        for name, gradient in zip(parameters, gradients, strict=True)
    }
    if "grad_norm" in case:
        found |= _gradient_norms(norms, {_our_name(name): float(v) for name, v in case["grad_norm"].items()})
    if "no_grad_params" in case:
        moved = [name for name in case["no_grad_params"] if norms.get(_our_name(name), math.nan) != 0]
        found["no_grad_params"] = Difference(len(moved), 0, ", ".join(moved))
    return found


def _compared_losses(
    predictions: Predictions, targets: Targets, loss: LossConfig, case: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Difference]]:
    """The total loss, and the differences of cost, matching and losses."""
    found: dict[str, Difference] = {}
    detached = _detached(predictions)
    cost, query = matching_cost(detached, targets, loss).cpu(), match(detached, targets, loss).query.cpu()
    layers = {str(layer): layer for layer in range(len(cost) - 1)} | {"final": len(cost) - 1}
    for name, recorded in case.get("match", {}).items():
        for image, pairs in enumerate(recorded):
            where, layer = f"match.{name}.{image}", layers.get(name)
            found[f"{where}.C"] = relative(
                None if layer is None else cost[layer, image, :, : targets.counts[image]], pairs["C"], OUTPUT_TOLERANCE
            )
            found[where] = differing_pairs(None if layer is None else query[layer, image], pairs)
    criterion = Criterion(predictions.class_logits.shape[-1] - 1, loss).to(predictions.class_logits.device)
    losses = criterion(predictions, targets)
    for key in ("losses", "losses64"):
        for name, recorded in case.get(key, {}).items():
            found[f"{key}.{name}"] = relative(losses.terms.get(name), torch.as_tensor(recorded), LOSS_TOLERANCE)
    return losses.total, found


def _gradient_norms(norms: Mapping[str, float], recorded: Mapping[str, float]) -> dict[str, Difference]:
    """Relative difference of the worst parameter; of those whose gradient is rounding, the largest share of it."""
    largest = max(recorded.values(), default=0.0)
    relative, vanishing = {}, {}
    for name, norm in recorded.items():
        got = norms.get(name, math.nan)
        if abs(norm) <= VANISHING * largest:
            vanishing[name] = got / largest if largest else got
        else:
            relative[name] = abs(got - norm) / abs(norm)
    found = {"grad_norm": worst(relative, GRADIENT_TOLERANCE)}
    return found | ({"grad_norm (vanishing)": worst(vanishing, VANISHING)} if vanishing else {})


def _synth(is_thing: Sequence[bool], synth: Mapping[str, Any]) -> dict[str, Difference]:
    found: dict[str, Difference] = {}
    for index, post in enumerate(synth.get("post", [])):
        found |= {f"post.{index}.{name}": difference for name, difference in _post(is_thing, post).items()}
    for index, case in enumerate(synth.get("criterion", [])):
        found |= {f"criterion.{index}.{name}": difference for name, difference in _criterion(case).items()}
    return found | not_compared(name for name in synth if name not in ("post", "criterion"))


def _post(is_thing: Sequence[bool], post: Mapping[str, Any]) -> dict[str, Difference]:
    """Results of given logits: nothing but the margin of the recorded labels excuses a pixel here."""
    size = tuple(post["size"])
    predictions = _given(post["mask_cls"][None], post["mask_pred"][None], size)
    found: dict[str, Difference] = {}
    for name, recorded in post.items():
        if name == "labels":
            labels = postprocess.semantic(predictions, [size], order="official")[0].labels
            found[name] = differing_pixels(labels, recorded, post["margin"].float() > MARGIN)
        elif name.startswith("panoptic@"):
            objects, overlap = synth_thresholds(name)
            result = postprocess.panoptic(predictions, [size], is_thing, objects, overlap, order="official")[0]
            found[name] = differing_pixels(official_ids(result), recorded[0])
            found[name.replace("@", "_info@")] = differing_segments(result, recorded[1])
    inputs = ("mask_cls", "mask_pred", "size", "margin")
    return found | not_compared(name for name in post if name not in found and name not in inputs)


def _criterion(case: Mapping[str, Any]) -> dict[str, Difference]:
    """Cost, matching, losses and gradients of given logits."""
    masks = case["targets"][0]["masks"]
    class_logits, mask_logits = (case[name].clone().requires_grad_() for name in ("pred_logits", "pred_masks"))
    predictions = _given(class_logits, mask_logits, tuple(masks.shape[1:]))
    targets = _targets(case["targets"], predictions)
    loss = LossConfig(padding="include")
    # The recording has one layer and its losses before weighting.
    weights = {"loss_ce": loss.class_weight, "loss_mask": loss.mask_weight, "loss_dice": loss.dice_weight}
    weighted = {n: weights.get(n, math.nan) * float(v) for n, v in case.get("unweighted_losses", {}).items()}
    record = {"losses": weighted} | ({"match": {"final": case["match"]}} if "match" in case else {})
    with torch.enable_grad():
        total, compared = _compared_losses(predictions, targets, loss, record)
    found = {name.removeprefix("losses.").replace("match.final", "match"): d for name, d in compared.items()}
    gradients = torch.autograd.grad(total, (class_logits, mask_logits))
    for name, gradient in zip(("grad_logits", "grad_masks"), gradients, strict=True):
        if name in case:
            found[name] = rows_relative(gradient, case[name], GRADIENT_TOLERANCE)
    known = ("pred_logits", "pred_masks", "targets", "match", "unweighted_losses", "grad_logits", "grad_masks")
    return found | not_compared(name for name in case if name not in known)


def _given(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Predictions:
    """Predictions [B, Q, K+1], [B, Q, h, w] of one layer and full images: every query has a channel of its own."""
    batch, queries = mask_logits.shape[:2]
    embeddings = torch.eye(queries).expand(1, batch, -1, -1)
    return Predictions(class_logits[None], embeddings, mask_logits, torch.tensor([size] * batch), size)


def _targets(recorded: Sequence[Mapping[str, Tensor]], predictions: Predictions) -> Targets:
    """Labels and boolean masks of each image -> packed targets on the device of the predictions."""
    counts = torch.tensor([len(target["labels"]) for target in recorded])
    slots = int(counts.max())
    labels = torch.stack([F.pad(target["labels"], (0, slots - len(target["labels"]))) for target in recorded])
    masks = [F.pad(target["masks"], (0, 0, 0, 0, 0, slots - len(target["masks"]))) for target in recorded]
    size = predictions.input_size
    targets = Targets(labels, counts, pack_masks(torch.stack(masks)), predictions.valid_sizes.cpu(), size)
    return targets.to(predictions.class_logits.device)


def _detached(predictions: Predictions) -> Predictions:
    classes, embeddings, pixels = (tensor.detach() for tensor in predictions[:3])
    return predictions._replace(class_logits=classes, mask_embeddings=embeddings, pixel_features=pixels)


def _our_name(official: str) -> str:
    """Parameters have their official names, less the head's prefix."""
    return official.removeprefix("sem_seg_head.")


@contextmanager
def _evaluation(network: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; each module's own mode comes back after."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
