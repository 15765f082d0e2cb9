"""``solver.batch_size: auto``: the arithmetic, the trial's process, what is stored, memory of control groups."""

from __future__ import annotations

import pytest
import yaml

from maskformer_fast import train
from maskformer_fast.config import Config, SolverConfig
from maskformer_fast.core.machine import _left_in_groups, available_memory_bytes
from maskformer_fast.recipes import from_dict, load_recipe
from maskformer_fast.training import batch_size
from maskformer_fast.training.batch_size import MOST, Trial, measure_trial, micro_batch, with_batch_size
from tests.support.paths import TINY_RECIPE
from tests.training.test_trainer import tiny

GIB = 2**30


@pytest.mark.parametrize(
    ("available", "peaks", "examples", "expected"),
    [
        (8 * GIB, (2 * GIB, 3 * GIB), 1000, 10),  # 1 GiB + 0.5 GiB an image into 6 GiB
        (8 * GIB, (2 * GIB, 3 * GIB), 7, 7),
        (2 * GIB, (int(1.4 * GIB), int(1.6 * GIB)), 1000, 3),
        (8 * GIB, (GIB, GIB), 10**6, MOST),
    ],
)
def test_the_number_is_the_largest_that_fits(available, peaks, examples, expected):
    assert micro_batch(Trial(available, peaks, examples)) == expected


def test_no_memory_for_one_image_is_an_error():
    expected = r"solver\.batch_size: expected memory .* with auto, about 1\.50 GiB, got 75% of 1\.00 GiB"
    with pytest.raises(ValueError, match=expected):
        micro_batch(Trial(GIB, (2 * GIB, 3 * GIB), 10))


def test_the_total_counts_micro_batches_and_a_number_is_left_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(batch_size, "measure_trial", lambda config: Trial(8 * GIB, (2 * GIB, 3 * GIB), 1000))
    config = tiny(tmp_path, solver={"batch_size": "auto", "accumulate": 3})
    with caplog.at_level("INFO"):
        chosen = with_batch_size(config, resume=False)
    assert chosen.solver.images == 30 and chosen.solver.lr == config.solver.lr
    assert "30 = 10 images x 3 micro-batches x 1 processes" in caplog.text and "not scaled" in caplog.text
    assert with_batch_size(chosen, resume=True) is chosen


def test_auto_is_read_and_written_and_other_texts_are_refused():
    assert from_dict({"solver": {"batch_size": "auto"}}).solver.batch_size == "auto"
    assert from_dict({"solver": {"batch_size": 4}}).solver.images == 4
    for wrong in ("much", 4.5, True, None):
        with pytest.raises(ValueError, match=r"solver\.batch_size: expected an integer or 'auto', got"):
            from_dict({"solver": {"batch_size": wrong}})
    with pytest.raises(ValueError, match=r"solver\.batch_size: expected a positive integer, got 0"):
        SolverConfig(batch_size=0)
    with pytest.raises(ValueError, match="expected a number here, got auto"):
        _ = Config(solver=SolverConfig(batch_size="auto")).solver.images


@pytest.mark.slow
def test_a_run_stores_its_choice_and_resumes_with_it(tmp_path, monkeypatch):
    arguments = ["--config", str(TINY_RECIPE), "--output", str(tmp_path / "run"), "--device", "cpu"]
    more = ["--solver.batch-size", "auto", "--solver.max-steps"]
    assert train.main([*arguments, *more, "1"]) == 0
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["solver"]["batch_size"]
    assert stored == 12  # the images of the data set, as there is memory for all
    monkeypatch.setattr(batch_size, "measure_trial", lambda config: pytest.fail("measured again"))
    assert train.main([*arguments, *more, "2", "--resume"]) == 0
    assert load_recipe(tmp_path / "run/config.yaml").solver.images == 12


@pytest.mark.slow
def test_a_trial_that_fails_is_one_line(tmp_path):
    config = tiny(tmp_path, solver={"batch_size": "auto", "freeze": ("nothing",)})
    with pytest.raises(ValueError, match=r"solver\.batch_size: expected trial steps .*: ValueError: solver\.freeze"):
        measure_trial(config)


def test_memory_left_is_that_of_the_tightest_control_group(tmp_path):
    listing = tmp_path / "cgroup"
    listing.write_text("0::/job/step\n")
    inner, outer = tmp_path / "job/step", tmp_path / "job"
    inner.mkdir(parents=True)
    for folder, limit, used, files in ((inner, "max", 100, 10), (outer, "5000", 3000, 500)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {files}\n")
    assert _left_in_groups(listing, tmp_path) == [2500]
    first = tmp_path / "memory/job"
    first.mkdir(parents=True)
    (first / "memory.limit_in_bytes").write_text("900\n")
    (first / "memory.usage_in_bytes").write_text("1000\n")
    (first / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 30\n")
    listing.write_text("4:cpu:/job\n7:memory:/job\n")
    assert _left_in_groups(listing, tmp_path) == [0]
    assert _left_in_groups(tmp_path / "absent", tmp_path) == []
    assert 0 < available_memory_bytes() < 2**60
