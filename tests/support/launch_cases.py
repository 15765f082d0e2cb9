"""Bundles of real recorded launches, fake machine code and a fake engine, for the backend on a fake GPU."""

from __future__ import annotations

import base64
import ctypes
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from maskformer_fast.config import TASKS
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.deploy.bundle.folder import Bundle, write_bundle
from maskformer_fast.deploy.bundle.launches import FILE, Cubin, Kernel, LaunchFile
from maskformer_fast.deploy.bundle.manifest import Engine, Manifest, Postprocess, Preprocess, Profile, Shape, TensorSpec
from maskformer_fast.inference_config import PanopticRule
from tests.support.fake_cuda import FakeDriver
from tests.support.fake_engine import fake_tensorrt

TARGET = "sm_87"
QUERIES, CLASSES = 6, 5
SHAPES = (Shape(2, 11, 19), Shape(1, 17, 10))
THINGS = (True, False, True, False, True)


def make_manifest(
    masks: str = "float32", rule: PanopticRule = "maskformer", short_edge: int | None = 12, **changes: Any
) -> Manifest:
    metadata = Metadata("five", tuple("abcde"), THINGS, tuple(range(CLASSES)), ((0, 0, 0),) * CLASSES)
    shape = ("batch", QUERIES, "h", "w")
    class_logits = TensorSpec("class_logits", "float32", (*shape[:2], CLASSES + 1))
    outputs = (class_logits, TensorSpec("mask_logits", masks, shape))
    profile = Profile(Shape(1, 8, 8), Shape(1, 32, 32), Shape(8, 256, 256))
    engine = Engine("engines/fake.engine", "tensorrt", "10.9.0.34", "fp16", (TARGET,), profile, {}, outputs)
    facts = {
        "name": "fake", "created_with": {}, "num_queries": QUERIES, "num_classes": CLASSES, "metadata": metadata,
        "preprocess": Preprocess((0.0,) * 3, (1.0,) * 3, short_edge, 64, 32),
        "postprocess": Postprocess(0.3, 0.3, 9, rule), "graphs": {}, "engines": (engine,), "kernels": (TARGET,),
    }  # fmt: skip
    return Manifest(**(facts | changes))


def fake_files(manifest: Manifest, recorded: Any, **engine_facts: Any) -> dict[str, bytes]:
    """Files of a bundle: the recorded launches, a fake cubin for each kernel, an engine."""
    kernels = tuple(recorded.kernels.values())
    cubins = tuple(Cubin(kernel.name, TARGET, kernel.function, 64 << 10, 2) for kernel in kernels)
    constants = {digest: base64.b64encode(content).decode() for digest, content in recorded.constants.items()}
    launch_file = LaunchFile(kernels, constants, cubins, tuple(recorded.sequences))
    files = {cubin.file: fake_cubin(kernel) for cubin, kernel in zip(cubins, kernels, strict=True)}
    facts = {
        "queries": manifest.num_queries, "classes": manifest.num_classes, "divisor": 32, "scratch": 1000,
        "dtype": recorded.sequences[0].mask_dtype,
    }  # fmt: skip
    return files | {FILE: launch_file.to_bytes(), "engines/fake.engine": json.dumps(facts | engine_facts).encode()}


def fake_cubin(kernel: Kernel) -> bytes:
    return f"fake {kernel.name} {kernel.function}".encode()


def make_bundle(folder: Path, manifest: Manifest, shapes: Sequence[Shape] = SHAPES, **engine_facts: Any) -> Bundle:
    from maskformer_fast.deploy.build.record_launches import record_launches

    masks: Any = manifest.engines[0].outputs[1].dtype
    recorded = record_launches(manifest, shapes, TASKS, masks)
    return write_bundle(folder, manifest, fake_files(manifest, recorded, **engine_facts))


def make_frames(shape: Shape, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (shape.height, shape.width, 3), dtype=np.uint8) for _ in range(shape.batch)]


@contextmanager
def fake_gpu(driver: FakeDriver, **facts: Any) -> Iterator[Any]:
    """Replace cuda-python and TensorRT by the fakes during the block -> the fake TensorRT."""
    tensorrt = fake_tensorrt(driver, **facts)
    bindings: Any = type(sys)("cuda.bindings")
    bindings.driver = driver
    modules = {"cuda": type(sys)("cuda"), "cuda.bindings": bindings, "cuda.bindings.driver": driver}
    with patch.dict(sys.modules, {**modules, "tensorrt": tensorrt}):
        yield tensorrt


def read_parameters(address: int, types: Sequence[str], null_pointers: int) -> list[Any]:
    """Values of a launch's parameters, read as the driver does: from an array of pointers."""
    kinds: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
    pointers = (ctypes.c_void_p * (len(types) + null_pointers)).from_address(address)
    values = []
    for pointer, kind in zip(pointers, [*types, *["*u8"] * null_pointers], strict=True):
        assert pointer is not None
        values.append(kinds.get(kind, ctypes.c_uint64).from_address(pointer).value)
    assert values[len(types) :] == [0] * null_pointers
    return values[: len(types)]
