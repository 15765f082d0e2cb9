"""Painting of the synthetic scenes: signed distances of the shapes, patterns, regions and light.

All functions are vectorised NumPy on float32. Lengths are in pixels of the scene unless a comment says otherwise.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

KINDS = ("circle", "square", "triangle", "star", "ring", "cross", "crescent", "flower", "hexagon", "ellipse")
PATTERNS = ("plain", "striped", "dotted", "checked", "ribbed")
GROUNDS = ("grass", "water", "sand", "brick", "clouds", "planks", "gravel", "tiles")
HUES = ("red", "orange", "yellow", "lime", "green", "mint", "cyan", "azure", "blue", "violet", "magenta", "rose")

EXTENT = 1.5
"""Largest distance, in radii, of any shape's points from its centre."""


def hsv_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert one colour, all numbers in 0..1 (the hue wraps) -> [3] float32."""
    k = (np.array([5.0, 3.0, 1.0]) + hue * 6.0) % 6.0
    return (value - value * saturation * np.minimum(np.minimum(k, 4.0 - k), 1.0).clip(0.0)).astype(np.float32)


@lru_cache(maxsize=256)
def _lerp_matrix(cells: int, size: int) -> np.ndarray:
    """Make the matrix that interpolates ``cells + 1`` knots linearly at ``size`` pixels -> [size, cells + 1]."""
    position = (np.arange(size) + 0.5) * cells / size
    left = np.minimum(position.astype(np.int64), cells - 1)
    matrix = np.zeros((size, cells + 1), dtype=np.float32)
    rows = np.arange(size)
    matrix[rows, left] = left + 1 - position
    matrix[rows, left + 1] += position - left
    return matrix


def smooth_noise(rng: np.random.Generator, size: tuple[int, int], cell: tuple[float, float]) -> np.ndarray:
    """Draw value noise with knots ``cell`` (height, width) pixels apart -> [H, W], mean 0, roughly -1..1."""
    down, across = (max(1, round(side / step)) for side, step in zip(size, cell, strict=True))
    knots = rng.random((down + 1, across + 1), dtype=np.float32) * 2.0 - 1.0
    return _lerp_matrix(down, size[0]) @ knots @ _lerp_matrix(across, size[1]).T


def signed_distance(
    kind: str,
    x: np.ndarray,  # [h, w], in radii, from the shape's centre
    y: np.ndarray,  # [h, w]
) -> np.ndarray:
    """Compute the distance to a shape's outline in radii, negative inside -> [h, w].

    Every kind has an area of about 2.5 radii squared.
    """
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.82
    if kind == "triangle":
        return np.maximum(0.866 * np.abs(x) + 0.5 * y, -y) - 0.68
    if kind == "cross":
        u, v = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(u - 1.08, v - 0.37), np.maximum(v - 1.08, u - 0.37))
    if kind == "hexagon":
        return np.maximum(0.866 * np.abs(x) + 0.5 * np.abs(y), np.abs(y)) - 0.86
    if kind == "ellipse":
        return (np.sqrt((x / 1.32) ** 2 + (y / 0.62) ** 2) - 1.0) * 0.7
    rho = np.sqrt(x * x + y * y)
    if kind == "circle":
        return rho - 0.9
    if kind == "ring":
        return np.abs(rho - 0.78) - 0.27
    if kind == "crescent":
        return np.maximum(rho - 1.1, 0.82 - np.sqrt((x - 0.62) ** 2 + y * y))
    theta = np.arctan2(x, y)
    if kind == "flower":
        return (rho - 0.88 - 0.26 * np.cos(5.0 * theta)) * 0.7
    if kind == "star":
        half = np.pi / 5
        folded = np.abs((theta + half) % (2 * half) - half)  # angle from the nearest tip
        tip, dent = 1.38, 0.58
        edge_x, edge_y = tip - dent * np.cos(half), dent * np.sin(half)  # from the tip to the dent beside it
        across, along = (float(part / np.hypot(edge_x, edge_y)) for part in (edge_y, edge_x))
        return rho * (np.cos(folded) * across + np.sin(folded) * along) - tip * across
    raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")


def shape_pattern(
    pattern: str,
    x: np.ndarray,  # [h, w], in radii, from the shape's centre
    y: np.ndarray,  # [h, w]
    period: float,
) -> np.ndarray | None:
    """Compute the weight of a shape's second tone -> [h, w] 0..1 (soft edges), or None for a plain shape."""
    k = np.float32(2 * np.pi / period)
    if pattern == "plain":
        return None
    if pattern == "striped":
        wave = np.sin(k * y)
    elif pattern == "dotted":
        wave = np.cos(k * x) * np.cos(k * y) * 2.0 - 0.5
    elif pattern == "checked":
        wave = np.sin(k * 0.7 * x) * np.sin(k * 0.7 * y) * 3.0
    elif pattern == "ribbed":
        wave = np.sin(k * np.sqrt(x * x + y * y))
    else:
        raise ValueError(f"pattern: expected one of {', '.join(PATTERNS)}, got {pattern!r}")
    return (wave * 2.0 + 0.5).clip(0.0, 1.0)


