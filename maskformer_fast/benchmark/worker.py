"""``python -m maskformer_fast.benchmark.worker``: the process of one runner.

It reads commands as lines of JSON and answers each with a line. In separate processes, the peak memory of each runner
can be measured, and a runner that fails does not end the others.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any, TextIO

import numpy as np

from maskformer_fast.benchmark.runners import Setting, label_map, make_frames, open_runner
from maskformer_fast.core.machine import peak_resident_bytes
from maskformer_fast.core.stages import StageSeconds
from maskformer_fast.deploy.bundle.folder import read_manifest
from maskformer_fast.deploy.runtime.selection import CPU_BACKENDS, tensorrt_obstacle

FRAMES = 8
"""Smallest number of different frames; they are used in turn."""
WARM_UP_CALLS = 3
STAGE_CALLS = 8
"""Calls over which the seconds of the stages are averaged."""
COMPARED_FRAMES = 4
"""Frames whose label maps are compared between runners."""


class Worker:
    """Answers commands about one runner; a command is a method, and its answer a dictionary."""

    def __init__(self) -> None:
        self.commands: dict[str, Callable[..., dict[str, Any]]] = {
            "open": self.open, "calls": self.calls, "stages": self.stages, "stream": self.stream, "finish": self.finish,
        }  # fmt: skip

    def open(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Load the runner and call it a few times, which also compiles a compiled one."""
        self.setting = Setting.from_json(setting)
        count = max(FRAMES, self.setting.batch)
        frames = make_frames(count, self.setting.size, self.setting.pictures, self.setting.channels)
        self.frames = itertools.cycle(frames)
        self.compared_frames = frames[:COMPARED_FRAMES]
        before = device_bytes(self.setting)
        start = perf_counter()
        self.runner = open_runner(self.setting)
        for _ in range(WARM_UP_CALLS):
            self.runner.predict(self.batch())
        ready = perf_counter() - start
        after = device_bytes(self.setting)
        return {
            "backend": self.runner.backend,
            "ready_s": ready,
            "gpu_mib": None if after is None or before is None else (after - before) / 2**20,
        }

    def batch(self) -> list[np.ndarray]:
        """The next frames for one call."""
        return [next(self.frames) for _ in range(self.setting.batch)]

    def calls(self, seconds: float) -> dict[str, Any]:
        """Call the runner for so many seconds, at least once -> seconds of each call."""
        samples: list[float] = []
        end = perf_counter() + seconds
        while not samples or perf_counter() < end:
            frames = self.batch()
            start = perf_counter()
            self.runner.predict(frames)
            samples.append(perf_counter() - start)
        return {"seconds": samples}

    def stages(self) -> dict[str, Any]:
        """Mean seconds of a batch's stages."""
        samples = [self.runner.timed(self.batch()) for _ in range(STAGE_CALLS)]
        return {"stages": StageSeconds(*(float(np.mean(column)) for column in zip(*samples, strict=True)))._asdict()}

    def stream(self, seconds: float) -> dict[str, Any]:
        """Stream frames for so many seconds -> frames a second with several in flight."""
        end = perf_counter() + seconds

        def frames() -> Iterator[np.ndarray]:
            yield next(self.frames)
            while perf_counter() < end:
                yield next(self.frames)

        start = perf_counter()
        results = self.runner.stream(frames())
        count = None if results is None else sum(1 for _ in results)
        return {"frames_per_s": None if count is None else count / (perf_counter() - start)}

    def finish(self, maps: str) -> dict[str, Any]:
        """Write the label maps of a few frames to a file -> peak memory, None where the system does not record it."""
        results = self.runner.predict(self.compared_frames)
        np.save(maps, np.stack([label_map(result, self.setting.task, self.setting.size) for result in results]))
        peak = None
        with contextlib.suppress(OSError):
            peak = peak_resident_bytes() / 2**20
        return {"peak_rss_mib": peak}


def device_bytes(setting: Setting) -> int | None:
    """Bytes in use on the GPU, the context of this process included; None for a runner that needs no GPU."""
    if setting.kind != "bundle":
        if not setting.device.startswith("cuda"):
            return None
        import torch

        free, total = torch.cuda.mem_get_info(torch.device(setting.device))
        return int(total - free)
    manifest, _ = read_manifest(setting.path)
    on_cpu = setting.device in CPU_BACKENDS
    if on_cpu or tensorrt_obstacle(manifest, setting.device_index, setting.precision) is not None:
        return None  # without a CUDA context, whose memory would count as the runner's
    from cuda.bindings import runtime as cuda

    cuda.cudaSetDevice(setting.device_index)
    status, free, total = cuda.cudaMemGetInfo()
    return int(total - free) if status == cuda.cudaError_t.cudaSuccess else None


def serve(commands: TextIO, answers: TextIO) -> None:
    """Answer each line ``{"do": NAME, ...}`` by a line, ``{"error": ...}`` if it fails, until the end of the input."""
    worker = Worker()
    for line in commands:
        request = json.loads(line)
        try:
            answer = worker.commands[request.pop("do")](**request)
        except Exception as error:  # the report names every failure, of any kind
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    serve(sys.stdin, answers)
