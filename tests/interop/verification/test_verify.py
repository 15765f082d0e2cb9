"""Network, post-processing and criterion against recordings of the official code; errors that `verify` must detect."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maskformer_fast.config import BackboneConfig, DecoderConfig, LossConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.loader import pad_images
from maskformer_fast.inference import postprocess
from maskformer_fast.interop.verification.difference import Difference, Report, relative, rows_relative, worst
from maskformer_fast.interop.verification.verify import verify
from maskformer_fast.modeling import MaskFormer, build_model
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import Targets, pack_masks
from maskformer_fast.training.criterion import Criterion
from tests.support.paths import ORACLES

needs_oracles = pytest.mark.skipif(not ORACLES.is_dir(), reason="recordings of the official code are not here")

# Dropout and trained BatchNorm must be switched off, as in the recordings.
TINY_BACKBONE = BackboneConfig("resnet50", stem_channels=16, bottleneck_channels=8, res2_channels=32)
TINY_DECODER = DecoderConfig(layers=3, hidden_dim=64, num_heads=4, ffn_dim=96, dropout=0.3, num_queries=24)
TINY = {
    "r50_ade_tiny": ModelConfig(
        num_classes=13, backbone=TINY_BACKBONE, pixel_decoder=PixelDecoderConfig(conv_dim=64, mask_dim=32),
        decoder=TINY_DECODER,
    ),
    "r50_coco_panoptic_tiny": ModelConfig(
        num_classes=133, backbone=TINY_BACKBONE,
        pixel_decoder=PixelDecoderConfig(
            conv_dim=64, mask_dim=32, encoder_layers=2, encoder_heads=4, encoder_ffn_dim=96, encoder_dropout=0.2
        ),
        decoder=TINY_DECODER,
    ),
}  # fmt: skip
ADE, COCO = TINY


class NumpyUnpickler(pickle.Unpickler):
    """Unpickler of numpy arrays in plain containers alone."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] != "numpy":
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def official_network(name: str) -> MaskFormer:
    with (ORACLES / name / "model.pkl").open("rb") as file:
        weights = NumpyUnpickler(file).load()["model"]
    weights.pop("criterion.empty_weight", None)
    network = build_model(TINY[name])
    network.load_state_dict({key.removeprefix("sem_seg_head."): torch.from_numpy(v) for key, v in weights.items()})
    return network


def things(name: str) -> list[bool]:
    """The first 80 classes of COCO panoptic are things."""
    return [name == COCO and category < 80 for category in range(TINY[name].num_classes)]


def recording(name: str, file: str = "case.pt") -> dict[str, Any]:
    return torch.load(ORACLES / name / file, weights_only=True)


def failed(report: Report) -> set[str]:
    return {name for name, quantity in report.quantities.items() if quantity.ok is False}


@needs_oracles
@pytest.mark.parametrize("name", TINY)
def test_every_recorded_quantity_of_the_official_code_is_reproduced(name: str) -> None:
    network = official_network(name).train()
    report = verify(network, things(name), ORACLES / name)
    assert report.ok and not failed(report)
    assert network.training and all(module.training for module in network.modules()), "its mode is restored"
    assert all(parameter.grad is None for parameter in network.parameters())

    case, synth = recording(name), recording(name, "synth.pt")
    expected = set(case["f32"]) | {f"losses.{term}" for term in case["losses"]}
    expected |= {f"losses64.{term}" for term in case["losses64"]}
    for key in ("eval", "eval_loose"):
        expected |= {f"{key}.{part}" for part in case[key] if not part.startswith("margin")}
    for layer in ("0", "1", "final"):
        expected |= {f"match.{layer}.{image}{cost}" for image in range(2) for cost in ("", ".C")}
    expected |= {"grad_norm", "grad_norm (vanishing)", "no_grad_params", "n_kept"}
    expected |= {"thing_ids"} if "thing_ids" in case else set()
    for index, post in enumerate(synth["post"]):
        for part in post:
            if part == "labels" or "@" in part:
                expected |= {f"post.{index}.{part}"}
            if "@" in part:
                expected |= {f"post.{index}.{part.replace('@', '_info@')}"}
    for index, recorded in enumerate(synth["criterion"]):
        parts = [*recorded["unweighted_losses"], "grad_logits", "grad_masks"]
        parts += [f"match.{image}{cost}" for image in range(len(recorded["match"])) for cost in ("", ".C")]
        expected |= {f"criterion.{index}.{part}" for part in parts}
    assert set(report.quantities) == expected
    assert len(synth["post"]) == len(synth["criterion"]) == 3

    # For equal predictions only the order of summation differs.
    criterion = {key: q for key, q in report.quantities.items() if key.startswith("criterion.")}
    assert max(quantity.largest for quantity in criterion.values()) < 2e-6
    losses = {key: q for key, q in report.quantities.items() if key.startswith("losses")}
    assert max(quantity.largest for quantity in losses.values()) < 1e-5


