from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Its default. As the environment sets the allocation, networks that tests load leave that of the test's process alone.
os.environ.setdefault("MALLOC_TOP_PAD_", str(128 << 10))
os.environ["MASKFORMER_FAST_CACHE"] = ""  # tests neither read nor write the user's cache


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _processes_without_coverage(request: pytest.FixtureRequest) -> Iterator[None]:
    """Do not measure the coverage of processes that a test marked `no_cover` starts."""
    if request.node.get_closest_marker("no_cover") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield
