"""The GPU backend on a GPU: recorded launches and graphs, with a stand-in for the network and a TensorRT engine."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from maskformer_fast.config import TASKS
from maskformer_fast.core.image_resize import resize_array
from maskformer_fast.deploy.build.record_launches import compile_launches, record_launches
from maskformer_fast.deploy.bundle.folder import Bundle, extend_bundle, write_bundle
from maskformer_fast.deploy.bundle.launches import MaskType, padded_size
from maskformer_fast.deploy.bundle.manifest import Shape
from maskformer_fast.deploy.runtime.cuda_backend import TensorRTBackend
from maskformer_fast.deploy.runtime.session import load
from maskformer_fast.inference import postprocess
from maskformer_fast.structures import Predictions
from tests.support.fake_cuda import FakeDriver
from tests.support.fake_engine import fake_tensorrt, logits_of
from tests.support.launch_cases import CLASSES, QUERIES, THINGS, fake_files, make_frames, make_manifest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
SHAPES = (Shape(2, 120, 161), Shape(1, 211, 90))


@pytest.fixture(scope="module")
def target() -> str:
    pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python")
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def device_network(driver: Any, pixels: list[np.ndarray]) -> types.ModuleType:
    """The fake TensorRT on real memory.

    Its network copies logits that lie on the device, work that a graph captures. The first run, which is not captured,
    computes these logits from the images.
    """
    module = fake_tensorrt(FakeDriver(lambda *arguments: None))
    stock = module.Runtime.deserialize_cuda_engine

    def deserialise(self: Any, content: bytes) -> Any:
        engine = stock(self, content)
        create = engine.create_execution_context

        def context(strategy: Any) -> Any:
            made = create(strategy)
            made.execute_async_v3 = lambda stream: copy_logits(made, stream)
            return made

        engine.create_execution_context = context
        return engine

    kept: list[torch.Tensor] = []

    def check(status: Any, *values: Any) -> None:
        assert int(status) == 0, status

    def copy_logits(made: Any, stream: int) -> bool:
        facts, mask_size = made.facts, made.get_tensor_shape("mask_logits")[2:]
        images = np.stack(pixels) if len(pixels) == made.shape[0] else np.zeros(made.shape, np.uint8)
        for name, logits in zip(
            ("class_logits", "mask_logits"),
            logits_of(images, facts["queries"], facts["classes"], mask_size, facts["dtype"]), strict=True,
        ):  # fmt: skip
            if not made.__dict__.get(name):
                kept.append(torch.from_numpy(logits).cuda())  # in the first run, which is not captured
                made.__dict__[name] = kept[-1].data_ptr()
                torch.cuda.synchronize()
            check(*driver.cuMemcpyDtoDAsync(made.addresses[name], made.__dict__[name], logits.nbytes, stream))
        return True

    module.Runtime.deserialize_cuda_engine = deserialise
    return module


@pytest.mark.parametrize("masks", ["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_kernels_in_a_graph_equal_the_cpu(masks: MaskType, shape: Shape, target: str, tmp_path: Path) -> None:
    from cuda.bindings import driver

    manifest = make_manifest(masks, short_edge=100)
    engine = replace(manifest.engines[0], targets=(target,))
    preprocess = replace(manifest.preprocess, max_size=300)
    manifest = replace(manifest, engines=(engine,), kernels=(target,), preprocess=preprocess)
    recorded = record_launches(manifest, [shape], TASKS, masks)
    fakes = fake_files(manifest, recorded)
    files = compile_launches(recorded, [target]) | {"engines/fake.engine": fakes["engines/fake.engine"]}
    bundle = write_bundle(tmp_path / "bundle", manifest, files)
    frames = make_frames(shape, 1)
    pixels = [resize_array(frame, 100, 300).transpose(2, 0, 1) for frame in frames]
    padded = padded_size(manifest.preprocess, *pixels[0].shape[1:])
    class_logits, mask_logits = (
        torch.from_numpy(logits)
        for logits in logits_of(np.stack(pixels), QUERIES, CLASSES, (padded[0] // 4, padded[1] // 4), masks)
    )
    sizes = torch.tensor([pixels[0].shape[1:]] * shape.batch)
    eye = torch.eye(QUERIES).expand(1, shape.batch, -1, -1)
    predictions = Predictions(class_logits[None], eye, mask_logits, sizes, padded)
    outputs = [(shape.height, shape.width)] * shape.batch
    settings = manifest.postprocess
    with patch.dict(sys.modules, {"tensorrt": device_network(driver, pixels)}):
        backend = TensorRTBackend(bundle, 0, 2)
        try:
            for _ in range(4):  # captured in both slots, then replayed
                results = {task: backend.collect(backend.submit(frames, task))[0] for task in TASKS}
            free = torch.cuda.mem_get_info()[0]
            for _ in range(50):
                _, seconds = backend.collect(backend.submit(frames, "panoptic"))
            assert torch.cuda.mem_get_info()[0] >= free, "memory was allocated after warming up"
            assert backend.graph_obstacle is None
            assert 0 < seconds.preprocess < 1 and 0 < seconds.postprocess < 1
        finally:
            backend.close()
    for result, expected in zip(results["semantic"], postprocess.semantic(predictions, outputs), strict=True):
        assert np.mean(result.labels == expected.labels.numpy()) > (0.9999 if masks == "float32" else 0.99)
    panoptic = postprocess.panoptic(
        predictions, outputs, THINGS, settings.object_mask_threshold, settings.overlap_threshold
    )
    for result, expected in zip(results["panoptic"], panoptic, strict=True):
        assert np.mean(result.id_map == expected.id_map.numpy()) > 0.9999
    instance = postprocess.instances(predictions, outputs, THINGS, 9)
    for result, expected in zip(results["instance"], instance, strict=True):
        assert np.array_equal(result.labels, expected.labels.numpy())
        assert np.mean(result.masks == expected.masks.numpy()) > 0.9999
        assert np.allclose(result.scores, expected.scores.numpy(), rtol=1e-4)


def test_resized_pixels_are_pillows(target: str) -> None:
    """The kernel that a bundle contains gives Pillow's pixels, bit for bit."""
    from maskformer_fast.kernels.resize import resize_forward
    from maskformer_fast.ops.resize import filters_columns_first

    (frame,) = make_frames(Shape(1, 1080, 1920), 3)
    expected = resize_array(frame, 512, 2048).transpose(2, 0, 1)
    out = torch.empty(1, *expected.shape, dtype=torch.uint8, device="cuda")
    size = expected.shape[1:]
    resize_forward(torch.from_numpy(frame).cuda()[None], size, out, filters_columns_first(frame.shape[:2], size))
    assert np.array_equal(out[0].cpu().numpy(), expected)


