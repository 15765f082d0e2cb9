"""Verification of a converted network: run it on recorded inputs and compare all recorded outputs of the original.

The official code was recorded in evaluation mode (BatchNorm with its running statistics, no dropout, but gradients),
and its losses count the padding of the batch. Where the official code has several behaviours (semantic scores before or
after the last resize), the behaviour that reproduces the numbers is chosen and logged.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskformer_fast.config import LossConfig
from maskformer_fast.core.checks import check
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.inference import postprocess
from maskformer_fast.inference_config import SemanticOrder
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
from maskformer_fast.interop.verification.recording import (
    Case,
    Evaluation,
    Losses,
    Synth,
    SynthCriterion,
    SynthPost,
    Target,
    Training,
    read_recordings,
)
from maskformer_fast.interop.verification.recording_checks import synth_thresholds
from maskformer_fast.modeling import MaskFormer
from maskformer_fast.ops import matching_cost
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import Predictions, Targets, pack_masks
from maskformer_fast.training.criterion import Criterion
from maskformer_fast.training.matcher import match

logger = logging.getLogger(__name__)

OUTPUT_TOLERANCE = 1e-4
"""Tolerance of features, logits, costs and scores, relative to the largest recorded magnitude."""
LOSS_TOLERANCE = 1e-4
"""Relative tolerance of losses."""
GRADIENT_TOLERANCE = 1e-3
"""Relative tolerance of gradients."""
VANISHING = 1e-6
"""Share of the largest norm below which a gradient is rounding (queries and keys that attend to equal values)."""
MARGIN = 1e-4
"""Lead of the best score over the second best below which rounding in float32 may change the winner."""
KEPT_THRESHOLDS = (0.5, 0.8)
"""Thresholds at which the recorded queries of each image are counted (``n_kept``)."""


class _Batch(NamedTuple):
    """Inputs of a case on the network's device."""

    images: Tensor  # [B, 3, H, W] uint8
    valid_sizes: Tensor  # [B, 2] int64


def verify(
    network: torch.nn.Module, things: Metadata | Sequence[bool], path: str | Path, loss: LossConfig | None = None
) -> Report:
    """Compare a network with recorded outputs of the official implementation.

    Args:
        network: a `MaskFormer` in float32. It runs on its own device (on a GPU turn TF32 off) and keeps its mode.
        things: metadata of the network's classes, or whether each class is a thing; panoptic results depend on it.
        path: a `case.pt` (network, post-processing, matching, losses, gradients), a `synth.pt` (post-processing and
            criterion alone), or a folder with either or both.
        loss: weights of the losses of a `case.pt`; ``None`` takes the published ones. Those of a `synth.pt` are always
            the published ones.

    Returns:
        One difference for each recorded quantity. Differences of intermediates, logits, costs and scores are relative
        to the largest recorded magnitude. Those of losses and norms of gradients are relative to each recorded value.
        Those of matchings, labels and panoptic maps are numbers of pairs and pixels. Pixels that nearly tie (`MARGIN`)
        do not count where predictions come from the network. Unknown quantities are listed as not compared.

    Raises:
        FileNotFoundError: there is no such recording.
        ValueError: a network without queries, or a recording of another network; the message has the missing key.
    """
    if not isinstance(network, MaskFormer):
        raise ValueError(f"network: expected MaskFormer, as recordings are of, got {type(network).__name__}")
    is_thing = things.is_thing if isinstance(things, Metadata) else tuple(things)
    num_classes = network.config.num_classes
    check(len(is_thing) == num_classes, "things", f"a flag for each of {num_classes} classes", len(is_thing))
    recordings = read_recordings(path, num_classes)
    quantities: dict[str, Difference] = {}
    if recordings.case is not None:
        with evaluation_mode(network):
            quantities |= _case(network, is_thing, recordings.case, loss or LossConfig())
    if recordings.synth is not None:
        quantities |= _synth(is_thing, recordings.synth)
    return Report(quantities)


