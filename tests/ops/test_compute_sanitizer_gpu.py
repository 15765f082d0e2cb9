"""Every operator on small inputs under NVIDIA's memcheck and racecheck: accesses out of bounds, races in shared memory.

The checks of all operators run side by side, as most of their time is the start of Python and compilers.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.support.compute_sanitizer import find_sanitizer, run_under_sanitizer
from tests.support.operator_calls import CALLS

pytestmark = pytest.mark.gpu
TOOLS = ("memcheck", "racecheck")
SECONDS = 150.0
"""Time limit of one operator under one tool."""
WORKERS = 9
"""Checks that run at the same time."""


@pytest.fixture(scope="module")
def checks() -> Iterator[dict[tuple[str, str], Future[tuple[int, str]]]]:
    """Status and output by tool and operator; all start with the first test."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH, nor in $CUDA_HOME/bin")
    with ThreadPoolExecutor(WORKERS) as pool:
        yield {
            (tool, name): pool.submit(
                run_under_sanitizer, sanitizer, tool, "-m", "tests.support.operator_calls", "cuda", name,
                seconds=SECONDS,
            )
            for tool in TOOLS
            for name in CALLS
        }  # fmt: skip
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("tool", TOOLS)
def test_operator_has_no_errors(tool: str, name: str, checks: dict[tuple[str, str], Future[tuple[int, str]]]) -> None:
    status, output = checks[tool, name].result()
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device")  # as inside some virtual machines
    assert status == 0, output[-4000:]
    assert f"called {name}" in output, "the operator itself failed"
