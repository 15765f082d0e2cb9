"""Training and inference of transformers' models with this package's operators in place of their slow parts.

`equip_model` replaces what `equip_loss` replaces, and multi-scale deformable attention, which takes most of the time of
the pixel decoders of Mask2Former and OneFormer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from maskformer_fast.drop_in.losses import criterion_family, equip_loss, unequip_loss
from maskformer_fast.drop_in.swap import restore_methods, swap_methods
from maskformer_fast.ops.deformable_attention import CPU_DTYPES, CUDA_DTYPES, deformable_attention

Model = TypeVar("Model", bound=nn.Module)
ATTENTION = tuple(
    f"{family}PixelDecoderEncoderMultiscaleDeformableAttention" for family in ("Mask2Former", "OneFormer")
)
"""Names of the classes of multi-scale deformable attention that are replaced."""


def equip_model(model: Model) -> Model:
    """Replace the slow parts of a model for training and inference, and return it.

    These are the matcher and the mask losses, as `equip_loss` replaces them, and the multi-scale deformable attention
    of the pixel decoders of Mask2Former and OneFormer. Results and gradients are equal up to rounding. Parameters,
    buffers and state dicts stay as they are.

    Args:
        model: one that `equip_loss` takes, or a Mask2Former or OneFormer model without a criterion.

    Raises:
        TypeError: a model that has none of these parts.
    """
    unequip_model(model)
    attentions = _attentions(model)
    if not attentions or _has_criterion(model):
        equip_loss(model)  # raises where there is nothing to replace
    for attention in attentions:
        _equip_attention(attention)
    return model


def unequip_model(model: Model) -> Model:
    """Put a model's own methods back, and return it."""
    if _has_criterion(model):
        unequip_loss(model)
    for attention in _attentions(model):
        restore_methods(attention)
    return model


def _attentions(model: nn.Module) -> list[nn.Module]:
    return [
        module for module in model.modules() if any(parent.__name__ in ATTENTION for parent in type(module).__mro__)
    ]


def _has_criterion(model: Any) -> bool:
    try:
        criterion_family(getattr(model, "criterion", model))
    except TypeError:
        return False
    return True


def _equip_attention(attention: Any) -> Any:
    swap_methods(attention, {"forward": _attend}, _equip_attention, {})
    return attention


def _attend(
    self: Any,
    hidden_states: Tensor,  # [B, Q, channels]
    attention_mask: Tensor | None = None,  # [B, S] bool, true at cells that are read as zeros
    encoder_hidden_states: Tensor | None = None,  # [B, S, channels]
    encoder_attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,  # [B, Q, channels]
    reference_points: Tensor | None = None,  # [B, Q, levels, 2]
    *,
    spatial_shapes_list: Sequence[tuple[int, int]],
    output_attentions: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as the model's own method; weights are returned only with ``output_attentions``."""
    assert encoder_hidden_states is not None and reference_points is not None
    value = self.value_proj(encoder_hidden_states)
    dtypes = CUDA_DTYPES if value.device.type == "cuda" else CPU_DTYPES
    if reference_points.shape[-1] != 2 or value.dtype not in dtypes:
        result: tuple[Tensor, Tensor] = self._plain_class.forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, position_embeddings,
            reference_points, spatial_shapes_list=spatial_shapes_list, output_attentions=output_attentions, **others,
        )  # fmt: skip
        return result
    queries = self.with_pos_embed(hidden_states, position_embeddings)
    if attention_mask is not None:
        value = value.masked_fill(attention_mask[..., None], 0.0)
    sizes = (self.n_heads, self.n_levels, self.n_points)
    logits = self.attention_weights(queries).unflatten(2, sizes)
    attended = deformable_attention(
        value.unflatten(2, (self.n_heads, -1)),
        [(int(height), int(width)) for height, width in spatial_shapes_list],
        reference_points.to(torch.float64 if value.dtype == torch.float64 else torch.float32),
        self.sampling_offsets(queries).unflatten(2, (*sizes, 2)),
        logits,
    )
    weights = logits.flatten(3).softmax(-1).view(logits.shape) if output_attentions else None
    return self.output_proj(attended), weights
