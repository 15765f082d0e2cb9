"""Configuration: checks, plain form, overrides on the command line; and exit statuses of commands."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from shlex import split as words
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from maskformer_fast.cli import TRACEBACK_VARIABLE, Recipe, cli_errors, leading_path, parse, parse_command, run_command
from maskformer_fast.config import (
    AugmentConfig,
    BackboneConfig,
    Config,
    DataConfig,
    DecoderConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    PixelDecoderConfig,
    ShapesConfig,
    SolverConfig,
    TestConfig,
)
from maskformer_fast.core.typed import to_plain
from maskformer_fast.recipes import from_dict, load_recipe, save_config


@dataclasses.dataclass(frozen=True)
class Options:
    """Train something."""

    config: Recipe
    resume: bool = False
    """Continue."""


def parse_config(argv):
    return parse_command(Options, argv, prog="test").config


@pytest.mark.parametrize(
    ("kind", "values", "name"),
    [
        (BackboneConfig, {"stem_channels": 0}, "backbone.stem_channels"),
        (BackboneConfig, {"drop_path_rate": 1.0}, "backbone.drop_path_rate"),
        (BackboneConfig, {"norm": "group"}, "backbone.norm"),
        (BackboneConfig, {"stem": "wide"}, "backbone.stem"),
        (PixelDecoderConfig, {"conv_dim": 100}, "pixel_decoder.conv_dim"),
        (PixelDecoderConfig, {"encoder_heads": 7}, "pixel_decoder.encoder_heads"),
        (PixelDecoderConfig, {"encoder_layers": -1}, "pixel_decoder.encoder_layers"),
        (DecoderConfig, {"layers": 0}, "decoder.layers"),
        (DecoderConfig, {"num_heads": 3}, "decoder.num_heads"),
        (DecoderConfig, {"dropout": -0.1}, "decoder.dropout"),
        (ModelConfig, {"type": "unet"}, "model.type"),
        (ModelConfig, {"pixel_std": (1.0, 0.0, 1.0)}, "model.pixel_std"),
        (LossConfig, {"mask_loss": "l2"}, "loss.mask_loss"),
        (LossConfig, {"dice_weight": -1.0}, "loss.dice_weight"),
        (LossConfig, {"max_nonfinite_steps": 0}, "loss.max_nonfinite_steps"),
        (AugmentConfig, {"scale_mode": "zoom"}, "data.augment.scale_mode"),
        (AugmentConfig, {"short_edge": ()}, "data.augment.short_edge"),
        (AugmentConfig, {"scale_range": (2.0, 1.0)}, "data.augment.scale_range"),
        (AugmentConfig, {"single_category_max_area": 0.0}, "data.augment.single_category_max_area"),
        (AugmentConfig, {"crop_size": (0, 4)}, "data.augment.crop_size"),
        (AugmentConfig, {"scale_size": (0, 4)}, "data.augment.scale_size"),
        (ShapesConfig, {"size": (8, 64)}, "data.shapes.size"),
        (DataConfig, {"task": "depth"}, "data.task"),
        (DataConfig, {"workers": -1}, "data.workers"),
        (TestConfig, {"overlap_threshold": 1.5}, "test.overlap_threshold"),
        (TestConfig, {"short_edge": 0}, "test.short_edge"),
        (TestConfig, {"size": (9, 0)}, "test.size"),
        (ModelConfig, {"size_divisibility": 10**6}, "model.size_divisibility"),
        (DecoderConfig, {"layers": 10**6}, "decoder.layers"),
        (DecoderConfig, {"num_queries": 10**9}, "decoder.num_queries"),
        (PixelDecoderConfig, {"encoder_layers": 10**6}, "pixel_decoder.encoder_layers"),
        (TestConfig, {"multi_scale": (1.0, -1.0)}, "test.multi_scale"),
        (SolverConfig, {"lr": 0.0}, "solver.lr"),
        (SolverConfig, {"lr": float("nan")}, "solver.lr"),
        (SolverConfig, {"accumulate": 3}, "solver.accumulate"),
        (SolverConfig, {"schedule": "cosine"}, "solver.schedule"),
        (SolverConfig, {"clip_norm": -1.0}, "solver.clip_norm"),
        (SolverConfig, {"warmup_factor": -0.1}, "solver.warmup_factor"),
        (SolverConfig, {"poly_power": -1.0}, "solver.poly_power"),
        (LogConfig, {"every": 0}, "log.every"),
        (LogConfig, {"pictures": -1}, "log.pictures"),
        (Config, {"metrics": ("depth",)}, "metrics"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(kind: type, values: dict, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        kind(**values)


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


# Plain containers


CONFIGS = st.builds(
    Config,
    output=st.text(st.characters(codec="utf-8"), min_size=1),
    seed=st.integers(0, 2**40),
    metrics=st.lists(st.sampled_from(["semantic", "instance", "panoptic"]), unique=True).map(tuple),
    model=st.builds(
        ModelConfig,
        backbone=st.builds(
            BackboneConfig,
            weights=st.none() | st.sampled_from(["None", "null", "1e-4", "a: b", "w.safetensors"]),
            depths=st.none() | st.tuples(*[st.integers(1, 9)] * 4),
            drop_path_rate=st.none() | st.floats(0.0, 0.99),
        ),
    ),
    data=st.builds(
        DataConfig,
        augment=st.builds(
            AugmentConfig,
            short_edge=st.lists(st.integers(1, 4096), min_size=1, max_size=20).map(tuple),
            crop_size=st.none() | st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
            detr_crop=st.booleans(),
        ),
        skip_broken=st.booleans(),
    ),
    test=st.builds(TestConfig, size=st.sampled_from([None, (384, 640)]),
                   multi_scale=st.lists(st.floats(1e-3, 8.0), max_size=4).map(tuple)),
    solver=st.builds(SolverConfig, lr=st.floats(1e-300, 1e300), milestones=st.lists(st.integers(0, 99)).map(tuple)),
)


@given(config=CONFIGS)
@settings(max_examples=50, deadline=None)
def test_a_saved_configuration_reads_back_identically(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    save_config(config, path)
    assert load_recipe(path) == config
    assert from_dict(to_plain(config)) == config


@pytest.mark.parametrize("name", ["a\x85b", "a\u2028b", "\u00e4", "~", "a: b"])
def test_an_output_of_any_characters_reads_back(tmp_path: Path, name: str) -> None:
    save_config(Config(output=name), tmp_path / "config.yaml")
    assert load_recipe(tmp_path / "config.yaml").output == name


def test_the_plain_form_of_tuples_is_lists() -> None:
    assert to_plain(Config())["data"]["augment"]["crop_size"] == [512, 512]
    assert yaml.safe_load(yaml.safe_dump(to_plain(Config()))) == to_plain(Config())


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "0.001", "!!float 1e-3"])
def test_floats_are_read_in_every_spelling_of_yaml(written: str) -> None:
    assert from_dict(yaml.safe_load(f"solver: {{lr: {written}}}")).solver.lr == 1e-3


def test_an_integer_in_a_float_field_becomes_a_float() -> None:
    lr = from_dict({"solver": {"lr": 1}}).solver.lr
    assert lr == 1.0 and isinstance(lr, float)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"solver": {"lrr": 1.0}}, r"solver\.lrr: expected one of max_steps, .*unknown key \(did you mean lr\?\)"),
        ({"colour": 1}, r"^colour: expected one of output, "),
        ({"model": {"backbone": {2: 3}}}, r"model\.backbone\.2: expected one of name"),
        ({"solver": {"lr": "fast"}}, r"solver\.lr: expected a finite number, got 'fast'"),
        ({"solver": {"lr": True}}, r"solver\.lr: expected a finite number, got True"),
        ({"solver": {"lr": None}}, r"solver\.lr: expected a finite number, got None"),
        ({"solver": {"lr": [1]}}, r"solver\.lr: expected a finite number, got \[1\]"),
        ({"solver": {"lr": float("inf")}}, r"solver\.lr: expected a finite number, got inf"),
        ({"solver": {"max_steps": 1.5}}, r"solver\.max_steps: expected an integer, got 1\.5"),
        ({"solver": {"max_steps": True}}, r"solver\.max_steps: expected an integer, got True"),
        ({"solver": {"amp": False}}, r"solver\.amp: expected one of 'off', .*got False"),
        ({"data": {"skip_broken": 1}}, r"data\.skip_broken: expected true or false, got 1"),
        ({"data": {"dataset": 3}}, r"data\.dataset: expected text, got 3"),
        ({"data": {"augment": {"crop_size": 512}}}, r"data\.augment\.crop_size: expected a list of 2, got 512"),
        ({"data": {"augment": {"crop_size": [1]}}}, r"data\.augment\.crop_size: expected a list of 2, got \[1\]"),
        ({"data": {"augment": {"short_edge": [1, "x"]}}}, r"short_edge\[1\]: expected an integer, got 'x'"),
        ({"data": {"augment": {"short_edge": "12"}}}, r"short_edge: expected a list, got '12'"),
        ({"data": None}, r"data: expected a mapping, got None"),
        ({"solver": {"lr": -1}}, r"solver\.lr: expected > 0, got -1\.0"),
    ],
)
def test_plain_data_that_does_not_fit_is_named(data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(data)


def test_plain_data_must_be_a_mapping() -> None:
    with pytest.raises(ValueError, match="recipe: expected a mapping"):
        from_dict([1])  # type: ignore[arg-type]


# Command line


def test_without_arguments_the_recipe_is_the_demo() -> None:
    assert parse_config([]) == load_recipe("demo")


@pytest.mark.parametrize("arguments", [["--config", "ade20k_150/maskformer_r50"],
                                       ["--config=demo", "--config=ade20k_150/maskformer_r50"]])
def test_config_chooses_a_recipe(arguments: list[str]) -> None:
    assert parse_config(arguments) == load_recipe("ade20k_150/maskformer_r50")


def test_options_override_the_recipe() -> None:
    demo = load_recipe("demo")
    config = parse_config(
        words(
            "--solver.max-steps 100 --solver.batch_size 4 --solver.lr=3e-4 --data.skip-broken --data.task semantic "
            "--data.augment.crop-size 64 48 --data.augment.short_edge 3 4 5 --test.multi-scale 0.5 1 "
            "--metrics semantic --output 'runs/a b'"
        )
    )
    assert config.solver == dataclasses.replace(demo.solver, max_steps=100, batch_size=4, lr=3e-4)
    assert config.data.skip_broken and config.data.task == "semantic"
    assert config.data.augment.crop_size == (64, 48) and config.data.augment.short_edge == (3, 4, 5)
    assert config.test.multi_scale == (0.5, 1.0) and config.metrics == ("semantic",) and config.output == "runs/a b"
    assert config.model == demo.model and config.loss == demo.loss and config.log == demo.log


def test_a_height_and_width_goes_before_the_short_edge() -> None:
    assert parse_config(words("--test.size 384 640 --test.short-edge 9")).test.edge == (384, 640)
    assert parse_config(words("--test.short-edge 384 --test.flip")).test.edge == 384


def test_negated_flags_and_none_turn_settings_off() -> None:
    config = parse_config(words("--config ade20k_150/maskformer_r50 --data.augment.crop-size None "
                                "--test.short-edge None --data.augment.no-flip"))
    assert config.data.augment.crop_size is None and config.test.short_edge is None and not config.data.augment.flip


def test_another_backbone_drops_the_recipes_backbone_settings() -> None:
    config = parse_config(words("--config ade20k_150/maskformer_r50 --model.backbone.name swin_tiny "
                                "--model.backbone.window-size 12"))
    assert config.model.backbone == BackboneConfig("swin_tiny", window_size=12)
    same = parse_config(words("--config ade20k_150/maskformer_r50 --model.backbone.name=resnet50"))
    assert same.model.backbone == BackboneConfig("resnet50", norm="frozen")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--solver.lrr 1", "--solver.lr"),
        ("--solver.max-steps many", "--solver.max-steps"),
        ("--solver.lr -1", "solver.lr: expected > 0, got -1.0"),
        ("--data.augment.crop-size 5", "--data.augment.crop-size"),
        ("--config", "error: --config: expected a value after it, got nothing"),
        ("--config --seed 1", "error: --config: expected a value after it, got --seed"),
        ("--config ade20k_150/maskformer_r5", "did you mean ade20k_150/maskformer_r50"),
        ("--config nowhere.yaml", "error: nowhere.yaml: no such recipe file"),
    ],
)
def test_wrong_options_end_with_status_2_and_a_message(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(words(arguments))
    assert stopped.value.code == 2
    output = " ".join(capsys.readouterr().err.split())
    assert message in output and "Traceback" not in output


def test_help_shows_options_with_the_recipes_values(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--config", "mapillary_vistas_65/maskformer_r50", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for part in ("--config NAME_OR_PATH", "--list-recipes", "--solver.max-steps", "300000", "1280 1280",
                 "Learning-rate factor of the backbone"):
        assert part in text


def test_list_recipes_prints_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--list-recipes"])
    assert stopped.value.code == 0
    assert "cityscapes_19/maskformer_r101c" in capsys.readouterr().out.splitlines()


def test_a_command_has_its_own_options_beside_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_command(Options, words("--seed 3 --resume --config demo"), prog="train")
    assert options == Options(dataclasses.replace(load_recipe("demo"), seed=3), resume=True)
    with pytest.raises(SystemExit):
        parse_command(Options, ["--help"], prog="train")
    text = capsys.readouterr().out
    assert all(part in text for part in ("Train something.", "--resume", "--solver.lr", "--config"))


# Errors of commands


@pytest.mark.parametrize("error", [ValueError("size: expected 1, got 2"), FileNotFoundError("no a.png"), KeyError("x")])
def test_expected_errors_become_messages(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, cli_errors(KeyError):
        raise error
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError), cli_errors():
        raise KeyError("x")
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError, match="x"), cli_errors():
        raise ValueError("x")


@pytest.mark.parametrize(("status", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_exit_status_is_that_of_the_command(status: int | None, code: int) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: status)
    assert stopped.value.code == code


def test_an_interrupted_command_has_exit_status_130() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_command(interrupted)
    assert stopped.value.code == 130


@pytest.mark.no_cover
@pytest.mark.parametrize(("code", "status"), [("parse(TestConfig, ['--help'], prog='x')", 0), ("print(1)", 0),
                                              ("[print(1), 3][1]", 3), ("print('x' * 100_000)", 0)])  # fmt: skip
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_into_a_closed_pipe_is_no_error(code: str, status: int, unbuffered: str) -> None:
    program = (
        "from maskformer_fast.cli import parse, run_command; from maskformer_fast.config import TestConfig; "
        f"run_command(lambda: {code})"
    )
    ended = run_into_closed_pipe([sys.executable, "-c", program], PYTHONUNBUFFERED=unbuffered)
    assert (ended.returncode, ended.stderr) == (0 if unbuffered else status, "")


@pytest.mark.no_cover
def test_help_of_a_command_into_a_closed_pipe_is_no_error() -> None:
    ended = run_into_closed_pipe([sys.executable, "-m", "maskformer_fast.benchmark", "--help"])
    assert (ended.returncode, ended.stderr) == (0, "")


def run_into_closed_pipe(line: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    finally:
        os.close(writer)


def test_a_broken_pipe_of_another_process_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, cli_errors():
        raise BrokenPipeError("of a worker")
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: of a worker\n"


def test_the_leading_path_is_the_first_argument() -> None:
    assert leading_path(["runs/demo", "--limit", "3"]) == "runs/demo"
    assert leading_path([]) is None and leading_path(["--limit", "3", "--help"]) is None
    with pytest.raises(ValueError, match=r"first argument: expected the checkpoint, .* got '--limit'"):
        leading_path(["--limit", "3", "runs/demo"])


def test_options_default_to_the_class_or_to_the_given_object() -> None:
    assert parse(TestConfig, ["--top-k", "5"], prog="x") == TestConfig(top_k=5)
    assert parse(TestConfig, ["--flip"], prog="x", default=TestConfig(top_k=7)) == TestConfig(top_k=7, flip=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("section", "name", "make"),
    [
        (SolverConfig, "solver.lr", lambda value: {"lr": value}),
        (ModelConfig, "model.pixel_mean", lambda value: {"pixel_mean": (1.0, value, 1.0)}),
        (LossConfig, "loss.dice_weight", lambda value: {"dice_weight": value}),
        (AugmentConfig, "data.augment.scale_range", lambda value: {"scale_range": (0.5, value)}),
        (TestConfig, "test.multi_scale", lambda value: {"multi_scale": (1.0, value)}),
    ],
)
def test_numbers_that_are_not_finite_are_refused(section: Any, name: str, make: Any, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected finite numbers, got"):
        section(**make(value))
