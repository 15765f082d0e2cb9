"""What the files of ``pytest benchmarks`` share: devices, groups, and what is noted beside the figures.

    python -m pytest benchmarks --benchmark-only [-m "not gpu"] [-k semantic]
    python -m pytest benchmarks --benchmark-only --benchmark-autosave       # note this state ...
    python -m pytest benchmarks --benchmark-only --benchmark-compare        # ... and compare a later one with it

Each group is one operation on one set of inputs, ours beside its peers. On a GPU a call ends when the GPU is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import Operation
from benchmarks.machine import version

Measure = Callable[[str, Operation], Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """The versions and the instruction set that the figures depend on."""
    from maskformer_fast.core.extension import load_extension

    machine_info["packages"] = {name: version(name) for name in ("torch", "numpy", "scipy", "transformers")}
    machine_info["isa"] = load_extension().available_isas()[-1]
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device; a test that does not ask for it runs on the CPU alone."""
    name: str = request.param
    return name


@pytest.fixture
def measure(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Measure:
    """``measure(group, operation)`` times the operation, beside the others of that group -> its result."""
    on_gpu = "device" in request.fixturenames and request.getfixturevalue("device") == "cuda"

    def run(group: str, operation: Operation) -> Any:
        def finished() -> object:
            result = operation()
            torch.cuda.synchronize()
            return result

        benchmark.group = f"{group} [GPU]" if on_gpu else group
        benchmark.extra_info["threads"] = torch.get_num_threads()
        return benchmark(finished if on_gpu else operation)

    return run


@pytest.fixture(autouse=True)
def _same_inputs() -> None:
    """Every side of a group draws the same inputs."""
    torch.manual_seed(0)
