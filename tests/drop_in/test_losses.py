"""Losses and gradients of equipped criteria equal those of transformers' own, at the points of one seed."""

from __future__ import annotations

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch

from maskformer_fast.drop_in import equip_loss, unequip_loss
from tests.support.host_reads import NoHostRead

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")
CLASSES, QUERIES = 9, 13
FAMILIES = ["MaskFormer", "Mask2Former", "OneFormer", "Eomt", "EomtDinov3"]
WEIGHTS = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
FOLDERS = {"EomtDinov3": "eomt_dinov3"}


def criterion(family: str) -> Any:
    folder = FOLDERS.get(family, family.lower())
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    made, matcher = getattr(module, f"{family}Loss"), getattr(module, f"{family}HungarianMatcher")
    if family == "MaskFormer":
        return made(CLASSES, matcher(1.0, 20.0, 1.0), WEIGHTS, 0.1)
    if family == "OneFormer":
        return made(CLASSES, matcher(2.0, 5.0, 5.0, 300), WEIGHTS, 0.1, 300, 3.0, 0.75, 0.07)
    config = getattr(transformers, f"{family}Config")(num_labels=CLASSES, train_num_points=300)
    return made(config, WEIGHTS)


def inputs(counts: tuple[int, ...], sizes: list[tuple[int, int]], layers: int = 2) -> dict[str, Any]:
    batch = len(counts)
    arguments: dict[str, Any] = {
        "masks_queries_logits": 3 * torch.randn(batch, QUERIES, 24, 20),
        "class_queries_logits": torch.randn(batch, QUERIES, CLASSES + 1),
        "mask_labels": [(torch.rand(n, *size) < 0.3).float() for n, size in zip(counts, sizes, strict=True)],
        "class_labels": [torch.randint(CLASSES, (n,)) for n in counts],
    }
    arguments["auxiliary_predictions"] = [
        {name: torch.randn_like(arguments[name]) for name in ("masks_queries_logits", "class_queries_logits")}
        for _ in range(layers)
    ]
    return arguments


def losses(loss: Any, family: str, arguments: dict[str, Any]) -> tuple[dict[str, float], torch.Tensor]:
    """Losses of all layers, and the gradient of their weighted sum by all mask logits."""
    arguments = {**arguments, "auxiliary_predictions": [dict(layer) for layer in arguments["auxiliary_predictions"]]}
    leaves = []
    for holder in (arguments, *arguments["auxiliary_predictions"]):
        holder["masks_queries_logits"] = holder["masks_queries_logits"].clone().requires_grad_()
        leaves.append(holder["masks_queries_logits"])
    if family == "OneFormer":
        arguments |= {"contrastive_queries_logits": None, "text_queries": None, "calculate_contrastive_loss": False}
    torch.manual_seed(3)
    found = loss(**arguments)
    for name in found:
        found[name] *= 1.5  # in place, as the models weight them
    sum(found.values()).backward()
    return {name: value.item() for name, value in found.items()}, torch.stack([leaf.grad for leaf in leaves])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[(96, 80), (96, 80)], [(96, 80), (70, 90)]])
@pytest.mark.parametrize("counts", [(4, 7), (1, QUERIES + 3), (0, 5)])
def test_losses_and_gradients(family: str, sizes: list[tuple[int, int]], counts: tuple[int, int]) -> None:
    arguments = inputs(counts, sizes)
    theirs, ours = criterion(family), equip_loss(criterion(family))
    expected, expected_gradient = losses(theirs, family, arguments)
    got, gradient = losses(ours, family, arguments)
    assert list(got) == list(expected) and len(got) == 9
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    scale = expected_gradient.abs().amax()
    assert scale > 0
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4 * scale.item())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matching_is_theirs(family: str) -> None:
    arguments = inputs((5, 8), [(96, 80)] * 2)
    del arguments["auxiliary_predictions"]
    pairs = []
    for loss in (criterion(family), equip_loss(criterion(family))):
        torch.manual_seed(0)
        pairs.append(loss.matcher(**arguments))
    for theirs, ours in zip(*pairs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("family", ["MaskFormer", "Mask2Former"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_costs_that_are_not_finite_are_matched_last(family: str, value: float) -> None:
    arguments = inputs((4, 6), [(96, 80)] * 2)
    del arguments["auxiliary_predictions"]
    arguments["masks_queries_logits"][0, 2] = value
    arguments["class_queries_logits"][1, 3] = float("nan")
    found = equip_loss(criterion(family)).matcher(**arguments)
    for query, target in found:
        assert len(query) == len(set(query.tolist())) and sorted(target.tolist()) == list(range(len(target)))
    assert 2 not in found[0][0] and 3 not in found[1][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_equipping_keeps_the_module(family: str) -> None:
    plain = criterion(family)
    state = plain.state_dict()
    fast = equip_loss(plain)
    assert fast is plain and list(fast.state_dict()) == list(state)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), equip_loss(fast)):
        assert twin.loss_masks.__module__ == twin.matcher.forward.__module__ == "maskformer_fast.drop_in.losses"
    assert type(unequip_loss(fast)) is type(criterion(family)) and type(fast.matcher) is type(criterion(family).matcher)
    model = torch.nn.Module()
    model.criterion = fast
    assert equip_loss(model) is model and fast.loss_masks.__module__ == "maskformer_fast.drop_in.losses"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_reads_nothing(family: str) -> None:
    arguments = inputs((5, 8), [(96, 80)] * 2)
    fast = equip_loss(criterion(family))
    masks, classes, targets, labels, _ = arguments.values()
    with NoHostRead():
        indices = fast.matcher(masks, classes, targets, labels)
        fast.loss_masks(masks.requires_grad_(), targets, indices, torch.tensor(13.0))


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="model: expected a model for segmentation of MaskFormer"):
        equip_loss(torch.nn.Linear(2, 2))
