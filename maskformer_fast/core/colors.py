"""Distinct, repeatable colours for any number of classes or segments."""

from __future__ import annotations

import colorsys

__all__ = ["default_colors"]

# (value, saturation) of each tone: neighbours in hue differ in lightness or saturation as well.
_TONES = (
    (0.95, 0.85), (0.65, 0.90), (1.00, 0.50), (0.45, 0.75), (0.80, 0.60), (0.90, 0.30), (0.55, 0.45), (0.75, 1.00),
)
_GOLDEN_RATIO = 0.6180339887498949  # step of the hue as a fraction of the circle; no hue comes twice


def default_colors(n: int) -> tuple[tuple[int, int, int], ...]:
    """n distinct RGB colours, of which the first m are `default_colors(m)`.

    Args:
        n: number of colours, at least 0.

    Returns:
        A tuple of n (red, green, blue) tuples of ints in 0..255, no two equal, none black (black marks void).

    Raises:
        TypeError: n is not an int.
        ValueError: n is negative or above 2**20.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n: expected an int, got {type(n).__name__}")
    if not 0 <= n <= 2**20:
        raise ValueError(f"n: expected a count from 0 to {2**20}, got {n}")
    colors: list[tuple[int, int, int]] = []
    used = {(0, 0, 0)}
    step = 0
    while len(colors) < n:
        value, saturation = _TONES[(step // 7) % len(_TONES)]
        red, green, blue = colorsys.hsv_to_rgb((0.02 + step * _GOLDEN_RATIO) % 1.0, saturation, value)
        color = (round(red * 255), round(green * 255), round(blue * 255))
        # Thousands of colours use up the tones; a colour that is taken is moved through the RGB cube to a free one.
        while color in used:
            code = (color[0] * 65536 + color[1] * 256 + color[2] + 7_368_787) % 2**24
            color = (code >> 16, code >> 8 & 255, code & 255)
        used.add(color)
        colors.append(color)
        step += 1
    return tuple(colors)
