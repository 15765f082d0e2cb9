"""The resize operator against the transforms of training; the kernel itself is tested in tests/kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from maskformer_fast.data.loader import pad_images
from maskformer_fast.data.transforms import resize_image, short_edge_size
from maskformer_fast.ops import resize_images
from maskformer_fast.ops.resize import _Arguments, _resize_images_cuda
from tests.support.missing_modules import hide_triton

OPERATOR = torch.ops.maskformer_fast.resize_images
SHAPES = [(37, 50), (64, 21), (16, 16), (1, 9)]


def random_image(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize(("short_edge", "max_size"), [(24, 40), (16, 1000), (90, 200)])
@pytest.mark.parametrize(("divisor", "canvas"), [(1, (0, 0)), (32, (0, 0)), (4, (30, 70))])
def test_equals_resize_image_then_pad_images(
    short_edge: int, max_size: int, divisor: int, canvas: tuple[int, int]
) -> None:
    images = [random_image(seed, *shape, 3) for seed, shape in enumerate(SHAPES)]
    sizes = [short_edge_size(*shape, short_edge, max_size) for shape in SHAPES]
    batch, valid_sizes = resize_images(images, sizes, divisor, canvas)
    resized = [resize_image(image.numpy(), short_edge, max_size) for image in images]
    expected, expected_sizes = pad_images(resized, divisor, canvas)
    torch.testing.assert_close(batch, expected, rtol=0, atol=0)
    torch.testing.assert_close(valid_sizes, expected_sizes, rtol=0, atol=0)


def test_a_stack_gives_the_same_as_its_images_alone() -> None:
    stack = random_image(0, 3, 20, 31, 3)
    together = resize_images(stack, [(13, 17)] * 3, 8)
    alone = resize_images(list(stack), [(13, 17)] * 3, 8)
    assert together[0].shape == (3, 3, 16, 24)
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


@pytest.mark.parametrize("bgr", [False, True])
def test_strides_alpha_and_order_of_colours(bgr: bool) -> None:
    frames = random_image(1, 2, 20, 40, 4)[:, ::2, 3:34]
    batch, _ = resize_images(frames, [(7, 15)] * 2, bgr=bgr)
    for frame, got in zip(frames, batch, strict=True):
        rgb = (frame[..., :3].flip(-1) if bgr else frame[..., :3]).contiguous()
        expected, _ = resize_images([rgb], [(7, 15)])
        torch.testing.assert_close(got, expected[0], rtol=0, atol=0)


IMAGE = torch.zeros(4, 5, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], []), ValueError, "images: expected at least one"),
        (([IMAGE.numpy()], [(2, 2)]), TypeError, "images: expected Tensors, got ndarray"),
        (([IMAGE.float()], [(2, 2)]), TypeError, "images: expected torch.uint8, got torch.float32"),
        ((IMAGE, [(2, 2)]), ValueError, r"images: expected a tensor \[N, H, W, 3 or 4\]"),
        (([IMAGE[None]], [(2, 2)]), ValueError, r"images: .*got \(1, 4, 5, 3\)"),
        (([IMAGE[..., :2]], [(2, 2)]), ValueError, r"images: .*got \(4, 5, 2\)"),
        (([IMAGE[:0]], [(2, 2)]), ValueError, "images: .*none empty"),
        (([IMAGE, IMAGE.to("meta")], [(2, 2)] * 2), ValueError, "images: expected all on cpu as the first, got .*meta"),
        (([IMAGE], [(2, 2)] * 2), ValueError, "sizes: expected one for each of the 1 images, got 2"),
        (([IMAGE], [(2, 0)]), ValueError, "sizes: expected at least 1 x 1"),
        ((IMAGE[None].repeat(2, 1, 1, 1), [(2, 2), (2, 3)]), ValueError, "sizes: expected the same"),
        (([IMAGE], [(2, 2)], 0), ValueError, "divisor: expected >= 1"),
    ],
)
def test_bad_input_is_named(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        resize_images(*arguments)


def test_opcheck() -> None:
    stacks = [random_image(2, 2, 9, 12, 3), random_image(3, 1, 5, 6, 4)]
    torch.library.opcheck(OPERATOR.default, (stacks, [4, 7, 8, 9], [8, 16], True))


@pytest.mark.no_cover
def test_compiles_in_one_graph() -> None:
    def brightness(images: Tensor) -> Tensor:
        return resize_images(images, [(6, 8)] * 2, 4)[0].float().mean((1, 2, 3))

    frames = random_image(4, 2, 11, 13, 3)
    compiled = torch.compile(brightness, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(frames), brightness(frames))


def test_missing_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_triton(monkeypatch)
    with pytest.raises(ImportError, match=r"No module named 'triton'.*pip install triton"):
        _resize_images_cuda(_Arguments((IMAGE[None],), (2, 2), (2, 2), False))
