"""Configuration of inference, a part of `config`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from maskformer_fast.core.checks import check, check_choice, check_finite

TileBlend = Literal["feather", "mean"]
SemanticOrder = Literal["direct", "official", "official_panoptic", "huggingface"]
PanopticOrder = Literal["direct", "official"]
PanopticRule = Literal["maskformer", "mask2former", "huggingface"]


@dataclass(frozen=True)
class TestConfig:
    """Inference: resizing, thresholds and test-time augmentation."""

    __test__ = False  # not a pytest class

    short_edge: int | None = 512
    """Shorter side of the network's input, in pixels; ``None`` does not resize."""
    max_size: int = 2048
    size: tuple[int, int] | None = None
    """Height, width of the network's input, whatever an image's shape; ``None``: see ``short_edge``."""
    object_mask_threshold: float = 0.8
    """Panoptic: least score of a query's best class; other queries are dropped."""
    overlap_threshold: float = 0.8
    """Panoptic: least visible share of a segment's mask; other segments are dropped."""
    semantic_order: SemanticOrder = "direct"
    """Semantic: stage at which masks are resized, see `inference.postprocess`. The default resizes once and takes least
    time and memory; ``official`` and ``huggingface`` give the numbers of those implementations."""
    panoptic_order: PanopticOrder = "direct"
    """Panoptic: stage at which masks are resized; ``official`` gives the official numbers."""
    panoptic_rule: PanopticRule = "maskformer"
    """Panoptic: implementation whose segments to give, see `maskformer_fast.ops.segments.panoptic_inference`."""
    top_k: int = 100
    """Instance: largest number of results in an image."""
    multi_scale: tuple[float, ...] = ()
    """Semantic: scales of ``short_edge`` over which scores are averaged; empty uses one scale."""
    flip: bool = False
    """Semantic: average the scores with those of the mirrored image."""
    windows: bool = False
    """Semantic: run the network on square windows along the longer side of the resized image and average their scores
    where they overlap, as EoMT's official code does."""
    batch_size: int = 1
    tile: int | None = None
    """Side in pixels of the square tiles, each segmented as an image of its own, that images which are longer or wider
    are cut into; ``None``: images are not cut."""
    tile_overlap: float = 0.25
    """Least share of a tile's side, 0 to 0.5, that neighbouring tiles share."""
    tile_blend: TileBlend = "feather"
    """Semantic, where tiles overlap: ``feather`` lets the weight of a tile's scores fall towards its edges, ``mean``
    gives all tiles the same."""

    def __post_init__(self) -> None:
        check_finite(self, "test")
        check(self.tile is None or self.tile > 0, "test.tile", "> 0 or None", self.tile)
        check(0.0 <= self.tile_overlap <= 0.5, "test.tile_overlap", "0..0.5", self.tile_overlap)
        check_choice("test.tile_blend", self.tile_blend, get_args(TileBlend))
        if self.windows:
            check(not (self.multi_scale or self.flip), "test.windows", "off with multi_scale or flip", True)
            check(self.size is None and self.short_edge is not None, "test.windows", "off without a short_edge", True)
        if self.tile is not None:
            others = self.multi_scale or self.flip or self.windows
            check(not others, "test.tile", "none with multi_scale, flip or windows", self.tile)
            check(self.semantic_order == "direct", "test.semantic_order", "direct with tiles", self.semantic_order)
        check(self.short_edge is None or self.short_edge > 0, "test.short_edge", "> 0 or None", self.short_edge)
        check(self.size is None or min(self.size) > 0, "test.size", "positive height and width, or None", self.size)
        for name in ("max_size", "top_k", "batch_size"):
            check(getattr(self, name) > 0, f"test.{name}", "> 0", getattr(self, name))
        for name in ("object_mask_threshold", "overlap_threshold"):
            check(0.0 <= getattr(self, name) <= 1.0, f"test.{name}", "0..1", getattr(self, name))
        check_choice("test.semantic_order", self.semantic_order, get_args(SemanticOrder))
        check_choice("test.panoptic_order", self.panoptic_order, get_args(PanopticOrder))
        check_choice("test.panoptic_rule", self.panoptic_rule, get_args(PanopticRule))
        check(all(s > 0 for s in self.multi_scale), "test.multi_scale", "positive factors", self.multi_scale)

    @property
    def edge(self) -> int | tuple[int, int] | None:
        """The ``short_edge`` of `core.image_resize`: ``size`` if there is one."""
        return self.size or self.short_edge
