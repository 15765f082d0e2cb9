"""Configuration of a run as frozen dataclasses; `recipes` reads it from YAML, `cli` from the command line.

A value that cannot work raises ``ValueError`` with the field's name when the object is made, so that a typo in a recipe
costs a second and not an evening.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from maskformer_fast.backbone_config import MAX_LAYERS, MAX_WIDTH, BackboneConfig
from maskformer_fast.core.checks import check, check_choice, check_finite
from maskformer_fast.inference_config import TestConfig
from maskformer_fast.solver_config import Amp as Amp
from maskformer_fast.solver_config import LogConfig, SolverConfig

Task = Literal["semantic", "instance", "panoptic"]
ModelType = Literal["maskformer", "mask2former", "eomt", "per_pixel", "per_pixel_plus"]
IMAGENET_MEAN = (123.675, 116.280, 103.530)
"""Mean of the colours of ImageNet's images, 8 bits."""
MAX_CHANNELS = 64
"""Largest number of bands of a picture."""
TASKS: tuple[Task, ...] = ("semantic", "instance", "panoptic")


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Pixel decoder: FPN, optionally with a transformer encoder on res5; Mask2Former's has deformable attention."""

    conv_dim: int = 256
    mask_dim: int = 256
    """Channels D of the pixel embeddings."""
    norm_groups: int = 32
    encoder_layers: int = 0
    """Transformer encoder layers on res5: 0 for the plain FPN, 6 in the official panoptic models. Mask2Former:
    layers of deformable attention, 6 in the official models."""
    encoder_heads: int = 8
    encoder_ffn_dim: int = 2048
    encoder_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("mask_dim", "norm_groups", "encoder_heads", "encoder_ffn_dim"):
            check(getattr(self, name) > 0, f"pixel_decoder.{name}", "a positive integer", getattr(self, name))
        check(self.conv_dim > 0 and self.conv_dim % self.norm_groups == 0, "pixel_decoder.conv_dim",
              f"a positive multiple of norm_groups={self.norm_groups}", self.conv_dim)
        layers = self.encoder_layers
        check(0 <= layers <= MAX_LAYERS, "pixel_decoder.encoder_layers", f"0..{MAX_LAYERS}", layers)
        check(self.conv_dim % self.encoder_heads == 0, "pixel_decoder.encoder_heads",
              f"a divisor of conv_dim={self.conv_dim}", self.encoder_heads)
        check(0.0 <= self.encoder_dropout < 1.0, "pixel_decoder.encoder_dropout", "0 <= p < 1", self.encoder_dropout)


@dataclass(frozen=True)
class DecoderConfig:
    """Transformer decoder with learned queries."""

    layers: int = 6
    """EoMT, which has no decoder: number of the encoder's last blocks that the queries take part in."""
    hidden_dim: int = 256
    num_heads: int = 8
    ffn_dim: int = 2048
    dropout: float = 0.1
    num_queries: int = 100
    attention_masks: Literal["resized", "direct"] = "resized"
    """Mask2Former: masks of the attention from pixel embeddings resized once to each level, which is far cheaper, or,
    as in the official code, masks of full size resized in each layer. Equal but for pixels on the edge of a mask."""

    def __post_init__(self) -> None:
        check_choice("decoder.attention_masks", self.attention_masks, ("resized", "direct"))
        for name in ("layers", "hidden_dim", "num_heads", "ffn_dim", "num_queries"):
            value, limit = getattr(self, name), MAX_LAYERS if name == "layers" else MAX_WIDTH
            check(0 < value <= limit, f"decoder.{name}", f"a positive integer up to {limit}", value)
        check(self.hidden_dim % self.num_heads == 0, "decoder.num_heads",
              f"a divisor of hidden_dim={self.hidden_dim}", self.num_heads)
        check(0.0 <= self.dropout < 1.0, "decoder.dropout", "0 <= p < 1", self.dropout)


