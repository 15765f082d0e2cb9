"""The time that a machine's measured copy bandwidth and matrix rate allow for what an operation must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maskformer_fast.ops.mask_product import layer_mask_logits


@dataclass(frozen=True)
class Bound:
    """What the operation cannot do without: memory traffic, and multiplications and additions by a matrix unit."""

    bytes: float  # each input read once, each output written once
    operations: float = 0.0
    rate: str = "fp16"  # whose: "fp16", "bf16", "tf32" or "fp32"

    def milliseconds(self, machine: dict[str, Any]) -> float | None:
        """On a machine of this copy bandwidth and these matrix rates; None where they were not measured."""
        bandwidth, rates = machine.get("copy_gb_per_s"), machine.get("matrix_tflop_per_s") or {}
        if not bandwidth or (self.operations and not rates.get(self.rate)):
            return None
        matrix = self.operations / (1e9 * rates[self.rate]) if self.operations else 0.0
        return max(self.bytes / (1e6 * bandwidth), matrix)


def count_operations(run: Callable[[], object]) -> float:
    """Multiplications and additions of the convolutions and matrix products that PyTorch runs in a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def network_work(model: Any, size: tuple[int, int], training: bool = False) -> tuple[float, float]:
    """Parameters of a network of this `ModelConfig`, multiplications and additions of its forward pass on one image.

    Without numbers, on the meta device. In training the pixel embeddings are computed, for the losses; in inference
    mask logits, of all queries.
    """
    import torch

    from maskformer_fast.modeling import build_model

    with torch.device("meta"), torch.no_grad():
        network = build_model(model).train(training)
        images = torch.zeros((1, 3, *size), dtype=torch.uint8)
        count = sum(parameter.numel() for parameter in network.parameters())
        if training:
            return count, count_operations(lambda: network(images))
        return count, count_operations(lambda: layer_mask_logits(network(images)))
