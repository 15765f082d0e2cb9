"""Equipped processors as users have them: real outputs of models, threads, other processes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from maskformer_fast.drop_in import equip, unequip
from tests.drop_in.comparison import check_maps, check_results, processor, twins
from tests.support.paths import ROOT
from tests.support.peaky import model_outputs

transformers = pytest.importorskip("transformers")
SIZES = [(70, 50), (33, 91)]


def test_threads_share_a_processor() -> None:
    theirs, ours = twins("MaskFormer")
    images = [model_outputs(True, images=2, live=20, size=(20, 30), seed=seed) for seed in range(8)]
    arguments = {"target_sizes": SIZES, "label_ids_to_fuse": {1, 2}}
    expected = [theirs.post_process_panoptic_segmentation(outputs, **arguments) for outputs in images]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda outputs: ours.post_process_panoptic_segmentation(outputs, **arguments), images)
        assert sum(check_results(mine, other) for mine, other in zip(results, expected, strict=True)) > 20


@pytest.mark.parametrize("family", ["MaskFormer", "Eomt"])
def test_inference_mode_and_gradients(family: str) -> None:
    _, ours = twins(family)
    outputs = model_outputs(True, images=2, size=(20, 20))
    with torch.inference_mode():
        frozen = model_outputs(True, images=2, size=(20, 20))
        expected = ours.post_process_semantic_segmentation(frozen, target_sizes=SIZES)
    outputs.masks_queries_logits.requires_grad_()
    outputs.class_queries_logits.requires_grad_()
    for mine, other in zip(ours.post_process_semantic_segmentation(outputs, target_sizes=SIZES), expected, strict=True):
        assert not mine.requires_grad and torch.equal(mine, other)


def test_outputs_are_not_changed() -> None:
    for family in ("MaskFormer", "Mask2Former", "OneFormer", "Eomt"):
        _, ours = twins(family)
        ours.class_info_file = ""
        outputs = model_outputs(True, images=2, queries=12, size=(20, 27))
        before = [outputs.class_queries_logits.clone(), outputs.masks_queries_logits.clone()]
        for task in ("semantic", "panoptic", "instance"):
            for sizes in (SIZES, [(20, 27)] * 2):
                getattr(ours, f"post_process_{task}_segmentation")(outputs, target_sizes=sizes)
        assert torch.equal(before[0], outputs.class_queries_logits)
        assert torch.equal(before[1], outputs.masks_queries_logits)


@pytest.mark.slow
def test_a_real_model(tmp_path: Path) -> None:
    """Outputs of a model of transformers, an equipped processor from another process, and its own class again."""
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_feedforward_dim=32, dim_feedforward=32,
        num_attention_heads=2, encoder_layers=1, decoder_layers=2, num_queries=10, num_labels=6,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 64, 96))
    theirs, ours = twins("Mask2Former")
    for mine, other in zip(
        ours.post_process_semantic_segmentation(outputs, SIZES),
        theirs.post_process_semantic_segmentation(outputs, SIZES),
        strict=True,
    ):
        check_maps(mine, other)
    path = tmp_path / "processor"
    path.write_bytes(pickle.dumps((ours, dict(outputs))))
    program = (
        "import pickle, sys\nfrom types import SimpleNamespace\n"
        "processor, outputs = pickle.load(open(sys.argv[1], 'rb'))\n"
        "found = processor.post_process_semantic_segmentation(SimpleNamespace(**outputs), [(70, 50), (33, 91)])\n"
        "print(type(processor).__name__, processor.post_process_semantic_segmentation.__module__, found[1].shape)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    name, module, *shape = output.split(maxsplit=2)
    assert (name, module) == (type(processor("Mask2Former")).__name__, "maskformer_fast.drop_in.mask2former")
    assert shape == ["torch.Size([33, 91])\n"]
    restored: Any = unequip(pickle.loads(path.read_bytes())[0])
    assert type(restored) is type(theirs) and restored.to_dict() == theirs.to_dict() == equip(restored).to_dict()
