"""Classes of a checkpoint and of a data set are the same by name, not by number or index."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskformer_fast import evaluate
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data import build_dataset
from maskformer_fast.evaluation.measure import check_classes
from maskformer_fast.modeling import build_model
from maskformer_fast.modeling.weights import CheckpointError, load_initial, load_weights, save_weights
from maskformer_fast.recipes import load_recipe
from maskformer_fast.training import trainer as module
from maskformer_fast.training.trainer import Trainer
from tests.support import coco_files
from tests.support.paths import TINY_RECIPE

TINY = load_recipe(TINY_RECIPE)


def classes(*names):
    count = len(names)
    return Metadata("mine", names, (True,) * count, tuple(range(1, count + 1)), ((0, 0, 0),) * count)


def network(kind, count, seed):
    torch.manual_seed(seed)
    made = build_model(replace(TINY.model, type=kind, num_classes=count))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)  # no bias is zero, so that a row that is not copied shows
    return made


def saved(folder, kind, *names):
    made = network(kind, len(names), seed=1)
    path = Path(folder) / "model.safetensors"
    save_weights(path, made, replace(TINY, model=replace(TINY.model, type=kind, num_classes=len(names))),
                 classes(*names), 7)
    return path, made.state_dict()


def rename_classes(monkeypatch, rename):
    def build(config, split, trained):
        dataset = build_dataset(config, split, trained)
        dataset.metadata = replace(dataset.metadata, class_names=tuple(rename(dataset.metadata.class_names)))
        return dataset

    monkeypatch.setattr(module, "build_dataset", build)


ROWS = {
    "maskformer": ("predictor.class_embed.weight", "predictor.class_embed.bias"),
    "per_pixel": ("predictor.weight", "predictor.bias"),
    "per_pixel_plus": ("predictor.query_embed.weight",),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("names", [("dog", "cat", "bird"), ("bird", "fish"), ("dog", "fish", "bird", "cow", "cat")])
def test_fine_tuning_takes_each_class_from_the_row_of_its_name(tmp_path, kind, names):
    path, given = saved(tmp_path, kind, "cat", "dog", "bird")
    target = network(kind, len(names), seed=2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    load_initial(target, path, classes(*names))
    for name, tensor in target.state_dict().items():
        if name not in ROWS[kind]:
            assert torch.equal(tensor, given[name]) or name.endswith("num_batches_tracked"), name
            continue
        for index, label in enumerate(names):
            rows = {"cat": given[name][0], "dog": given[name][1], "bird": given[name][2]}
            assert torch.equal(tensor[index], rows.get(label, before[name][index])), (name, label)
        if kind == "maskformer":
            assert torch.equal(tensor[-1], given[name][-1]), '"no object" is the same class in both'


def test_fine_tuning_on_other_classes_of_the_same_number_starts_their_classifier_anew(tmp_path):
    path, given = saved(tmp_path, "maskformer", "cat", "dog")
    target = network("maskformer", 2, seed=2)
    before = target.predictor.class_embed.weight.clone()
    result = load_initial(target, path, classes("road", "sky"))
    assert torch.equal(target.predictor.class_embed.weight, before)
    assert torch.equal(target.predictor.query_embed.weight, given["predictor.query_embed.weight"])
    assert (result.kept, result.moved, result.new, result.dropped) == ((), (), ("road", "sky"), ("cat", "dog"))


def test_fine_tuning_says_which_classes_were_kept_moved_made_and_dropped(tmp_path):
    path, _ = saved(tmp_path, "maskformer", "cat", "dog", "bird", "cow")
    result = load_initial(network("maskformer", 4, seed=2), path, classes("cat", "bird", "fish", "dog"))
    assert str(result) == "kept: 1 (cat); moved: 2 (bird, dog); new: 1 (fish); dropped: 1 (cow)"


def test_a_name_that_a_list_has_twice_is_matched_in_its_order(tmp_path):
    path, given = saved(tmp_path, "maskformer", "door", "wall", "door")
    target = network("maskformer", 3, seed=2)
    result = load_initial(target, path, classes("door", "door", "wall"))
    assert torch.equal(target.predictor.class_embed.bias, given["predictor.class_embed.bias"][[0, 2, 1, 3]])
    assert result.new == result.dropped == ()


def test_a_checkpoint_of_another_kind_of_network_is_refused(tmp_path):
    path, _ = saved(tmp_path, "maskformer", "cat", "dog")
    with pytest.raises(CheckpointError, match=r"unknown: predictor\.class_embed\.weight"):
        load_initial(network("per_pixel_plus", 2, seed=2), path, classes("cat", "dog"))


RENAMED = {
    "swapped": lambda names: (names[1], names[0], *names[2:]),
    "partly swapped": lambda names: (names[1], names[0], "new", *names[3:]),
    "renamed": lambda names: ("new", *names[1:]),
}


@pytest.mark.parametrize("change", RENAMED)
def test_resuming_on_other_or_reordered_classes_is_refused_with_both_names(tmp_path, monkeypatch, change):
    config = replace(TINY, output=str(tmp_path), solver=replace(TINY.solver, max_steps=1))
    trainer = Trainer(config)
    trainer.run()
    first = trainer.metadata.class_names[0]
    rename_classes(monkeypatch, RENAMED[change])
    with pytest.raises(ValueError, match=rf"step_00000001.*0: {first} / .*--model\.weights"):
        Trainer(replace(config, solver=replace(TINY.solver, max_steps=2)), resume=True)
    assert load_weights(tmp_path).metadata.class_names[0] == first


def test_measuring_refuses_classes_of_which_some_are_reordered():
    check_classes(classes("cat", "dog", "bird"), classes("cat", "dog", "fish"))  # a warning
    with pytest.raises(ValueError, match=r"0: cat / dog; 1: dog / cat; 2: bird / fish"):
        check_classes(classes("cat", "dog", "bird"), classes("dog", "cat", "fish"))


def test_a_run_that_was_trained_with_a_grouping_category_resumes_and_is_measured_with_it(tmp_path):
    data = coco_files.content()
    data["categories"] = [{"id": 1, "name": "all"}, *({**c, "supercategory": "all"} for c in data["categories"])]
    data["annotations"][0]["category_id"] = 1
    for split in ("train", "val"):
        coco_files.store(tmp_path, data, split, f"instances_{split}.json")
    options = replace(TINY.data, dataset="coco_instances", root=str(tmp_path))
    config = replace(TINY, output=str(tmp_path / "run"), data=options, metrics=("instance",),
                     solver=replace(TINY.solver, max_steps=1))
    Trainer(config).run()
    data["annotations"][0]["category_id"] = 20
    for split in ("train", "val"):
        coco_files.store(tmp_path, data, split, f"instances_{split}.json")
    resumed = Trainer(replace(config, solver=replace(TINY.solver, max_steps=2)), resume=True)
    assert resumed.metadata.class_names == resumed.val_set.metadata.class_names == ("all", "b", "a")
    assert evaluate.main([str(tmp_path / "run")]) == 0
    anew = Trainer(replace(config, output=str(tmp_path / "new")))
    assert anew.metadata.class_names == anew.val_set.metadata.class_names == ("b", "a")


def test_panoptic_quality_of_instances_is_refused_before_training(tmp_path):
    for split in ("train", "val"):
        coco_files.store(tmp_path, None, split, f"instances_{split}.json")
    options = replace(TINY.data, dataset="coco_instances", root=str(tmp_path))
    with pytest.raises(ValueError, match="metrics: expected semantic or instance for truth of instances"):
        Trainer(replace(TINY, output=str(tmp_path / "run"), data=options, metrics=("instance", "panoptic")))
