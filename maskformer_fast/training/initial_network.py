"""The network at the start of a run."""

from __future__ import annotations

import logging

import torch
from torch import nn

from maskformer_fast.config import Config
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import load_backbone, load_initial

logger = logging.getLogger(__name__)


def initial_network(config: Config, metadata: Metadata | None, device: torch.device) -> nn.Module:
    """Build the network of a run, its random weights a function of the seed, on a device and in its memory layout.

    Args:
        metadata: classes to train, to load the weights that the configuration names to start from; ``None`` loads none.

    Raises:
        FileNotFoundError, CheckpointError: see `modeling.weights`.
    """
    torch.manual_seed(config.seed)
    model = config.model
    network = build_model(model)
    if metadata is not None and model.backbone.weights:
        load_backbone(network, model.backbone.weights)
    if metadata is not None and model.weights:
        classes = load_initial(network, model.weights, metadata)
        if classes.moved or classes.new or classes.dropped:
            logger.info("%s has other classes than this data set. Their weights go by name; %s", model.weights, classes)
    layout = torch.channels_last if config.solver.channels_last else torch.contiguous_format
    network.to(device, memory_format=layout)  # type: ignore[call-overload]
    return network
