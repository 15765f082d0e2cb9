"""A network trained by several processes: DDP or FSDP2, and states that do not depend on the number of processes.

All functions also work in a single process.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from maskformer_fast.config import Config
from maskformer_fast.core.checks import check
from maskformer_fast.distributed import is_main, mean_over_ranks, shared_out, unsharded, world_size


def wrap(network: nn.Module, config: Config) -> nn.Module:
    """The network as several ranks train it, by ``config.solver.parallel``: call the result in place of the network.

    ``ddp`` keeps the whole network on every rank. ``fsdp`` (FSDP2, `torch.distributed.fsdp.fully_shard`) gives each
    rank its share of every parameter, gradient and optimiser state, in place: build the optimiser afterwards. Both
    average gradients over the ranks. Running statistics of BatchNorm stay each rank's own in training: see
    `average_statistics`. In one process the network itself comes back.

    Raises:
        ValueError: ``backbone.norm: sync`` on the CPU, for which PyTorch has no such layer.
    """
    if world_size() == 1:
        return network
    device = next(network.parameters()).device
    synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    check(device.type == "cuda" or not synchronised, "model.backbone.norm",
          "batch or frozen where several processes train on the CPU", "sync")
    if config.solver.parallel == "ddp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has a new name for it, 2.11 only this one
            return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    # Of our outputs some are views, as it says; what it warns of, writing into them, nobody does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device.type, (world_size(),))
    lists = [module for module in network.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    blocks = {block: None for blocks in lists for block in blocks if any(True for _ in block.children())}
    for block in reversed(blocks):  # inner ones first: what they hold is no longer the outer ones'
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)  # type: ignore[call-overload]
    return network


@contextmanager
def gradient_sync(network: nn.Module, enabled: bool) -> Iterator[None]:
    """Forward and backward inside average gradients over ranks if ``enabled``: at the last micro-batch of a step."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(enabled)
    if enabled or not isinstance(network, DistributedDataParallel):
        yield
    else:
        with network.no_sync():
            yield


@contextmanager
def unsharded_parameters(network: nn.Module) -> Iterator[None]:
    """Keep all parameters of a sharded network on every rank, so that each may run it as often as it needs to."""
    shards = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        for shard in shards:
            shard.reshard()
            shard.set_reshard_after_forward(shard is not network, recurse=False)


@torch.no_grad()
def average_statistics(network: nn.Module) -> None:
    """Give every rank the mean of all ranks' running statistics.

    Done before a checkpoint, so that the statistics saved and measured are of all images, equal on all ranks, and what
    a resumed run starts with.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    own = [norm for norm in norms if not isinstance(norm, nn.SyncBatchNorm)]  # whose statistics are equal already
    statistics = [buffer for norm in own for buffer in norm.buffers() if buffer.is_floating_point()]
    if world_size() == 1 or not statistics:
        return
    mean = mean_over_ranks(torch.cat(statistics))
    torch._foreach_copy_(statistics, list(mean.split([len(buffer) for buffer in statistics])))


def gather_full_state(state: Any) -> Any:
    """A copy of a state with every sharded tensor put together, on the CPU; to be called by all ranks.

    Dictionaries, lists and tuples are walked through. Ranks other than 0, which write nothing, keep empty tensors.
    """
    if isinstance(state, Mapping):
        return {key: gather_full_state(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gather_full_state(value) for value in state)
    if not isinstance(state, Tensor):
        return state
    state = state.detach()
    full = unsharded(state)
    return full.cpu() if is_main() else full.new_empty(0, device="cpu")


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load an optimiser's whole state (`gather_full_state` of its ``state_dict()``, however many ranks had it).

    Raises:
        ValueError: the state is of other parameter groups.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {
        index: {name: shared_out(value, parameters[index]) if isinstance(value, Tensor) else value
                for name, value in values.items()}
        for index, values in state["state"].items() if index < len(parameters)
    }  # fmt: skip
    optimizer.load_state_dict({**state, "state": own})
