"""The resize operator on CUDA against Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from maskformer_fast.ops import resize_images

pytestmark = pytest.mark.gpu
OPERATOR = torch.ops.maskformer_fast.resize_images


def random_image(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("bgr", [False, True])
def test_cuda_equals_pillow(bgr: bool) -> None:
    rng = np.random.default_rng(5)
    for _ in range(30):
        shapes = rng.integers(8, 400, (3, 2)).tolist()
        sizes = [tuple(size) for size in rng.integers(1, 300, (3, 2)).tolist()]
        images = [random_image(int(rng.integers(2**32)), *shape, 3 + int(rng.integers(2))) for shape in shapes]
        expected = resize_images(images, sizes, 32, bgr=bgr)
        got = resize_images([image.cuda() for image in images], sizes, 32, bgr=bgr)
        assert all(tensor.is_cuda for tensor in got)
        torch.testing.assert_close([tensor.cpu() for tensor in got], list(expected), rtol=0, atol=0)


def test_cuda_frame_with_a_pitch_and_graph() -> None:
    frames = random_image(6, 2, 1080, 1984, 4).cuda()[:, :, :1920]
    size = [(640, 1138)] * 2
    resize_images(frames, size, 32, bgr=True)  # brings the filters to the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch = OPERATOR(list(frames.split(1)), [640, 1138] * 2, [640, 1152], True)
        together, valid_sizes = resize_images(frames, size, 32, bgr=True)
    frames.bitwise_not_()
    graph.replay()
    expected, expected_sizes = resize_images(frames.cpu(), size, 32, bgr=True)
    for actual in (batch, together):
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0)
    assert torch.equal(valid_sizes.cpu(), expected_sizes)
