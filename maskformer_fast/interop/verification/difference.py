"""Differences between computed and recorded tensors, and their report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskformer_fast.core.metadata import VOID
from maskformer_fast.core.results import PanopticResult


@dataclass(frozen=True)
class Difference:
    """Difference of one quantity from the recorded one; ``tolerance`` is ``None`` for an unknown quantity."""

    largest: float
    tolerance: float | None
    note: str = ""

    @property
    def ok(self) -> bool | None:
        """Whether the difference is within the tolerance (NaN and infinity are not); ``None`` without a tolerance."""
        if self.tolerance is None:
            return None
        return math.isfinite(self.largest) and self.largest <= self.tolerance


@dataclass(frozen=True)
class Report:
    """Differences by name of the quantity, which consists of its keys in the recording."""

    quantities: Mapping[str, Difference]

    @property
    def ok(self) -> bool:
        """Whether at least one quantity was compared, and none is beyond its tolerance."""
        verdicts = [quantity.ok for quantity in self.quantities.values()]
        return True in verdicts and False not in verdicts

    def to_dict(self) -> dict[str, Any]:
        """Containers for JSON. A difference that is not finite is ``None``, as is ``ok`` of a quantity not compared."""
        report: dict[str, Any] = {}
        for name, quantity in self.quantities.items():
            difference = float(quantity.largest) if math.isfinite(quantity.largest) else None
            report[name] = {"difference": difference, "tolerance": quantity.tolerance, "ok": quantity.ok}
            if quantity.note:
                report[name]["note"] = quantity.note
        return report | {"ok": self.ok}


def relative(
    got: Tensor | None,  # any shape; None where the network has no such output
    recorded: Tensor,  # the same shape
    tolerance: float,
) -> Difference:
    """Largest absolute difference, relative to the largest recorded magnitude (absolute where that is zero)."""
    if got is None or got.shape != recorded.shape:
        return _other_shape(got, recorded, tolerance)
    error, scale = _maximum((_double(got) - _double(recorded)).abs()), _maximum(_double(recorded).abs())
    return Difference(error if scale == 0 else error / scale, tolerance)


def rows_relative(
    got: Tensor,  # [B, Q, ...]
    recorded: Tensor,  # [B, Q, ...]
    tolerance: float,
) -> Difference:
    """`relative` of the worst query, so that an error in a small row is not hidden by large rows.

    A row's difference is relative to the row's largest magnitude, but at least to 1e-3 of the tensor's, below which
    rounding dominates.
    """
    got, recorded = _double(got).flatten(0, 1).flatten(1), _double(recorded).flatten(0, 1).flatten(1)
    magnitude = recorded.abs().amax(1)
    scale = magnitude.clamp(min=max(1e-3 * _maximum(magnitude), torch.finfo(torch.float32).tiny))
    return Difference(_maximum((got - recorded).abs().amax(1) / scale), tolerance)


def differing_pixels(
    got: Tensor,  # [H, W] integer
    recorded: Tensor,  # [H, W] integer
    counted: Tensor | None = None,  # [H, W] bool, None counts every pixel
) -> Difference:
    """Number of counted pixels with another value. The tolerance is zero."""
    if got.shape != recorded.shape:
        return _other_shape(got, recorded, 0)
    different = got.cpu().long() != recorded.long()
    return Difference(int((different if counted is None else different & counted.cpu()).sum()), 0)


def differing_pairs(
    query: Tensor | None,  # [T] query of each target, -1 for none; None where the network has no such layer
    recorded: Mapping[str, Tensor],  # i: queries, j: targets they are assigned to
) -> Difference:
    """Number of targets that are assigned to another query."""
    if query is None:
        return Difference(math.nan, 0, "the network has no such layer")
    ours = {(q, target) for target, q in enumerate(query.tolist()) if q >= 0}
    theirs = set(zip(recorded["i"].tolist(), recorded["j"].tolist(), strict=True))
    return Difference(len({target for _, target in ours ^ theirs}), 0)


def differing_segments(result: PanopticResult, recorded: Sequence[Mapping[str, Any]]) -> Difference:
    """Number of segments (id, class, thing or not) that are only in one of the two lists."""
    ours = {(segment.id, segment.category, segment.is_thing) for segment in result.segments}
    theirs = {(int(s["id"]), int(s["category_id"]), bool(s["isthing"])) for s in recorded}
    return Difference(len(ours ^ theirs) + abs(len(theirs) - len(recorded)), 0)


def official_ids(result: PanopticResult) -> Tensor:
    """Id map as in the official code, with 0 where no segment is -> [H, W] int32."""
    return result.id_map.masked_fill(result.id_map == VOID, 0)


def worst(values: Mapping[str, float], tolerance: float) -> Difference:
    """Difference of the largest value (NaN counts as the largest), with its name as the note."""
    name = max(values, key=lambda key: math.inf if math.isnan(values[key]) else values[key], default="")
    return Difference(values.get(name, 0.0), tolerance, name)


def not_compared(names: Iterable[str]) -> dict[str, Difference]:
    """Entries for recorded quantities that are unknown here."""
    return {name: Difference(math.nan, None, "recorded, but unknown here") for name in names}


def _other_shape(got: Tensor | None, recorded: Tensor, tolerance: float) -> Difference:
    ours = "the network has none" if got is None else f"shape {list(got.shape)}"
    return Difference(math.nan, tolerance, f"{ours}, recorded {list(recorded.shape)}")


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().to(torch.float64)


def _maximum(values: Tensor) -> float:
    """Largest value: NaN if there is one, 0 for an empty tensor."""
    return float(values.max()) if values.numel() else 0.0
