"""Operators: one file each, holding schema, fake, eager twin and backends."""

from maskformer_fast.ops.linear_sum_assignment import linear_sum_assignment
from maskformer_fast.ops.mask_loss import mask_loss
from maskformer_fast.ops.matching_cost import matching_cost

__all__ = ["linear_sum_assignment", "mask_loss", "matching_cost"]
