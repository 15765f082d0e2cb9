"""The commands of docs/checkpoints.md: every published configuration, with options that exist and its settings."""

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
OWN = ("camvid", "demo", "small")
MULTI_SCALE = "--test.multi-scale 0.5 0.75 1.0 1.25 1.5 1.75 --test.flip"


def commands(name: str) -> list[list[str]]:
    """Arguments of every call of a command on the page."""
    lines = PAGE.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[3:] for line in lines if line.startswith(f"python -m maskformer_fast.{name} ")]


def recipe_of(weights: str) -> Config:
    """The recipe in a weights file's name; that of a Hugging Face folder is in the page's table."""
    name = weights.removeprefix("weights/").removesuffix(".safetensors")
    if "/" not in name:
        found = re.search(rf"\| `facebook/{name}` \| `(.+?)` \|", PAGE)
        assert found, f"{name} is not in the table"
        name = found[1]
    assert name in recipe_names()
    return load_recipe(name)


def test_every_published_configuration_is_converted_and_evaluated_once() -> None:
    published = {f"weights/{name}.safetensors" for name in recipe_names() if not name.startswith(OWN)}
    assert len(published) == 30
    converted = [target for _, target, *_ in commands("convert")]
    evaluated = [target for target, *_ in commands("evaluate")]
    assert sorted(evaluated) == sorted(set(evaluated)) and published <= set(evaluated)
    assert converted[:-1] == evaluated and commands("convert")[-1][2] == "--verify"
    sources = [source for source, *_ in commands("convert")[:-1]]
    assert len(set(sources)) == len(sources)
    for source in sources:
        assert PAGE.count(source) > 1, f"{source} is in no table"


@pytest.mark.no_cover  # the command line is parsed for every row of the table
@pytest.mark.parametrize("more", ["", MULTI_SCALE], ids=["single scale", "multi-scale"])
def test_evaluation_has_the_settings_of_the_recipe(more: str) -> None:
    assert MULTI_SCALE in PAGE
    for arguments in commands("evaluate"):
        recipe = recipe_of(arguments[0])
        # What an official file is converted to carries its recipe; a Hugging Face folder names no data set.
        carried = recipe if arguments[0].count("/") > 1 else Config()
        default = EvaluateOptions(tyro.MISSING, data=carried.data, test=carried.test)
        options = parse(EvaluateOptions, [*arguments, *shlex.split(more)], prog="evaluate", default=default)
        assert options.data.root is not None and options.data.dataset == recipe.data.dataset
        scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) if more else ()
        order = "panoptic_order" if "panoptic" in " ".join(arguments) else "semantic_order"
        assert options.test == replace(recipe.test, multi_scale=scales, flip=bool(more), **{order: "official"})
