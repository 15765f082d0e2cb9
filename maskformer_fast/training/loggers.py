"""Loggers of other projects beside the run's own log: Weights & Biases, and MLflow.

Each works in a thread of its own, so that no step waits for a network, and one that fails is left out with a warning.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maskformer_fast.config import Config
from maskformer_fast.core.files import write_json
from maskformer_fast.core.typed import to_plain

logger = logging.getLogger(__name__)

IDS_NAME = "loggers.json"
"""File of a run's folder with the run's ids at the loggers, so that a resumed run continues there."""
CLOSE_SECONDS = 60.0
"""Longest time for which the end of a run waits until everything is sent."""
_MAX_PENDING = 10_000  # calls that wait to be sent
_MODULES = {"wandb": "wandb", "mlflow": "mlflow"}  # field of `LogConfig` and name of the extra -> module


class Logger(Protocol):
    """Receiver of a run's numbers and pictures."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers of a step."""

    def picture(self, step: int, image: np.ndarray) -> None:
        """Log a picture [H, W, 3] uint8 of a validation."""

    def close(self) -> None:
        """Send what is left."""


def check_loggers(config: Config) -> None:
    """Raise ``ModuleNotFoundError`` if a logger that the configuration asks for is not installed."""
    for name, module in _MODULES.items():
        if getattr(config.log, name) and importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f'log.{name}: pip install "maskformer_fast[{name}]" brings {module}')


def open_loggers(folder: Path, config: Config) -> list[Logger]:
    """Loggers that the configuration asks for, for a run in ``folder``."""
    makers: dict[str, Callable[[], Logger]] = {
        "wandb": lambda: WandbLogger(folder, config), "mlflow": lambda: MlflowLogger(folder, config),
    }  # fmt: skip
    return [BackgroundLogger(name, make) for name, make in makers.items() if getattr(config.log, name)]


class BackgroundLogger:
    """Makes and calls a logger in a thread. The first error, or too many waiting calls, ends it with one warning."""

    def __init__(self, name: str, make: Callable[[], Logger]) -> None:
        self._name = name
        self._calls: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(_MAX_PENDING)
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"logger {name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Queue numbers."""
        copied = dict(values)
        self._put(lambda target: target.scalars(step, copied))

    def picture(self, step: int, image: np.ndarray) -> None:
        """Queue a picture."""
        self._put(lambda target: target.picture(step, image))

    def close(self) -> None:
        """Wait until everything is sent, at most `CLOSE_SECONDS`."""
        self._put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._fail(f"not everything was sent within {CLOSE_SECONDS:g} seconds")

    def _put(self, call: Callable[[Logger], None] | None) -> None:
        if self._failed.is_set():
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._fail(f"{_MAX_PENDING} calls wait to be sent")

    def _work(self, make: Callable[[], Logger]) -> None:
        try:
            target = make()
            while (call := self._calls.get()) is not None and not self._failed.is_set():
                call(target)
            target.close()
        except Exception as error:  # of any kind: it comes from another library and its network
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            logger.warning("log.%s: training goes on without it: %s", self._name, " ".join(reason.split())[:500])


class WandbLogger:
    """Logs to Weights & Biases, online or offline as its own ``WANDB_MODE`` says."""

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        self._wandb = wandb
        name = _remembered(folder, "wandb") or secrets.token_hex(4)
        self._run = wandb.init(project=config.log.project, dir=str(folder), id=name, resume="allow",
                               name=folder.name, config=to_plain(config))
        _remember(folder, "wandb", name)
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers of a step."""
        self._run.log({"step": step, **_sectioned(values)})

    def picture(self, step: int, image: np.ndarray) -> None:
        """Log a picture of a validation."""
        self._run.log({"step": step, "val/predictions": self._wandb.Image(image)})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MlflowLogger:
    """Logs to the server or folder of ``MLFLOW_TRACKING_URI``, by default to ``mlruns`` in the run's folder."""

    def __init__(self, folder: Path, config: Config) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (folder / "mlruns").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would need more than mlflow-skinny
        self._client = MlflowClient(tracking_uri=uri)
        known = _remembered(folder, "mlflow")
        if known is not None:
            self._run = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(config.log.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(config.log.project)
        self._run = self._client.create_run(number, run_name=folder.name).info.run_id
        _remember(folder, "mlflow", self._run)
        parameters = [Param(key, str(value)[:500]) for key, value in _flat(to_plain(config))]
        for first in range(0, len(parameters), 100):  # the most of one request
            self._client.log_batch(self._run, params=parameters[first : first + 100])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log named numbers of a step; those that are not finite are left out."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, float(value), now, step) for name, value in _sectioned(values).items()
                   if math.isfinite(value)]
        self._client.log_batch(self._run, metrics=metrics)

    def picture(self, step: int, image: np.ndarray) -> None:
        """Log a picture of a validation."""
        self._client.log_image(self._run, image, artifact_file=f"predictions/step_{step:08d}.png")

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


def _sectioned(values: Mapping[str, float]) -> dict[str, float]:
    """Numbers with the names that TensorBoard shows: those of training begin with ``train/``."""
    return {name if "/" in name else f"train/{name}": value for name, value in values.items()}


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Settings by their dotted names."""
    items: list[tuple[str, Any]] = []
    for key, value in section.items():
        items += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return items


def _ids(folder: Path) -> dict[str, str]:
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads((folder / IDS_NAME).read_bytes())
        if isinstance(content, dict):
            return {str(key): value for key, value in content.items() if isinstance(value, str)}
    return {}


def _remembered(folder: Path, name: str) -> str | None:
    """Id of this run at a logger, from an earlier process."""
    return _ids(folder).get(name)


_IDS_LOCK = threading.Lock()


def _remember(folder: Path, name: str, value: str) -> None:
    with _IDS_LOCK:
        write_json(folder / IDS_NAME, {**_ids(folder), name: value})
