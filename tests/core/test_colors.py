"""Default colours: distinct, and the same for a class whatever the number of classes."""

from __future__ import annotations

import numpy as np
import pytest

from maskformer_fast.core.colors import default_colors


@pytest.mark.parametrize("count", [0, 1, 2, 19, 150, 847, 5000])
def test_colors_are_distinct_and_a_prefix_of_those_of_more_classes(count: int) -> None:
    colors = default_colors(count)
    assert len(set(colors)) == count == len(colors) and (0, 0, 0) not in colors
    assert all(0 <= value <= 255 and isinstance(value, int) for color in colors for value in color)
    assert default_colors(count + 1)[:count] == colors, "a new class keeps the others' colours"
    if 1 < count <= 19:
        distance = [np.abs(np.subtract(a, b)).sum() for i, a in enumerate(colors) for b in colors[:i]]
        assert min(distance) > 40, "few classes can be told apart"


def test_a_bad_count_is_refused() -> None:
    for bad, error in ((-1, ValueError), (2**21, ValueError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="n: expected"):
            default_colors(bad)  # type: ignore[arg-type]
