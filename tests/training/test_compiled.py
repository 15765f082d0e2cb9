"""Network and criterion under `torch.compile`: a single graph for each shape, and the numbers of eager mode."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from maskformer_fast.config import BackboneConfig, DecoderConfig, LossConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.compile import compile_single_graph
from maskformer_fast.modeling.weights import load_weights
from maskformer_fast.recipes import load_recipe
from maskformer_fast.structures import Targets, pack_masks
from maskformer_fast.training import trainer
from maskformer_fast.training.criterion import Criterion
from tests.support.paths import TINY_RECIPE

BACKBONES = [
    BackboneConfig("resnet_micro"),
    BackboneConfig("swin_micro", depths=(1, 2, 1, 1), drop_path_rate=0.2, checkpointing=True),
]


def random_batch(seed: int, size: tuple[int, int], slots: int) -> tuple[torch.Tensor, Targets]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([slots - seed, 3])
    masks = torch.rand(2, slots, *size, generator=generator) < 0.3
    masks &= (torch.arange(slots) < counts[:, None])[..., None, None]
    labels = torch.randint(5, (2, slots), generator=generator)
    valid_sizes = torch.tensor([size, (size[0] - 9, size[1] - seed)])
    images = torch.randint(256, (2, 3, *size), generator=generator, dtype=torch.uint8)
    return images, Targets(labels, counts, pack_masks(masks), valid_sizes, size)


@pytest.mark.slow
@pytest.mark.no_cover  # other tests run the same code eagerly
@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone.name)
def test_no_shape_is_compiled_twice(backbone: BackboneConfig) -> None:
    torch._dynamo.reset()
    model = ModelConfig(
        num_classes=5, backbone=backbone, pixel_decoder=PixelDecoderConfig(conv_dim=16, mask_dim=8, norm_groups=4),
        decoder=DecoderConfig(layers=2, hidden_dim=16, num_heads=2, ffn_dim=16, num_queries=20),
    )  # fmt: skip
    torch.manual_seed(0)
    network, criterion = build_model(model).train(), Criterion(5, LossConfig())
    # Tracing gradients takes long, and only the network with activation checkpointing needs it.
    backends = ("aot_eager" if backbone.checkpointing else "eager", "aot_eager")
    counters = [CompileCounterWithBackend(backend) for backend in backends]
    pairs = zip((network, criterion), counters, strict=True)
    compiled = [compile_single_graph(module, counter) for module, counter in pairs]

    def losses_and_gradients(forward, compare, images, targets):
        torch.manual_seed(5)  # for dropout and stochastic depth
        losses = compare(forward(images, targets.valid_sizes), targets)
        losses.total.backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        network.zero_grad(set_to_none=True)
        return losses.terms, gradients

    graphs = []
    for seed, shape in enumerate([((64, 96), 8), ((96, 64), 8), ((64, 96), 16)] * 2):
        batch = random_batch(seed, *shape)
        got = losses_and_gradients(*compiled, *batch)
        torch.testing.assert_close(got, losses_and_gradients(network, criterion, *batch))
        graphs.append([counter.frame_count for counter in counters])
    assert graphs == [[1, 1], [2, 2], [2, 3], [2, 3], [2, 3], [2, 3]]


@pytest.mark.no_cover
def test_a_compiled_run_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "compile_single_graph", partial(compile_single_graph, backend="eager"))
    tiny = load_recipe(TINY_RECIPE)
    weights = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        solver = replace(tiny.solver, max_steps=3, accumulate=2, compile=compiled)
        trainer.Trainer(replace(tiny, output=str(folder), metrics=("semantic",), solver=solver)).run()
        weights.append(load_weights(folder).weights)
    torch.testing.assert_close(weights[1], weights[0])