@needs_oracles
@pytest.mark.parametrize("name", TINY)
def test_gradients_of_all_recorded_parameters_are_compared(name: str, tmp_path: Path) -> None:
    # The norm of one parameter is wrong by 0.2 per cent, which must be reported with its name.
    case = recording(name)
    assert len(case["grad_norm"]) > 140
    network = official_network(name)
    for key in list(case["grad_norm"])[::40]:
        changed = copy.deepcopy({part: case[part] for part in ("images", "image_sizes", "padded_size", "targets")})
        changed |= {"f32": {}, "grad_norm": {**case["grad_norm"], key: case["grad_norm"][key] * 1.002}}
        torch.save(changed, tmp_path / "case.pt")
        report = verify(network, things(name), tmp_path)
        assert failed(report) == {"grad_norm"}
        assert report.quantities["grad_norm"].note == key.removeprefix("sem_seg_head.")
        assert report.quantities["grad_norm"].largest == pytest.approx(0.002, rel=0.1)


def scale_weight(network: MaskFormer) -> None:
    network.backbone.res4[1].conv2.weight.data.mul_(1.01)


def swap_queries(network: MaskFormer) -> None:
    network.predictor.query_embed.weight.data = network.predictor.query_embed.weight.data.flip(0)


def break_pixels(network: MaskFormer) -> None:
    network.pixel_decoder.mask_features.bias.data[3] = torch.nan


@needs_oracles
@pytest.mark.parametrize(
    ("change", "reported", "not_reported"),
    [
        (scale_weight, {"features.res4", "features.res5", "pred_masks", "grad_norm"}, {"features.res2"}),
        (swap_queries, {"hs", "pred_logits", "match.final.0"}, {"mask_features", "features.res5"}),
        (break_pixels, {"mask_features", "pred_masks", "aux.0.pred_masks", "losses.loss_mask_1", "grad_norm"},
         {"hs", "pred_logits"}),
    ],
)  # fmt: skip
def test_an_error_in_the_network_is_reported_where_it_begins(
    change: Callable[[MaskFormer], None], reported: set[str], not_reported: set[str]
) -> None:
    network = official_network(COCO)
    change(network)
    report = verify(network, things(COCO), ORACLES / COCO / "case.pt")
    assert not report.ok
    assert reported <= failed(report) and not not_reported & failed(report)
    text = json.dumps(report.to_dict(), allow_nan=False)
    assert json.loads(text)["ok"] is False
    if change is break_pixels:
        assert json.loads(text)["mask_features"]["difference"] is None


@needs_oracles
def test_a_wrong_number_of_heads_is_suspected(caplog: pytest.LogCaptureFixture) -> None:
    weights = official_network(ADE).state_dict()
    network = build_model(replace(TINY[ADE], decoder=replace(TINY_DECODER, num_heads=8)))
    network.load_state_dict(weights)
    report = verify(network, things(ADE), ORACLES / ADE / "case.pt")
    assert {"hs", "pred_logits"} <= failed(report) and "mask_features" not in failed(report)
    assert "are 8 decoder and 8 encoder heads right" in caplog.text


