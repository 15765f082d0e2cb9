"""Properties of published models that weights do not show: classes, data set, and size of images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from maskformer_fast.config import Config, ModelConfig
from maskformer_fast.core.colors import default_colors
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.datasets.presets import preset_metadata
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


def published_recipe(model: ModelConfig) -> Config | None:
    """The packaged recipe that is most similar to a network, if a published data set has as many classes."""
    folder = _FOLDERS.get(model.num_classes)
    if folder is None:
        return None
    if folder == "ade20k_150" and model.pixel_decoder.encoder_layers > 0:
        folder = _ADE20K_PANOPTIC

    def similarity(recipe: Config) -> tuple[bool, bool]:
        other = recipe.model
        return other.type == model.type, other.backbone.name == model.backbone.name

    return max(_recipes(folder), key=similarity)


@functools.cache
def _recipes(folder: str) -> tuple[Config, ...]:
    return tuple(load_recipe(name) for name in recipe_names() if name.startswith(f"{folder}/"))


def published_config(model: ModelConfig) -> Config:
    """Configuration of a converted network: that of its published recipe, or the defaults.

    The recipe decides whether images are padded, which weights do not show.
    """
    recipe = published_recipe(model)
    if recipe is None:
        return Config(model=model)
    return replace(recipe, model=replace(model, size_divisibility=recipe.model.size_divisibility))


def published_metadata(model: ModelConfig, class_names: Sequence[str] | None = None) -> Metadata:
    """Metadata of a network's classes.

    Args:
        model: the network. Its number of classes (for ADE20K also its encoder) decides the published data set.
        class_names: names that the source has, which replace those of the data set. The data set is only taken if half
            of the names or more are its own.

    Returns:
        Names, things and colours of the published data set; otherwise the given names, or ``class_0`` and so on,
        without things.
    """
    count = model.num_classes
    recipe = published_recipe(model)
    if recipe is not None:
        known = preset_metadata(recipe.data.dataset)
        if class_names is None:
            return known
        same = sum(_first_word(a) == _first_word(b) for a, b in zip(class_names, known.class_names, strict=True))
        if 2 * same >= count:
            return replace(known, class_names=tuple(class_names))
    names = tuple(class_names or (f"class_{index}" for index in range(count)))
    return Metadata("converted", names, (False,) * count, tuple(range(count)), default_colors(count))


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