@dataclass(frozen=True)
class ModelConfig:
    """Network."""

    type: ModelType = "maskformer"
    num_classes: int = 0
    """Number of classes; 0 takes that of the data set."""
    weights: str | None = None
    """Checkpoint in this package's format (trained or converted) to start training from. Its classes are compared with
    those of the data set by name: equal names keep their weights at any index, others start anew."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    pixel_decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    pixel_mean: tuple[float, ...] = IMAGENET_MEAN
    """RGB, on the 0..255 scale; with ``data.channels`` of each band, on the scale of its values."""
    pixel_std: tuple[float, ...] = (58.395, 57.120, 57.375)
    size_divisibility: int = 32
    """Batches are padded to a multiple of this; 0 pads to the largest image only."""
    padding: Literal["mean", "black"] = "mean"
    """Colour of padding: zero after normalisation, or black before it, as EoMT was trained."""

    def __post_init__(self) -> None:
        check_finite(self, "model")
        check_choice("model.type", self.type, get_args(ModelType))
        check(self.num_classes >= 0, "model.num_classes", ">= 0", self.num_classes)
        check_choice("model.padding", self.padding, ("mean", "black"))
        check(0 <= self.size_divisibility <= 2048, "model.size_divisibility", "0..2048", self.size_divisibility)
        check(all(s > 0 for s in self.pixel_std), "model.pixel_std", "positive numbers", self.pixel_std)
        check(0 < self.channels <= MAX_CHANNELS, "model.pixel_mean", f"1 to {MAX_CHANNELS} numbers", self.pixel_mean)
        check(len(self.pixel_std) == self.channels, "model.pixel_std", f"{self.channels} numbers, as model.pixel_mean",
              self.pixel_std)

    @property
    def channels(self) -> int:
        """Number of bands of the network's images."""
        return len(self.pixel_mean)

    @property
    def has_imagenet_mean(self) -> bool:
        """Whether the mean is that of ImageNet's 8-bit colours, up to rounding."""
        return self.channels == 3 and all(
            abs(mean - usual) < 0.5 for mean, usual in zip(self.pixel_mean, IMAGENET_MEAN, strict=True)
        )

    @property
    def classifies_masks(self) -> bool:
        """Whether the network predicts masks with classes, one for each query; a per-pixel baseline does not."""
        return self.type in ("maskformer", "mask2former", "eomt")


@dataclass(frozen=True)
class LossConfig:
    """Matching cost and loss, which share their weights (paper section 3.3)."""

    class_weight: float = 1.0
    mask_weight: float = 20.0
    dice_weight: float = 1.0
    no_object_weight: float = 0.1
    mask_loss: Literal["focal", "bce"] = "focal"
    """Focal loss, as in the official code, or binary cross-entropy, as in the paper's equation 2."""
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    deep_supervision: bool = True
    points: int = 0
    """Number of points at which masks are matched and compared, 12544 in Mask2Former; 0 takes every pixel."""
    oversample: float = 3.0
    """With points: candidates drawn for an image, as a multiple of ``points``; a pair takes its most uncertain ones."""
    importance: float = 0.75
    """With points: share of a pair's points that are its most uncertain candidates; the others are random."""
    padding: Literal["exclude", "include"] = "exclude"
    """Whether padding pixels count in mask losses; ``include`` gives the official code's numbers."""
    max_nonfinite_steps: int = 10
    """Number of consecutive skipped steps (non-finite cost, loss or gradient) after which training stops."""

    def __post_init__(self) -> None:
        check_finite(self, "loss")
        for name in ("class_weight", "mask_weight", "dice_weight", "no_object_weight", "focal_gamma"):
            check(getattr(self, name) >= 0, f"loss.{name}", ">= 0", getattr(self, name))
        check(self.points >= 0, "loss.points", ">= 0", self.points)
        check(self.oversample >= 1.0, "loss.oversample", ">= 1", self.oversample)
        check(0.0 <= self.importance <= 1.0, "loss.importance", "0..1", self.importance)
        check(0.0 <= self.focal_alpha <= 1.0, "loss.focal_alpha", "0..1", self.focal_alpha)
        check_choice("loss.mask_loss", self.mask_loss, ("focal", "bce"))
        check_choice("loss.padding", self.padding, ("exclude", "include"))
        check(self.max_nonfinite_steps > 0, "loss.max_nonfinite_steps", "> 0", self.max_nonfinite_steps)


