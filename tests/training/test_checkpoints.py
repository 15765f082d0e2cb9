"""Checkpoints of a run, and weights files."""

import json
import os
import pickle

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from maskformer_fast.config import Config, ModelConfig, SolverConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.modeling.weights import CheckpointError, load_backbone, load_into, load_weights, weights_file
from maskformer_fast.training.checkpoints import (
    best_score,
    complete_checkpoints,
    config_differences,
    load_state,
    mark_best,
    remove_leftovers,
    save_checkpoint,
)

METADATA = Metadata("toy", ("cat", "sky"), (True, False), (3, 7), ((1, 2, 3), (4, 5, 6)))
CONFIG = Config(model=ModelConfig(num_classes=2), solver=SolverConfig(lr=3e-4, milestones=(5, 6)))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)


def save(folder, network, step, best=False):
    path = save_checkpoint(folder, network, CONFIG, METADATA, step, {"step": step, "x": torch.arange(3)})
    if best:
        mark_best(folder, path, step / 10)
    return path


def test_a_saved_checkpoint_loads_equal(tmp_path):
    network = Toy()
    path = save(tmp_path, network, 7, best=True)
    saved = load_weights(path)
    assert saved.config == CONFIG and saved.metadata == METADATA and saved.step == 7
    other = Toy()
    load_into(other, saved.weights, path)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    state = load_state(path)
    assert state["step"] == 7 and torch.equal(state["x"], torch.arange(3))


def test_only_the_two_newest_checkpoints_and_the_best_are_kept(tmp_path):
    network = Toy()
    for step, best in ((1, True), (2, False), (3, False), (4, False)):
        save(tmp_path, network, step, best)
    assert sorted(path.name for path in tmp_path.glob("*step*")) == ["step_00000001", "step_00000003", "step_00000004"]
    assert (tmp_path / "last").resolve().name == "step_00000004"
    assert (tmp_path / "best").resolve().name == "step_00000001"
    assert load_weights(tmp_path).step == 1  # a run folder means its best
    assert best_score(tmp_path) == 0.1


def test_an_incomplete_checkpoint_is_never_listed_and_is_removed(tmp_path, monkeypatch):
    network = Toy()
    save(tmp_path, network, 1)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, network, 2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000001"]
    assert load_weights(tmp_path / "last").step == 1
    (tmp_path / ".writing-step_00000009").mkdir()  # as a killed run leaves it
    remove_leftovers(tmp_path)
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamWriter failed"), SafetensorError("Disk full")])
def test_a_failing_writer_is_an_oserror_that_names_the_checkpoint(tmp_path, monkeypatch, error):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(OSError, match="step_00000002.*earlier ones stand"):
        save(tmp_path, Toy(), 2)


def test_weights_that_do_not_fit_are_all_named(tmp_path):
    weights = {name: tensor.clone() for name, tensor in Toy().state_dict().items()}
    weights["extra"] = weights.pop("head.bias")
    weights["head.weight"] = torch.zeros(9, 9)
    with pytest.raises(CheckpointError) as error:
        load_into(Toy(), weights, "here")
    for part in ("missing: head.bias", "unknown: extra", "head.weight: expected (2, 4), got (9, 9)"):
        assert part in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "garbage"])
def test_a_damaged_weights_file_is_named(tmp_path, damage):
    path = save(tmp_path, Toy(), 1) / "model.safetensors"
    if damage == "foreign":
        save_file({"a": torch.zeros(1)}, str(path))
    else:
        data = {"truncated": path.read_bytes()[:-40], "empty": b"", "garbage": os.urandom(500)}[damage]
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_weights(path)


def test_loading_a_trainer_state_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'owned'}",))

    path = save(tmp_path, Toy(), 1)
    (path / "trainer.pt").write_bytes(pickle.dumps({"optimizer": Evil()}))
    with pytest.raises(CheckpointError, match=r"trainer\.pt"):
        load_state(path)
    assert not (tmp_path / "owned").exists()


def test_backbone_weights_load_from_a_checkpoint_and_from_a_file_of_a_backbone(tmp_path):
    network = Toy()
    path = save(tmp_path, network, 1)
    save_file(network.backbone.state_dict(), str(tmp_path / "backbone.safetensors"))
    for source in (path, tmp_path / "backbone.safetensors"):
        other = Toy()
        load_backbone(other, source)
        assert torch.equal(other.backbone[0].weight, network.backbone[0].weight)
        assert not torch.equal(other.head.weight, network.head.weight)


def test_a_missing_checkpoint_names_the_paths_that_were_tried(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*best"):
        weights_file(tmp_path / "nowhere")


def test_config_differences_name_the_keys():
    changed = Config(model=CONFIG.model, solver=SolverConfig(lr=1e-5, milestones=(5, 6)))
    assert config_differences(CONFIG, changed, ("model", "solver")) == ["solver.lr: 0.0003 -> 1e-05"]
    assert json.dumps(config_differences(CONFIG, CONFIG, ("model", "solver"))) == "[]"
