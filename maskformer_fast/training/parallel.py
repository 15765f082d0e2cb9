"""Training by several processes: DDP or FSDP2, and states that do not depend on the number of processes.

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
from maskformer_fast.distributed import is_main, mean_over_ranks, shard_like, unsharded, world_size


def wrap(network: nn.Module, config: Config) -> nn.Module:
    """Wrap a network for training by several ranks -> a module to call in its place.

    By ``config.solver.parallel``: ``ddp`` keeps a copy of the network on every rank. ``fsdp`` (FSDP2,
    `torch.distributed.fsdp.fully_shard`) shards every parameter, gradient and optimiser state over the ranks, in place:
    build the optimiser afterwards. Both average gradients over the ranks. Each rank has running statistics of BatchNorm
    of its own: see `average_statistics`. In one process the result is the network itself.

    Raises:
        ValueError: ``backbone.norm: sync`` on the CPU, where PyTorch has no such layer.
    """
    if world_size() == 1:
        return network
    device = next(network.parameters()).device
    synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    check(device.type == "cuda" or not synchronised, "model.backbone.norm",
          "batch or frozen where several processes train on the CPU", "sync")
    if config.solver.parallel == "ddp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames an argument; 2.11 has the old name only
            return DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    # Some outputs are views, and the warning is about writing into them, which no code here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(device.type, (world_size(),))
    lists = [module for module in network.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    blocks = {block: None for blocks in lists for block in blocks if any(True for _ in block.children())}
    for block in reversed(blocks):  # inner blocks first, so that outer blocks leave their parameters out
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)  # type: ignore[call-overload]
    return network


@contextmanager
def gradient_sync(network: nn.Module, enabled: bool) -> Iterator[None]:
    """Average gradients over ranks in the enclosed forward and backward pass only if ``enabled``.

    Enabled for the last micro-batch of a step: it averages the accumulated gradients.
    """
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(enabled)
    if enabled or not isinstance(network, DistributedDataParallel):
        yield
    else:
        with network.no_sync():
            yield


@contextmanager
def unsharded_parameters(network: nn.Module) -> Iterator[None]:
    """Keep all parameters of a sharded network on every rank, so that ranks may call it a different number of times."""
    sharded = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
            module.set_reshard_after_forward(module is not network, recurse=False)


@torch.no_grad()
def average_statistics(network: nn.Module) -> None:
    """Replace the running statistics of BatchNorm by their mean over the ranks.

    Called before a checkpoint is saved: statistics that are saved and measured then come from all images, are equal on
    all ranks, and are those that a resumed run starts with.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    local = [norm for norm in norms if not isinstance(norm, nn.SyncBatchNorm)]  # SyncBatchNorm's are equal already
    statistics = [buffer for norm in local for buffer in norm.buffers() if buffer.is_floating_point()]
    if world_size() == 1 or not statistics:
        return
    mean = mean_over_ranks(torch.cat(statistics))
    torch._foreach_copy_(statistics, list(mean.split([len(buffer) for buffer in statistics])))


def gather_full_state(state: Any) -> Any:
    """Copy a state to the CPU with every sharded tensor made full; all ranks must call it.

    A state is any nesting of dictionaries, lists and tuples. Ranks other than 0 write no files and get empty tensors.
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
    """Load an optimiser's full state: `gather_full_state` of a ``state_dict()``, from any number of ranks.

    Raises:
        ValueError: the state belongs to other parameter groups.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {
        index: {name: shard_like(value, parameters[index]) if isinstance(value, Tensor) else value
                for name, value in values.items()}
        for index, values in state["state"].items() if index < len(parameters)
    }  # fmt: skip
    optimizer.load_state_dict({**state, "state": sharded})
