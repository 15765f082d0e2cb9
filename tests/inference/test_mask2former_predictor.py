"""What holds of a MaskFormer's predictor holds of a Mask2Former's, from a checkpoint or a folder of Hugging Face."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import maskformer_fast
from maskformer_fast import convert, evaluate, predict
from maskformer_fast.benchmark.runners import Setting, open_runner
from maskformer_fast.config import TASKS, BackboneConfig, Config, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.config import TestConfig as InferenceConfig
from maskformer_fast.core.results import PanopticResult
from maskformer_fast.data.datasets.shapes import ShapesDataset
from maskformer_fast.demo.stages import StagedPredictor
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.interop.huggingface import write_folder
from maskformer_fast.interop.names import ConvertError
from maskformer_fast.modeling import Mask2Former, build_model
from maskformer_fast.modeling.fuse_for_cpu import convolves_bfloat16
from maskformer_fast.modeling.weights import save_weights
from maskformer_fast.recipes import load_recipe
from tests.support.images import photo
from tests.support.paths import TINY_RECIPE

SIZES = [(64, 64), (37, 50), (61, 47), (200, 31), (64, 64), (1, 90)]
SWIN = BackboneConfig("swin_tiny", depths=(1, 1, 2, 1), embed_dim=8, num_heads=(1, 2, 4, 8), window_size=5)
TEST = InferenceConfig(
    short_edge=48, max_size=96, object_mask_threshold=0.2, overlap_threshold=0.1, panoptic_rule="mask2former", top_k=9
)


def model_of(backbone: BackboneConfig, num_classes: int) -> ModelConfig:
    return ModelConfig(
        type="mask2former", num_classes=num_classes, backbone=backbone,
        pixel_decoder=PixelDecoderConfig(
            conv_dim=32, mask_dim=16, norm_groups=4 if "resnet" in backbone.name else 32, encoder_layers=2,
            encoder_heads=4, encoder_ffn_dim=48, encoder_dropout=0.0,
        ),
        decoder=DecoderConfig(layers=4, hidden_dim=32, num_heads=4, ffn_dim=96, num_queries=9, dropout=0.0),
    )  # fmt: skip


def random_network(model: ModelConfig) -> Mask2Former:
    """A network whose queries are sure of their classes, and whose masks have edges."""
    torch.manual_seed(2)
    network = build_model(model).eval()
    assert isinstance(network, Mask2Former)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        network.predictor.class_embed.weight.normal_()
        network.predictor.class_embed.bias[-1] = -4.0
        network.predictor.mask_embed.layers[-1].weight.mul_(4)
        network.predictor.mask_embed.layers[-1].bias.normal_()
    return network


@pytest.fixture(scope="module")
def config() -> Config:
    recipe = load_recipe(TINY_RECIPE)
    classes = ShapesDataset(recipe.data.shapes, "val").metadata.num_classes
    return replace(recipe, model=model_of(SWIN, classes), test=TEST)


@pytest.fixture(scope="module")
def folder(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face."""
    path = tmp_path_factory.mktemp("mask2former") / "theirs"
    metadata = ShapesDataset(config.data.shapes, "val").metadata
    write_folder(path, random_network(config.model).state_dict(), config, metadata)
    return path


@pytest.fixture(scope="module", params=["resnet", "swin", "huggingface"])
def checkpoint(request: pytest.FixtureRequest, config: Config, folder: Path) -> Path:
    """Weights of ours with either backbone, or a folder of Hugging Face."""
    if request.param == "huggingface":
        return folder
    backbone = SWIN if request.param == "swin" else BackboneConfig("resnet_micro")
    own = replace(config, model=replace(config.model, backbone=backbone))
    own = replace(own, model=model_of(backbone, config.model.num_classes))
    file = folder.parent / f"{request.param}.safetensors"
    save_weights(file, random_network(own.model), own, ShapesDataset(config.data.shapes, "val").metadata, step=0)
    return file


