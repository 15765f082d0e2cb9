"""`SegmentBatch`, alone and as actors of Ray Data of which one is killed."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maskformer_fast
from maskformer_fast import train
from maskformer_fast.inference.ray_batches import SegmentBatch
from tests.support.paths import TINY_RECIPE

arrow = pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained tiny run."""
    folder = tmp_path_factory.mktemp("ray") / "run"
    assert train.main(["--config", str(TINY_RECIPE), "--output", str(folder), "--solver.max-steps", "2"]) == 0
    return folder


def pixels(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    return rng.integers(0, 255, (*rng.integers(20, 50, 2), 3), dtype=np.uint8)


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels(number)).save(content, "PNG")
    return content.getvalue()


def column(values: list) -> np.ndarray:
    filled = np.empty(len(values), dtype=object)
    filled[:] = values
    return filled


def decode(row: dict, task: str) -> np.ndarray:
    from pycocotools import mask

    size = [row["height"], row["width"]]
    rles = [{"size": size, "counts": counts.encode()} for counts in row[f"{task}_counts"]]
    return mask.decode(rles) if rles else np.zeros((*size, 0), np.uint8)


def test_rows_have_the_masks_of_the_model_and_bad_pictures_an_error(run):
    images = column([png(0), b"<html>", png(1), b""])
    batch = {"bytes": images, "name": np.array(["a", "b", "c", "d"]), "n": np.arange(4)}
    tasks = ("semantic", "panoptic", "instance")
    table = SegmentBatch(str(run), tasks, device="cpu")(batch)
    rows = table.to_pylist()
    assert [row["name"] for row in rows] == list("abcd") and [row["n"] for row in rows] == [0, 1, 2, 3]
    assert "bytes" not in table.column_names and "got HTML" in rows[1]["error"] and "an empty file" in rows[3]["error"]
    model = maskformer_fast.load(run, "cpu")
    ids = np.array(model.metadata.category_ids)
    for row, number in ((rows[0], 0), (rows[2], 1)):
        assert row["error"] == "" and (row["height"], row["width"]) == pixels(number).shape[:2]
        labels = model.predict(pixels(number)).labels.numpy()
        masks = decode(row, "semantic")
        assert (masks.sum(2) == 1).all() and (ids[labels] == masks @ np.array(row["semantic_category_id"])).all()
        instances = model.predict(pixels(number), "instance")
        assert row["instance_score"] == pytest.approx(instances.scores.tolist(), abs=1e-6)
        assert decode(row, "instance").sum() == np.unpackbits(instances.masks.numpy()).sum()
        assert decode(row, "panoptic").any(2).sum() == (model.predict(pixels(number), "panoptic").id_map >= 0).sum()
    for task in tasks:
        assert rows[1][f"{task}_counts"] == [] and rows[1][f"{task}_score"] == []
    empty = SegmentBatch(str(run), tasks, device="cpu")({name: values[1:2] for name, values in batch.items()})
    assert empty.schema == table.schema, "files of Parquet have one schema"


def test_arrays_are_images_too_and_other_columns_are_refused(run):
    actor = SegmentBatch(str(run), image_column="image", device="cpu")
    same = actor({"image": np.stack([np.zeros((24, 30, 3), np.uint8)] * 2), "box": np.ones((2, 4))})
    assert same.column("error").to_pylist() == ["", ""] and same.column("box").to_pylist() == [[1.0] * 4] * 2
    ragged = actor({"image": column([pixels(0), pixels(1)[..., 0]])}).to_pylist()
    assert ragged[0]["error"] == "" and "expected a uint8 array [H, W, 3]" in ragged[1]["error"]
    with pytest.raises(ValueError, match="image_column: expected one of bytes, got 'image'"):
        actor({"bytes": column([b""])})


def test_without_pyarrow_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"maskformer_fast\[ray\]"):
        SegmentBatch("nowhere")


class KilledOnce(SegmentBatch):
    """An actor that kills its own process in the middle, the first time that any does."""

    def __init__(self, mark: str, **options: object) -> None:
        torch.set_num_threads(1)
        super().__init__(**options)  # type: ignore[arg-type]
        self._mark = Path(mark)

    def __call__(self, batch: dict[str, np.ndarray]) -> object:
        with open(self._mark / f"{os.getpid()}.log", "a") as file:
            print(*batch["number"].tolist(), file=file)
        table = super().__call__(batch)
        if 11 in batch["number"] and not (self._mark / "killed").exists():
            (self._mark / "killed").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        return table


def start_cluster(ray: object, attempts: int = 3) -> None:
    """Start a local cluster of two workers; Ray gives up after 30 seconds, which a busy machine may need."""
    for attempt in range(attempts):
        try:
            ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20,  # type: ignore[attr-defined]
                     _temp_dir=f"/tmp/ray_{os.getpid()}_{attempt}",
                     _system_config={"enable_metrics_collection": False})  # fmt: skip
            return
        except Exception:
            ray.shutdown()  # type: ignore[attr-defined]
            if attempt == attempts - 1:
                raise


@pytest.mark.slow
@pytest.mark.no_cover
def test_no_picture_is_lost_or_doubled_where_one_of_two_workers_is_killed(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_agent_register_timeout_ms", "300000")  # of a machine with much else to do
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    start_cluster(ray)
    try:
        rows = [{"number": number, "bytes": png(number) if number != 5 else b"broken"} for number in range(24)]
        (tmp_path / "marks").mkdir()
        segmented = ray.data.from_items(rows, override_num_blocks=12).map_batches(
            KilledOnce, fn_constructor_kwargs={"mark": str(tmp_path / "marks"), "checkpoint": str(run),
                                               "task": ("semantic", "instance"), "device": "cpu"},
            batch_size=2, batch_format="numpy", compute=ray.data.ActorPoolStrategy(size=2))  # fmt: skip
        segmented.write_parquet(str(tmp_path / "out"))
    finally:
        ray.shutdown()
    assert (tmp_path / "marks/killed").exists() and len(list((tmp_path / "marks").glob("*.log"))) >= 2
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    table.sort(key=lambda row: row["number"])
    assert [row["number"] for row in table] == list(range(24))
    assert [row["number"] for row in table if row["error"]] == [5]
    model = maskformer_fast.load(run, "cpu")
    ids = np.array(model.metadata.category_ids)
    for row in (row for row in table if not row["error"]):
        labels = model.predict(pixels(row["number"])).labels.numpy()
        masks = decode(row, "semantic")
        assert ((ids[labels] != masks @ np.array(row["semantic_category_id"])).mean()) < 0.01
