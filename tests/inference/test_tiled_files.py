"""Large pictures from file to result files: formats, georeference, interruption, memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskformer_fast.config import Task, TestConfig
from maskformer_fast.core.coco_tools import coco_tools
from maskformer_fast.core.results import InstanceResult
from maskformer_fast.data.images import read_index_png, read_panoptic_png
from maskformer_fast.data.large_pictures import read_georeference
from maskformer_fast.inference.tiled import infer_tiled
from maskformer_fast.inference.tiled_files import WORK_FOLDER, remove_work, segment_file
from maskformer_fast.output.formats import instances_to_coco, panoptic_png
from maskformer_fast.output.label_files import LabelWriter
from maskformer_fast.output.writer import ResultWriter
from tests.support.paths import ROOT
from tests.support.scene import METADATA, Truth, draw_scene, scene_keys

TASKS: tuple[Task, ...] = ("semantic", "panoptic", "instance")
TEST = TestConfig(tile=128)


def segment(path: Path, folder: Path, predictor=None, advance=lambda count, total: None, tasks=TASKS):
    writer = ResultWriter(folder, METADATA, True, [path.name])
    done = segment_file(predictor or Truth(TEST), path, tasks, writer, 0, 5, True, "settings", advance)
    writer.close()
    return writer, done


def check_results(folder: Path, scene: np.ndarray, labels: np.ndarray, id_map: np.ndarray) -> None:
    """The files of a scene are what predictions of the whole image would be written as."""
    results = infer_tiled(Truth(TEST), scene, TASKS)
    assert (labels == scene[..., 0]).all()
    assert (id_map == np.maximum(results["panoptic"].id_map.numpy(), 0)).all()
    entry = json.loads((folder / "panoptic.json").read_text())["annotations"][0]
    assert entry["image_id"] == 5 and entry["segments_info"] == panoptic_png(results["panoptic"], METADATA)[1]
    written = json.loads((folder / "instances.json").read_text())
    expected = instances_to_coco(results["instance"], 5, METADATA)
    assert written == json.loads(json.dumps(expected)) and len(written) > 10


def test_png_in_and_out(tmp_path: Path) -> None:
    scene = draw_scene((300, 411), 40)
    Image.fromarray(scene).save(tmp_path / "scene.png")
    counts: list[tuple[int, int]] = []
    writer, done = segment(tmp_path / "scene.png", tmp_path / "out", advance=lambda *count: counts.append(count))
    assert done and sum(count for count, _ in counts) == counts[0][1] == 3 * 4
    out = tmp_path / "out"
    check_results(out, scene, read_index_png(out / "semantic/scene.png"), read_panoptic_png(out / "panoptic/scene.png"))
    assert json.loads((out / "panoptic.json").read_text())["annotations"][0]["file_name"] == "scene.png"
    for task in TASKS:
        assert Image.open(out / "overlays" / f"scene_{task}.png").size == (411, 300)
    assert sorted(path.name for path in (out / WORK_FOLDER / "scene").iterdir()) == ["finished.json", "job.json"]
    remove_work(writer)
    assert not (out / WORK_FOLDER).exists()


def test_geotiff_keeps_its_georeference(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    scene = draw_scene((290, 350), 30)
    place = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(500000, 5400000, 0.5, 0.5)}
    with rasterio.open(tmp_path / "scene.tif", "w", driver="GTiff", height=290, width=350, count=4, dtype="uint8",
                       **place) as file:  # fmt: skip
        file.write(np.concatenate([scene.transpose(2, 0, 1), np.full((1, 290, 350), 255, np.uint8)]))
    _, done = segment(tmp_path / "scene.tif", tmp_path / "out")
    assert done
    maps = {}
    for task in ("semantic", "panoptic"):
        with rasterio.open(tmp_path / "out" / task / "scene.tif") as file:
            assert file.crs.to_epsg() == 32632 and file.transform == place["transform"]
            maps[task] = file.read(1)
    check_results(tmp_path / "out", scene, maps["semantic"], maps["panoptic"])
    entry = json.loads((tmp_path / "out/panoptic.json").read_text())["annotations"][0]
    assert entry["file_name"] == "scene.tif"


def test_labels_of_tiles_have_the_picture_s_coordinates_and_survive_an_interruption(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    path, scene = tmp_path / "scene.tif", draw_scene((290, 350), 30)
    place = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(500000, 5400000, 0.5, 0.5)}
    with rasterio.open(path, "w", driver="GTiff", height=290, width=350, count=3, dtype="uint8", **place) as file:
        file.write(scene.transpose(2, 0, 1))
    for task in TASKS:
        for _ in range(2):  # the second one finds a finished picture
            labels = LabelWriter(tmp_path / task / "labels", METADATA, ("coco", "geojson"), ["scene.tif"], [path],
                                 min_score=0.0, georeference=read_georeference)  # fmt: skip
            writer = ResultWriter(tmp_path / task, METADATA, False, ["scene.tif"], labels=labels)
            assert segment_file(Truth(TEST), path, [task], writer, 0, 5, True, "settings", lambda count, total: None)
            writer.close()
        result = infer_tiled(Truth(TEST), scene, [task])[task]
        content = json.loads((tmp_path / task / "labels/coco/annotations/instances_train.json").read_text())
        ours = [InstanceResult.from_coco([one], (290, 350)).masks[0] for one in content["annotations"]]
        expected = result.to_instances().arrays().masks
        assert sorted(mask.tobytes() for mask in ours) == sorted(mask.tobytes() for mask in expected) and len(ours) > 2
        document = json.loads((tmp_path / task / "labels/geojson/train/scene.geojson").read_text())
        assert document["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32632"
        text = json.dumps([feature["geometry"]["coordinates"] for feature in document["features"]])
        numbers = np.array([float(word) for word in re.findall(r"[\d.]+", text)]).reshape(-1, 2)
        assert numbers[:, 0].min() >= 500000 and numbers[:, 0].max() <= 500175
        assert numbers[:, 1].min() >= 5399855 and numbers[:, 1].max() <= 5400000


def test_an_overlay_of_a_large_picture_is_small(tmp_path: Path) -> None:
    scene = draw_scene((200, 4200), 10)
    Image.fromarray(scene).save(tmp_path / "scene.png")
    assert segment(tmp_path / "scene.png", tmp_path / "out")[1]
    for task in TASKS:
        assert Image.open(tmp_path / "out/overlays" / f"scene_{task}.png").size == (1400, 67)


class Interrupted(BaseException):
    pass


class Counting(Truth):
    tiles = 0

    def infer(self, images, tasks):
        self.tiles += len(images)
        return super().infer(images, tasks)


def test_an_interrupted_picture_goes_on_and_a_finished_one_is_not_repeated(tmp_path: Path) -> None:
    scene = draw_scene((300, 411), 40)
    Image.fromarray(scene).save(tmp_path / "scene.png")
    predictor, left = Counting(TEST), 7

    def advance(count: int, total: int) -> None:
        nonlocal left
        left -= count
        if left < 0:
            raise Interrupted

    with pytest.raises(Interrupted):
        segment(tmp_path / "scene.png", tmp_path / "out", predictor, advance)
    assert predictor.tiles == 8
    out = tmp_path / "out"
    assert segment(tmp_path / "scene.png", out, predictor)[1] and predictor.tiles == 12
    check_results(out, scene, read_index_png(out / "semantic/scene.png"), read_panoptic_png(out / "panoptic/scene.png"))
    assert segment(tmp_path / "scene.png", out, predictor)[1] and predictor.tiles == 12
    Image.fromarray(scene[::-1].copy()).save(tmp_path / "scene.png")  # another picture of the same name
    assert segment(tmp_path / "scene.png", out, predictor)[1] and predictor.tiles == 24
    assert (read_index_png(out / "semantic/scene.png") == scene[::-1, :, 0]).all()


def test_a_run_killed_while_it_removes_tiles_keeps_its_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = draw_scene((300, 411), 40)
    Image.fromarray(scene).save(tmp_path / "scene.png")
    out, predictor = tmp_path / "out", Counting(TEST)

    def killed(path: Path, missing_ok: bool = False) -> None:
        (path.parent / "labels.npy").rename(tmp_path / "removed.npy")  # which may be the first
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(Interrupted):
            segment(tmp_path / "scene.png", out, predictor)
    assert (tmp_path / "removed.npy").exists() and predictor.tiles == 12
    writer, done = segment(tmp_path / "scene.png", out, predictor)
    assert done and predictor.tiles == 12
    check_results(out, scene, read_index_png(out / "semantic/scene.png"), read_panoptic_png(out / "panoptic/scene.png"))
    remove_work(writer)
    assert not (out / WORK_FOLDER).exists()


class Failing(Counting):
    """One that fails at a tile, as where memory runs out."""

    at = 18

    def infer(self, images, tasks):
        if self.tiles + len(images) > self.at:
            raise MemoryError("no memory for this tile")
        return super().infer(images, tasks)


def test_tiles_of_a_failed_picture_are_kept_for_the_next_run(tmp_path: Path) -> None:
    """The first picture is finished, the second fails; the next run does neither the first nor the known tiles."""
    names = ["a.png", "b.png"]
    for name in names:
        Image.fromarray(draw_scene((300, 411), 40)).save(tmp_path / name)
    out = tmp_path / "out"

    def run(predictor: Counting) -> list[bool]:
        writer = ResultWriter(out, METADATA, False, names)
        done = [
            segment_file(predictor, tmp_path / name, TASKS, writer, number, number, True, "", lambda *_: None)
            for number, name in enumerate(names)
        ]
        remove_work(writer)
        writer.close()
        return done

    failing, predictor = Failing(TEST), Counting(TEST)
    assert run(failing) == [True, False] and 12 < failing.tiles <= 18
    assert (out / WORK_FOLDER / "b").is_dir()
    assert run(predictor) == [True, True] and predictor.tiles == 24 - failing.tiles
    assert not (out / WORK_FOLDER).exists()
    assert len(json.loads((out / "panoptic.json").read_text())["annotations"]) == 2
    assert (read_index_png(out / "semantic/a.png") == read_index_png(out / "semantic/b.png")).all()


def test_a_damaged_file_of_a_tile_is_an_error_of_its_picture(tmp_path: Path) -> None:
    Image.fromarray(draw_scene((150, 150), 5)).save(tmp_path / "scene.png")
    assert segment(tmp_path / "scene.png", tmp_path / "out")[1]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    writer, done = segment(tmp_path / "broken.png", tmp_path / "out2")
    assert not done and "broken.png" in writer.failed[0] and "cannot be decoded" in writer.failed[0]


@pytest.mark.parametrize("seed", range(6))
def test_run_lengths_of_a_box_are_those_of_the_mask(seed: int) -> None:
    from maskformer_fast.output.large_results import instance_entry

    make = np.random.default_rng(seed)
    size = int(make.integers(1, 40)), int(make.integers(1, 40))
    top, left = int(make.integers(0, size[0])), int(make.integers(0, size[1]))
    mask = make.random((make.integers(1, size[0] - top + 1), make.integers(1, size[1] - left + 1))) < make.random()
    if seed == 0:
        top, mask = 0, np.ones((size[0], size[1] - left), bool)  # runs that go on in the next column
    whole = np.zeros(size, np.uint8, order="F")
    whole[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    entry = instance_entry(1, 0, 0.5, (top, left), mask, size, METADATA)
    assert entry["segmentation"]["counts"].encode() == coco_tools().mask.encode(whole)["counts"]
    assert entry["area"] == whole.sum()


SCENE_OF_10000 = """
import re, sys
from pathlib import Path
import numpy as np
from PIL import Image
Image.MAX_IMAGE_PIXELS = None
from maskformer_fast.config import TestConfig
from maskformer_fast.inference.tiled_files import segment_file
from maskformer_fast.output.writer import ResultWriter
from tests.support.scene import METADATA, Truth
writer = ResultWriter(Path(sys.argv[2]), METADATA, True, ["scene.bmp"])
test = TestConfig(tile=1024)
assert segment_file(Truth(test), Path(sys.argv[1]), ("semantic", "panoptic", "instance"), writer, 0, 1, True, "", print)
writer.close()
# not ru_maxrss, in which the memory of the process that started this one counts
print("peak", int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.no_cover
def test_each_object_of_a_scene_of_10000_by_10000_is_found_once_within_2_gib(tmp_path: Path) -> None:
    scene = draw_scene((10_000, 10_000), 900, radius=(20, 400))
    Image.fromarray(scene).save(tmp_path / "scene.bmp")
    objects = sum(np.bincount(scene_keys(scene[top : top + 1000]).ravel(), minlength=4 << 16) for top in
                  range(0, 10_000, 1000)).astype(bool).sum()  # fmt: skip
    line = [sys.executable, "-c", SCENE_OF_10000, str(tmp_path / "scene.bmp"), str(tmp_path / "out")]
    ran = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=1200)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[-1]) <= 2048
    entry = json.loads((tmp_path / "out/panoptic.json").read_text())["annotations"][0]
    assert len(entry["segments_info"]) == objects
    assert sum(info["area"] for info in entry["segments_info"]) == 10_000**2
    assert len(json.loads((tmp_path / "out/instances.json").read_text())) == objects - 2  # two kinds of ground