@needs_oracles
def test_other_things_than_the_official_ones_are_reported() -> None:
    report = verify(official_network(COCO), [True] * 133, ORACLES / COCO)
    assert "thing_ids" in failed(report) and report.quantities["thing_ids"].largest == 53
    assert any(name.startswith("post.") for name in failed(report))
    assert not any("loss" in name or "pred" in name for name in failed(report))


@needs_oracles
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda case: case["eval"]["panoptic.0"].__setitem__((slice(0, 20), slice(None)), 1), "eval.panoptic.0"),
        (lambda case: case["eval_loose"]["panoptic_info.1"].pop(), "eval_loose.panoptic_info.1"),
        (lambda case: case["eval"]["labels.1"].add_(1), "eval.labels.1"),
        (lambda case: case["eval"]["sem_seg_small.0"].mul_(1.01), "eval.sem_seg_small.0"),
        (lambda case: case["match"]["1"][0]["i"].copy_(case["match"]["1"][0]["i"].flip(0)), "match.1.0"),
        (lambda case: case["losses"].update(loss_dice_0=torch.tensor(0.8)), "losses.loss_dice_0"),
        (lambda case: case["losses"].update(loss_dice_7=torch.tensor(0.8)), "losses.loss_dice_7"),
        (lambda case: case["f32"].update({"aux.9.pred_logits": torch.zeros(2, 24, 134)}), "aux.9.pred_logits"),
        (lambda case: case["f32"].update(hs=case["f32"]["hs"][1:]), "hs"),
        (lambda case: case["f32"]["mask_features"].fill_(torch.nan), "mask_features"),
        (lambda case: case["grad_norm"].update({"backbone.bn": 1.0}), "grad_norm"),
        (lambda case: case["no_grad_params"].append("backbone.stem.conv1.weight"), "no_grad_params"),
        (lambda case: case["n_kept"].__setitem__(2, 21), "n_kept"),
        (lambda case: case["thing_ids"].pop(), "thing_ids"),
    ],
)
def test_one_changed_number_fails_its_quantity_alone(
    change: Callable[[dict[str, Any]], Any], name: str, tmp_path: Path
) -> None:
    case = recording(COCO)
    change(case)
    torch.save(case, tmp_path / "case.pt")
    assert failed(verify(official_network(COCO), things(COCO), tmp_path / "case.pt")) == {name}


@needs_oracles
def test_unknown_quantities_are_listed_as_not_compared(tmp_path: Path) -> None:
    case = recording(ADE)
    case["depth"] = torch.zeros(3)
    case["f32"]["attention.0"] = torch.zeros(2)
    case["eval"]["boxes.0"] = torch.zeros(4)
    for key in ("losses", "losses64", "match"):
        del case[key]  # absent quantities are not reported
    torch.save(case, tmp_path / "any name")
    report = verify(official_network(ADE), things(ADE), tmp_path / "any name")
    assert report.ok
    entries = {name: entry for name, entry in report.to_dict().items() if name != "ok"}
    assert [name for name, entry in entries.items() if entry["ok"] is None] == ["attention.0", "eval.boxes.0", "depth"]
    assert entries["depth"]["difference"] is None and entries["depth"]["tolerance"] is None
    assert not any(name.startswith(("losses", "match")) for name in entries)


@needs_oracles
def test_things_come_from_metadata_and_networks_without_queries_are_refused() -> None:
    classes = tuple(map(str, range(133)))
    metadata = Metadata("coco", classes, tuple(things(COCO)), tuple(range(133)), ((0, 0, 0),) * 133)
    assert verify(official_network(COCO), metadata, ORACLES / COCO / "synth.pt").ok
    with pytest.raises(ValueError, match="things: expected a flag for each of 133 classes, got 13"):
        verify(official_network(COCO), things(ADE), ORACLES / COCO)
    with pytest.raises(ValueError, match="network: expected MaskFormer.*PerPixelBaseline"):
        verify(build_model(ModelConfig("per_pixel", num_classes=13)), things(ADE), ORACLES / ADE)


