"""The demo without its page: stages, class and score of every pixel, HTML, bad images, the command's errors."""

from __future__ import annotations

import builtins
import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import maskformer_fast
from maskformer_fast.config import TASKS, Config, DataConfig, ShapesConfig, Task
from maskformer_fast.core.metadata import VOID, SegmentInfo
from maskformer_fast.core.results import InstanceResult, PanopticResult, SemanticResult
from maskformer_fast.demo import __main__ as demo
from maskformer_fast.demo.page import MAX_EDGE, DemoImage, import_gradio
from maskformer_fast.demo.stages import StagedPredictor
from maskformer_fast.demo.view import error_html, hover_png, make_view, view_html
from maskformer_fast.inference import postprocess
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.recipes import load_recipe
from maskformer_fast.structures import pack_masks
from tests.support.demo_cases import EVIL, Shown, expected_at, scene_predictor, tiny_predictor
from tests.support.images import photo
from tests.support.paths import TINY_RECIPE
from tests.support.tiny_bundle import metadata_of


def same(got: Any, expected: Any) -> bool:
    """Whether two results are equal."""
    pairs = zip(vars(got).values(), vars(expected).values(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


# Stages


@pytest.mark.parametrize("kind", ["maskformer", "mask2former", "eomt"])
def test_the_network_runs_once_for_all_tasks_with_the_predictors_results(kind: str) -> None:
    reference, predictor = scene_predictor(kind), scene_predictor(kind)
    staged = StagedPredictor(predictor)
    runs = []
    predictor.network.register_forward_hook(lambda *_: runs.append(1))
    images = [photo(0), photo(1, 33, 70)]
    opened = [staged.open(image) for image in images]
    for task in (*TASKS, *reversed(TASKS)):  # in turns, so that one image's predictions could be taken for another's
        for image, one in zip(images, opened, strict=True):
            result, seconds = one.result(task)
            assert same(result, reference.predict(image, task)) and seconds > 0
    assert len(runs) == len(images)
    for one in opened:
        parts = ["network"] if kind == "eomt" else ["backbone", "pixel decoder", "transformer decoder"]
        assert list(one.seconds) == ["resize", *parts]
        assert min(one.seconds.values()) > 0


@pytest.mark.parametrize(
    ("kind", "stages"),
    [("per_pixel", ["backbone", "pixel decoder", "classifier"]), ("per_pixel_plus", ["backbone", "decoders"])],
)
def test_a_baseline_offers_semantic_segmentation_alone(kind: str, stages: list[str]) -> None:
    staged = StagedPredictor(scene_predictor(kind))
    assert staged.tasks == ("semantic",)
    opened = staged.open(photo())
    assert same(opened.result("semantic")[0], scene_predictor(kind).predict(photo()))
    assert list(opened.seconds) == ["resize", *stages]
    with pytest.raises(ValueError, match="task: expected one that"):
        opened.result("panoptic")


def test_a_bundle_gives_all_tasks_with_one_run(tmp_path: Path) -> None:
    folder, reference = tiny_predictor(tmp_path / "bundle")
    predictor: Any = maskformer_fast.load(folder, "cpu")
    staged = StagedPredictor(predictor)
    opened = staged.open(photo())
    for task in TASKS:
        got, expected = opened.result(task)[0], reference.predict(photo(), task)
        y, x = np.mgrid[0:60:7, 0:84:5].reshape(2, -1)
        assert [expected_at(got, *at)[0] for at in zip(y, x, strict=True)] == [
            expected_at(expected, *at)[0] for at in zip(y, x, strict=True)]  # fmt: skip
    assert list(opened.seconds) == ["resize", "network"] and min(opened.seconds.values()) > 0
    assert opened.pixel_scores() is None and staged.runs_on == "openvino"
    results, seconds = predictor.runtime.timed_tasks([photo(), photo(1)], ("panoptic", "semantic"))
    assert [len(of_task) for of_task in results.values()] == [2, 2] and min(seconds) >= 0
    for task, of_task in results.items():
        for image, got in zip((photo(), photo(1)), of_task, strict=True):
            expected = predictor.runtime.predict(image, task)
            name = "labels" if task == "semantic" else "id_map"
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    with pytest.raises(ValueError, match="tasks: expected at least one"):
        predictor.runtime.timed_tasks([photo()], ())
    predictor.runtime._backend.max_tasks = 1  # as TensorRT: the network runs for each task
    again, summed = predictor.runtime.timed_tasks([photo(), photo(1)], ("panoptic", "semantic"))
    assert list(again) == list(results) and summed.network > 0
    np.testing.assert_array_equal(again["semantic"][1].labels, results["semantic"][1].labels)


def test_augmentation_is_off_and_scores_are_those_of_the_label() -> None:
    predictor = scene_predictor()
    predictor.config = replace(predictor.config, test=replace(predictor.config.test, flip=True, multi_scale=(1.0, 2.0)))
    opened = StagedPredictor(predictor).open(photo())
    assert opened.pixel_scores() is None  # nothing has run
    labels = opened.result("semantic")[0].labels.long()  # type: ignore[union-attr]
    assert same(SemanticResult(labels.byte()), scene_predictor().predict(photo()))
    reference = scene_predictor()
    with torch.no_grad():
        scores = postprocess.semantic_scores(reference.run_network([photo()]), [(60, 84)])[0]
    pixel_scores = opened.pixel_scores()
    assert pixel_scores is not None
    np.testing.assert_allclose(pixel_scores, scores.gather(0, labels[None])[0], rtol=1e-4)


# Class and score of every pixel


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (47, 33), (640, 9), (90, 1300)])
@pytest.mark.parametrize("task", TASKS)
def test_every_pixel_has_its_class_and_score(tmp_path: Path, task: Task, size: tuple[int, int]) -> None:
    _, predictor = tiny_predictor(tmp_path / "bundle")
    image = photo(2, *size)
    opened = StagedPredictor(predictor).open(image)
    result, _ = opened.result(task)
    scores = opened.pixel_scores() if task == "semantic" else None
    view = make_view(image, result, predictor.metadata, scores)
    stage, legend = view_html(view)
    shown = Shown(f'<div class="mf-view" data-task="{task}">{stage}{legend}')
    assert shown.map.shape == (*size, 3) and shown.picture.shape == view.picture.shape
    ratio = view.picture.shape[0] / size[0]
    assert ratio == view.picture.shape[1] / size[1] and max(view.picture.shape) >= 640
    if task == "semantic":
        result = replace(result, scores=torch.from_numpy(scores))  # type: ignore[type-var]
    for y in range(0, size[0], max(1, size[0] // 9)):
        for x in range(0, size[1], max(1, size[1] // 9)):
            category, score = expected_at(result, y, x)
            name = None if category is None else predictor.metadata.class_names[category]
            got = shown.at(y, x)
            assert got[0] == name
            assert got[1] == (None if score is None else pytest.approx(score, abs=shown.facts["unit"] or 1e-6))
    shares = [segment.share for segment in view.segments]
    assert sum(shares) == pytest.approx((view.rows != VOID).mean())
    if task != "instance":
        assert shares == sorted(shares, reverse=True)
    for row, segment in enumerate(view.segments):
        assert segment.share == pytest.approx((view.rows == row).mean())


def test_the_map_has_more_rows_than_a_byte_counts_and_void() -> None:
    """More rows than a byte counts, in an order of areas that is not that of ids, and pixels without a segment."""
    rng = np.random.default_rng(0)
    id_map = rng.permutation(np.repeat(np.arange(1, 601), 8)).reshape(60, 80).astype(np.int32)
    id_map[:4] = VOID
    ids, areas = np.unique(id_map[id_map != VOID], return_counts=True)
    segments = [SegmentInfo(int(i), int(i) % 5, score=float(i) / 600, area=int(a)) for i, a in zip(ids, areas)]  # noqa: B905
    view = make_view(photo(0, 60, 80), PanopticResult(torch.from_numpy(id_map), segments), metadata_of(5))
    png, unit = hover_png(view)
    pixels = np.asarray(Image.open(io.BytesIO(png))).astype(int)
    rows = pixels[..., 0] + 256 * pixels[..., 1] - 1
    assert unit == 1.0 and (rows[:4] == VOID).all() and rows.max() > 255
    scores = np.array([segment.score for segment in view.segments])
    np.testing.assert_allclose(scores[rows[4:]], id_map[4:] / 600)


def test_the_map_shows_the_best_of_overlapping_instances_and_none_below_the_score() -> None:
    masks = torch.zeros(3, 20, 30, dtype=torch.bool)
    masks[0, 5:15, 5:15] = masks[1, 10:18, 10:25] = masks[2] = True
    result = InstanceResult(torch.tensor([1, 2, 3]), torch.tensor([0.6, 0.9, 0.4]), pack_masks(masks),
                            torch.zeros(3, 4), (20, 30))  # fmt: skip
    view = make_view(photo(0, 20, 30), result, metadata_of(5))
    assert [(s.name, round(s.score or 0, 2), s.kind) for s in view.segments] == [
        ("class 2", 0.9, "thing"), ("class 1", 0.6, "stuff")]  # fmt: skip
    assert (view.rows[12, 12], view.rows[6, 6], view.rows[0, 0]) == (0, 1, VOID)
    empty = make_view(photo(0, 20, 30), replace(result, scores=result.scores * 0), metadata_of(5))
    assert empty.segments == () and "no instance found" in view_html(empty)[1]


def test_names_of_classes_are_escaped(tmp_path: Path) -> None:
    labels = torch.zeros(9, 9, dtype=torch.uint8)
    metadata = tiny_predictor(tmp_path / "bundle")[1].metadata
    page = "".join(view_html(make_view(photo(0, 9, 9), SemanticResult(labels), metadata)))
    assert "<script" not in page and "alert(" in page
    assert Shown(f'<div class="mf-view" data-task="semantic">{page}').at(3, 3)[0] == EVIL
    assert "<b>" not in error_html("<b>")


# Images


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is of this size, and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be decoded"),
        (b"not an image", "cannot be decoded"),
        (png_header(40_000, 40_000), "expected at most 89478485 pixels"),
        (png_header(20, 30), "cannot be decoded"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be decoded"),
    ],
)
def test_a_bad_file_has_a_message_without_its_folder(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "secret" / "their photo.png"
    path.parent.mkdir()
    path.write_bytes(content)
    staged: Any = None  # not used before the error
    with pytest.raises(ValueError, match=message) as error:
        DemoImage(staged, path)
    assert str(error.value).startswith("their photo.png: ") and "secret" not in str(error.value)


def test_a_large_image_is_reduced_and_the_page_says_so(tmp_path: Path) -> None:
    Image.fromarray(photo(0, 40, 3 * MAX_EDGE)).save(tmp_path / "wide.png")
    staged = StagedPredictor(tiny_predictor(tmp_path / "bundle")[1])
    image = DemoImage(staged, tmp_path / "wide.png")
    page = image.show("semantic")
    shown = Shown(page)
    assert shown.map.shape == (13, MAX_EDGE, 3) and f"{3 * MAX_EDGE} × 40 pixels, reduced to {MAX_EDGE} × 13" in page
    new = ["decode", "reduce", "resize", "network", "post-processing", "scores to hover", "drawing"]
    assert shown.stages.keys() == set(new) and not any(kept for _, kept in shown.stages.values())
    again = Shown(image.show("panoptic"))
    assert {name for name, (_, kept) in again.stages.items() if kept} == {"decode", "reduce", "resize", "network"}
    assert image.show("semantic") is page


# The command


def test_the_missing_demo_checkpoint_names_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="make demo"):
        demo.check_checkpoint(demo.DemoOptions().checkpoint)


def test_missing_gradio_is_an_error_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'", name="gradio")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ModuleNotFoundError, match=r'pip install -e "\.\[demo\]"'):
        import_gradio()


def test_ports_and_hosts_that_cannot_be_bound_are_named() -> None:
    assert demo.DemoOptions().host == "127.0.0.1"
    with demo.listen("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(OSError, match="--port"):
            demo.listen("127.0.0.1", bound.getsockname()[1])
    with pytest.raises(OSError, match="host: expected an address of this machine"):
        demo.listen("no.such.host.invalid", 0)
    with pytest.raises(ValueError, match="port: expected 0 to 65535"):
        demo.DemoOptions(port=70_000)


def test_scenes_follow_the_networks_training_or_its_size(tmp_path: Path) -> None:
    predictor = scene_predictor()
    config = demo.scene_config(predictor)
    assert config == load_recipe(TINY_RECIPE).data.shapes
    paths = demo.write_scenes(tmp_path, config)
    assert len(paths) == demo.SCENES and {Image.open(path).size for path in paths} == {(40, 48)}
    other = replace(predictor.config, data=DataConfig(dataset="ade20k_150"))
    assert demo.scene_config(Predictor(predictor.network, other, predictor.metadata, "cpu")).size == demo.SCENE_SIZE
    folder, _ = tiny_predictor(tmp_path / "any")
    loaded: Any = maskformer_fast.load(folder, "cpu")
    assert demo.scene_config(loaded).size == demo.SCENE_SIZE
    assert isinstance(Config().data.shapes, ShapesConfig)
