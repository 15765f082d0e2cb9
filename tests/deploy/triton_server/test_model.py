"""The model of the Python backend, with a stand-in for the server's own module."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2 as schema

from maskformer_fast.config import TestConfig
from maskformer_fast.core.metadata import SegmentInfo
from maskformer_fast.deploy.bundle.folder import Bundle, write_bundle
from maskformer_fast.deploy.bundle.manifest import BundleError
from maskformer_fast.deploy.runtime import session as runtime
from maskformer_fast.deploy.triton_server.repository import write_repository
from tests.deploy.triton_server.test_repository import CLASSES, METADATA, options, served, tiny_bundle
from tests.support.tiny_bundle import tiny_bundle as tiny_network_bundle


class Server(types.ModuleType):
    """The part of ``triton_python_backend_utils`` that `ServedBundle` uses."""

    @dataclass
    class Tensor:
        name: str
        array: np.ndarray

        def as_numpy(self) -> np.ndarray:
            return self.array

    @dataclass
    class InferenceResponse:
        output_tensors: list[Server.Tensor]
        error: Server.TritonError | None = None

    @dataclass
    class TritonError:
        message: str

    @staticmethod
    def get_input_tensor_by_name(request: dict[str, np.ndarray], name: str) -> Server.Tensor:
        return Server.Tensor(name, request[name])


NUMPY = {"TYPE_UINT8": np.uint8, "TYPE_INT16": np.int16, "TYPE_INT32": np.int32, "TYPE_INT64": np.int64,
         "TYPE_FP32": np.float32, "TYPE_STRING": np.object_}  # fmt: skip


class Runtime:
    """Stand-in for `deploy.runtime.Runtime`, whose results depend on the images' values."""

    def __init__(self, bundle: Bundle) -> None:
        self.manifest, self.calls, self.closed = bundle.manifest, [], False

    def predict(self, images: list[np.ndarray], task: str) -> list[object]:
        self.calls.append(len(images))
        if any(image.size == 0 for image in images):
            raise ValueError("images: expected at least one pixel")
        return [getattr(self, task)(image) for image in images]

    def semantic(self, image: np.ndarray) -> object:
        return types.SimpleNamespace(labels=image.argmax(axis=2).astype(np.uint8))

    def panoptic(self, image: np.ndarray) -> object:
        ids = image.argmax(axis=2).astype(np.int32) - 1
        segments = [SegmentInfo(int(k), int(k), METADATA.is_thing[k], score=0.5 + k / 16, area=int((ids == k).sum()))
                    for k in np.unique(ids) if k >= 0]  # fmt: skip
        return types.SimpleNamespace(id_map=ids, segments=segments)

    def instance(self, image: np.ndarray) -> object:
        count = int(image[0, 0, 0]) % 3
        masks = np.packbits(image[..., :count].transpose(2, 0, 1) > 99, axis=-1, bitorder="little")
        return types.SimpleNamespace(
            labels=np.arange(count), scores=np.linspace(0.9, 0.5, count, dtype=np.float32),
            boxes=np.full((count, 4), count, np.float32), masks=masks,
        )  # fmt: skip

    def close(self) -> None:
        self.closed = True


def start_model(folder: Path, kind: str):
    """Import a model and start it, as the server does."""
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    parameters = {key: {"string_value": value.string_value} for key, value in served(folder).parameters.items()}
    model.initialize({
        "model_config": json.dumps({"parameters": parameters}), "model_instance_kind": kind,
        "model_instance_device_id": "3", "model_repository": "elsewhere", "model_version": "1", "model_name": "x",
    })  # fmt: skip
    return model


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Function that writes a task's model and starts it -> the model, its configuration, calls of `load`."""
    bundle = tiny_bundle(tmp_path / "bundle")
    loads: list[tuple[object, ...]] = []

    def load(folder: Path, backend: str, *, digest: str, device: int | None, precision: str | None) -> Runtime:
        loads.append((folder, backend, device, precision))
        return Runtime(Bundle.open(folder, digest))

    monkeypatch.setattr(runtime, "load", load)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Server("triton_python_backend_utils"))

    def start(task: str, kind: str = "CPU", **more: object):
        folder = write_repository(bundle, options(tmp_path, model="results", task=task, name=task, **more))
        return start_model(folder, kind), served(folder), loads

    return start


def check_response(config: schema.ModelConfig, response: Server.InferenceResponse, batch: int) -> dict[str, np.ndarray]:
    """Outputs by name, in the types and shapes of the configuration."""
    assert response.error is None
    found = {tensor.name: tensor.array for tensor in response.output_tensors}
    assert list(found) == [output.name for output in config.output]
    for output in config.output:
        array = found[output.name]
        assert array.dtype == NUMPY[schema.DataType.Name(output.data_type)]
        assert len(array) == batch and array.ndim == 1 + len(output.dims)
        assert all(dim in (-1, size) for dim, size in zip(output.dims, array.shape[1:], strict=True))
    return found


