"""Every case of `benchmarks.cases` for pytest-benchmark: a group is one case, of ours and its peer on the same inputs.

On a GPU a call ends when the GPU is done. Marked slow are the subjects whose calls take seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.__main__ import MODULES
from benchmarks.harness.case import OURS, Case
from benchmarks.harness.worker import load_cases

SLOW_SUBJECTS = {"criterion", "network", "train_step", "mask2former", "loader", "deployment", "end_to_end"}


def parameters() -> Iterator[Any]:
    for device in ("cpu", "cuda"):
        for module in MODULES:
            subject = module.rpartition(".")[2]
            marks = [pytest.mark.gpu] if device == "cuda" else []
            marks += [pytest.mark.slow] if subject in SLOW_SUBJECTS else []
            for case in load_cases(module, device):
                for name in (OURS, "peer") if case.peer else (OURS,):
                    yield pytest.param(device, case, name, marks=marks, id=f"{subject}-{device}-{case.name}-{name}")


@cache
def prepared(device: str, setup: Any) -> tuple[Any, Any]:
    """Work and inputs of the case at hand."""
    torch.manual_seed(0)
    work = setup(torch.device(device))
    return work, work.draw(0)


@pytest.mark.parametrize(("device", "case", "name"), parameters())
def test_case(benchmark: BenchmarkFixture, device: str, case: Case, name: str) -> None:
    torch.set_num_threads(case.threads if device == "cpu" else torch.get_num_threads())
    if name == OURS:
        prepared.cache_clear()  # frees the inputs of the case before
    work, inputs = prepared(device, case.setup)
    run = work.ours if name == OURS else work.peers[str(case.peer)]

    def call() -> None:
        run(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.name} [GPU]" if device == "cuda" else case.name
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "peer": case.peer}
    try:
        benchmark(call)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("maskformer_fast", "benchmarks"):
            raise
        pytest.skip(str(error))
