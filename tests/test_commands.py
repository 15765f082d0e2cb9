"""The commands as a user calls them: real processes, real files, bad input."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import maskformer_fast
from maskformer_fast import convert, evaluate, export, predict, train
from maskformer_fast.core.metadata import VOID, SegmentInfo
from maskformer_fast.core.results import InstanceResult, PanopticResult, SemanticResult
from maskformer_fast.data import build_dataset
from maskformer_fast.evaluation import build_evaluator
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.modeling.weights import load_weights
from maskformer_fast.output.writer import ResultWriter
from tests.support.paths import TINY_RECIPE


def command(name, *arguments, **options):
    line = [sys.executable, "-m", f"maskformer_fast.{name}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained tiny run."""
    folder = tmp_path_factory.mktemp("commands") / "run"
    assert train.main(["--config", str(TINY_RECIPE), "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def photos(tmp_path):
    """Two images in nested folders, and a broken one."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.jpg", (37, 50)), ("deep/b.png", (64, 33))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"not an image")
    return folder


def run_as_module(name, arguments, monkeypatch, capsys):
    """Run a command in this process as by ``python -m`` -> exit status, output; any other exception is a failure."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"maskformer_fast.{name}", run_name="__main__", alter_sys=True)
    return ended.value.code, "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ["train", "evaluate", "predict"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_help_names_the_options(name, monkeypatch, capsys):
    status, output = run_as_module(name, ["--help"], monkeypatch, capsys)
    assert status == 0 and "--output" in output and "usage" in output.lower()


@pytest.mark.slow
@pytest.mark.no_cover
def test_train_then_evaluate_from_a_shell(tmp_path):
    options = ["--config", TINY_RECIPE, "--output", tmp_path / "run", "--solver.max-steps", 2]
    result = command("train", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "mIoU" in result.stdout and "metrics.json" in result.stdout
    result = command("evaluate", tmp_path / "run", "--task", "semantic", "--output", tmp_path / "m.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    again = json.loads((tmp_path / "m.json").read_text())
    assert again["miou"] == pytest.approx(json.loads((tmp_path / "run" / "metrics.json").read_text())["miou"])


def test_evaluate_gives_the_metrics_of_training(run, tmp_path, capsys):
    assert evaluate.main([str(run), "--task", "semantic", "panoptic", "instance", "--output", str(tmp_path / "m.json"),
                          "--picture", str(tmp_path / "grid.png")]) == 0
    trained, again = (json.loads(path.read_text()) for path in (run / "metrics.json", tmp_path / "m.json"))
    for key in ("miou", "pixel_accuracy", "fwiou", "pq", "sq", "rq", "pq_things", "pq_stuff", "ap", "ap50"):
        assert again[key] == pytest.approx(trained[key]), key
    assert "PQ" in capsys.readouterr().out
    assert Image.open(tmp_path / "grid.png").size[0] > 100


def test_evaluate_with_test_time_augmentation_changes_the_scores_only_a_little(run, tmp_path):
    arguments = [str(run), "--test.multi-scale", "1.0", "1.5", "--test.flip", "--output", str(tmp_path / "m.json")]
    assert evaluate.main([*arguments, "--task", "semantic"]) == 0
    assert 0.0 <= json.loads((tmp_path / "m.json").read_text())["miou"] <= 1.0


def test_the_batch_size_does_not_change_metrics(run, tmp_path):
    for size in (1, 3):
        evaluate.main([str(run), "--task", "panoptic", "--test.batch-size", str(size), "--output",
                       str(tmp_path / f"{size}.json")])
    one, three = (json.loads((tmp_path / f"{size}.json").read_text()) for size in (1, 3))
    assert one["pq"] == pytest.approx(three["pq"])


def test_evaluate_writes_predictions_that_score_the_same_from_files(run, tmp_path):
    """The panoptic files, read back as a data set of their own, are the predictions that were measured."""
    out = tmp_path / "out"
    evaluate.main([str(run), "--task", "panoptic", "--predictions", str(out), "--test.object-mask-threshold", "0.0",
                   "--test.overlap-threshold", "0.0", "--output", str(tmp_path / "m.json")])
    panoptic = json.loads((out / "panoptic.json").read_text())
    assert len(panoptic["annotations"]) == len(panoptic["images"]) == 3
    dataset = build_dataset(load_weights(run).config.data, "val")
    evaluator = build_evaluator("panoptic", dataset.metadata)
    for example, annotation in zip(dataset, panoptic["annotations"], strict=True):
        rgb = np.asarray(Image.open(out / "panoptic" / annotation["file_name"]).convert("RGB")).astype(np.int32)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        category = {number: index for index, number in enumerate(dataset.metadata.category_ids)}
        segments = [SegmentInfo(s["id"], category[s["category_id"]]) for s in annotation["segments_info"]]
        evaluator.process(example, PanopticResult(torch.from_numpy(np.where(ids == 0, VOID, ids)), segments))
    assert evaluator.evaluate()["pq"] == pytest.approx(json.loads((tmp_path / "m.json").read_text())["pq"])


def test_evaluate_refuses_other_classes_and_bad_arguments(run, tmp_path, caplog):
    with pytest.raises(ValueError, match="data: expected the 4 classes"):
        evaluate.main([str(run), "--data.shapes.num-things", "3"])
    with pytest.raises(ValueError, match="limit: expected a positive"):
        evaluate.main([str(run), "--limit", "0"])
    with pytest.raises(ValueError, match="output: expected a file"):
        evaluate.main([str(run), "--output", str(tmp_path)])
    evaluate.main([str(run), "--task", "panoptic", "--test.flip", "--limit", "1"])
    assert "semantic segmentation alone" in caplog.text


def test_predict_writes_every_format_and_reports_the_broken_file(run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    status = predict.main([str(run), str(photos), "-o", str(out), "--task", "semantic", "panoptic", "instance",
                           "--test.object-mask-threshold", "0.0", "--test.overlap-threshold", "0.0"])
    assert status == 1 and "broken.jpg" in capsys.readouterr().err
    for name, size in (("a", (50, 37)), ("deep/b", (33, 64))):
        assert Image.open(out / "semantic" / f"{name}.png").size == size
        assert Image.open(out / "panoptic" / f"{name}.png").size == size
        for task in ("semantic", "panoptic", "instance"):
            assert (out / "overlays" / f"{name}_{task}.png").exists()
    panoptic = json.loads((out / "panoptic.json").read_text())
    assert [(image["id"], image["file_name"]) for image in panoptic["images"]] == [(1, "a.jpg"), (3, "deep/b.png")]
    for annotation in panoptic["annotations"]:
        rgb = np.asarray(Image.open(out / "panoptic" / annotation["file_name"]).convert("RGB")).astype(int)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        areas = {segment["id"]: segment["area"] for segment in annotation["segments_info"]}
        assert areas == {int(i): int((ids == i).sum()) for i in np.unique(ids) if i != 0}
    from pycocotools import mask

    for instance in json.loads((out / "instances.json").read_text()):
        area = int(mask.area(instance["segmentation"]))
        assert area > 0 and 0.0 <= instance["score"] <= 1.0
        assert instance["segmentation"]["size"] in ([37, 50], [64, 33])


def test_file_names_that_are_numbers_are_the_image_ids(run, tmp_path):
    for name in ("000000142238.jpg", "7.png"):
        Image.new("RGB", (20, 30)).save(tmp_path / name)
    predict.main([str(run), str(tmp_path / "*.*"), "-o", str(tmp_path / "out"), "--task", "panoptic"])
    images = json.loads((tmp_path / "out" / "panoptic.json").read_text())["images"]
    assert {image["id"]: image["file_name"] for image in images} == {142238: "000000142238.jpg", 7: "7.png"}


def test_predict_keeps_equal_names_apart_and_reports_missing_ones(run, photos, tmp_path, capsys):
    Image.new("RGB", (20, 30)).save(photos / "deep" / "a.png")
    out = tmp_path / "out"
    inputs = [photos / "a.jpg", photos / "deep" / "a.png", photos / "deep" / "*.png", tmp_path / "nowhere.jpg"]
    assert predict.main([str(run), *map(str, inputs), "-o", str(out), "--no-overlays"]) == 1
    assert "nowhere.jpg" in capsys.readouterr().err
    assert sorted(path.name for path in (out / "semantic").iterdir()) == ["a.png", "a_2.png", "a_3.png", "b.png"]
    assert not (out / "overlays").exists()


def test_predict_leaves_out_hidden_files_and_its_own_results(run, photos, capsys, monkeypatch):
    (photos / "broken.jpg").unlink()
    (photos / "._a.jpg").write_bytes(b"macOS")
    monkeypatch.chdir(photos)
    for output in ("predictions", "predictions", "."):
        assert predict.main([str(run), ".", "-o", output]) == 0
        assert "2 images segmented" in capsys.readouterr().out
    assert predict.main([str(run), "**/*.png", "-o", "again"]) == 0
    assert "1 images segmented" in capsys.readouterr().out
    assert predict.main([str(run), "predictions/overlays/*.png", "-o", "again"]) == 0
    assert "1 images segmented" in capsys.readouterr().out, "a folder that the pattern names is searched"


def test_one_image_that_fails_costs_no_other_its_results(run, photos, tmp_path, capsys, monkeypatch):
    """Names that cannot be written, files that cannot be read, and an image whose inference fails in its batch."""
    Image.new("RGB", (20, 30)).save(photos / ("a" * 250 + ".png"))
    Image.new("RGB", (20, 30)).save(os.fsdecode(os.fsencode(photos) + b"/x\xff\xfe.png"))
    Image.new("RGB", (13, 17)).save(photos / "poison.png")
    infer = Predictor.infer

    def poisoned(self, images, tasks, *rest):
        if any(image.shape[:2] == (17, 13) for image in images):
            raise RuntimeError("not enough memory")
        return infer(self, images, tasks, *rest)

    monkeypatch.setattr(Predictor, "infer", poisoned)
    out = tmp_path / "out"
    assert predict.main([str(run), str(photos), "-o", str(out), "--task", "semantic", "panoptic",
                         "--test.batch-size", "8"]) == 1
    output = capsys.readouterr()
    assert "4 images segmented" in output.out
    assert "2 inputs could not be used" in output.err
    assert "poison.png: RuntimeError: not enough memory" in output.err and "broken.jpg" in output.err
    listed = json.loads((out / "panoptic.json").read_text())["images"]
    assert len(listed) == len(list((out / "semantic").rglob("*.png"))) == 4
    assert all((out / "semantic" / f"{image['result']}.png").is_file() for image in listed)
    assert {"x\udcff\udcfe.png", "a" * 250 + ".png"} < {image["file_name"] for image in listed}


def test_an_interrupted_predict_keeps_what_it_has(run, photos, tmp_path, monkeypatch):
    write = ResultWriter.write

    def stop(self, number, *arguments):
        if number:
            raise KeyboardInterrupt
        return write(self, number, *arguments)

    monkeypatch.setattr(ResultWriter, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        predict.main([str(run), str(photos), "-o", str(tmp_path / "out"), "--task", "panoptic"])
    assert len(json.loads((tmp_path / "out/panoptic.json").read_text())["annotations"]) == 1


def test_predict_in_tiles_writes_every_format(run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    line = [str(run), str(photos), "-o", str(out), "--task", "semantic", "panoptic", "instance", "--test.tile", "32",
            "--test.short-edge", "32"]  # fmt: skip
    assert predict.main(line) == 1
    output = capsys.readouterr()
    assert "2 images segmented" in output.out and "broken.jpg" in output.err
    for name, size in (("a", (50, 37)), ("deep/b", (33, 64))):
        for kind in ("semantic", "panoptic"):
            assert Image.open(out / kind / f"{name}.png").size == size
    names = {entry["file_name"] for entry in json.loads((out / "panoptic.json").read_text())["annotations"]}
    assert names == {"a.png", "deep/b.png"} and not (out / ".tiles").exists()


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_an_image_within_a_tile_is_segmented_as_a_whole(run, photos, task):
    model = maskformer_fast.load(run)
    whole, tiled = (model.predict(photos / "a.jpg", task, tile=tile) for tile in (None, 50))
    for name in {"semantic": ["labels"], "panoptic": ["id_map"], "instance": ["labels", "scores", "masks"]}[task]:
        assert torch.equal(getattr(whole, name), getattr(tiled, name))
    parts = model.predict(photos / "a.jpg", task, tile=30)
    size = tuple(parts.id_map.shape) if task == "panoptic" else parts.size if task == "instance" else parts.labels.shape
    assert size == (37, 50)


def test_equal_names_from_two_folders_are_told_apart_by_their_paths(run, tmp_path, monkeypatch):
    for folder in ("cam1", "cam2"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (20, 30)).save(tmp_path / folder / "0001.jpg")
    monkeypatch.chdir(tmp_path)
    assert predict.main([str(run), "cam1/0001.jpg", "cam2/0001.jpg", "--task", "instance"]) == 0
    images = json.loads((tmp_path / "predictions/images.json").read_text())["images"]
    assert [(image["id"], image["file_name"]) for image in images] == [(1, "cam1/0001.jpg"), (2, "cam2/0001.jpg")]


def test_evaluate_writes_the_results_of_all_images_but_those_that_fail(run, tmp_path, capsys, monkeypatch):
    infer, calls = Predictor.infer, []

    def poisoned(self, images, tasks, *rest):
        calls.append(len(images))
        if len(calls) in (1, 3):  # the batch of three, then the second image alone
            raise RuntimeError("not enough memory")
        return infer(self, images, tasks, *rest)

    monkeypatch.setattr(Predictor, "infer", poisoned)
    line = [str(run), "--task", "semantic", "--test.batch-size", "3"]
    assert evaluate.main([*line, "--predictions", str(tmp_path / "out"), "--output", str(tmp_path / "m.json")]) == 1
    assert "1.png: RuntimeError: not enough memory" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out/semantic").iterdir()) == ["0.png", "2.png"]
    assert json.loads((tmp_path / "m.json").read_text())["miou"] >= 0
    calls.clear()
    with pytest.raises(RuntimeError, match="not enough memory"):
        evaluate.main(line)


def coco_with_ids(root, names, ids):
    """A COCO data set of flat images, each with one square."""
    images = [{"id": i, "file_name": name, "height": 32, "width": 40} for i, name in zip(ids, names, strict=True)]
    square = [[4, 4, 20, 4, 20, 20, 4, 20]]
    annotations = [{"id": n, "image_id": i, "category_id": 1, "segmentation": square} for n, i in enumerate(ids, 1)]
    categories = [{"id": c, "name": f"class {c}"} for c in range(1, 5)]
    for split in ("train", "val"):
        for name in names:
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32)).save(root / split / name)
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return ["--data.dataset", "coco_instances", "--data.root", str(root)]


@pytest.mark.parametrize("ids", [("../../escaped", "/tmp/escaped_absolute", "a"), (1, 2, 3)])
def test_results_of_evaluate_stay_in_their_folder_and_keep_equal_names_apart(run, tmp_path, ids):
    names = ["cam1/0001.jpg", "cam2/0001.jpg", "cam2/0001.png"]
    data = coco_with_ids(tmp_path / "coco", names, ids)
    before = set(tmp_path.rglob("*"))
    assert evaluate.main([str(run), *data, "--task", "semantic", "--predictions", str(tmp_path / "a/b")]) == 0
    written = {path.relative_to(tmp_path).as_posix() for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    pictures = {f"a/b/semantic/{name}.png" for name in ("cam1/0001", "cam2/0001", "cam2/0001_2")}
    assert written == {*pictures, "a/b/images.json"} and not os.path.exists("/tmp/escaped_absolute.png")
    listed = json.loads((tmp_path / "a/b/images.json").read_text())["images"]
    assert [(image["id"], image["file_name"]) for image in listed] == list(zip(ids, names, strict=True))


def test_evaluate_writes_what_it_can_beside_a_broken_image(run, tmp_path, capsys):
    data = coco_with_ids(tmp_path / "coco", ["a.jpg", "b.jpg", "c.jpg"], [1, 2, 3])
    (tmp_path / "coco/val/b.jpg").write_bytes(b"broken")
    line = [str(run), *data, "--task", "semantic"]
    assert evaluate.main([*line, "--predictions", str(tmp_path / "out")]) == 1
    assert "b.jpg: cannot be decoded" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out/semantic").iterdir()) == ["a.png", "c.png"]
    assert evaluate.main([*line, "--predictions", str(tmp_path / "out"), "--data.skip-broken"]) == 0
    with pytest.raises(ValueError, match=r"b\.jpg: cannot be decoded"):
        evaluate.main(line)
    for name in "ac":
        (tmp_path / f"coco/val/{name}.jpg").write_bytes(b"broken")
    assert evaluate.main([*line, "--predictions", str(tmp_path / "none")]) == 1


def test_predictor_takes_every_kind_of_image_and_task(run, photos):
    model = maskformer_fast.load(run)
    image = np.asarray(Image.open(photos / "a.jpg"))
    semantic = model.predict(photos / "a.jpg")
    assert isinstance(semantic, SemanticResult) and semantic.labels.shape == (37, 50)
    for kind in (Image.fromarray(image), image, torch.from_numpy(image.copy()).permute(2, 0, 1)):
        assert torch.equal(model.predict(kind).labels, semantic.labels)
    panoptic = model.predict([image, image[:20]], task="panoptic")
    assert [type(result) for result in panoptic] == [PanopticResult] * 2 and panoptic[1].id_map.shape == (20, 50)
    assert isinstance(model.predict(image, task="instance"), InstanceResult)
    panoptic[0].id_map[0, 0] = 5  # results are the caller's to change
    deep = Image.fromarray(np.full((8, 8), 30000, dtype=np.uint16))
    deep.save(photos / "deep.png")
    assert torch.equal(model.predict(deep).labels, model.predict(photos / "deep.png").labels)
    with pytest.raises(ValueError, match="task: expected one of"):
        model.predict(image, task="pose")
    with pytest.raises(TypeError, match="uint8"):
        model.predict(image.astype(np.float32))


def test_load_builds_an_untrained_recipe():
    model = maskformer_fast.load("demo")
    assert model.predict(np.zeros((40, 40, 3), dtype=np.uint8)).labels.shape == (40, 40)
    ade = maskformer_fast.load("ade20k_150/maskformer_r50")
    assert ade.metadata.num_classes == 150 and not ade.network.training


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train", ["--config", "demi"], "demo"),
        ("train", ["--solver.lr", "-1"], "solver.lr"),
        ("train", ["--solver.learning-rate", "1"], "learning-rate"),
        ("train", ["--data.dataset", "ade20k_150"], "data.root"),
        ("train", ["--data.dataset", "folder", "--data.root", "nowhere"], "nowhere"),
        ("train", ["--device", "tpu:9"], "device"),
        ("evaluate", ["nowhere"], "nowhere"),
        ("predict", ["nowhere", "x.jpg"], "nowhere"),
        ("predict", [], "checkpoint"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_bad_input_is_an_error_without_a_traceback(name, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, output = run_as_module(name, arguments, monkeypatch, capsys)
    assert status == 2 and message.lower() in output.lower() and "Traceback" not in output


def test_a_second_run_moves_the_first_aside_and_nothing_is_lost(tmp_path, caplog):
    arguments = ["--config", str(TINY_RECIPE), "--output", str(tmp_path / "run"), "--solver.max-steps", "1"]
    train.main(arguments)
    first = load_weights(tmp_path / "run").weights
    train.main([*arguments, "--seed", "5"])
    kept = load_weights(tmp_path / "run.1").weights
    assert all(torch.equal(first[name], kept[name]) for name in first)
    assert load_weights(tmp_path / "run").config.seed == 5


@pytest.mark.no_cover
def test_two_processes_cannot_share_a_run(tmp_path):
    with train.run_lock(tmp_path / "run"):
        result = command("train", "--config", TINY_RECIPE, "--output", tmp_path / "run")
    assert result.returncode == 2 and "no other run" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_leaves_the_former_run_in_its_place(tmp_path):
    folder = tmp_path / "run"
    train.main(["--config", str(TINY_RECIPE), "--output", str(folder), "--solver.max-steps", "1"])
    with pytest.raises(FileNotFoundError):
        train.main(["--output", str(folder), "--data.dataset", "folder", "--data.root", str(tmp_path / "nowhere")])
    assert load_weights(folder).step == 1 and not (tmp_path / "run.1").exists()


def test_resume_takes_the_recipe_of_the_run_itself(tmp_path):
    folder = tmp_path / "run"
    train.main(["--config", str(TINY_RECIPE), "--output", str(folder), "--solver.max-steps", "2", "--seed", "7"])
    train.main(["--output", str(folder), "--resume", "--solver.max-steps", "3"])
    saved = load_weights(folder / "checkpoints" / "last")
    assert saved.step == 3 and saved.config.seed == 7 and saved.config.solver.lr == 1e-3


def test_a_launch_with_the_same_name_continues_and_another_one_starts_anew(tmp_path, monkeypatch):
    line = ["--config", str(TINY_RECIPE), "--output", str(tmp_path / "run"), "--solver.max-steps"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    train.main([*line, "2"])
    train.main([*line, "3"])  # as torchrun does when a node joins
    steps = [json.loads(text)["step"] for text in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 3] and not (tmp_path / "run.1").exists()
    for name in ("job 8", "none", "none"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        train.main([*line, "1"])
    assert (tmp_path / "run.3").exists()


KILLING = """
import os, random, signal, sys, time
from pathlib import Path
from maskformer_fast import train

def steps():
    return len(log.read_text().splitlines()) if log.exists() else 0

log, arguments, rng = Path(sys.argv[1]), sys.argv[2:], random.Random(0)
for _ in range(10):
    before, ended = steps(), (0, 0)
    process = os.fork()
    if process == 0:
        sys.exit(train.main(arguments))
    while ended == (0, 0) and steps() <= before:
        time.sleep(0.02)
        ended = os.waitpid(process, os.WNOHANG)
    if ended == (0, 0):
        time.sleep(rng.uniform(0, 0.1))  # somewhere within a step or the writing of a checkpoint
        os.kill(process, signal.SIGKILL)
        ended = os.waitpid(process, 0)
    assert ended[1] in (0, signal.SIGKILL), ended
"""


@pytest.mark.slow
@pytest.mark.no_cover
def test_kill_9_ten_times_at_random_points_then_resume_ends_with_the_same_weights(tmp_path):
    """Runs are forked from a process that has imported the package, as the import takes far longer than the steps."""
    arguments = ["--config", str(TINY_RECIPE), "--log.checkpoint-every", "1", "--solver.max-steps", "40"]
    train.main([*arguments, "--output", str(tmp_path / "uninterrupted")])
    arguments += ["--output", str(tmp_path / "killed"), "--resume"]
    arguments += ["--data.workers", "1"]  # a worker process must end with its run
    line = [sys.executable, "-c", KILLING, str(tmp_path / "killed" / "log.jsonl"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    loop = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert loop.returncode == 0, loop.stderr
    assert command("train", *arguments).returncode == 0
    checkpoints = (tmp_path / name / "checkpoints" / "last" for name in ("uninterrupted", "killed"))
    expected, resumed = map(load_weights, checkpoints)
    assert expected.step == resumed.step == 40
    for name in expected.weights:
        assert torch.equal(expected.weights[name], resumed.weights[name]), name


@pytest.mark.parametrize(
    ("command", "arguments", "name"),
    [
        (predict, [r"C:\runs\x", "a.jpg"], "checkpoint"),
        (predict, ["RUN", "a.jpg", "-o", r"D:\out"], "output"),
        (evaluate, [r"runs\x"], "checkpoint"),
        (evaluate, ["RUN", "--data.root", r"C:\data"], "data.root"),
        (evaluate, ["RUN", "--predictions", r"C:\out"], "predictions"),
        (convert, [r"C:\x.pth", "y.safetensors"], "source"),
        (export, ["RUN", "-o", r"C:\bundle"], "output"),
    ],
)
def test_paths_of_windows_are_refused_by_every_command(run, command, arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected a path with / between its folders"):
        command.main([str(run) if argument == "RUN" else argument for argument in arguments])