def ground_texture(rng: np.random.Generator, ground: str, size: tuple[int, int]) -> np.ndarray:
    """Draw the relief of one ground over the complete scene -> [H, W], about -1..1."""
    unit = min(size) / 128 * rng.uniform(0.85, 1.2)  # the texture scales with the scene
    y, x = (axis * np.float32(1 / unit) for axis in _pixel_grid(size))
    if ground == "grass":
        return smooth_noise(rng, size, (7 * unit, 1.6 * unit)) * 1.3
    if ground == "water":
        sway = smooth_noise(rng, size, (9 * unit, 26 * unit))
        return np.sin(y * 0.9 + 4.0 * sway + rng.uniform(0, 6)) * 0.8
    if ground == "sand":
        return smooth_noise(rng, size, (1.5 * unit, 1.5 * unit)) * 0.7
    if ground == "clouds":
        return smooth_noise(rng, size, (24 * unit, 36 * unit)) + 0.6 * smooth_noise(rng, size, (9 * unit, 14 * unit))
    if ground == "gravel":
        return 1.4 - np.abs(smooth_noise(rng, size, (4 * unit, 4 * unit))) * 4.0
    x, y = _turned(x, y, rng.uniform(-0.2, 0.2))
    if ground == "brick":
        row = np.floor(y / 7.0)
        gap = np.minimum(np.abs((x / 14.0 + 0.5 * row) % 1.0 - 0.5) * 14.0, np.abs((y / 7.0) % 1.0 - 0.5) * 7.0)
        return np.float32(1.2) * (gap < 0.8) - 0.3 + 0.3 * smooth_noise(rng, size, (4 * unit, 8 * unit))
    if ground == "planks":
        tones = rng.uniform(-0.8, 0.8, 64).astype(np.float32)
        plank = np.floor(x / 9.0).astype(np.int64)
        grain = smooth_noise(rng, size, (12 * unit, 1.5 * unit))
        return np.where(np.abs((x / 9.0) % 1.0 - 0.5) > 0.42, -1.2, tones[plank % 64]) + 0.3 * grain
    if ground == "tiles":
        x, y = _turned(x, y, np.pi / 4)
        return np.float32(1.4) * ((np.floor(x / 8.0) + np.floor(y / 8.0)) % 2) - 0.7
    raise ValueError(f"ground: expected one of {', '.join(GROUNDS)}, got {ground!r}")


def region_map(rng: np.random.Generator, size: tuple[int, int], regions: int) -> np.ndarray:
    """Cut the scene into ``regions`` parts with wavy borders -> [H, W] int64 of 0..regions-1."""
    y, x = _pixel_grid(size)
    short = min(size)
    wander = smooth_noise(rng, size, (short / 4, short / 4)) * (0.10 * short)
    if rng.random() < 0.5:  # bands, mostly near horizontal
        turned = _turned(x - size[1] / 2, y - size[0] / 2, rng.normal(0.0, 0.5))[1] + wander
        span = 0.42 * size[0]
        borders = np.linspace(-span, span, regions + 1)[1:-1] + rng.uniform(-0.35, 0.35, regions - 1) * span / regions
        return np.searchsorted(borders.astype(np.float32), turned.ravel()).reshape(size)
    centres = _spread_points(rng, regions) * np.array(size)
    distance = [np.square(y + wander - cy) + np.square(x - wander - cx) for cy, cx in centres.astype(np.float32)]
    return np.argmin(np.stack(distance), axis=0)


def light_field(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Draw the brightness of the scene's light -> [H, W], around 1."""
    short = min(size)
    return rng.uniform(0.8, 1.1) * (1.0 + 0.18 * smooth_noise(rng, size, (0.8 * short, 0.8 * short)))


def _spread_points(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw points several times and keep the draw of largest minimal distance -> [count, 2] of 0..1.

    Distant points avoid very thin Voronoi cells.
    """
    draws = rng.uniform(0.1, 0.9, (8, count, 2))
    gaps = np.square(draws[:, :, None] - draws[:, None]).sum(-1) + 9.0 * np.eye(count)
    return draws[gaps.min((1, 2)).argmax()]


@lru_cache(maxsize=8)
def _pixel_grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column of every pixel's centre, float32 [H, W] each; cached, and therefore read-only."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32) + np.float32(0.5)
    y.setflags(write=False)
    x.setflags(write=False)
    return y, x


def _turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Rotate the axes by ``angle`` radians."""
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x
