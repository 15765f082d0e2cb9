"""Properties of published models that weights do not show: classes, data set, and size of images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from maskformer_fast.config import Config, ModelConfig
from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.datasets.presets import preset_metadata
from maskformer_fast.data.datasets.things import things_metadata
from maskformer_fast.modeling.backbone import resolve_backbone
from maskformer_fast.recipes import load_recipe, recipe_names

_FOLDERS = {
    19: "cityscapes_19",
    65: "mapillary_vistas_65",
    133: "coco_panoptic",
    150: "ade20k_150",
    171: "coco_stuff_10k_171",
    847: "ade20k_full_847",
}
"""Number of classes -> folder of the recipes of the published data set."""
_ADE20K_PANOPTIC = "ade20k_panoptic"
"""Folder of ADE20K panoptic, with as many classes as the semantic data set. Its models have an encoder."""
_MASK2FORMER = {
    8: "cityscapes_instance",
    19: "cityscapes_semantic",
    65: "mapillary_semantic",
    80: "coco_instance",
    100: "ade20k_instance",
    133: "coco_panoptic",
    150: "ade20k_semantic",
}
"""Number of classes -> beginning of the names of Mask2Former's recipes."""
_EOMT = {19: "cityscapes_semantic", 80: "coco_instance", 133: "coco_panoptic", 150: "ade20k_panoptic"}
"""Number of classes -> beginning of the names of EoMT's recipes."""
_EOMT_SEMANTIC_QUERIES = 100
"""Queries of the semantic EoMTs; others have more."""
_MANY_QUERIES = 200
"""Queries of the largest Mask2Formers but the semantic ones, which have the classes of panoptic ones."""


def published_recipe(model: ModelConfig) -> Config | None:
    """The packaged recipe that is most similar to a network, if a published data set has as many classes.

    A Mask2Former of ADE20K or Cityscapes with 100 queries may be semantic or panoptic; the semantic recipe is taken.
    """
    folder = _folder(model)
    if folder is None:
        return None

    def similarity(recipe: Config) -> tuple[bool, bool, bool]:
        other = recipe.model
        same_size = model.type == "eomt" and _stored_size(other) == _stored_size(model)
        return other.type == model.type, other.backbone.name == model.backbone.name, same_size

    return max(_recipes(folder), key=similarity)


def _folder(model: ModelConfig) -> str | None:
    """Beginning of the names of the recipes of a network's data set and kind."""
    if model.type == "mask2former":
        known = _MASK2FORMER.get(model.num_classes)
        if known is not None and model.decoder.num_queries == _MANY_QUERIES:
            known = known.replace("semantic", "panoptic") if known != "mapillary_semantic" else known
        return None if known is None else f"mask2former/{known}"
    if model.type == "eomt":
        known = _EOMT.get(model.num_classes)
        if known == "ade20k_panoptic" and model.decoder.num_queries == _EOMT_SEMANTIC_QUERIES:
            known = "ade20k_semantic"
        return None if known is None else f"eomt/{known}"
    known = _FOLDERS.get(model.num_classes)
    if known == "ade20k_150" and model.pixel_decoder.encoder_layers > 0:
        known = _ADE20K_PANOPTIC
    return None if known is None else f"{known}/"


def _known_classes(recipe: Config) -> Metadata:
    """Classes of a recipe's data set; those of COCO's instances are the things of its panoptic data set."""
    name = recipe.data.dataset
    if name == "coco_instances":
        return things_metadata(preset_metadata("coco_panoptic_133"), name)
    return preset_metadata(name)


@functools.cache
def _recipes(folder: str) -> tuple[Config, ...]:
    return tuple(load_recipe(name) for name in recipe_names() if name.startswith(folder))


def published_config(model: ModelConfig) -> Config:
    """Configuration of a converted network: that of its published recipe, or the defaults.

    The recipe decides whether images are padded, which weights do not show.
    """
    recipe = published_recipe(model)
    if recipe is None:
        return Config(model=model)
    if model.type != "eomt":
        return replace(recipe, model=replace(model, size_divisibility=recipe.model.size_divisibility))
    # Images are brought to the size of the stored positions, to which all but the semantic recipes pad.
    side, patch = max(_stored_size(model)), resolve_backbone(model.backbone).patch_size or 0
    pads = recipe.model.size_divisibility > patch
    test = replace(recipe.test, short_edge=side, max_size=side if pads else 4 * side)
    fits = len(recipe.solver.mask_annealing) == model.decoder.layers
    solver = recipe.solver if fits else replace(recipe.solver, mask_annealing=())
    model = replace(model, size_divisibility=side if pads else patch)
    return replace(recipe, model=model, test=test, solver=solver)


def _stored_size(model: ModelConfig) -> tuple[int, int]:
    """Height and width for which a ViT's positions are stored."""
    return resolve_backbone(model.backbone).image_size or (0, 0)


def published_metadata(model: ModelConfig, class_names: Sequence[str] | None = None) -> Metadata:
    """Metadata of a network's classes.

    Args:
        model: the network. Its number of classes (for ADE20K also its encoder or queries) decides the published data
            set.
        class_names: names that the source has, which replace those of the data set. The data set is only taken if half
            of the names or more are its own.

    Returns:
        Names, things and colours of the published data set; otherwise the given names, or ``class_0`` and so on,
        without things.
    """
    count = model.num_classes
    recipe = published_recipe(model)
    if recipe is not None:
        known = _known_classes(recipe)
        if class_names is None:
            return known
        same = sum(_first_word(a) == _first_word(b) for a, b in zip(class_names, known.class_names, strict=True))
        if 2 * same >= count:
            return replace(known, class_names=tuple(class_names))
    names = tuple(class_names or (f"class_{index}" for index in range(count)))
    return Metadata("converted", names, (False,) * count, tuple(range(count)), default_colors(count))


def with_published_classes(config: Config, class_names: Sequence[str] | None) -> tuple[Config, Metadata]:
    """Classes of a converted network (`published_metadata`), and its configuration with the data set that has them."""
    metadata = published_metadata(config.model, class_names)
    recipe = published_recipe(config.model)
    if recipe is not None and recipe.data.dataset == metadata.name:
        config = replace(config, data=recipe.data)
    return config, metadata


def with_things(metadata: Metadata, things: Sequence[str]) -> Metadata:
    """Metadata in which exactly the given classes are things.

    Args:
        metadata: the classes.
        things: indices and ranges, as ``0-79`` or ``0``, ``1``, ``5``; also joined by commas.

    Raises:
        ValueError: another text, or an index outside of the classes.
    """
    chosen: set[int] = set()
    last = metadata.num_classes - 1
    for part in ",".join(things).split(",") if things else ():
        first, dash, end = part.strip().partition("-")
        numbers = [first, end if dash else first]
        if not all(number.isascii() and number.isdecimal() and len(number) <= 6 for number in numbers):
            raise ValueError(f"things: expected class indices and ranges like 0-79, got {part!r}")
        low, high = map(int, numbers)
        if not low <= high <= last:
            raise ValueError(f"things: expected classes in 0..{last}, got {part!r}")
        chosen.update(range(low, high + 1))
    return replace(metadata, is_thing=tuple(index in chosen for index in range(metadata.num_classes)))


def _first_word(name: str) -> str:
    """First name in a list of synonyms, in lower case."""
    return name.replace(";", ",").partition(",")[0].strip().lower()