def random_images(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_each_request_is_answered_with_its_own_results(serve, task: str) -> None:
    model, config, loads = serve(task)
    assert loads == [(model.bundle, "auto", None, None)] and config.backend == "python"
    rng = np.random.default_rng(1)
    batches = [random_images(rng, *shape) for shape in ((1, 9, 13), (3, 5, 8), (2, 9, 13))]
    responses = model.execute([{"images": images} for images in batches])
    assert model.runtime.calls == [6], "requests run together"
    for images, response in zip(batches, responses, strict=True):
        found = check_response(config, response, len(images))
        for row, image in enumerate(images):
            wanted = getattr(model.runtime, task)(image)
            if task == "semantic":
                np.testing.assert_array_equal(found["labels"][row], wanted.labels)
            elif task == "panoptic":
                np.testing.assert_array_equal(found["id_map"][row], wanted.id_map)
                texts = json.loads(found["segments"][row, 0])
                assert [(t["id"], t["area"], t["score"]) for t in texts] == [
                    (s.id, s.area, s.score) for s in wanted.segments
                ]
                assert all(t["name"] == CLASSES[t["category"]] and t["category_id"] in (7, 8, 11) for t in texts)
            else:
                count = found["count"][row, 0]
                assert count == len(wanted.scores)
                for name in ("labels", "scores", "boxes", "masks"):
                    np.testing.assert_array_equal(found[name][row, :count], getattr(wanted, name))
                    assert not found[name][row, count:].any()
    stub = model.runtime
    model.finalize()
    assert stub.closed


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_results_equal_those_of_the_runtime(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", Server("triton_python_backend_utils"))
    thresholds = TestConfig(short_edge=None, object_mask_threshold=0.2, overlap_threshold=0.1)
    bundle, _ = tiny_network_bundle(tmp_path / "bundle", thresholds)
    folder = write_repository(bundle, options(tmp_path, model="results", task=task))
    model = start_model(folder, "CPU")
    rng = np.random.default_rng(3)
    batches = [random_images(rng, *shape) for shape in ((2, 40, 56), (1, 33, 47))]
    responses = model.execute([{"images": images} for images in batches])
    with runtime.load(bundle, "onnxruntime") as direct:
        for images, response in zip(batches, responses, strict=True):
            found = check_response(served(folder), response, len(images))
            for row, wanted in enumerate(direct.predict(list(images), task)):  # type: ignore[arg-type]
                if task == "semantic":
                    np.testing.assert_array_equal(found["labels"][row], wanted.labels)
                elif task == "panoptic":
                    np.testing.assert_array_equal(found["id_map"][row], wanted.id_map)
                    assert [text["id"] for text in json.loads(found["segments"][row, 0])] == [
                        segment.id for segment in wanted.segments
                    ]
                else:
                    count = found["count"][row, 0]
                    assert count == len(wanted.scores) > 0
                    np.testing.assert_array_equal(found["masks"][row, :count], wanted.masks)
    model.finalize()


def test_a_bad_request_does_not_fail_the_others(serve) -> None:
    model, config, _ = serve("semantic")
    rng = np.random.default_rng(2)
    requests = [{"images": random_images(rng, *shape)} for shape in ((1, 4, 4), (1, 0, 4), (2, 3, 3))]
    first, second, third = model.execute(requests)
    check_response(config, first, 1)
    check_response(config, third, 2)
    assert second.error.message == "ValueError: images: expected at least one pixel" and not second.output_tensors


def test_an_instance_uses_its_backend_and_device(serve) -> None:
    model, _, loads = serve("semantic", kind="GPU", backend="tensorrt")
    assert loads == [(model.bundle, "tensorrt", 3, None)]


def test_a_backend_and_a_precision_of_the_cpu_are_kept(serve) -> None:
    model, _, loads = serve("semantic", device="cpu", backend="openvino", precision="bf16")
    assert loads == [(model.bundle, "openvino", None, "bf16")]
    with pytest.raises(ValueError, match="device: expected gpu for the backend tensorrt, got cpu"):
        serve("semantic", device="cpu", backend="tensorrt")


def test_another_bundle_in_the_folder_is_refused(serve, tmp_path: Path) -> None:
    model, _, _ = serve("semantic")
    write_bundle(model.bundle, replace(model.runtime.manifest, name="another"), {
        name: (tmp_path / "bundle" / name).read_bytes() for name in model.runtime.manifest.files
    })  # fmt: skip
    with pytest.raises(BundleError, match="digest: expected"):
        model.initialize({
            "model_config": json.dumps({"parameters": {"task": {"string_value": "semantic"},
                                                       "backend": {"string_value": "auto"}}}),
            "model_instance_kind": "CPU", "model_instance_device_id": "0",
        })  # fmt: skip