def same(a: Any, b: Any) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def test_a_folder_of_hugging_face_gives_the_results_of_the_converted_file(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "converted.safetensors"
    assert convert.main([str(folder), str(target)]) == 0
    theirs, ours = (maskformer_fast.load(path, "cpu") for path in (folder, target))
    assert isinstance(theirs, Predictor) and theirs.config == ours.config and theirs.metadata == ours.metadata
    assert theirs.config.test.short_edge == TEST.short_edge and theirs.config.test.panoptic_rule == "mask2former"
    image = photo(0)
    for task in TASKS:
        assert same(theirs.predict(image, task), ours.predict(image, task))
    half = maskformer_fast.load(folder, "cpu", TEST, amp="bf16")
    assert isinstance(half, Predictor) and half.amp == "bf16" and half.test == TEST
    with pytest.raises(ValueError, match="backend"):
        maskformer_fast.load(folder, backend="onnxruntime")


def test_a_damaged_folder_of_hugging_face_is_an_error_by_name(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (broken / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(FileNotFoundError, match="broken"):
        maskformer_fast.load(broken, "cpu")
    content = json.loads((folder / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(content | {"hidden_dim": 64}))
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ConvertError, match=r"query|queries|predictor"):
        maskformer_fast.load(broken, "cpu")


def test_images_of_any_size_in_a_batch_have_the_results_of_each_alone(checkpoint: Path) -> None:
    predictor: Any = maskformer_fast.load(checkpoint, "cpu", TEST)
    images = [photo(number, *size) for number, size in enumerate(SIZES)]
    together = predictor.infer(images, TASKS)
    segments = 0
    for index, image in enumerate(images):
        alone = predictor.infer([image], TASKS)
        labels, expected = together["semantic"][index].labels, alone["semantic"][0].labels
        assert labels.shape == image.shape[:2] and (labels != expected).float().mean() < 1e-2
        panoptic = together["panoptic"][index]
        assert isinstance(panoptic, PanopticResult) and panoptic.id_map.shape == image.shape[:2]
        assert [s.category for s in panoptic.segments] == [s.category for s in alone["panoptic"][0].segments]
        segments += len(panoptic.segments)
        got, wanted = together["instance"][index], alone["instance"][0]
        assert got.size == image.shape[:2] and len(got.scores) == len(wanted.scores)
        torch.testing.assert_close(got.scores, wanted.scores, atol=1e-4, rtol=0)
    assert segments > 0


@pytest.mark.skipif(not convolves_bfloat16(), reason="this processor has no bfloat16 convolutions")
def test_bfloat16_labels_are_mostly_those_of_float32(checkpoint: Path) -> None:
    full, half = (maskformer_fast.load(checkpoint, "cpu", TEST, amp=amp) for amp in ("off", "bf16"))
    image = photo(1, 90, 70)
    labels: list[Any] = [predictor.predict(image) for predictor in (full, half)]
    assert (labels[0].labels != labels[1].labels).float().mean() < 0.1
    for task in TASKS:
        half.predict(image, task)


def test_commands_take_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index, size in enumerate(SIZES[:3]):
        Image.fromarray(photo(index, *size)).save(images / f"{index}.png")
    results = tmp_path / "results"
    arguments = [str(checkpoint), str(images), "--output", str(results), "--task", *TASKS, "--test.batch-size", "2"]
    assert predict.main(arguments) == 0
    assert len(list((results / "semantic").iterdir())) == len(list((results / "panoptic").iterdir())) == 3
    for index, size in enumerate(SIZES[:3]):
        assert np.asarray(Image.open(results / "semantic" / f"{index}.png")).shape == size
    shapes = "size 48 40 --data.shapes.num-things 2 --data.shapes.num-stuff 2 --data.shapes.val-images 3"
    metrics = tmp_path / "metrics.json"
    arguments = [str(checkpoint), "--task", *TASKS, "--output", str(metrics), "--data.workers", "0"]
    assert evaluate.main([*arguments, *f"--data.shapes.{shapes}".split()]) == 0
    assert {"miou", "pq", "ap"} <= set(json.loads(metrics.read_text()))


def test_the_demo_page_times_the_parts_of_the_network(checkpoint: Path) -> None:
    predictor: Any = maskformer_fast.load(checkpoint, "cpu", TEST)
    image = StagedPredictor(predictor).open(photo(3, 33, 70))
    for task in TASKS:
        result, seconds = image.result(task)
        assert same(result, predictor.predict(photo(3, 33, 70), task)) and seconds > 0
    assert list(image.seconds) == ["resize", "backbone", "pixel decoder", "transformer decoder"]
    scores = image.pixel_scores()
    assert scores is not None and scores.shape == (33, 70) and np.isfinite(scores).all()


def test_the_benchmarks_runner_takes_the_checkpoint(checkpoint: Path) -> None:
    setting = Setting("eager", str(checkpoint), 2, (40, 56), "semantic", "cpu", 0, 2, "off")  # type: ignore[arg-type]
    runner = open_runner(setting)
    frames = [photo(index, 40, 56) for index in range(2)]
    (first, second) = runner.predict(frames)
    assert first.labels.shape == second.labels.shape == (40, 56)
