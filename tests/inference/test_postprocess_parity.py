"""Results equal those of the official code (stored outputs) and of Hugging Face (installed) for equal predictions.

The official results of the network itself and of made-up predictions are compared in tests/interop.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from maskformer_fast.core.metadata import VOID
from maskformer_fast.inference import postprocess
from maskformer_fast.ops.mask_product import layer_mask_logits
from maskformer_fast.structures import Predictions, unpack_masks
from tests.support.paths import ORACLES

needs_oracles = pytest.mark.skipif(not ORACLES.exists(), reason="official outputs are not here")


def from_masks(classes: torch.Tensor, masks: torch.Tensor, valid_sizes: list, input_size: tuple) -> Predictions:
    """Predictions whose mask logits are the given ones [B, Q, h, w]: one embedding channel a query."""
    eye = torch.eye(masks.shape[1]).expand(1, len(masks), -1, -1)
    return Predictions(classes[None], eye, masks, torch.tensor(valid_sizes), tuple(input_size))


def random_predictions(seed: int, batch: int) -> Predictions:
    """Nine queries, seven classes, images that fill the padded input."""
    generator = torch.Generator().manual_seed(seed)
    classes = 3 * torch.randn(batch, 9, 8, generator=generator)
    return from_masks(classes, 4 * torch.randn(batch, 9, 10, 14, generator=generator), [(40, 56)] * batch, (40, 56))


@needs_oracles
@pytest.mark.parametrize("model", ["ade", "coco_panoptic"])
def test_direct_semantic_is_a_few_percent_from_the_official_network(model: str) -> None:
    case = torch.load(ORACLES / f"r50_{model}_tiny/case.pt", weights_only=True)
    logits, masks = case["f32"]["pred_logits"], case["f32"]["pred_masks"]
    predictions = from_masks(logits, masks, case["image_sizes"], case["padded_size"])
    for image, result in enumerate(postprocess.semantic(predictions, case["sizes"])):
        assert (result.labels.long() == case["eval"][f"labels.{image}"].long()).float().mean() > 0.9


@needs_oracles
@pytest.mark.parametrize("model", ["ade", "coco_panoptic"])
@pytest.mark.parametrize("index", range(3))
def test_direct_semantic_equals_official_at_the_input_size(model: str, index: int) -> None:
    post = torch.load(ORACLES / f"r50_{model}_tiny/synth.pt", weights_only=True)["post"][index]
    size = tuple(post["size"])
    predictions = from_masks(post["mask_cls"][None], post["mask_pred"][None], [size], size)
    sure = post["margin"].float() > 1e-4
    assert sure.float().mean() > 0.9
    labels = postprocess.semantic(predictions, [size])[0].labels
    assert (labels.long() == post["labels"].long())[sure].all()


@needs_oracles
@pytest.mark.parametrize("outputs, key", [("eval", "thresholds"), ("eval_loose", "thresholds_loose")])
def test_panoptic_equals_official_network(outputs: str, key: str) -> None:
    # From the recorded logits: no rounding of the network excuses a pixel.
    case = torch.load(ORACLES / "r50_coco_panoptic_tiny/case.pt", weights_only=True)
    logits, masks = case["f32"]["pred_logits"], case["f32"]["pred_masks"]
    predictions = from_masks(logits, masks, case["image_sizes"], case["padded_size"])
    is_thing = [category in case["thing_ids"] for category in range(logits.shape[-1] - 1)]
    results = postprocess.panoptic(predictions, case["sizes"], is_thing, *case[key], order="official")
    for image, result in enumerate(results):
        official = case[outputs][f"panoptic.{image}"]
        assert torch.equal(result.id_map, official.masked_fill(official == 0, VOID))
        expected = [
            (s["id"], s["category_id"], s["isthing"], int((official == s["id"]).sum()))
            for s in case[outputs][f"panoptic_info.{image}"]
        ]
        assert [(s.id, s.category, s.is_thing, s.area) for s in result.segments] == expected


def huggingface_processor():
    transformers = pytest.importorskip("transformers")
    try:
        return transformers.MaskFormerImageProcessor()
    except ImportError as error:  # versions that need torchvision for it
        pytest.skip(str(error))


def huggingface_outputs(predictions: Predictions) -> SimpleNamespace:
    masks = layer_mask_logits(predictions)
    return SimpleNamespace(class_queries_logits=predictions.class_logits[-1], masks_queries_logits=masks)


@pytest.mark.parametrize("seed", [9, 11])
def test_semantic_equals_huggingface(seed: int) -> None:
    predictions = random_predictions(seed, 4)
    sizes = [(40, 56), (25, 91), (9, 9), (61, 43)]
    outputs = huggingface_outputs(predictions)
    expected = huggingface_processor().post_process_semantic_segmentation(outputs, sizes)
    results = postprocess.semantic(predictions, sizes, order="huggingface")
    scores = postprocess.semantic_scores(predictions, sizes, order="huggingface")
    for result, score, labels in zip(results, scores, expected, strict=True):
        best = score.topk(2, dim=0).values
        sure = best[0] - best[1] > 1e-5
        assert sure.float().mean() > 0.999 and (result.labels.long() == labels)[sure].all()


@pytest.mark.parametrize("seed", [10, 12, 13])
def test_instances_equal_huggingface_at_mask_resolution(seed: int) -> None:
    predictions = random_predictions(seed, 2)
    low = (10, 14)
    predictions.pixel_embeddings[0, :3] = -1.0  # empty masks
    outputs = huggingface_outputs(predictions)
    expected = huggingface_processor().post_process_instance_segmentation(outputs, 0.0, return_binary_maps=True)
    results = postprocess.instances(predictions, [low] * 2, [True] * 7, top_k=9)
    for result, theirs in zip(results, expected, strict=True):
        order = sorted(range(len(theirs["segments_info"])), key=lambda i: -theirs["segments_info"][i]["score"])
        assert result.labels.tolist() == [theirs["segments_info"][i]["label_id"] for i in order]
        scores = torch.tensor([theirs["segments_info"][i]["score"] for i in order])
        torch.testing.assert_close(result.scores, scores, atol=2e-6, rtol=0)  # they round to 6 digits
        masks = torch.stack([theirs["segmentation"][i] for i in order]).bool()
        assert torch.equal(unpack_masks(result.masks, low[1]), masks)


def huggingface_panoptic(predictions: Predictions, image: int, stuff: set[int], thresholds: tuple[float, float]):
    """Id map (theirs: 0 is void) and segments that transformers gives of one image at mask resolution."""
    one = SimpleNamespace(
        class_queries_logits=predictions.class_logits[-1, image, None],
        masks_queries_logits=layer_mask_logits(predictions)[image, None],
    )
    found = huggingface_processor().post_process_panoptic_segmentation(
        one, threshold=thresholds[0], overlap_mask_area_threshold=thresholds[1], label_ids_to_fuse=stuff
    )[0]
    return found["segmentation"].masked_fill(found["segmentation"] == 0, VOID), found["segments_info"]


@pytest.mark.parametrize("thresholds", [(0.4, 0.41), (0.6, 0.33), (0.05, 0.0)])
@pytest.mark.parametrize("stuff", [set(), {0, 3}])
def test_panoptic_equals_huggingface(thresholds: tuple[float, float], stuff: set[int]) -> None:
    """Compared where its ids are distinct; thresholds are no quotients of areas, as it divides in float32."""
    size, compared = (10, 14), 0
    for seed in range(30):
        predictions = random_predictions(seed, 1)
        predictions.class_logits.mul_(2)
        is_thing = [category not in stuff for category in range(7)]
        id_map, segments = huggingface_panoptic(predictions, 0, stuff, thresholds)
        by_id: dict[int, set] = {}
        for segment in segments:
            by_id.setdefault(segment["id"], set()).add(segment["label_id"])
        merges = len(segments) > len(by_id)
        if any(len(labels) > 1 for labels in by_id.values()) or (merges and segments[-1]["id"] < max(by_id)):
            continue  # its counter went back
        result = postprocess.panoptic(predictions, [size], is_thing, *thresholds, rule="huggingface")[0]
        assert torch.equal(result.id_map.long(), id_map.long())
        assert {s.id: {s.category} for s in result.segments} == by_id
        compared += len(segments) > 1
    assert compared >= 5


def test_panoptic_ids_stay_distinct_where_huggingface_lets_them_collide() -> None:
    """Stuff, thing, the same stuff again, thing: transformers counts on from the merged segment's id (seen in
    `compute_segments` of the installed version, which this runs)."""
    masks = torch.full((1, 4, 1, 4), -9.0)
    masks[0, range(4), 0, range(4)] = 9.0
    classes = torch.full((1, 4, 4), -9.0)
    classes[0, range(4), [0, 1, 0, 2]] = 9.0
    predictions = from_masks(classes, masks, [(1, 4)], (1, 4))
    id_map, segments = huggingface_panoptic(predictions, 0, {0}, (0.5, 0.5))
    assert id_map.tolist() == [[1, 2, 1, 2]] and [s["label_id"] for s in segments] == [0, 1, 0, 2]
    result = postprocess.panoptic(predictions, [(1, 4)], [False, True, True], 0.5, 0.5, rule="huggingface")[0]
    assert result.id_map.tolist() == [[1, 2, 1, 3]]
    assert [(s.id, s.category) for s in result.segments] == [(1, 0), (2, 1), (3, 2)]
