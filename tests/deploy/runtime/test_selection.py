"""Choice of backend and precision, by what is installed and what the bundle has; no library is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from maskformer_fast.config import TestConfig
from maskformer_fast.deploy.bundle.manifest import BundleError, Engine, Manifest, Profile, Shape
from maskformer_fast.deploy.runtime import selection
from maskformer_fast.deploy.runtime.selection import choose_backend
from tests.support.tiny_bundle import TinyNetwork, manifest_of, metadata_of

ONE = Shape(1, 64, 64)


def manifest(*engines: Engine, kernels: tuple[str, ...] = ()) -> Manifest:
    return replace(manifest_of(TinyNetwork(9, 5), metadata_of(5), TestConfig()), engines=engines, kernels=kernels)


def engine(api: Any, precision: str, *targets: str) -> Engine:
    return Engine(f"engines/{precision}.xml", api, "1", precision, targets, Profile(ONE, ONE, ONE), {}, ())


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(selection.importlib.util, "find_spec", lambda name: name if name in names else None)


@pytest.mark.parametrize("device", [0, None])
@pytest.mark.parametrize(
    ("installed", "precision", "expected"),
    [
        (("openvino", "onnxruntime"), None, ("openvino", "fp32")),
        (("openvino", "onnxruntime"), "fp32", ("openvino", "fp32")),
        (("openvino", "onnxruntime"), "bf16", ("openvino", "bf16")),
        (("onnxruntime",), None, ("onnxruntime", "fp32")),
        (("onnxruntime",), "fp32", ("onnxruntime", "fp32")),
    ],
)
def test_auto_takes_the_first_installed_library_that_has_the_precision(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], precision: Any, expected: tuple[str, str], device: Any
) -> None:
    install(monkeypatch, *installed)
    choice = choose_backend(manifest(), device=device, precision=precision)
    assert choice[:2] == expected
    why = "the fastest library" if expected[0] == "openvino" else "as openvino is not installed"
    assert choice.reason.startswith(f"on the CPU by {expected[0]} in {expected[1]} ({why})")
    assert ("not by tensorrt: engines: expected one for this GPU" in choice.reason) == (device == 0)


def test_an_int8_engine_is_used_unless_another_precision_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    quantised = manifest(engine("openvino", "int8"))
    install(monkeypatch, "openvino", "onnxruntime")
    for backend in ("auto", "openvino"):
        assert choose_backend(quantised, backend)[:2] == ("openvino", "int8")  # type: ignore[arg-type]
        assert choose_backend(quantised, backend, precision="fp32")[:2] == ("openvino", "fp32")  # type: ignore[arg-type]
    reason = "on the CPU by openvino in int8 (the fastest library, for which the bundle has an engine)"
    assert choose_backend(quantised, device=None).reason == reason
    assert choose_backend(quantised, "openvino").reason == reason.replace("the fastest library, ", "")
    assert choose_backend(quantised, "openvino", precision="fp32").reason == "on the CPU by openvino in fp32"
    assert choose_backend(quantised, "onnxruntime")[:2] == ("onnxruntime", "fp32")
    with pytest.raises(BundleError, match="without engines"):  # one for OpenVINO is none for a GPU
        choose_backend(quantised, "tensorrt")
    install(monkeypatch, "onnxruntime")
    assert choose_backend(quantised)[:2] == ("onnxruntime", "fp32")


@pytest.mark.parametrize(
    ("installed", "arguments", "error", "message"),
    [
        ((), {}, ModuleNotFoundError, r"openvino or onnxruntime is needed .*\[openvino\] or .*\[deploy\]"),
        (("onnxruntime",), {"precision": "bf16"}, ModuleNotFoundError, "^openvino is needed .* in bf16; install it"),
        (("openvino",), {"precision": "int8"}, BundleError, "openvino in int8, got none; build it with: .* openvino"),
        (("openvino",), {"precision": "fp16"}, ValueError, "precision: expected one of fp32, bf16, int8 on a CPU"),
        (("openvino",), {"precision": "fp64"}, ValueError, "precision: expected one of 'fp32', 'fp16', 'bf16'"),
        (("openvino",), {"precision": "fp8", "backend": "openvino"}, ValueError, "expected fp32 or bf16 or int8 with"),
        ((), {"precision": "int8", "backend": "onnxruntime"}, ValueError, "precision: expected fp32 with the backend"),
        ((), {"backend": "tensorrt", "device": None}, ValueError, "device: expected one that tensorrt runs on"),
        ((), {"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'onnxruntime'"),
        ((), {"device": -1}, ValueError, "device: expected >= 0, got -1"),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], arguments: Any, error: Any, message: str
) -> None:
    install(monkeypatch, *installed)
    with pytest.raises(error, match=message) as caught:
        choose_backend(manifest(), **arguments)
    assert "\n" not in str(caught.value)


def test_a_precision_on_a_gpu_is_that_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", "openvino")
    monkeypatch.setattr(selection, "gpu_target", lambda device: "sm_87")
    ready = manifest(engine("tensorrt", "fp16", "sm_87"), engine("openvino", "int8"), kernels=("sm_87",))
    assert choose_backend(ready)[:2] == ("tensorrt", None)
    assert choose_backend(ready, precision="fp16")[:2] == ("tensorrt", "fp16")
    assert choose_backend(ready, device=None)[:2] == ("openvino", "int8")
    assert choose_backend(ready, precision="bf16")[:2] == ("openvino", "bf16")
    with pytest.raises(BundleError, match=r"\(sm_87\) in fp32, got fp16; build it .* --engine.precision fp32"):
        choose_backend(ready, "tensorrt", precision="fp32")
