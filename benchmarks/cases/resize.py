"""A decoded 1080p frame to a network's input on a GPU: our kernel beside Pillow on the host and torch's antialiased
resize.

Frames are drawn on host and device, as a decoder may leave them on either. torch converts, resizes and rounds: its
resize of 8 bits has no antialiasing on CUDA.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.inputs import Size
from benchmarks.harness.case import Bound, Case, Work, beside
from maskformer_fast.ops import resize_images

PILLOW, UPLOADED, INTERPOLATE = "Pillow, then an upload", "an upload, then ours", "torch, antialiased"
FRAME, SIZE, DIVISOR = (1080, 1920), (640, 1138), 32


def padded(size: Size) -> list[int]:
    return [-(-side // DIVISOR) * DIVISOR for side in size]


def setup(device: torch.device, batch: int, frame: Size = FRAME, size: Size = SIZE) -> Work:
    canvas = padded(size)

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        frames = torch.randint(256, (batch, *frame, 3), dtype=torch.uint8, device=device)
        return frames, frames.cpu()

    def ours(frames: Tensor, _: Tensor) -> Tensor:
        # the operator and not `resize_images`, whose valid sizes are a copy from the host, which no graph can hold
        result: Tensor = torch.ops.maskformer_fast.resize_images([frames], list(size), canvas, False)
        return result

    def interpolate(frames: Tensor, _: Tensor) -> Tensor:
        planes = frames.permute(0, 3, 1, 2).float()
        resized = F.interpolate(planes, size, mode="bilinear", align_corners=False, antialias=True)
        resized = resized.round_().clamp_(0, 255).to(torch.uint8)
        return F.pad(resized, (0, canvas[1] - size[1], 0, canvas[0] - size[0]))

    def agreement(ours: Tensor, theirs: Tensor) -> float:
        """Share of the values that differ by at most one: torch does not round where Pillow does."""
        return (ours.int() - theirs.int()).abs().le(1).float().mean().item()

    peers = {
        PILLOW: lambda _, frames: resize_images(frames, [size] * batch, DIVISOR)[0].to(device),
        UPLOADED: lambda _, frames: resize_images(frames.to(device), [size] * batch, DIVISOR)[0],
        INTERPOLATE: interpolate,
    }
    return Work(ours, peers, draw, agreement, dict.fromkeys(peers, 0.999))


def cases(device: str) -> list[Case]:
    if device == "cpu":
        return []
    rows = []
    height, width = padded(SIZE)
    for batch, rank in ((1, 1), (8, 2)):
        name = f"resize {FRAME[0]}x{FRAME[1]} -> {SIZE[0]}x{SIZE[1]}, B={batch}"
        bound = Bound(3.0 * batch * (FRAME[0] * FRAME[1] + height * width))
        make = partial(setup, batch=batch)
        rows += beside(name, {PILLOW: None, UPLOADED: None}, make, bound=bound, rank=rank, peer_captured=False)
        rows += beside(name, {INTERPOLATE: None}, make, bound=bound, rank=rank)
    return rows
