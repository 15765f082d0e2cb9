"""Commands of docs/deployment.md and the README about bundles: options that exist, with valid values."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from maskformer_fast.benchmark.__main__ import BenchmarkOptions
from maskformer_fast.cli import parse
from maskformer_fast.config import TestConfig
from maskformer_fast.data.datasets.presets import PRESETS
from maskformer_fast.deploy.runtime import session as runtime
from maskformer_fast.deploy.triton_server.options import TritonServerOptions
from maskformer_fast.evaluate import EvaluateOptions
from maskformer_fast.export import ExportOptions
from maskformer_fast.predict import PredictOptions
from tests.support.paths import ROOT
from tests.support.tiny_bundle import tiny_bundle

PAGES = {name: (ROOT / name).read_text() for name in ("docs/deployment.md", "README.md")}
OPTIONS: dict[str, Any] = {
    "benchmark": BenchmarkOptions, "deploy.triton_server": TritonServerOptions, "predict": PredictOptions,
    "evaluate": EvaluateOptions,
}  # fmt: skip


def commands(name: str) -> list[str]:
    """Return every call of a module on the pages that is about a bundle, without its comment."""
    calls = []
    for page in PAGES.values():
        lines = [line.partition("  #")[0] for line in page.replace("\\\n", " ").splitlines()]
        calls += [line for line in lines if line.startswith(f"python -m maskformer_fast.{name} ")]
    return [line for line in calls if name == "export" or " bundle" in line]


@pytest.mark.parametrize("name", OPTIONS)
def test_commands_on_bundles_have_valid_options(name: str) -> None:
    lines = commands(name)
    assert lines
    for line in lines:
        options = parse(OPTIONS[name], shlex.split(line)[3:], prog=name)
        assert "bundle" in vars(options).values()
        if name == "evaluate":
            named = options.data.dataset in PRESETS and options.data.root
            assert named or options.data.dataset == "shapes", "a bundle does not contain its data set"


def test_exports_have_valid_options() -> None:
    lines = commands("export")
    assert len(lines) >= 6
    for line in lines:
        options = parse(ExportOptions, shlex.split(line)[3:], prog="export")
        assert options.engine_only == (options.output is None)
        assert bool(options.target) == bool(options.frames)


def test_python_calls_methods_of_the_runtime_with_known_arguments() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGES["docs/deployment.md"], re.DOTALL)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert hasattr(runtime.Runtime, node.func.attr)
                called = getattr(runtime.Runtime, node.func.attr)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "load":
                called = runtime.load
            else:
                continue
            known = inspect.signature(called).parameters.keys()
            assert {keyword.arg for keyword in node.keywords} <= known


def test_kernels_compile_for_every_named_target() -> None:
    from maskformer_fast.kernels import aot

    targets = set(re.findall(r"`(sm_\d+)`", PAGES["docs/deployment.md"])) - {"sm_101"}
    assert {"sm_87", "sm_110"} <= targets
    assert targets <= set(aot.SHARED_MEMORY_LIMITS)


WITHOUT_TORCH = """
import runpy
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import maskformer_fast.deploy.build.tensorrt

def build_engine(raw_onnx, config):
    raise ValueError(f"asked for {config.precision}")

maskformer_fast.deploy.build.tensorrt.build_engine = build_engine
sys.argv = ["export", sys.argv[1], "--engine-only", "--engine.precision", "bf16"]
runpy.run_module("maskformer_fast.export", run_name="__main__", alter_sys=True)
"""


def test_an_engine_is_added_without_torch(tmp_path: Path) -> None:
    bundle, _ = tiny_bundle(tmp_path / "bundle", TestConfig())
    command = [sys.executable, "-c", WITHOUT_TORCH, str(bundle.folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and result.stderr.strip() == "error: asked for bf16"