@pytest.fixture(scope="module")
def engine_bundle(target: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small network's bundle with kernels and an engine for this GPU, built by the TensorRT that is installed."""
    if not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")):
        pytest.skip("needs TensorRT")
    from maskformer_fast.config import TestConfig
    from maskformer_fast.deploy.build.tensorrt import EngineConfig, build_engine
    from tests.support.tiny_bundle import tiny_bundle

    folder = tmp_path_factory.mktemp("engine") / "bundle"
    bundle, _ = tiny_bundle(folder, TestConfig(short_edge=96, max_size=300))
    config = EngineConfig("fp32", min_shape=(1, 64, 64), opt_shape=(1, 96, 128), max_shape=(2, 320, 320))
    content, entry = build_engine(bundle.read("raw.onnx"), config, progress=False)
    files = compile_launches(record_launches(bundle.manifest, SHAPES, TASKS), [target])
    return extend_bundle(bundle, {**files, entry.file: content}, engines=(entry,), kernels=(target,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_engine_and_kernels_agree_with_the_cpu(engine_bundle: Bundle, shape: Shape) -> None:
    pytest.importorskip("onnxruntime")
    frames = make_frames(shape, 1)
    with load(engine_bundle, "onnxruntime") as host, load(engine_bundle, "tensorrt") as device:
        for expected, result in zip(host.predict(frames), device.predict(frames), strict=True):
            assert np.mean(result.labels == expected.labels) > 0.995
        for expected, result in zip(host.predict(frames, "panoptic"), device.predict(frames, "panoptic"), strict=True):
            assert np.mean(result.id_map == expected.id_map) > 0.99
        for expected, result in zip(host.predict(frames, "instance"), device.predict(frames, "instance"), strict=True):
            assert abs(len(result.labels) - len(expected.labels)) <= 1
            assert len(result.scores) == 0 or result.scores[0] == pytest.approx(expected.scores[0], abs=1e-2)
        assert isinstance(device._backend, TensorRTBackend)
        assert device._backend.graph_obstacle is None, "engines of such networks must run as graphs"
        streamed = list(device.stream(frames * 4))
        assert len(streamed) == 4 * len(frames)
        for first, again in zip(streamed, streamed[len(frames) :], strict=False):
            assert np.array_equal(first.labels, again.labels)


def test_two_backends_run_in_one_process(engine_bundle: Bundle) -> None:
    frames = make_frames(SHAPES[1], 1)
    with load(engine_bundle, "tensorrt") as first, load(engine_bundle, "tensorrt") as second:
        assert np.array_equal(first.predict(frames)[0].labels, second.predict(frames)[0].labels)
    with load(engine_bundle, "tensorrt") as again:
        assert len(again.predict(frames)) == 1
    torch.zeros(1, device="cuda")  # torch can still use the device
