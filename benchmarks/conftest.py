"""Settings of ``pytest benchmarks``: skips without a GPU, and what is noted about the machine beside the figures.

    python -m pytest benchmarks --benchmark-only [-m "not gpu and not slow"] [-k semantic]
    python -m pytest benchmarks --benchmark-only --benchmark-autosave       # note this state ...
    python -m pytest benchmarks --benchmark-only --benchmark-compare        # ... and compare a later one with it
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskformer_fast.core.machine import installed_version


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Note the versions and the instruction set that the figures depend on."""
    from maskformer_fast.core.extension import load_extension

    packages = ("torch", "numpy", "scipy", "transformers")
    machine_info["packages"] = {name: installed_version(name) for name in packages}
    machine_info["isa"] = load_extension().available_isas()[-1]
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
