"""Commands of docs/checkpoints.md: one for each published configuration, with its settings."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest
import tyro

from maskformer_fast.cli import parse
from maskformer_fast.config import Config
from maskformer_fast.evaluate import EvaluateOptions
from maskformer_fast.recipes import load_recipe, recipe_names
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/checkpoints.md").read_text()
UNPUBLISHED = ("camvid", "demo", "small")
"""Beginnings of the names of this project's own recipes."""
MULTI_SCALE = "--test.multi-scale 0.5 0.75 1.0 1.25 1.5 1.75 --test.flip"


def commands(name: str) -> list[list[str]]:
    """Return the arguments of every call of a command on the page."""
    lines = PAGE.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[3:] for line in lines if line.startswith(f"python -m maskformer_fast.{name} ")]


def recipe_of(weights: str) -> Config:
    """Load the recipe of a weights file: named by its path, or for a Hugging Face folder by the page's table."""
    name = weights.removeprefix("weights/").removesuffix(".safetensors")
    if "/" not in name:
        row = re.search(rf"\| `facebook/{name}` \| `(.+?)` \|", PAGE)
        assert row, f"{name} is not in the table"
        name = row[1]
    assert name in recipe_names()
    return load_recipe(name)


def test_every_published_configuration_is_converted_and_evaluated_once() -> None:
    published = {f"weights/{name}.safetensors" for name in recipe_names() if not name.startswith(UNPUBLISHED)}
    assert len(published) == 30 + 45 + 21
    conversions = [arguments for arguments in commands("convert") if arguments[1].startswith("weights/")]
    converted = [target for _, target, *_ in conversions]
    evaluated = [target for target, *_ in commands("evaluate")]
    assert sorted(evaluated) == sorted(set(evaluated)) and published <= set(evaluated)
    assert converted == evaluated
    sources = [source for source, *_ in conversions]
    assert len(set(sources)) == len(sources)
    for source in sources:
        listed = source.removesuffix("/pytorch_model.bin")
        assert PAGE.count(source) > 1 or f"| `{listed}` |" in PAGE, f"{source} is in no table"


@pytest.mark.no_cover  # the command line is parsed for every row of the table
@pytest.mark.parametrize("more", ["", MULTI_SCALE], ids=["single scale", "multi-scale"])
def test_evaluation_has_the_settings_of_the_recipe(more: str) -> None:
    assert MULTI_SCALE in PAGE
    for arguments in commands("evaluate"):
        recipe = recipe_of(arguments[0])
        if more and recipe.test.windows:  # which is another way of test-time augmentation
            continue
        # A converted official file has its recipe in it; a converted Hugging Face folder has none.
        stored = recipe if arguments[0].count("/") > 1 else Config()
        default = EvaluateOptions(tyro.MISSING, data=stored.data, test=stored.test)
        options = parse(EvaluateOptions, [*arguments, *shlex.split(more)], prog="evaluate", default=default)
        assert options.data.root is not None and options.data.dataset == recipe.data.dataset
        scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) if more else ()
        order = "panoptic_order" if "panoptic" in " ".join(arguments) else "semantic_order"
        has_order = "instance" not in arguments[0] and not recipe.test.windows  # both have one order only
        orders = {order: "official"} if has_order else {}
        assert options.test == replace(recipe.test, multi_scale=scales, flip=bool(more), **orders)
