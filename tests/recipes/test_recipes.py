"""Recipes of the 30 published configurations, and recipe files: names, bases, merging, errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskformer_fast.config import Config
from maskformer_fast.core.typed import to_plain
from maskformer_fast.data.datasets.presets import PRESETS
from maskformer_fast.modeling.backbone import resolve_backbone
from maskformer_fast.recipes import CONFIG_DIR, from_dict, load_recipe, recipe_names
from tests.support.memory import at_most
from tests.support.paths import ROOT

# Values of the published configurations, one line for each data set:
# steps, batch, crop, first and last short edge, their number, longest side in training, test size.
FACTS = {
    "ade20k_150": (160_000, 16, (512, 512), 256, 1024, 16, 2048, (512, 2048)),
    "ade20k_full_847": (200_000, 16, (512, 512), 256, 1024, 16, 2048, (512, 2048)),
    "ade20k_panoptic": (720_000, 16, (640, 640), 320, 1280, 16, 2560, (640, 2560)),
    "cityscapes_19": (90_000, 16, (512, 1024), 512, 2048, 16, 4096, (1024, 2048)),
    "coco_stuff_10k_171": (60_000, 32, (640, 640), 320, 960, 11, 2560, (640, 2560)),
    "coco_panoptic": (554_400, 64, None, 480, 800, 11, 1333, (800, 1333)),
    "mapillary_vistas_65": (300_000, 16, (1280, 1280), 1024, 4096, 16, 8192, (2048, 2048)),
}
COUNTS = {"ade20k_150": 9, "ade20k_full_847": 5, "ade20k_panoptic": 2, "cityscapes_19": 2, "coco_stuff_10k_171": 5,
          "coco_panoptic": 6, "mapillary_vistas_65": 1}
OFFICIAL = [name for name in recipe_names() if name.split("/")[0] in COUNTS]
BACKBONES = {"r50": "resnet50", "r101": "resnet101", "r101c": "resnet101c", "tiny": "swin_tiny", "small": "swin_small",
             "base": "swin_base", "large": "swin_large"}


def test_there_is_a_recipe_for_each_of_the_30_published_configurations() -> None:
    assert len(OFFICIAL) == 30
    folders = [name.split("/")[0] for name in OFFICIAL]
    assert {folder: folders.count(folder) for folder in folders} == COUNTS


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_loads_and_its_backbone_resolves(name: str) -> None:
    config = load_recipe(name)
    assert config.output == f"runs/{name}"
    backbone = resolve_backbone(config.model.backbone)
    assert (backbone.depths or backbone.blocks) is not None


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_data_set_is_a_preset_of_the_recipes_task(name: str) -> None:
    dataset = load_recipe(name).data.dataset
    assert dataset in PRESETS
    assert ("panoptic" in dataset) == ("panoptic" in name)


@pytest.mark.parametrize("name", OFFICIAL)
def test_schedule_crop_and_sizes_are_the_published_ones(name: str) -> None:
    config, augment = load_recipe(name), load_recipe(name).data.augment
    steps, batch, crop, low, high, count, longest, test = FACTS[name.split("/")[0]]
    if "res640" in name:
        crop, low, high, longest, test = (640, 640), 320, 1280, 2560, (640, 2560)
    if name == "coco_panoptic/maskformer_panoptic_swin_large_in21k_384":
        longest = 1000
    assert (config.solver.max_steps, config.solver.batch_size) == (steps, batch)
    assert augment.crop_size == crop and augment.max_size == longest and augment.scale_mode == "short_edge"
    assert (augment.short_edge[0], augment.short_edge[-1], len(augment.short_edge)) == (low, high, count)
    assert list(augment.short_edge) == sorted(augment.short_edge)
    assert (config.test.short_edge, config.test.max_size) == test
    assert augment.flip and augment.single_category_max_area == 1.0
    coco = name.startswith("coco_panoptic")
    assert augment.detr_crop == coco and augment.color_jitter != coco


@pytest.mark.parametrize("name", OFFICIAL)
def test_backbone_and_optimiser_are_the_published_ones(name: str) -> None:
    config = load_recipe(name)
    solver, backbone = config.solver, config.model.backbone
    assert backbone.name == next(BACKBONES[part] for part in name.split("_") if part in BACKBONES)
    if "swin" in name:
        assert (solver.lr, solver.backbone_factor, solver.weight_decay) == (6e-5, 1.0, 0.01)
        assert (solver.warmup_steps, solver.warmup_factor) == (1500, 1e-6)
        assert backbone.norm is None and resolve_backbone(backbone).drop_path_rate == 0.3
    else:
        assert (solver.lr, solver.backbone_factor, solver.weight_decay) == (1e-4, 0.1, 1e-4)
        assert (solver.warmup_steps, backbone.norm) == (0, "frozen")
    assert (solver.clip_norm, solver.norm_weight_decay) == (0.01, 0.0)
    if name.startswith("coco_panoptic"):
        assert (solver.schedule, solver.milestones, solver.gamma) == ("step", (369_600,), 0.1)
    else:
        assert (solver.schedule, solver.poly_power) == ("poly", 0.9)


@pytest.mark.parametrize("name", OFFICIAL)
def test_network_loss_and_thresholds_are_the_published_ones(name: str) -> None:
    config = load_recipe(name)
    model, loss = config.model, config.loss
    kind = next(k for part, k in (("plus", "per_pixel_plus"), ("per_pixel", "per_pixel"), ("", "maskformer"))
                if part in name)
    assert model.type == kind
    unpadded = kind != "maskformer" or name.startswith("coco_panoptic")
    assert model.size_divisibility == (0 if unpadded else 32)
    assert model.pixel_decoder.encoder_layers == (6 if "panoptic_r" in name else 0)
    assert (model.decoder.layers, model.decoder.num_queries, model.decoder.dropout) == (6, 100, 0.1)
    assert (loss.class_weight, loss.mask_weight, loss.dice_weight, loss.no_object_weight) == (1.0, 20.0, 1.0, 0.1)
    assert config.test.overlap_threshold == 0.8
    assert config.test.object_mask_threshold == (0.7 if name.startswith("ade20k_panoptic") else 0.8)


MASK2FORMER = [name for name in recipe_names() if name.startswith("mask2former/")]
MASK2FORMER_FACTS = {
    "coco_panoptic": (7, 368_750, (1024, 1024), None, (800, 1333)),
    "coco_instance": (7, 368_750, (1024, 1024), None, (800, 1333)),
    "ade20k_semantic": (7, 160_000, (512, 512), (256, 1024, 2048), (512, 2048)),
    "ade20k_panoptic": (2, 160_000, (640, 640), (320, 1280, 2560), (640, 2560)),
    "ade20k_instance": (2, 160_000, (640, 640), (320, 1280, 2560), (640, 2560)),
    "cityscapes_semantic": (6, 90_000, (512, 1024), (512, 2048, 4096), (1024, 2048)),
    "cityscapes_panoptic": (6, 90_000, (512, 1024), (512, 2048, 4096), (1024, 2048)),
    "cityscapes_instance": (6, 90_000, (512, 1024), (512, 2048, 4096), (1024, 2048)),
    "mapillary_semantic": (2, 300_000, (1024, 1024), (1024, 4096, 8192), (2048, 2048)),
}
"""Of each data set: recipes, steps, crop, first and last short edge and longest side in training, test size."""


def dataset_of(name: str) -> str:
    return "_".join(name.partition("/")[2].split("_")[:2])


def test_there_is_a_recipe_for_each_published_mask2former() -> None:
    folders = [dataset_of(name) for name in MASK2FORMER]
    assert {folder: folders.count(folder) for folder in folders} == {k: v[0] for k, v in MASK2FORMER_FACTS.items()}


@pytest.mark.parametrize("name", MASK2FORMER)
def test_values_of_mask2former_are_the_published_ones(name: str) -> None:
    config = load_recipe(name)
    model, loss, solver, augment, test = config.model, config.loss, config.solver, config.data.augment, config.test
    _, steps, crop, edges, sizes = MASK2FORMER_FACTS[dataset_of(name)]
    is_large = "swin_large" in name
    if "res640" in name:
        crop, edges, sizes = (640, 640), (320, 1280, 2560), (640, 2560)
    assert model.type == "mask2former" and model.size_divisibility == 32
    assert (model.decoder.layers, model.decoder.dropout, model.decoder.ffn_dim) == (9, 0.0, 2048)
    assert model.decoder.num_queries == (200 if is_large and "semantic" not in name else 100)
    pixel = model.pixel_decoder
    assert (pixel.encoder_layers, pixel.encoder_ffn_dim, pixel.encoder_dropout) == (6, 1024, 0.0)
    assert model.backbone.name == next(BACKBONES[part] for part in name.split("_") if part in BACKBONES)
    if "_r" in name.partition("/")[2] and "res640" not in name:
        assert model.backbone.norm == ("sync" if "cityscapes" in name else "frozen")
    else:
        assert model.backbone.norm is None and resolve_backbone(model.backbone).drop_path_rate == 0.3
    assert (loss.class_weight, loss.mask_weight, loss.dice_weight, loss.no_object_weight) == (2.0, 5.0, 5.0, 0.1)
    assert (loss.mask_loss, loss.points, loss.oversample, loss.importance) == ("bce", 12_544, 3.0, 0.75)
    assert (solver.lr, solver.backbone_factor, solver.weight_decay, solver.norm_weight_decay) == (1e-4, 0.1, 0.05, 0.0)
    assert (solver.batch_size, solver.clip_norm) == (16, 0.01)
    if edges is None:
        doubled = 2 if is_large else 1
        assert (augment.scale_mode, augment.scale_range, augment.scale_size) == ("scale", (0.1, 2.0), (1024, 1024))
        assert (solver.max_steps, solver.milestones) == (doubled * steps, (doubled * 327_778, doubled * 355_092))
        assert (solver.schedule, solver.gamma, solver.warmup_steps, solver.warmup_factor) == ("step", 0.1, 10, 1.0)
    else:
        assert augment.scale_mode == "short_edge" and len(augment.short_edge) == 16
        assert (augment.short_edge[0], augment.short_edge[-1], augment.max_size) == edges
        assert (solver.max_steps, solver.schedule, solver.poly_power) == (steps, "poly", 0.9)
    assert augment.crop_size == crop and augment.color_jitter == (edges is not None) and augment.flip
    assert (test.short_edge, test.max_size) == sizes and test.panoptic_rule == "mask2former" and test.top_k == 100
    assert (test.object_mask_threshold, test.overlap_threshold) == (0.8, 0.8)
    assert config.data.task is None and ("instance" in name) == config.data.dataset.endswith("_instances")


EOMT_STEPS = {"coco": (12, 7391), "ade20k": (31, 1262), "cityscapes": (107, 186)}
"""Of each data set of EoMT: epochs, and steps of an epoch."""
EOMT_ANNEALING = {
    "coco": ((14782, 29564), (29564, 44346), (44346, 59128), (59128, 73910)),
    "coco_giant": ((14782, 29564), (25869, 40651), (36955, 51737), (48042, 62824), (59128, 73910)),
    "coco_2x": ((29564, 59128), (73910, 103474), (118256, 147820)),
    "ade20k": ((6520, 13040), (13040, 19560), (19560, 26080), (26080, 32600)),
    "ade20k_giant": ((6520, 13040), (11410, 17930), (16300, 22820), (21190, 27710), (26080, 32600)),
    "ade20k_dinov3": ((0, 3000), (6520, 9780), (9780, 13040), (13040, 16300)),
    "cityscapes": ((3317, 6634), (6634, 9951), (9951, 13268), (13268, 16585)),
}
EOMT = [name for name in recipe_names() if name.startswith("eomt/")]


@pytest.mark.parametrize("name", EOMT)
def test_values_of_eomt_are_the_published_ones(name: str) -> None:
    config = load_recipe(name)
    model, solver = config.model, config.solver
    dataset, task, size = name.partition("/")[2].split("_")[:3]
    is_dinov3, epochs = name.endswith("_dinov3"), EOMT_STEPS[dataset][0] * (2 if "_2x" in name else 1)
    kind = {"giant": "_giant", "small": "_2x", "base": "_2x"}.get(size, "")
    if is_dinov3 and task == "semantic":
        kind, epochs = "_dinov3", 16
    annealing = EOMT_ANNEALING[dataset + kind]
    if is_dinov3 and task == "panoptic":
        annealing = ((0, 3000), *annealing[1:])
    assert solver.mask_annealing == annealing and model.decoder.layers == len(annealing)
    assert abs(solver.max_steps - epochs * EOMT_STEPS[dataset][1]) <= 2
    assert model.decoder.num_queries == (100 if task == "semantic" else 200)
    assert (solver.lr, solver.backbone_factor, solver.weight_decay) == (2e-4 if is_dinov3 else 1e-4, 1.0, 0.05)
    assert (solver.warmup_steps, solver.backbone_warmup_steps) == ((2000, 3000) if is_dinov3 else (500, 1000))
    assert solver.layer_decay == (1.0 if kind == "_dinov3" else 0.8)
    assert solver.decay_query_blocks == (not is_dinov3 or kind == "_dinov3")


def table_row(name: str) -> str:
    """Row of a recipe in docs/recipes.md."""
    config = load_recipe(name)
    crop, solver, test = config.data.augment.crop_size, config.solver, config.test
    cells = [
        f"`{name}`",
        config.model.type,
        config.model.backbone.name,
        "full image" if crop is None else f"{crop[0]} x {crop[1]}",
        f"{solver.batch_size}",
        f"{solver.max_steps:,}",
        f"{solver.lr:g} x {solver.backbone_factor:g}",
        f"{test.short_edge} / {test.max_size}",
        f"{test.object_mask_threshold:g} / {test.overlap_threshold:g}" if "panoptic" in name else "-",
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_table_in_the_documentation_lists_the_recipes_values(name: str) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert table_row(name) in text.splitlines()


def test_base_files_are_not_listed_as_recipes() -> None:
    assert (CONFIG_DIR / "ade20k_150" / "_base.yaml").is_file()
    assert not any("_base" in name.split("/")[-1][:5] for name in recipe_names())


# Files


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{next(iter(files))}.yaml"


def test_an_empty_mapping_is_the_defaults(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, mine="{}")) == Config(output="runs/mine")


def test_bases_merge_deeply_and_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, root="base: ade20k_150/maskformer_r50\noutput: runs/root\nsolver: {lr: 1e-3}\n")
    write(tmp_path / "sub", middle="base: ../root.yaml\nsolver: {batch_size: 2}\n")
    leaf = write(tmp_path, leaf="base: sub/middle.yaml\ndata: {augment: {crop_size: null, short_edge: [64]}}\n")
    config, official = load_recipe(str(leaf)), load_recipe("ade20k_150/maskformer_r50")
    assert (config.solver.lr, config.solver.batch_size, config.solver.max_steps) == (1e-3, 2, 160_000)
    assert config.data.augment.crop_size is None and config.data.augment.short_edge == (64,)
    assert config.data.augment.max_size == 2048 and config.model == official.model
    assert config.output == "runs/leaf"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: b.yaml", "b": "base: a.yaml"}, "base: expected recipes that do not base on themselves"),
        ({"a": "base: a.yaml"}, "base: expected recipes that do not base on themselves"),
        ({"a": "base: [x, y]"}, "base: expected the name or path of one recipe"),
        ({"a": "base: demoo"}, "got 'demoo' .did you mean demo"),
        ({"a": "[1, 2]"}, r"a.yaml: expected a mapping, got \[1, 2\]"),
        ({"a": ""}, "a.yaml: expected a mapping, got None"),
        ({"a": "solver: {lr: 1"}, "a.yaml: expected YAML"),
        ({"a": "seed: 1\nseed: 2"}, "key 'seed' is there twice"),
        ({"a": "solver: {lr: -1}"}, r"a.yaml: solver.lr: expected > 0"),
        ({"a": "solver: !!python/object/apply:os.getcwd []"}, "a.yaml: expected YAML"),
    ],
)
def test_files_that_cannot_be_used_are_named(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, **files))


def test_a_missing_file_and_an_unknown_name_get_a_hint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml: no such recipe file"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match="did you mean cityscapes_19/maskformer_r101"):
        load_recipe("cityscapes/maskformer_r101")
    with pytest.raises(FileNotFoundError, match="did you mean demo"):
        load_recipe("demo.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deep"),
        ("a: " + "{b: " * 100_000, "nested too deep"),
        ("k0: &a0 {x: 1}\n" + "".join(
            f"k{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}], z{i}: 1}}\n" for i in range(1, 12)
        ), "expected at most 1000 keys in a mapping"),
        ("k0: &a0 [x]\n" + "".join(
            f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 20)
        ) + "base: *a19", r"base: expected the name or path of one recipe, got \[\["),
        ("solver: {lr: 0x" + "f" * 5000 + "}", "solver.lr: "),
        ("a: 2001-13-45", "expected YAML, month must be"),
        ("a: !!int ''", "expected YAML, "),
        ("a: !!bool x", "expected YAML, "),
        ("a: !!timestamp x", "expected YAML, "),
    ],
    ids=range(9),
)
def test_hostile_recipes_are_refused_by_the_files_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with at_most(300), pytest.raises(ValueError, match=rf"mine\.yaml: .*{message}"):
        load_recipe(tmp_path / "mine.yaml")


def test_a_run_of_an_earlier_version_keeps_leaving_out_images_without_objects():
    data = to_plain(load_recipe("small"))
    for name in ("keep_empty", "exif"):
        del data["data"][name]
    earlier = from_dict(data).data
    assert (earlier.keep_empty, earlier.exif) == (False, True)
    assert from_dict(to_plain(load_recipe("small"))).data.keep_empty
    assert from_dict({"data": {"dataset": "coco_instances", "root": "x"}}).data.keep_empty, "a recipe, no saved run"
    del data["data"]["workers"]
    assert from_dict(data).data.keep_empty