@needs_oracles
@pytest.mark.parametrize("file", ["case.pt", "synth.pt"])
def test_a_recording_of_other_classes_is_refused(file: str) -> None:
    with pytest.raises(ValueError, match=rf"{file}: .*expected the network's 13 classes and no-object, got '133"):
        verify(official_network(ADE), things(ADE), ORACLES / COCO / file)


@pytest.mark.parametrize("padding", ["include", "exclude"])
@pytest.mark.parametrize("order", ["official", "official_panoptic"])
def test_the_recorded_behaviour_is_recognised(padding: Any, order: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = ModelConfig(
        num_classes=5, backbone=BackboneConfig("swin_micro", drop_path_rate=0.5),
        pixel_decoder=PixelDecoderConfig(conv_dim=32, mask_dim=8, norm_groups=4),
        decoder=DecoderConfig(layers=2, hidden_dim=32, num_heads=4, ffn_dim=16, num_queries=9),
    )  # fmt: skip
    network = build_model(config).eval()
    for parameter in network.predictor.parameters():
        parameter.data = 0.5 * torch.randn_like(parameter)
    network.predictor.transformer["decoder"].norm.bias.data.zero_()  # different queries
    network.predictor.class_embed.weight.data.mul_(4)
    sizes, padded, asked = [(41, 70), (64, 50)], (64, 96), [(41, 70), (77, 33)]
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    batch, valid = pad_images(images, 32)
    predictions = network(batch, valid, all_layers=True)
    masks = torch.rand(2, 3, *padded) < 0.4
    labels = torch.tensor([[0, 4, 2], [1, 1, 3]])
    targets = Targets(labels, torch.tensor([3, 3]), pack_masks(masks), valid, padded)
    loss = LossConfig(padding=padding, no_object_weight=0.3)
    losses = Criterion(5, loss)(predictions, targets)
    losses.total.backward()
    scores = postprocess.semantic_scores(predictions, asked, order)
    evaluation: dict[str, Any] = {}
    for image, score in enumerate(scores):
        best = score.topk(2, dim=0).values
        evaluation[f"labels.{image}"] = score.argmax(0).to(torch.int16)
        evaluation[f"margin.{image}"] = (best[0] - best[1]).half()
        evaluation[f"sem_seg_small.{image}"] = score[:, ::7, ::7].clone()
    case = {
        "images": images, "image_sizes": sizes, "padded_size": padded, "sizes": asked, "eval": evaluation,
        "f32": {"features.res5": network.backbone(network.normalize(batch, valid))[3].detach(),
                "aux.0.pred_masks": layer_mask_logits(predictions, 0).detach()},
        "targets": [{"labels": row, "masks": mask} for row, mask in zip(labels, masks, strict=True)],
        "losses": {name: value.detach() for name, value in losses.terms.items()},
        "grad_norm": {
            name if name.startswith("backbone") else f"sem_seg_head.{name}": float(parameter.grad.norm())
            for name, parameter in network.named_parameters()
        },
    }  # fmt: skip
    torch.save(case, tmp_path / "case.pt")
    assert failed(verify(network, [False] * 5, tmp_path)) >= {"losses.loss_ce", "losses.loss_ce_0", "grad_norm"}
    report = verify(network.train(), [False] * 5, tmp_path, LossConfig(no_object_weight=0.3))
    assert report.ok and not failed(report) and len(report.quantities) == 2 + 4 + 6 + 2
    other = postprocess.semantic_scores(predictions, asked, "official" if order != "official" else "official_panoptic")
    assert relative(other[1], scores[1], 1e-2).ok is False, "the case must distinguish the orders"


TINY_CASE = {
    "images": [torch.zeros(3, 8, 8, dtype=torch.uint8)], "image_sizes": [(8, 8)], "padded_size": (8, 8), "f32": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "not a recording of the official implementation: lacks images, image_sizes, padded_size, f32"),
        ([1, 2], "content: expected a dictionary, got 'list'"),
        ({1: 2}, "content: expected names as keys"),
        ({**TINY_CASE, "losses": {"loss_ce": 1.0}}, "lacks targets"),
        ({**TINY_CASE, "eval": {"labels.0": torch.zeros(8, 8, dtype=torch.int16)}}, "lacks sizes"),
        ({**TINY_CASE, "sizes": [(8, 8)], "eval": {"labels.0": torch.zeros(8, 8, dtype=torch.int16)}},
         r"lacks eval\.margin\.0"),
        ({**TINY_CASE, "sizes": [(8, 8)], "eval": {"panoptic.0": torch.zeros(8, 8, dtype=torch.int32)}},
         "lacks thresholds"),
        ({**TINY_CASE, "sizes": [(8, 8)], "eval": {"panoptic.3": 0}, "thresholds": (0, 0)}, "one of 1 images, got '3'"),
        ({**TINY_CASE, "images": []}, "images: expected at least one"),
        ({**TINY_CASE, "images": [torch.zeros(3, 8, 9, dtype=torch.uint8)]}, r"images\.0: expected torch\.uint8 of"),
        ({**TINY_CASE, "images": ["x"]}, r"images\.0: expected a tensor, got 'str'"),
        ({**TINY_CASE, "padded_size": (8, 7)}, "padded_size: expected one that holds image 0"),
        ({**TINY_CASE, "padded_size": (10**6, 10**6)}, "padded_size: expected at most"),
        ({**TINY_CASE, "f32": {"hs": 3}}, r"f32\.hs: expected a tensor"),
        ({**TINY_CASE, "targets": [{"labels": torch.tensor([13]), "masks": torch.zeros(1, 8, 8, dtype=torch.bool)}],
          "losses": {}}, r"targets\.0\.labels: expected classes in 0\.\.12"),
        ({**TINY_CASE, "targets": [{"labels": torch.tensor([1])}], "losses": {}}, r"lacks targets\.0\.masks"),
        ({"post": [{"size": (8, 8)}]}, r"lacks post\.0\.mask_cls, post\.0\.mask_pred"),
        ({"criterion": 3}, "criterion: expected a list"),
    ],
)  # fmt: skip
def test_files_without_a_recording_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "case.pt")
    with torch.device("meta"):
        network = build_model(TINY[ADE])
    with pytest.raises(ValueError, match=rf"case\.pt: .*{message}"):
        verify(network, things(ADE), tmp_path / "case.pt")


