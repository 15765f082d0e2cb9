"""A decoded 1080p frame to a network's input: Pillow, then an upload; an upload, then the kernel; the kernel alone."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from maskformer_fast.ops import resize_images

SIZE = (640, 1138)


def prepare(frame: Tensor, resize_on: str) -> Tensor:
    """A frame, wherever it lies -> the network's input on the GPU, finished."""
    batch, _ = resize_images(frame.to(resize_on), [SIZE], 32)
    batch = batch.to("cuda")
    torch.cuda.synchronize()
    return batch


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["pillow, upload", "upload, kernel", "kernel"])
def test_frame(benchmark: BenchmarkFixture, path: str) -> None:
    benchmark.group = "resize 1080x1920 to 640x1138"
    frame = torch.randint(256, (1, 1080, 1920, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected, _ = resize_images(frame, [SIZE], 32)
    if path == "kernel":
        frame = frame.cuda()
    batch = benchmark(prepare, frame, "cpu" if path.startswith("pillow") else "cuda")
    assert torch.equal(batch.cpu(), expected)
