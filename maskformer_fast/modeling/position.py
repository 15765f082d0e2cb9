"""Sine position embeddings of a feature map (DETR, Carion et al., 2020, section A.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10_000.0


def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Position embeddings -> [1, height*width, channels] float32.

    The first half of the channels encodes the row, the second half the column. Positions are normalised, from 0 to 2*pi
    over a map of any size. ``channels`` must be a multiple of 4 (a sine and a cosine on each axis).
    """
    rows = _axis_embedding(height, channels // 2, device)  # [height, channels/2]
    columns = _axis_embedding(width, channels // 2, device)  # [width, channels/2]
    grid = torch.cat(
        (rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), dim=-1
    )  # [height, width, channels]
    return grid.flatten(0, 1)[None]


def _axis_embedding(length: int, channels: int, device: torch.device) -> Tensor:
    """Interleaved sines and cosines of the positions 1..length -> [length, channels]."""
    position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
    position = position / (position[-1] + 1e-6) * (2 * math.pi)
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    angle = position[:, None] / TEMPERATURE**exponent  # [length, channels/2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