def test_missing_files_and_files_with_code_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = build_model(TINY[ADE])
    with pytest.raises(FileNotFoundError, match=r"no such recording"):
        verify(network, things(ADE), tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match=r"case\.pt or synth\.pt, in this folder"):
        verify(network, things(ADE), tmp_path)
    for content in (b"", b"no zip", pickle.dumps({"images": print}, 2)):
        (tmp_path / "case.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"case\.pt: not a recording of tensors and plain containers: ") as caught:
            verify(network, things(ADE), tmp_path)
        assert "trust" not in str(caught.value), "no advice to switch the protection off"


def test_differences_equal_values_computed_by_hand() -> None:
    recorded = torch.tensor([[1.0, -4.0], [0.5, 0.0]])
    assert relative(recorded + torch.tensor([[0.0, 0.0], [0.1, 0.0]]), recorded, 1e-4).largest == pytest.approx(0.025)
    assert relative(torch.full((2,), 0.5), torch.zeros(2), 1e-4).largest == 0.5  # absolute, as recorded values are zero
    assert relative(torch.zeros(0), torch.zeros(0), 1e-4).ok
    for wrong in (None, recorded[:1], recorded * torch.nan, recorded * torch.inf):
        assert relative(wrong, recorded, 1e9).ok is False
    # A zeroed row is reported beside a row that is a thousand times larger.
    gradient = torch.tensor([[[1.0, -2.0], [2e-3, 1e-3]]])
    assert rows_relative(gradient, gradient, 1e-3).largest == 0
    assert rows_relative(gradient * torch.tensor([[[1.0], [0.0]]]), gradient, 1e-3).largest == pytest.approx(1.0)
    assert worst({"a": 1.0, "b": float("nan"), "c": 2.0}, 3.0).note == "b"
    assert not Report({}).ok and not Report({"a": Difference(0.0, None)}).ok
    assert Report({"a": Difference(0.0, None), "b": Difference(1.0, 1.0)}).ok
