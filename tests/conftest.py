from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

LONGEST = (
    "kernels/test_aot.py", "test_sanitizers.py", "kernels/test_interpreted.py", "deploy/test_onnx.py",
    "test_distributed.py", "test_cross_compile.py", "test_compiled_training.py", "test_export.py",
    "deploy/test_tapes.py", "test_step_sync.py", "test_build.py", "test_benchmark.py", "docs/test_pages.py",
    "test_demo_page.py", "test_benchmarks.py", "deploy/test_tensorrt.py", "test_faults.py", "test_trainer.py",
    "test_commands.py", "test_pytest_benchmark.py", "test_benchmark_cases.py", "test_scaling.py", "test_end_to_end.py",
    "modeling/test_inference.py", "test_winograd.py",
)  # fmt: skip
"""Files of more than a few seconds, the longest first: a process that is left with one at the end works alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0].removeprefix("tests/"), len(ranks)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _uncovered_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Processes that a test marked `no_cover` starts are not measured either."""
    if request.node.get_closest_marker("no_cover") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield
