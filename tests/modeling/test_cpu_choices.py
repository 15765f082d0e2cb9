"""Choices by measurement: the least time wins, and each is measured once. The rule for matrices measures nothing."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from maskformer_fast.modeling import cpu_choices
from maskformer_fast.modeling.cpu_choices import cache_file, packed_linear_is_faster, winograd_is_faster
from maskformer_fast.modeling.fuse_for_cpu import convolves_bfloat16

CHOICES = {
    "float32": (16, 20, torch.float32, 300),
    "bfloat16": (32, 16, torch.bfloat16, 1000),
}


forget = cpu_choices._winograd_wins.cache_clear


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and times of the next measurements: Winograd's and the direct convolution's."""
    monkeypatch.setenv("MASKFORMER_FAST_CACHE", str(tmp_path / "cache"))
    times = []
    monkeypatch.setattr(cpu_choices, "_seconds", lambda run: times.pop(0))
    forget()
    yield times
    forget()


def test_times_are_kept_in_a_file_by_machine_and_size(cache, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger=cpu_choices.__name__)
    cache += [2.0, 1.0] * 4
    assert not winograd_is_faster(16, 20, torch.float32, 300) and not cache
    forget()  # as in another process
    assert not winograd_is_faster(16, 20, torch.float32, 256)
    assert "(kept), so direct is taken" in caplog.records[-1].getMessage()
    cache += [1.0, 2.0] * 8
    assert winograd_is_faster(16, 20, torch.float32, 4096) and len(cache) == 8  # another size is measured
    with monkeypatch.context() as patched:
        patched.setattr(cpu_choices, "processor_name", lambda: "another")
        forget()
        assert winograd_is_faster(16, 20, torch.float32, 300) and not cache
    forget()
    assert not winograd_is_faster(16, 20, torch.float32, 300)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["cpu_choices.json"]


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", "[" * 100000, "types", "text", "NaN", "missing", "negative"],
)
def test_a_damaged_cache_is_measured_anew(damage, cache):
    cache += [1.0, 2.0] * 4
    assert winograd_is_faster(16, 20, torch.float32, 300)
    file = cache_file()
    content = json.loads(file.read_text())
    ((machine, ((what, times),)),) = ((key, value.items()) for key, value in content.items())
    bad = {
        "types": [], "text": {**times, "direct": "1"}, "NaN": {**times, "direct": float("nan")},
        "missing": {"direct": 1.0}, "negative": {**times, "direct": -1.0},
    }  # fmt: skip
    file.write_text(json.dumps({machine: {what: bad[damage]}}) if damage in bad else damage)
    forget()
    cache += [2.0, 1.0] * 4
    assert not winograd_is_faster(16, 20, torch.float32, 300) and not cache
    assert json.loads(file.read_text())[machine][what] == {"Winograd": 2.0, "direct": 1.0}


def test_a_cache_that_cannot_be_written_costs_measurements_alone(cache, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger=cpu_choices.__name__)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MASKFORMER_FAST_CACHE", str(tmp_path / "file"))
    cache += [1.0, 2.0] * 4
    assert winograd_is_faster(16, 20, torch.float32, 300)
    assert any("not kept" in record.getMessage() for record in caplog.records)


def test_the_environment_moves_and_prevents_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKFORMER_FAST_CACHE", "")
    assert cache_file() is None
    monkeypatch.delenv("MASKFORMER_FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_file() == tmp_path / "maskformer_fast" / "cpu_choices.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_file() == tmp_path / "home" / ".cache" / "maskformer_fast" / "cpu_choices.json"


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("first_is_faster", [True, False])
def test_the_least_time_decides_and_is_measured_once_and_told(name, first_is_faster, monkeypatch, caplog):
    caplog.set_level("INFO", logger=cpu_choices.__name__)
    if name == "bfloat16" and not convolves_bfloat16():
        pytest.skip("this processor has no bfloat16 convolutions")
    arguments = CHOICES[name]
    times = itertools.cycle([5.0, 4.0, 3.0 if first_is_faster else 6.0, 5.0])
    calls = []

    def seconds(run):
        calls.append(run())
        return next(times)

    monkeypatch.setattr(cpu_choices, "_seconds", seconds)
    forget()
    try:
        assert winograd_is_faster(*arguments) == first_is_faster  # of the two, Winograd is measured first
        assert winograd_is_faster(*arguments) == first_is_faster
    finally:
        forget()
    (record,) = caplog.records
    assert f"so {'Winograd' if first_is_faster else 'direct'} is taken" in record.getMessage()
    ours, theirs = calls[:2]
    assert len(calls) == 8 and ours.shape == theirs.shape
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=2e-2 * theirs.float().abs().max().item())


@pytest.mark.parametrize(
    ("libraries", "avx512", "vendor", "channels", "gelu", "expected"),
    [
        (True, True, "AuthenticAMD", 1024, False, True), (True, True, "GenuineIntel", 1024, False, True),
        (True, False, "AuthenticAMD", 1024, False, False), (True, False, "AuthenticAMD", 128, False, True),
        (True, False, "AuthenticAMD", 1024, True, True), (True, False, "GenuineIntel", 1024, True, False),
        (True, False, "GenuineIntel", 96, True, True), (False, True, "GenuineIntel", 96, True, False),
    ],
)  # fmt: skip
def test_linear_layers_go_by_a_rule(libraries, avx512, vendor, channels, gelu, expected, monkeypatch):
    monkeypatch.setattr(cpu_choices, "has_both_libraries", lambda: libraries)
    monkeypatch.setattr(cpu_choices, "has_avx512", lambda: avx512)
    monkeypatch.setattr(cpu_choices, "processor_vendor", lambda: vendor)
    monkeypatch.setattr(cpu_choices, "_seconds", lambda run: pytest.fail("measured"))
    assert packed_linear_is_faster(channels, gelu) == expected


def test_measurements_take_real_time():
    assert 0 < cpu_choices._seconds(lambda: torch.randn(64, 64) @ torch.randn(64, 64)) < 60