def _case(network: MaskFormer, is_thing: Sequence[bool], case: Case, loss: LossConfig) -> dict[str, Difference]:
    device = network.pixel_mean.device
    images = torch.zeros(len(case.images), 3, *case.padded_size, dtype=torch.uint8)
    for padded, image in zip(images, case.images, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    batch = _Batch(images.to(device), torch.tensor(case.image_sizes, device=device))
    with torch.enable_grad():
        predictions = network(*batch, all_layers=True)
    quantities = _outputs(network, batch, predictions, case.outputs)
    for evaluation in case.evaluations:
        quantities |= _evaluated(predictions, is_thing, evaluation, case.sizes)
    if case.thing_ids is not None:
        flags = [category in case.thing_ids for category in range(len(is_thing))]
        different = [c for c, (got, recorded) in enumerate(zip(is_thing, flags, strict=True)) if got != recorded]
        note = f"differs for classes {different}" if different else ""
        quantities["thing_ids"] = Difference(len(different), 0, note)
    if case.kept_counts is not None:
        quantities["n_kept"] = _kept(predictions, case.kept_counts)
    if case.training is not None:
        quantities |= _trained(network, predictions, case.training, loss)
    return quantities | not_compared(case.unknown)


@torch.no_grad()
def _outputs(
    network: MaskFormer, batch: _Batch, predictions: Predictions, recorded: Mapping[str, Tensor]
) -> dict[str, Difference]:
    """Compare intermediates and logits of every layer."""
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
    quantities = {name: relative(ours.get(name), value, OUTPUT_TOLERANCE) for name, value in compared.items()}
    wrong = {name for name, quantity in quantities.items() if not quantity.ok}
    if wrong & {"transformer_encoder", "hs"} and not any(name.startswith("features") for name in wrong):
        heads = network.config.decoder.num_heads, network.config.pixel_decoder.encoder_heads
        logger.warning("the backbone agrees, the transformer does not: are %d decoder and %d encoder heads right? "
                       "Weights do not show them", *heads)  # fmt: skip
    return quantities | not_compared(name for name in recorded if name not in compared)


def _evaluated(
    predictions: Predictions, is_thing: Sequence[bool], evaluation: Evaluation, sizes: Sequence[tuple[int, int]]
) -> dict[str, Difference]:
    """Compare semantic and panoptic results at the recorded sizes."""
    quantities: dict[str, Difference] = {}
    key, recorded, thresholds = evaluation
    if any(re.match(r"(labels|sem_seg_small)\.", part) for part in recorded):
        # Models with panoptic inference resize logits, the others scores. The other order is tried after that.
        orders: list[SemanticOrder] = ["official", "official_panoptic"]
        if any(part.startswith("panoptic.") for part in recorded):
            orders.reverse()
        for order in orders:
            trial = _semantic(postprocess.semantic_scores(predictions, sizes, order), evaluation)
            if not quantities or all(quantity.ok for quantity in trial.values()):
                quantities, chosen = trial, order
            if all(quantity.ok for quantity in quantities.values()):
                break
        logger.info("%s: semantic order %s", key, chosen)
    if thresholds is not None and any(part.startswith("panoptic") for part in recorded):
        results = postprocess.panoptic(predictions, sizes, is_thing, *thresholds, order="official")
        for image, result in enumerate(results):
            ids, info = (f"{part}.{image}" for part in ("panoptic", "panoptic_info"))
            if ids in recorded:
                clear = _panoptic_margin(predictions, image, sizes[image], thresholds[0]) > MARGIN
                quantities[f"{key}.{ids}"] = differing_pixels(official_ids(result), recorded[ids], clear)
            if info in recorded:
                quantities[f"{key}.{info}"] = differing_segments(result, recorded[info])
    names = (f"{key}.{part}" for part in recorded if not part.startswith("margin."))
    return quantities | not_compared(name for name in names if name not in quantities)


def _semantic(scores: Sequence[Tensor], evaluation: Evaluation) -> dict[str, Difference]:
    quantities: dict[str, Difference] = {}
    key, recorded, _ = evaluation
    for image, score in enumerate(scores):
        if f"labels.{image}" in recorded:
            clear = recorded[f"margin.{image}"].float() > MARGIN
            quantities[f"{key}.labels.{image}"] = differing_pixels(score.argmax(0), recorded[f"labels.{image}"], clear)
        if f"sem_seg_small.{image}" in recorded:
            small = recorded[f"sem_seg_small.{image}"]
            quantities[f"{key}.sem_seg_small.{image}"] = relative(score[:, ::7, ::7], small, OUTPUT_TOLERANCE)
    return quantities


def _panoptic_margin(predictions: Predictions, image: int, size: tuple[int, int], threshold: float) -> Tensor:
    """Lead of the best query's score times mask over the second best -> [H, W]."""
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
    """Compare the number of queries with an object's class above each threshold, image by image."""
    scores, categories = predictions.class_logits[-1].detach().softmax(-1).max(-1)
    objects = categories < predictions.class_logits.shape[-1] - 1
    counts = [int((row & (s > t)).sum()) for row, s in zip(objects, scores, strict=True) for t in KEPT_THRESHOLDS]
    return relative(torch.tensor(counts), torch.tensor(recorded), 0)


def _trained(
    network: MaskFormer, predictions: Predictions, recorded: Training, loss: LossConfig
) -> dict[str, Difference]:
    """Compare matching, weighted losses and gradients for the recorded targets."""
    targets = packed_targets(recorded.targets, predictions)
    quantities: dict[str, Difference] = {}
    paddings: tuple[Literal["include", "exclude"], ...] = ("include", "exclude")
    for padding in paddings:
        total, trial = _compared_losses(predictions, targets, replace(loss, padding=padding), recorded.losses)
        if not quantities or all(quantity.ok for quantity in trial.values()):
            quantities, chosen, chosen_total = trial, padding, total
        if all(quantity.ok for quantity in quantities.values()):
            break
    logger.info("losses: padding %s", chosen)
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(chosen_total, list(parameters.values()), allow_unused=True)
    norms = {
        name: 0.0 if gradient is None else float(gradient.norm())
        for name, gradient in zip(parameters, gradients, strict=True)
    }
    if recorded.gradient_norms is not None:
        quantities |= gradient_norms(norms, {_our_name(name): v for name, v in recorded.gradient_norms.items()})
    if recorded.without_gradient is not None:
        nonzero = [name for name in recorded.without_gradient if norms.get(_our_name(name), math.nan) != 0]
        quantities["no_grad_params"] = Difference(len(nonzero), 0, ", ".join(nonzero))
    return quantities


def _compared_losses(
    predictions: Predictions, targets: Targets, loss: LossConfig, recorded: Losses
) -> tuple[Tensor, dict[str, Difference]]:
    """Compare costs, matching and losses -> the total loss, the differences."""
    quantities: dict[str, Difference] = {}
    detached = _detached(predictions)
    cost, query = matching_cost(detached, targets, loss).cpu(), match(detached, targets, loss).query.cpu()
    layers = {str(layer): layer for layer in range(len(cost) - 1)} | {"final": len(cost) - 1}
    for name, matches in recorded.matches.items():
        for image, pairs in enumerate(matches):
            where, layer = f"match.{name}.{image}", layers.get(name)
            quantities[f"{where}.C"] = relative(
                None if layer is None else cost[layer, image, :, : targets.counts[image]], pairs["C"], OUTPUT_TOLERANCE
            )
            quantities[where] = differing_pairs(None if layer is None else query[layer, image], pairs)
    criterion = Criterion(predictions.class_logits.shape[-1] - 1, loss).to(predictions.class_logits.device)
    losses = criterion(predictions, targets)
    for key, terms in recorded.terms.items():
        for name, value in terms.items():
            quantities[f"{key}.{name}"] = relative(losses.terms.get(name), torch.as_tensor(value), LOSS_TOLERANCE)
    return losses.total, quantities


def gradient_norms(norms: Mapping[str, float], recorded: Mapping[str, float]) -> dict[str, Difference]:
    """Relative difference of the worst parameter.

    Parameters whose recorded gradient is rounding are compared apart, by the share of their norm in the largest.
    """
    largest = max(recorded.values(), default=0.0)
    errors, vanishing = {}, {}
    for name, norm in recorded.items():
        got = norms.get(name, math.nan)
        if abs(norm) <= VANISHING * largest:
            vanishing[name] = got / largest if largest else got
        else:
            errors[name] = abs(got - norm) / abs(norm)
    quantities = {"grad_norm": worst(errors, GRADIENT_TOLERANCE)}
    return quantities | ({"grad_norm (vanishing)": worst(vanishing, VANISHING)} if vanishing else {})


def _synth(is_thing: Sequence[bool], synth: Synth) -> dict[str, Difference]:
    quantities: dict[str, Difference] = {}
    for index, post in enumerate(synth.posts):
        quantities |= {f"post.{index}.{name}": difference for name, difference in _post(is_thing, post).items()}
    for index, criterion in enumerate(synth.criteria):
        quantities |= {f"criterion.{index}.{name}": difference for name, difference in _criterion(criterion).items()}
    return quantities | not_compared(synth.unknown)


def _post(is_thing: Sequence[bool], post: SynthPost) -> dict[str, Difference]:
    """Compare results for given logits. Only the margin of the recorded labels excuses a pixel here."""
    predictions = given(post.class_logits[None], post.mask_logits[None], post.size)
    quantities: dict[str, Difference] = {}
    if post.labels is not None and post.margin is not None:
        labels = postprocess.semantic(predictions, [post.size], order="official")[0].labels
        quantities["labels"] = differing_pixels(labels, post.labels, post.margin.float() > MARGIN)
    for name, (id_map, segments) in post.panoptic.items():
        objects, overlap = synth_thresholds(name)
        result = postprocess.panoptic(predictions, [post.size], is_thing, objects, overlap, order="official")[0]
        quantities[name] = differing_pixels(official_ids(result), id_map)
        quantities[name.replace("@", "_info@")] = differing_segments(result, segments)
    return quantities | not_compared(post.unknown)


def _criterion(recorded: SynthCriterion) -> dict[str, Difference]:
    """Compare costs, matching, losses and gradients for given logits."""
    masks = recorded.targets[0]["masks"]
    class_logits = recorded.class_logits.clone().requires_grad_()
    mask_logits = recorded.mask_logits.clone().requires_grad_()
    predictions = given(class_logits, mask_logits, (masks.shape[1], masks.shape[2]))
    targets = packed_targets(recorded.targets, predictions)
    loss = LossConfig(padding="include")
    # The recording has one layer, and its losses are unweighted.
    weights = {"loss_ce": loss.class_weight, "loss_mask": loss.mask_weight, "loss_dice": loss.dice_weight}
    weighted = {name: weights.get(name, math.nan) * float(v) for name, v in recorded.unweighted_losses.items()}
    matches = {} if recorded.match is None else {"final": recorded.match}
    with torch.enable_grad():
        total, compared = _compared_losses(predictions, targets, loss, Losses(matches, {"losses": weighted}))
    quantities = {name.removeprefix("losses.").replace("match.final", "match"): d for name, d in compared.items()}
    gradients = torch.autograd.grad(total, (class_logits, mask_logits))
    for name, gradient in zip(("grad_logits", "grad_masks"), gradients, strict=True):
        if name in recorded.gradients:
            quantities[name] = rows_relative(gradient, recorded.gradients[name], GRADIENT_TOLERANCE)
    return quantities | not_compared(recorded.unknown)


def given(class_logits: Tensor, mask_logits: Tensor, size: tuple[int, int]) -> Predictions:
    """Predictions of one layer from class logits [B, Q, K+1] and mask logits [B, Q, h, w], by one-hot embeddings."""
    batch, queries = mask_logits.shape[:2]
    embeddings = torch.eye(queries).expand(1, batch, -1, -1)
    return Predictions(class_logits[None], embeddings, mask_logits, torch.tensor([size] * batch), size)


def packed_targets(recorded: Sequence[Target], predictions: Predictions) -> Targets:
    """Pack labels and boolean masks of each image into targets on the device of the predictions."""
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
    """Our name of a parameter: the official one without the prefix of the head."""
    return official.removeprefix("sem_seg_head.")


@contextmanager
def evaluation_mode(network: torch.nn.Module) -> Iterator[None]:
    """Set evaluation mode during the block, and restore the mode of each module after it."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
