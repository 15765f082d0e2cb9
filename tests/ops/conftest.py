from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.instruction_sets import INSTRUCTION_SETS, instruction_set


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs with every instruction set of this processor in turn."""
    with instruction_set(request.param):
        yield request.param
