"""Mask losses of the matched pairs at points (Mask2Former, section 3.3.2; PointRend, Kirillov et al., CVPR 2020).

Most of a pair's points are the candidates whose logit is nearest to 0, the others are random. In C++ on the CPU
(csrc/points) candidates are sampled and chosen a map at a time, and losses and gradients have no arrays of their own.
On CUDA it is Triton (kernels/point_loss.py), in float64 the eager twins.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer_fast.config import LossConfig
from maskformer_fast.core.arrays import address_of, dtype_name
from maskformer_fast.core.checks import check
from maskformer_fast.core.extension import load_extension, load_kernels
from maskformer_fast.ops.mask_loss import at_least_float32, focal_parameters
from maskformer_fast.ops.points import PointDraws, sample_maps, sample_masks, within_valid
from maskformer_fast.ops.registration import register_gradient, register_operator
from maskformer_fast.structures import Predictions, Targets

_CHUNK = 64
"""Maps whose candidates the eager twin samples together, which bounds their copies."""


class _Choice(NamedTuple):
    """Arguments of `choose_points`: N maps, G groups of points."""

    logits: Tensor  # [N, h, w] float32, bfloat16, float64 or, on CUDA, float16
    groups: Tensor  # [N] int64, the points of each map, -1 for none
    candidates: Tensor  # [G, M, 2] float32, float64 with the logits
    random: Tensor  # [G, R, 2]
    uncertain: int  # number of candidates to choose


class PointPairs(NamedTuple):
    """Arguments of `point_sums`: N maps and the targets at their points."""

    logits: Tensor  # [N, h, w] float32, bfloat16, float64 or, on CUDA, float16
    rows: Tensor  # [N] int64, negative for a map that is left out
    points: Tensor  # [N, P, 2] float32, float64 with the logits
    truth: Tensor  # [N, P]
    focal: tuple[float, float, float]  # weight of mask points, weight of other points, exponent


class PointPairsBackward(NamedTuple):
    """Arguments of `point_sums_backward`."""

    gradient: Tensor  # [N, 4], of the result of `point_sums`
    pairs: PointPairs

    @staticmethod
    def of(gradient: Tensor, *pairs: Any) -> PointPairsBackward:
        """Make them of the operator's arguments."""
        return PointPairsBackward(gradient, PointPairs(*pairs))


def _check_maps(logits: Tensor, numbers: Tensor, name: str) -> None:
    halves = (torch.bfloat16,) if logits.device.type == "cpu" else (torch.bfloat16, torch.float16)
    allowed = (torch.float32, torch.float64, *halves)
    if logits.dtype not in allowed:
        raise TypeError(f"logits: expected one of {', '.join(map(str, allowed))}, got {logits.dtype}")
    check(logits.dim() == 3, "logits", "shape [N, h, w]", tuple(logits.shape))
    _check_tensor(numbers, name, torch.int64, (len(logits),))


