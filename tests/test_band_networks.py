"""Networks of bands: trained, evaluated and used from files of 16 bits; weights of RGB start them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import maskformer_fast
from maskformer_fast import convert, evaluate, predict, train
from maskformer_fast.config import BackboneConfig, Config, DataConfig, ModelConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.statistics import statistics_of_files
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.first_convolution import from_rgb
from maskformer_fast.modeling.weights import load_backbone, save_weights
from maskformer_fast.recipes import load_recipe
from tests.support.bands import write_tiff
from tests.support.paths import TINY_RECIPE

CHANNELS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of five bands in three formats, whose class is seen in the last two bands alone."""
    root = tmp_path_factory.mktemp("bands") / "data"
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(6):
            labels = np.zeros((48, 64), np.uint8)
            top, left = rng.integers(0, 20, 2)
            labels[top : top + 24, left : left + 30] = 1 + number % 2
            pixels = rng.integers(0, 3000, (48, 64, CHANNELS)).astype(np.uint16)
            pixels[..., 3] += (labels == 1) * np.uint16(40000)
            pixels[..., 4] += (labels == 2) * np.uint16(30000)
            folders = root / "images" / split, root / "annotations" / split
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            if number % 2:
                np.save(folders[0] / f"{number}.npy", pixels)
            else:
                write_tiff(folders[0] / f"{number}.tif", pixels)
            Image.fromarray(labels).save(folders[1] / f"{number}.png")
    (root / "classes.json").write_text(json.dumps({"classes": [{"name": name} for name in ("ground", "a", "b")]}))
    return root


def options(data):
    found = statistics_of_files(sorted((data / "images/train").iterdir()), CHANNELS)
    text = [f"{value:.3f}" for value in (*found.mean, *found.std)]
    return ["--data.dataset", "folder", "--data.root", str(data), "--data.channels", str(CHANNELS),
            "--data.augment.no-color-jitter", "--model.pixel-mean", *text[:CHANNELS],
            "--model.pixel-std", *text[CHANNELS:]]  # fmt: skip


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    line = ["--config", str(TINY_RECIPE), "--output", str(folder), *options(data), "--data.task", "semantic",
            "--solver.max-steps", "6", "--solver.warmup-steps", "0", "--data.workers", "0"]  # fmt: skip
    assert train.main(line) == 0
    return folder


def test_a_run_is_trained_evaluated_and_resumed(run, data, tmp_path):
    losses = [json.loads(line).get("loss/total", None) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert not losses or losses[-1] < losses[0]
    assert evaluate.main([str(run), "--output", str(tmp_path / "m.json"), "--picture", str(tmp_path / "p.png")]) == 0
    assert 0 <= json.loads((tmp_path / "m.json").read_text())["miou"] <= 1 and (tmp_path / "p.png").exists()


@pytest.mark.parametrize("tile", [(), ("--test.tile", "32")], ids=["whole", "tiles"])
def test_predict_reads_bands_and_refuses_others(run, data, tmp_path, tile, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("0.tif", "1.npy"):
        (images / name).write_bytes((data / "images/val" / name).read_bytes())
    Image.new("RGB", (20, 30)).save(images / "rgb.png")
    line = [str(run), str(images), "-o", str(tmp_path / "out"), *tile]
    assert predict.main(line) == 1
    output = capsys.readouterr()
    assert "2 images segmented" in output.out and "expected 5 bands, got 3" in output.err
    overlay = np.asarray(Image.open(tmp_path / "out/overlays/1_semantic.png"))
    assert overlay.ndim == 3 and overlay.std() > 0
    model = maskformer_fast.load(run)
    pixels = np.load(data / "images/val/1.npy")
    labels = model.predict(pixels).labels
    assert torch.equal(model.predict(data / "images/val/1.npy").labels, labels)
    if not tile:
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/semantic/1.png")), labels.numpy())
    for wrong in (pixels[..., :3], pixels.astype(np.float32), Image.new("RGB", (9, 9))):
        with pytest.raises(TypeError, match=r"\[H, W, 5\]"):
            model.predict(wrong)


def test_the_scale_of_values_is_that_of_mean_and_deviation():
    tiny = load_recipe(TINY_RECIPE).model
    fields = {name: getattr(tiny, name) for name in ("type", "backbone", "pixel_decoder", "decoder")}
    deep = build_model(ModelConfig(num_classes=3, pixel_mean=(1000.0,) * 4, pixel_std=(200.0,) * 4, **fields)).eval()
    shallow = build_model(ModelConfig(num_classes=3, pixel_mean=(10.0,) * 4, pixel_std=(2.0,) * 4, **fields)).eval()
    shallow.load_state_dict(deep.state_dict())
    pixels = torch.rand(2, 4, 64, 64) * 60
    with torch.no_grad():
        torch.testing.assert_close(deep(pixels * 100).class_logits, shallow(pixels).class_logits, atol=1e-4, rtol=1e-4)
        whole = pixels.round()
        assert torch.equal(shallow(whole).class_logits, shallow(whole.byte()).class_logits)
    with pytest.raises(ValueError, match=r"expected shape \[B, 4, H, W\]"):
        deep(pixels[:, :3])


@pytest.mark.parametrize("backbone", ["resnet_micro", "swin_micro"])
def test_weights_of_rgb_give_grey_bands_what_they_gave_grey_pictures(backbone, tmp_path):
    tiny = load_recipe(TINY_RECIPE).model
    fields = {name: getattr(tiny, name) for name in ("type", "pixel_decoder", "decoder")}
    fields |= {"num_classes": 2, "backbone": BackboneConfig(backbone)}
    rgb, bands = (ModelConfig(pixel_mean=(100.0,) * count, pixel_std=(50.0,) * count, **fields) for count in (3, 7))
    before, after = build_model(rgb).eval(), build_model(bands).eval()
    metadata = Metadata("x", ("a", "b"), (True, True), (1, 2), ((0, 0, 0), (9, 9, 9)))
    save_weights(tmp_path / "rgb.safetensors", before, Config(model=rgb), metadata, 0)
    load_backbone(after, tmp_path / "rgb.safetensors")
    grey = torch.randint(0, 255, (1, 1, 64, 64), dtype=torch.uint8)
    sizes = torch.tensor([[64, 64]])
    with torch.no_grad():
        ours = after.backbone(after.normalize(grey.repeat(1, 7, 1, 1), sizes))
        theirs = before.backbone(before.normalize(grey.repeat(1, 3, 1, 1), sizes))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    weight = torch.randn(8, 3, 3, 3)
    torch.testing.assert_close(from_rgb(weight, 6)[:, 4], weight.mean(1) / 2)


def test_conversion_refuses_bands_in_one_line(run, tmp_path):
    with pytest.raises(ValueError, match="RGB pictures of 8 bits"):
        convert.main([str(run), str(tmp_path / "hf"), "--to", "huggingface"])
    assert not (tmp_path / "hf").exists()


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"model\.pixel_mean: expected 4 numbers, as data\.channels=4"):
        Config(data=DataConfig(channels=4))
    with pytest.raises(ValueError, match=r"model\.pixel_std: expected 4 numbers"):
        ModelConfig(pixel_mean=(1.0,) * 4)
    with pytest.raises(ValueError, match="pictures of bands are read by folder"):
        maskformer_fast.data.build_dataset(DataConfig(dataset="shapes", channels=4), "train")
