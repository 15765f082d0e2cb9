"""Parts of a network that are not trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from maskformer_fast.core.checks import check


def freeze(network: nn.Module, parts: Sequence[str]) -> list[nn.Module]:
    """Take parts of a network out of training -> their modules; see `set_training`.

    Their parameters need no gradient, so that the optimiser has neither state nor weight decay for them, and a part
    whose inputs need none either keeps nothing for the backward pass. Call it before the network is wrapped or sharded.

    Args:
        parts: dotted names of modules or parameters, as ``backbone``, ``backbone.res2`` or
            ``predictor.query_embed.weight``.

    Raises:
        ValueError: the network has no such part, or nothing is left to train.
    """
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    frozen = []
    for part in parts:
        if part and part in modules:
            frozen.append(modules[part].requires_grad_(False))
        elif part in parameters:
            parameters[part].requires_grad_(False)
        else:
            known = part
            while known and known not in modules:
                known = known.rpartition(".")[0]
            below = [name for name, _ in modules[known].named_children()]
            below += [name for name, _ in modules[known].named_parameters(recurse=False)]
            raise ValueError(f"solver.freeze: expected parts of {known or 'the network'}, which are "
                             f"{', '.join(below)}; got {part!r}")
    left = any(parameter.requires_grad for parameter in parameters.values())
    check(left, "solver.freeze", "parts that leave something to train", list(parts))
    return frozen


def set_training(network: nn.Module, frozen: Sequence[nn.Module]) -> None:
    """Set a network to training mode and its frozen parts to evaluation mode: no dropout, fixed running statistics."""
    network.train()
    for part in frozen:
        part.eval()