def _check_tensor(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(tensor.dtype == dtype and tensor.shape == shape, name, f"{dtype} {shape}",
          f"{tensor.dtype} {tuple(tensor.shape)}")


def _exact(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _check_choice(choice: _Choice) -> None:
    """Raise ``TypeError`` or ``ValueError`` for a shape or type that does not fit."""
    logits, groups, candidates, random, uncertain = choice
    _check_maps(logits, groups, "groups")
    for name, points in (("candidates", candidates), ("random", random)):
        check(points.dim() == 3, name, "shape [G, M, 2]", tuple(points.shape))
        _check_tensor(points, name, _exact(logits), (len(candidates), points.shape[1], 2))
    check(0 <= uncertain <= candidates.shape[1], "uncertain", f"0..{candidates.shape[1]} (candidates)", uncertain)


def _choose_points_fake(choice: _Choice) -> Tensor:
    return choice.random.new_empty(len(choice.logits), choice.uncertain + choice.random.shape[1], 2)


def _choose_points_cpu(choice: _Choice) -> Tensor:
    if choice.logits.dtype == torch.float64:
        return _choose_points_torch(choice)
    logits, groups, candidates, random = (tensor.contiguous() for tensor in choice[:4])
    result = _choose_points_fake(choice)
    if len(logits) > 0:
        load_extension().choose_points(
            dtype_name(logits),
            [
                address_of(logits, "logits", dtype_name(logits), logits.shape),
                address_of(groups, "groups", "int64", groups.shape),
                address_of(candidates, "candidates", "float32", candidates.shape),
                address_of(random, "random", "float32", random.shape),
            ],
            [*logits.shape, *candidates.shape[:2], random.shape[1], choice.uncertain],
            address_of(result, "result", "float32", result.shape),
            torch.get_num_threads(),
        )
    return result


def _choose_points_cuda(choice: _Choice) -> Tensor:
    if choice.logits.dtype == torch.float64:
        return _choose_points_torch(choice)
    tensors = (tensor.contiguous() for tensor in choice[:4])
    result: Tensor = load_kernels("point_loss").choose_points_forward(*tensors, choice.uncertain)
    return result


def _choose_points_torch(choice: _Choice) -> Tensor:
    logits, groups, candidates, random, uncertain = choice
    result = _choose_points_fake(choice)
    for first in range(0, len(logits), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        group = groups[chunk].clamp(min=0)
        own = candidates[group]  # [n, M, 2]
        nearness = sample_maps(logits[chunk].to(own.dtype).unsqueeze(1), own).squeeze(1).abs()
        nearest = nearness.topk(uncertain, dim=1, largest=False, sorted=False).indices
        chosen = torch.cat([own.gather(1, nearest.unsqueeze(2).expand(-1, -1, 2)), random[group]], 1)
        result[chunk] = chosen.where((groups[chunk] >= 0)[:, None, None], 0)
    return result


_choose_points = register_operator(
    "choose_points(Tensor logits, Tensor groups, Tensor candidates, Tensor random, SymInt uncertain) -> Tensor",
    _Choice,
    check=_check_choice,
    cpu=_choose_points_cpu,
    cuda=_choose_points_cuda,
    fake=_choose_points_fake,
)


def choose_points(
    logits: Tensor,  # [N, h, w] float32, bfloat16 or float64
    groups: Tensor,  # [N] int64, the points of each map, -1 for none
    candidates: Tensor,  # [G, M, 2]
    random: Tensor,  # [G, R, 2]
    uncertain: int,
) -> Tensor:
    """Points of each map: its ``uncertain`` candidates of least |logit|, and the random ones -> [N, uncertain + R, 2].

    The order of the candidates is not specified; a logit of NaN is chosen last. Maps without points get zeros. There is
    no gradient. Results are float32, float64 for float64 logits.

    Raises:
        TypeError: other dtypes.
        ValueError: shapes that do not fit; on the CPU also groups out of range.
    """
    exact = _exact(logits)
    return _choose_points(
        logits.detach(), groups, candidates.detach().to(exact), random.detach().to(exact), uncertain
    )


def choose_points_eager(
    logits: Tensor, groups: Tensor, candidates: Tensor, random: Tensor, uncertain: int
) -> Tensor:
    """Eager twin of `choose_points`: oracle of the tests, and the implementation for float64."""
    return _choose_points_torch(_Choice(logits, groups, candidates, random, uncertain))


def _check_pairs(pairs: PointPairs) -> None:
    """Raise ``TypeError`` or ``ValueError`` for a shape or type that does not fit."""
    logits, rows, points, truth, focal = pairs
    _check_maps(logits, rows, "rows")
    check(points.dim() == 3, "points", "shape [N, P, 2]", tuple(points.shape))
    _check_tensor(points, "points", _exact(logits), (len(logits), points.shape[1], 2))
    _check_tensor(truth, "truth", _exact(logits), tuple(points.shape[:2]))
    check(len(focal) == 3, "focal", "three numbers", focal)


def _check_backward(arguments: PointPairsBackward) -> None:
    _check_pairs(arguments.pairs)
    _check_tensor(arguments.gradient, "gradient", _exact(arguments.pairs.logits), (len(arguments.pairs.logits), 4))


class _ExtensionArguments:
    """Arguments as the extension takes them; keeps the tensors alive while their addresses are in use."""

    def __init__(self, pairs: PointPairs) -> None:
        logits, rows, points, truth = self.tensors = [tensor.contiguous() for tensor in pairs[:4]]
        self.type = dtype_name(logits)
        self.logits = address_of(logits, "logits", self.type, logits.shape)
        addresses = [
            address_of(rows, "rows", "int64", rows.shape),
            address_of(points, "points", "float32", points.shape),
            address_of(truth, "truth", "float32", truth.shape),
        ]
        self.values = (addresses, [*logits.shape, points.shape[1]], pairs.focal)


def _point_sums_fake(pairs: PointPairs) -> Tensor:
    return pairs.truth.new_empty(len(pairs.logits), 4)


def _point_sums_cpu(pairs: PointPairs) -> Tensor:
    if pairs.logits.dtype == torch.float64:
        return point_sums_eager(pairs)
    sums, inputs = _point_sums_fake(pairs), _ExtensionArguments(pairs)
    if len(sums) > 0:
        address = address_of(sums, "sums", "float32", sums.shape)
        load_extension().point_sums(inputs.type, inputs.logits, *inputs.values, address, torch.get_num_threads())
    return sums


def _point_sums_cuda(pairs: PointPairs) -> Tensor:
    if pairs.logits.dtype == torch.float64:
        return point_sums_eager(pairs)
    tensors = (tensor.contiguous() for tensor in pairs[:4])
    sums: Tensor = load_kernels("point_loss").point_sums_forward(*tensors, pairs.focal)
    return sums


def _backward_fake(arguments: PointPairsBackward) -> Tensor:
    logits = arguments.pairs.logits
    return logits.new_empty(logits.shape)


def _backward_cpu(arguments: PointPairsBackward) -> Tensor:
    gradient, pairs = arguments
    if pairs.logits.dtype == torch.float64:
        return point_sums_backward_eager(arguments)
    result, gradient, inputs = _backward_fake(arguments), gradient.contiguous(), _ExtensionArguments(pairs)
    if len(result) > 0:
        load_extension().point_sums_backward(
            inputs.type, address_of(gradient, "gradient", "float32", gradient.shape), inputs.logits, *inputs.values,
            address_of(result, "result", inputs.type, result.shape), torch.get_num_threads(),
        )
    return result


def _backward_cuda(arguments: PointPairsBackward) -> Tensor:
    gradient, pairs = arguments
    if pairs.logits.dtype == torch.float64:
        return point_sums_backward_eager(arguments)
    tensors = (tensor.contiguous() for tensor in (gradient, *pairs[:4]))
    result: Tensor = load_kernels("point_loss").point_sums_backward(*tensors, pairs.focal)
    return result


def _terms(pairs: PointPairs) -> tuple[Tensor, ...]:
    """Logits, probabilities, and losses with the target on and off at the points, [N, P] each."""
    on_weight, off_weight, gamma = pairs.focal
    x = sample_maps(pairs.logits.to(pairs.truth.dtype).unsqueeze(1), pairs.points).squeeze(1)
    probability = x.sigmoid()
    on, off = on_weight * F.softplus(-x), off_weight * F.softplus(x)
    if gamma != 0.0:
        on, off = on * (1 - probability) ** gamma, off * probability**gamma
    return x, probability, on, off


def point_sums_eager(pairs: PointPairs) -> Tensor:
    """Sums from which the losses of each pair are computed, in plain PyTorch -> [N, 4] float32 or float64.

    Over the points, with p the sigmoid of the logit and truth t: the weighted focal loss, p t, p, and t, each summed.
    Zeros for maps that are left out, whatever their logits.
    """
    truth = pairs.truth
    _, probability, on, off = _terms(pairs)
    sums = torch.stack([(truth * on + (1 - truth) * off).sum(1), (probability * truth).sum(1), probability.sum(1),
                        truth.sum(1)], 1)
    return sums.where((pairs.rows >= 0).unsqueeze(1), 0)


def point_sums_backward_eager(arguments: PointPairsBackward) -> Tensor:
    """Gradient of `point_sums` by its logits, in plain PyTorch -> [N, h, w]."""
    gradient, pairs = arguments
    with torch.enable_grad():
        logits = pairs.logits.detach().to(pairs.truth.dtype).requires_grad_()
        sums = point_sums_eager(pairs._replace(logits=logits))
        (result,) = torch.autograd.grad(sums, logits, gradient)
    return result.to(pairs.logits.dtype)


_PAIRS = "Tensor logits, Tensor rows, Tensor points, Tensor truth, float[] focal"
_point_sums = register_operator(
    f"point_sums({_PAIRS}) -> Tensor",
    PointPairs,
    check=_check_pairs,
    cpu=_point_sums_cpu,
    cuda=_point_sums_cuda,
    fake=_point_sums_fake,
)
_point_sums_backward = register_operator(
    f"point_sums_backward(Tensor gradient, {_PAIRS}) -> Tensor",
    PointPairsBackward.of,
    check=_check_backward,
    cpu=_backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, rows, points, truth, ctx.focal = inputs
    ctx.save_for_backward(logits, rows, points, truth)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _point_sums_backward(gradient, *ctx.saved_tensors, ctx.focal), None, None, None, None


register_gradient("point_sums", _differentiate, _setup_context)


def losses_of_pairs(
    logits: Tensor,  # [N, h, w] float32, bfloat16 or float64
    rows: Tensor,  # [N] int64, negative for a map that is left out
    points: Tensor,  # [N, P, 2] float32, float64 with the logits
    truth: Tensor,  # [N, P], targets at the points
    loss: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Mask and dice loss of each map at its points -> [N], [N] float32 or float64; zeros for maps left out."""
    sums = _point_sums(logits, rows, points, truth, list(focal_parameters(loss)))
    entropy, overlap, total, area = sums.unbind(1)
    dice = 1 - (2 * overlap + 1) / (total + area + 1)
    return entropy / points.shape[1], dice


def mask_loss_at_points(
    predictions: Predictions,  # L layers, any float dtype
    targets: Targets,
    query: Tensor,  # [L, B, T] int64, the query of each target, -1 for none
    draws: PointDraws,
    loss: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Mask and dice losses at points, summed over the matched pairs -> [L], [L] float32 or float64.

    The losses are those of `mask_loss`, with sums and means over ``loss.points`` points: ``loss.importance`` of them
    are the candidates of least |logit|, which change with the prediction, the others ``draws.random``. Logits and
    targets are sampled bilinearly, with zeros outside. With ``loss.padding == "exclude"`` all points are moved into the
    image. Gradients go to the embeddings; those of unmatched queries are zero. On the CPU results are the same for any
    number of threads, on CUDA in every run.

    Raises:
        ValueError: a shape that does not fit, or predictions and targets not of one padded input size.
        ImportError: the extension is not built; on CUDA, Triton is not installed.
    """
    check(targets.input_size == predictions.input_size, "targets.input_size",
          f"that of the predictions {predictions.input_size}", targets.input_size)
    layers, batch, slots = query.shape
    with torch.autocast(query.device.type, enabled=False):
        embeddings, pixels = (at_least_float32(e) for e in (predictions.mask_embeddings, predictions.pixel_embeddings))
        index = query.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, embeddings.shape[-1])
        matched = embeddings.gather(2, index).transpose(0, 1).flatten(1, 2)  # [B, L*T, D]
        logits = torch.bmm(matched, pixels.flatten(2)).view(batch * layers * slots, *pixels.shape[2:])
        order = query.transpose(0, 1).flatten()  # [B*L*T], as the logits
        pair = torch.arange(len(order), device=query.device)
        image = pair // max(layers * slots, 1)
        target = (image * slots + pair % max(slots, 1)).where(order >= 0, -1)
        groups, candidates, random = _points_of_pairs(targets, draws.to(logits.dtype), loss, query, image)
        uncertain = loss.points - random.shape[1]
        points = choose_points(logits, groups.where(order >= 0, -1), candidates, random, uncertain)
        truth = sample_masks(targets.masks.flatten(0, 1), targets.input_size[1], target, points, pair)
        losses = losses_of_pairs(logits, target, points, truth, loss)
        mask, dice = (terms.view(batch, layers, slots) for terms in losses)
    return mask.sum((0, 2)), dice.sum((0, 2))


def _points_of_pairs(
    targets: Targets,
    draws: PointDraws,
    loss: LossConfig,
    query: Tensor,  # [L, B, T]
    image: Tensor,  # [B*L*T] int64
) -> tuple[Tensor, Tensor, Tensor]:
    """Group of each pair [B*L*T], candidates [G, M, 2] and random points [G, R, 2]."""
    candidates, random = (within_valid(points, targets, loss) for points in draws[1:])
    if candidates.dim() == 3:
        return image, candidates, random
    expected = tuple(query.shape)
    check(candidates.shape[:3] == expected, "draws.candidates", f"shape {[*expected, 'M', 2]}",
          tuple(candidates.shape))
    candidates, random = (points.transpose(0, 1).flatten(0, 2) for points in (candidates, random))
    return torch.arange(len(image), device=image.device), candidates, random
