"""Loggers beside TensorBoard: offline Weights & Biases, MLflow in a folder, failures that do not stop a run."""

from __future__ import annotations

import json
import struct
import threading
from dataclasses import replace

import numpy as np
import pytest

from maskformer_fast.core.typed import to_plain
from maskformer_fast.training import loggers
from maskformer_fast.training.loggers import BackgroundLogger, MlflowLogger, WandbLogger, check_loggers
from maskformer_fast.training.run_log import RunLog
from maskformer_fast.training.trainer import Trainer
from tests.training.test_trainer import TINY, tiny


class Recorder:
    """A logger that keeps what it gets, and fails or waits when it is told to."""

    def __init__(self, fail_at=None):
        self.got, self.closed, self.fail_at = [], False, fail_at

    def scalars(self, step, values):
        if step == self.fail_at:
            raise ConnectionError("no route\nto host")
        self.got.append((step, values))

    def picture(self, step, image):
        self.got.append((step, image.shape))

    def close(self):
        self.closed = True


def test_calls_arrive_in_their_order_and_before_close_returns():
    target = Recorder()
    background = BackgroundLogger("wandb", lambda: target)
    values = {"loss": 1.0}
    for step in range(50):
        values["loss"] = float(step)
        background.scalars(step, values)
    background.picture(50, np.zeros((2, 3, 3), np.uint8))
    background.close()
    assert target.got == [(step, {"loss": float(step)}) for step in range(50)] + [(50, (2, 3, 3))] and target.closed


@pytest.mark.parametrize("where", ["make", "call", "full", "close"])
def test_a_logger_that_fails_gives_one_warning_and_stops_nothing(where, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(loggers, "_MAX_PENDING", 3)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.1)
    target, connected = Recorder(fail_at=2 if where == "call" else None), threading.Event()

    def make():
        if where == "make":
            raise OSError("no key")
        if where in ("full", "close"):
            connected.wait()
        return target

    log = RunLog(tmp_path, 0, tensorboard=False, loggers=[BackgroundLogger("mlflow", make)])
    for step in range(8 if where == "full" else 2 if where == "close" else 6):
        log.scalars(step, {"loss": 0.5})
    log.close()
    assert len([r for r in caplog.records if "log.mlflow: training goes on without it" in r.message]) == 1
    assert "\n" not in caplog.records[0].message
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) >= 2
    connected.set()


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        config = replace(TINY, log=replace(TINY.log, **{name: True}))
        with pytest.raises(ModuleNotFoundError, match=rf'log\.{name}: pip install "maskformer_fast\[{name}\]"'):
            check_loggers(config)
    check_loggers(TINY)


def test_mlflow_gets_the_scalars_the_configuration_and_pictures_of_a_resumed_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 900.0)  # for busy machines
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for the client that reads; the logger sets it as well
    folder = tmp_path / "a run"
    log = {"mlflow": True, "project": "tests", "every": 2}
    Trainer(tiny(folder, solver={"max_steps": 2}, log=log)).run()
    Trainer(tiny(folder, solver={"max_steps": 4}, log=log), resume=True).run()
    client = mlflow.MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert len(runs) == 1 and runs[0].info.status == "FINISHED"
    assert runs[0].data.params["solver.lr"] == "0.001" and runs[0].data.params["model.backbone.name"] == "resnet_micro"
    written = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for key, name in (("loss", "train/loss"), ("val/miou", "val/miou")):
        expected = [(line["step"], line[key]) for line in written if key in line]
        assert [(m.step, m.value) for m in client.get_metric_history(runs[0].info.run_id, name)] == expected
    assert [item.path for item in client.list_artifacts(runs[0].info.run_id, "predictions")] == [
        "predictions/step_00000002.png", "predictions/step_00000004.png"]


def test_a_dead_server_of_mlflow_does_not_stop_a_run(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 900.0)  # for busy machines
    trainer = Trainer(tiny(tmp_path, solver={"max_steps": 2}, log={"mlflow": True}))
    trainer.run()
    assert trainer.step == 2
    assert len([r for r in caplog.records if "log.mlflow: training goes on without it" in r.message]) == 1


def wandb_records(content):
    """Records of a file of Weights & Biases: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    at, parts = 7, []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too little for a record's header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            yield b"".join(parts)
            parts = []


@pytest.mark.slow
def test_weights_and_biases_offline_gets_the_scalars_and_the_configuration(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 900.0)  # for busy machines
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    Trainer(tiny(tmp_path, solver={"max_steps": 2}, log={"wandb": True, "project": "tests"})).run()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    history, settings = [], {}
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.history.item:
            history.append({".".join(item.nested_key) or item.key: json.loads(item.value_json)
                            for item in record.history.item})
        for item in (*record.run.config.update, *record.config.update):
            settings[item.key] = json.loads(item.value_json)
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for key, name in (("loss", "train/loss"), ("val/miou", "val/miou")):
        assert [(row["step"], row[name]) for row in history if name in row] == [
            (line["step"], line[key]) for line in written if key in line]
    assert any("val/predictions" in name for row in history for name in row)
    assert settings["solver"]["lr"] == 1e-3
    assert json.loads((tmp_path / "loggers.json").read_text()).keys() == {"wandb"}


def test_only_rank_zero_logs(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("maskformer_fast.training.trainer.open_loggers", lambda *_: opened.append(1) or [])
    monkeypatch.setattr("maskformer_fast.training.trainer.is_main", lambda: False)
    Trainer(tiny(tmp_path, solver={"max_steps": 1})).run()
    assert not opened


def test_the_classes_have_the_protocols_methods():
    for kind in (WandbLogger, MlflowLogger, BackgroundLogger):
        assert all(callable(getattr(kind, name)) for name in ("scalars", "picture", "close"))
    assert to_plain(TINY.log)["wandb"] is False and to_plain(TINY.log)["mlflow"] is False