@dataclass(frozen=True)
class AugmentConfig:
    """Training transforms of the official recipes, in the order of their application."""

    scale_mode: Literal["short_edge", "scale", "none"] = "short_edge"
    """``short_edge`` resizes the shorter side to one of ``short_edge``; ``scale`` fits the image into
    ``scale_size`` times a uniform draw of ``scale_range`` (large-scale jitter)."""
    short_edge: tuple[int, ...] = (512,)
    max_size: int = 2048
    """Largest longer side after a short-edge resize, in pixels."""
    scale_range: tuple[float, float] = (0.1, 2.0)
    scale_size: tuple[int, int] = (1024, 1024)
    crop_size: tuple[int, int] | None = (512, 512)
    """Height, width; smaller images are padded to it. ``None`` does not crop."""
    detr_crop: bool = False
    """Crop of DETR and of the official COCO panoptic recipe: in one image of two, before the resize, resize the shorter
    side to 400, 500 or 600 and crop a window with sides of 384 to 600."""
    single_category_max_area: float = 0.75
    """Largest share of the labelled pixels of a crop that one category may cover; other crops are drawn again. 1.0
    accepts any crop. Has no effect on data sets of overlapping instances, which have no map of categories."""
    color_jitter: bool = False
    """Change brightness, contrast, saturation and hue as SSD does; the official semantic recipes use it."""
    flip: bool = True
    copy_paste: float = 0.0
    """Probability with which an image gets objects (things) of another image of the data set (Ghiasi et al., 2021)."""
    copy_paste_scale: tuple[float, float] = (0.1, 2.0)
    """With ``copy_paste``: the other image is fitted into the crop's size times a uniform draw of this range."""

    def __post_init__(self) -> None:
        check_finite(self, "data.augment")
        check_choice("data.augment.scale_mode", self.scale_mode, ("short_edge", "scale", "none"))
        check(len(self.short_edge) > 0 and min(self.short_edge) > 0, "data.augment.short_edge", "positive sizes",
              self.short_edge)
        check(self.max_size > 0, "data.augment.max_size", "> 0", self.max_size)
        low, high = self.scale_range
        check(0.0 < low <= high, "data.augment.scale_range", "0 < low <= high", self.scale_range)
        check(0.0 <= self.copy_paste <= 1.0, "data.augment.copy_paste", "0..1", self.copy_paste)
        low, high = self.copy_paste_scale
        check(0.0 < low <= high, "data.augment.copy_paste_scale", "0 < low <= high", self.copy_paste_scale)
        area = self.single_category_max_area
        check(0.0 < area <= 1.0, "data.augment.single_category_max_area", "0 < share <= 1", area)
        check(min(self.scale_size) > 0, "data.augment.scale_size", "positive height and width", self.scale_size)
        if self.crop_size is not None:
            check(min(self.crop_size) > 0, "data.augment.crop_size", "positive height and width", self.crop_size)


@dataclass(frozen=True)
class ShapesConfig:
    """Synthetic data set of overlapping shapes (things) over textured stuff regions."""

    num_things: int = 6
    num_stuff: int = 4
    size: tuple[int, int] = (128, 128)
    """Height, width."""
    max_shapes: int = 6
    shape_area: tuple[float, float] = (0.022, 0.11)
    """Least and largest area of a shape, as shares of the image."""
    train_images: int = 4096
    val_images: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_things", "num_stuff", "max_shapes", "train_images"):
            check(getattr(self, name) >= 1, f"data.shapes.{name}", ">= 1", getattr(self, name))
        check(min(self.size) >= 16, "data.shapes.size", "at least 16 x 16", self.size)
        least, largest = self.shape_area
        check(0.0 < least <= largest <= 1.0, "data.shapes.shape_area", "0 < least <= largest <= 1", self.shape_area)
        check(self.val_images >= 0, "data.shapes.val_images", ">= 0", self.val_images)


