"""Exponential moving average of a network's weights, updated in each step without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from maskformer_fast.distributed import is_sharded


class WeightAverage:
    """Moving average of the trained parameters and of the running statistics of norms, sharded as the network is.

    After each step an average ``a`` of ``x`` is ``a + (1 - d) (x - a)``, with the decay ``d`` of `decay_at`. Other
    buffers (counters, schedules) are copied. The averages start as the network's values.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._decay = decay
        self._network = network.state_dict(keep_vars=True)
        self.weights: dict[str, Tensor] = {name: t.detach().clone() for name, t in self._network.items()}
        """Averages by the names of the network's ``state_dict``."""
        parameters = dict(network.named_parameters(remove_duplicate=False))
        averaged = {name for name, parameter in parameters.items() if parameter.requires_grad}
        for prefix, module in network.named_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                averaged |= {f"{prefix}.{name}" for name, b in module.named_buffers(recurse=False)
                             if b.is_floating_point()}
        self._averaged = [name for name in self.weights if name in averaged]
        self._copied = [name for name in self.weights if name not in averaged and name not in parameters]

    def decay_at(self, step: int) -> float:
        """Decay of the update after a step: ``(1 + step) / (10 + step)`` up to the configured one.

        The warm-up of TensorFlow's ``ExponentialMovingAverage``: early averages forget the initial weights sooner.
        """
        return min(self._decay, (1.0 + step) / (10.0 + step))

    @torch.no_grad()
    def update(
        self,
        step: int,
        unchanged: Tensor,  # scalar bool on the network's device: the step left the weights as they were
    ) -> None:
        """Add the weights after a step to the averages; a step without an update leaves these as they are."""
        weight = torch.where(unchanged, 0.0, 1.0 - self.decay_at(step))
        averages, values = self._tensors(self._averaged)
        torch._foreach_lerp_(averages, values, [weight] * len(averages))
        averages, values = self._tensors(self._copied)
        if averages:
            torch._foreach_copy_(averages, values)

    @torch.no_grad()
    def reset(self) -> None:
        """Take the network's values in place of the averages."""
        averages, values = self._tensors(list(self.weights))
        torch._foreach_copy_(averages, values)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the averages in the enclosed block. Takes the memory of its largest tensor."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, value in zip(*self._tensors(list(self.weights)), strict=True):
            before = value.clone()
            value.copy_(average)
            average.copy_(before)

    def _tensors(self, names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's parts of averages and of the network's tensors."""
        return [_local(self.weights[name]) for name in names], [_local(self._network[name]) for name in names]


def _local(tensor: Tensor) -> Tensor:
    """Part of a sharded tensor that is on this rank; other tensors as they are. Shares the memory."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor
