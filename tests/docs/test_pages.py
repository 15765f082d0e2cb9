"""Quick checks of the documentation: commands are parsed, Python blocks run; ``make docs-check`` runs commands."""

from __future__ import annotations

import json
import os
import re
import runpy
from pathlib import Path

import pytest

from maskformer_fast import train
from maskformer_fast.recipes import recipe_names
from tests.docs import run
from tests.docs.pages import ROOT, SHELL, Block, Command, PageError, Place, blocks, commands, pages
from tests.docs.parsing import CommandError, check, check_python, check_recipe, split_command
from tests.docs.prose import problems
from tests.docs.run import NOT_RUN, run_python, why_not_run
from tests.docs.world import TINY, make_world

PAGES = {path.relative_to(ROOT).as_posix(): path for path in pages()}
HERE = Place("page.md", 3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    for path in PAGES.values():
        for block in blocks(path):
            if block.language == "yaml":
                check_recipe(block.text, folder)
    return folder


# The pages


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_accepted_by_its_program(name: str, world: Path) -> None:
    for block in blocks(PAGES[name]):
        for command in commands(block) if block.language in SHELL else []:
            check(command, world)


@pytest.mark.parametrize("name", PAGES)
def test_everything_the_prose_names_exists(name: str) -> None:
    assert not problems(PAGES[name])


PYTHON = [block for path in PAGES.values() for block in blocks(path) if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: str(block.place))
def test_python_runs(block: Block, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    check_python(block.text)
    if not block.reason:
        run_python(block)


def test_every_operator_has_a_section_with_an_example() -> None:
    text = PAGES["docs/operators.md"].read_text()
    parts = dict(re.findall(r"^## (\w+).*?\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL))
    operators = ("semantic", "segments", "resized_argmax", "nearest_masks", "rle", "matching_cost", "assignment",
                 "mask_loss", "resize", "convolution", "window_attention", "attention", "upscaling",
                 "deformable_attention", "linear", "feed_forward", "mask_product")
    for name in operators:
        assert (ROOT / "maskformer_fast" / "ops" / f"{name}.py").exists()
        assert "```math" in parts[name] and "```python" in parts[name], name


def test_the_recipes_page_lists_every_published_recipe() -> None:
    text = PAGES["docs/recipes.md"].read_text()
    missing = [name for name in recipe_names() if f"`{name}`" not in text]
    assert not [name for name in missing if not name.startswith("camvid")]


def test_the_training_page_describes_every_field_of_the_log(world: Path, tmp_path: Path) -> None:
    assert train.main(["--config", str(TINY), "--output", str(tmp_path / "run"), "--solver.max-steps", "1"]) == 0
    text = PAGES["docs/training.md"].read_text()
    named = set(re.findall(r"`([\w/]+)`", text))
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        for field in json.loads(line):
            part = field.removesuffix("_things").removesuffix("_stuff")
            assert part in named, f"docs/training.md does not describe {field}"


def test_the_figure_is_up_to_date_and_names_files_that_exist() -> None:
    pytest.importorskip("matplotlib")
    figure = runpy.run_path(str(ROOT / "docs/figures/data_flow.py"), run_name="figure")
    drawn = (ROOT / "docs/figures/data_flow.svg").read_text()
    for box in figure["BOXES"].values():
        assert box.title in drawn, "draw it again: python docs/figures/data_flow.py"
        for file in box.files:
            assert (ROOT / "maskformer_fast" / file).exists() and file in drawn, file


# The checks themselves


def page(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "page.md"
    path.write_text(text)
    return path


def test_commands_have_the_line_numbers_of_their_page(tmp_path: Path) -> None:
    text = "# A\n\n```sh\n# why\nmake test   # all\npython -m x \\\n    --y 1\n```\n\n- list\n\n"
    page_blocks = blocks(page(tmp_path, text + "  ```\n  make lint\n  ```\n"), tmp_path)
    assert [(c.place.line, c.text) for block in page_blocks for c in commands(block)] == [
        (5, "make test"), (6, "python -m x --y 1"), (13, "make lint")]  # fmt: skip


def test_a_reason_applies_to_the_next_block_only(tmp_path: Path) -> None:
    text = "<!-- docs-check: parse, needs a Jetson -->\n```\nmake test\n```\n```\nmake lint\n```\n"
    assert [block.reason for block in blocks(page(tmp_path, text), tmp_path)] == ["needs a Jetson", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```fish\nmake\n```\n", "page.md:1: expected a block of sh"),
        ("```text\npython -m maskformer_fast.train\n```\n", "page.md:2: a command in a listing"),
        ("```sh\nmake test\n", "not closed"),
        ("<!-- docs-check: skip -->\n```\nmake\n```\n", "expected <!-- docs-check: parse, REASON -->"),
        ("<!-- docs-check: parse, why -->\nprose\n", "expected a fenced block after the comment"),
    ],
)
def test_blocks_that_cannot_be_checked_are_errors(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PageError, match=re.escape(message)):
        blocks(page(tmp_path, text), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frobnicate --now", "frobnicate: unknown to docs-check"),
        ("python script.py", "no such file: script.py"),
        ("python -V", "python -V: unknown to docs-check"),
        ('python -c "import (torch"', "not Python"),
        ('python -c "from maskformer_fast.ops import cake"', "maskformer_fast.ops has no cake"),
        ("python -m maskformer_fast.nothing", "no such module"),
        ("python -m http.server", "unknown to docs-check"),
        ("python -m maskformer_fast.train --solver.rate 1", "--solver.rate"),
        ("python -m maskformer_fast.train --solver.lr fast", "--solver.lr"),
        ("python -m maskformer_fast.train --config ade20k_150/maskformer_r5", "ade20k_150/maskformer_r50"),
        ("python -m maskformer_fast.train --config their.yaml", "no such recipe file"),
        ("python -m maskformer_fast.evaluate", "checkpoint"),
        ("python -m maskformer_fast.evaluate runs/demo --task semantics", "semantics"),
        ("torchrun --standalone --nproc-per-node 2 -m maskformer_fast.train --solver.rate 1", "--solver.rate"),
        ("torchrun --procs 2 -m maskformer_fast.train", "--procs"),
        ("make cake", "no target cake"),
        ("make test CAKE=1", "no variable CAKE"),
        ('pip install -e ".[cake]"', "no extra cake"),
        ("pip install -e . --cake", "--cake"),
        ("pip install -e . -c cake.txt", "no file cake.txt"),
        ("python -m pytest tests/cake.py", "no such file: tests/cake.py"),
        ("python -m maskformer_fast.kernels.aot --check --cake", "--cake"),
        ("python -m maskformer_fast.benchmark bundle --cake", "--cake"),
        ("docker run 'open", "not a command line"),
        ("make lint && make test", "one command on a line"),
    ],
)
def test_a_command_that_would_fail_is_refused(text: str, message: str) -> None:
    with pytest.raises(CommandError, match=re.escape(message)) as error:
        check(Command(HERE, text, ""))
    assert str(error.value).startswith("page.md:3: ")


def test_errors_in_the_prose_are_reported(tmp_path: Path) -> None:
    wrong = "`--solver.rate` `solver.rate` `ops/cake.py` `make cake` [a](cake.md) [b](#cake)"
    right = "`--solver.lr` `data.augment` `solver.lr` `make test` [a](page.md#a-section)\n\n## A section\n"
    assert len(problems(page(tmp_path, f"{wrong} {right}"), tmp_path)) == 6


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("python -m maskformer_fast.train", ""),
        ("python -m maskformer_fast.train --help", ""),
        ("python -m maskformer_fast.train --config small --data.root data", ""),
        ("python -m maskformer_fast.train --config ade20k_150/maskformer_r50", "data set"),
        ("python -m maskformer_fast.train --config ade20k_150/maskformer_r50 --data.root /data/x", "data set"),
        ("python -m maskformer_fast.evaluate runs/demo", ""),
        ("python -m maskformer_fast.convert model_final.pkl x.safetensors", "published checkpoint"),
        ("torchrun --standalone --nproc-per-node 2 -m maskformer_fast.train", "several processes"),
        ("make demo", "no module"),
        ("python -m maskformer_fast.kernels.aot --check", "too long"),
    ],
)
def test_commands_are_run_unless_there_is_a_reason(text: str, reason: str) -> None:
    why = why_not_run(split_command(text), "")
    assert (reason in why) if reason else not why


def test_options_that_take_long_are_omitted_with_their_values() -> None:
    arguments = split_command("python -m x runs/mine --target sm_87 sm_90 --output bundle --frames 1x2x3").arguments
    assert run.without_options(arguments, run.OMITTED) == ["runs/mine", "--output", "bundle"]


def test_a_failing_command_fails_the_check(tmp_path: Path) -> None:
    make_world(tmp_path / "world")
    report = run.Report()
    for image in ("photo.jpg", "none.jpg"):
        command = Command(HERE, f"python -m maskformer_fast.predict runs/demo {image}", "")
        run.check_command(command, tmp_path / "world", report)
    assert report.counts == {"ran": 1, "FAILED": 1} and report.failed == 1
    assert "none.jpg: no image there" in report.lines[-1]
    assert (tmp_path / "world" / "predictions" / "semantic" / "photo.png").exists()
    assert os.getcwd() != str(tmp_path / "world") and "/data/*" in NOT_RUN
