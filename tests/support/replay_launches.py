"""Replays a fake bundle's launches in Triton's interpreter: ``python -m tests.support.replay_launches BUNDLE OUT``.

It runs in a process of its own, because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import torch

from maskformer_fast.config import TASKS
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.bundle.launches import ELEMENT_BYTES, FILE, Kernel, LaunchFile
from tests.support.fake_cuda import FakeDriver
from tests.support.fake_engine import array_at
from tests.support.launch_cases import fake_gpu, make_frames, read_parameters

ELEMENTS = {"u8": "uint8", "i16": "int16", "i32": "int32", "i64": "int64", "fp16": "float16", "fp32": "float32"}


class Interpreter:
    """Runs the kernels of recorded launches on the memory of the host."""

    def __init__(self, launch_file: LaunchFile) -> None:
        self.kernels: dict[str, Kernel] = {kernel.name: kernel for kernel in launch_file.kernels}
        self.sequences = launch_file.sequences
        self.launched = 0

    def __call__(self, name: str, grid: tuple[int, int, int], threads: int, parameters: int) -> None:
        kernel = self.kernels[name]
        assert threads == 32 * kernel.num_warps
        types = [parameter.type for parameter in kernel.parameters]
        values: dict[str, Any] = {}
        for parameter, value in zip(kernel.parameters, read_parameters(parameters, types, 2), strict=True):
            assert not parameter.aligned or value % 16 == 0, parameter
            if parameter.type in ELEMENT_BYTES:
                value = torch.from_numpy(array_at(value, ELEMENTS[parameter.type[1:]], (1,)))
            values[parameter.name] = value
        jitted = getattr(importlib.import_module(f"maskformer_fast.kernels.{kernel.module}"), kernel.function)
        jitted[grid](**values, **kernel.constants)
        self.launched += 1


def main(folder: str, out: str) -> None:
    from maskformer_fast.deploy.runtime.cuda_backend import TensorRTBackend

    bundle = Bundle.open(folder)
    interpreter = Interpreter(LaunchFile.parse(bundle.read(FILE), bundle.manifest))
    driver = FakeDriver(interpreter)
    driver.eager = False
    results = {}
    with fake_gpu(driver):
        backend = TensorRTBackend(bundle, 0, 1)
        for shape in {sequence.frames for sequence in interpreter.sequences}:
            for task in TASKS:
                frames = make_frames(shape, 1)
                batch, seconds = backend.collect(backend.submit(frames, task))
                assert len(batch) == shape.batch and seconds.total > 0
                results[str(shape), task] = batch
        backend.close()
    assert not driver.alive and interpreter.launched > 0
    Path(out).write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