@dataclass(frozen=True)
class DataConfig:
    """Data set and its loading."""

    dataset: str = "shapes"
    """``shapes``, ``folder``, ``coco_instances``, ``coco_panoptic``, ``yolo``, ``labelme``, ``voc``, or a preset
    of `data.datasets.presets`."""
    root: str | None = None
    """Folder of the data set, in the layout that its preset documents."""
    train_split: str = "train"
    val_split: str = "val"
    task: Task | None = None
    """Task of the targets; ``None`` takes the data set's own (folder: semantic, COCO instances: instance...)."""
    ignore_index: int | None = None
    """Value of unlabelled pixels in index PNGs; ``None`` takes that of ``classes.json`` or of the preset, else 255."""
    keep_empty: bool = True
    """Instances: train on images without annotations, in which everything is background."""
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    channels: int = 0
    """0 reads images as RGB of 8 bits, whatever they are stored as; another number reads pictures of so many bands of 8
    or 16 bits as they are stored, for which ``model.pixel_mean`` and ``pixel_std`` have a number each."""
    exif: bool = True
    """Turn each image as its EXIF orientation says; without it, images lie as their pixels are stored."""
    repeat_threshold: float = 0.0
    """Repeat factor sampling, as for LVIS: images with a class that fewer than this share of the images have come
    several times in an epoch (`data.class_balance`); 0 gives each image once."""
    skip_broken: bool = False
    """Skip and list images and annotations that cannot be read, instead of stopping."""
    cache: bool = False
    """Keep both splits decoded in memory, for data sets that fit and are slow to read or decode."""
    workers: int = 2
    """Number of loader processes; 0 loads in the training process."""

    def __post_init__(self) -> None:
        check_choice("data.task", self.task, (None, *TASKS))
        check_finite(self, "data")
        check(self.workers >= 0, "data.workers", ">= 0", self.workers)
        check(0.0 <= self.repeat_threshold <= 1.0, "data.repeat_threshold", "0..1", self.repeat_threshold)
        check(0 <= self.channels <= MAX_CHANNELS, "data.channels", f"0..{MAX_CHANNELS}", self.channels)
        jitter = self.augment.color_jitter
        check(self.channels == 0 or not jitter, "data.augment.color_jitter", "False with data.channels", jitter)
        ignore = self.ignore_index
        check(ignore is None or 0 <= ignore <= 65535, "data.ignore_index", "0..65535 or None", ignore)


@dataclass(frozen=True)
class Config:
    """Configuration of one run."""

    output: str = "runs/default"
    """Folder of logs, checkpoints, metrics and pictures."""
    seed: int = 0
    device: str = "auto"
    """Device by PyTorch's name; ``auto`` takes the GPU if there is one."""
    metrics: tuple[Task, ...] = ()
    """Tasks measured in validation; empty takes the data set's own task."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    test: TestConfig = field(default_factory=TestConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check(self.output != "", "output", "a folder", self.output)
        check(0 <= self.seed < 2**64, "seed", f"0 to {2**64 - 1}, the seeds of PyTorch", self.seed)
        for task in self.metrics:
            check_choice("metrics", task, TASKS)
        patience = self.solver.early_stopping
        check(patience == 0 or self.log.validate_every > 0, "solver.early_stopping", "0 without log.validate_every",
              patience)
        bands = self.data.channels or 3
        check(self.model.channels == bands, "model.pixel_mean", f"{bands} numbers, as data.channels="
              f"{self.data.channels}", self.model.pixel_mean)
        check(self.solver.decay_query_blocks or self.model.type == "eomt", "solver.decay_query_blocks",
              f"True with model.type={self.model.type}", False)
        annealing = self.solver.mask_annealing
        fits = not annealing or (self.model.type == "eomt" and len(annealing) == self.model.decoder.layers)
        check(fits, "solver.mask_annealing", f"none, or with model.type=eomt one pair for each of decoder.layers="
              f"{self.model.decoder.layers}", annealing)
