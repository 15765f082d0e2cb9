"""Operators: one file each, with schema, implementations, fake, public function and eager twin."""

from maskformer_fast.ops.assignment import assign_pairs, linear_sum_assignment
from maskformer_fast.ops.deformable_attention import deformable_attention
from maskformer_fast.ops.mask_loss import mask_loss
from maskformer_fast.ops.matching_cost import matching_cost
from maskformer_fast.ops.point_cost import matching_cost_at_points
from maskformer_fast.ops.point_loss import mask_loss_at_points
from maskformer_fast.ops.points import draw_points
from maskformer_fast.ops.resize import resize_images
from maskformer_fast.ops.rle import encode_instances, instance_rle
from maskformer_fast.ops.scored_instances import instances_from_scores
from maskformer_fast.ops.segments import instance_inference, panoptic_inference
from maskformer_fast.ops.semantic import (
    pixel_semantic_inference,
    pixel_semantic_scores,
    semantic_inference,
    semantic_scores,
)
from maskformer_fast.ops.semantic_pruned import semantic_labels

__all__ = [
    "assign_pairs",
    "deformable_attention",
    "draw_points",
    "encode_instances",
    "instance_inference",
    "instance_rle",
    "instances_from_scores",
    "linear_sum_assignment",
    "mask_loss",
    "mask_loss_at_points",
    "matching_cost",
    "matching_cost_at_points",
    "panoptic_inference",
    "pixel_semantic_inference",
    "pixel_semantic_scores",
    "resize_images",
    "semantic_inference",
    "semantic_labels",
    "semantic_scores",
]
