"""Choices by measurement: the least time wins, and each is measured once. The rule for matrices measures nothing."""

from __future__ import annotations

import itertools

import pytest
import torch

from maskformer_fast.modeling import cpu_choices
from maskformer_fast.modeling.cpu_choices import onednn_is_faster, winograd_is_faster
from maskformer_fast.modeling.fuse_for_cpu import convolves_bfloat16

CHOICES = {
    "float32": (winograd_is_faster, (16, 20, torch.float32)),
    "bfloat16": (winograd_is_faster, (32, 16, torch.bfloat16)),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("first_is_faster", [True, False])
def test_the_least_time_decides_and_is_measured_once_and_told(name, first_is_faster, monkeypatch, caplog):
    caplog.set_level("INFO", logger=cpu_choices.__name__)
    if name == "bfloat16" and not convolves_bfloat16():
        pytest.skip("this processor has no bfloat16 convolutions")
    function, arguments = CHOICES[name]
    times = itertools.cycle([5.0, 4.0, 3.0 if first_is_faster else 6.0, 5.0])
    calls = []

    def seconds(run):
        calls.append(run())
        return next(times)

    monkeypatch.setattr(cpu_choices, "_seconds", seconds)
    function.cache_clear()
    try:
        assert function(*arguments) == first_is_faster  # of the two, Winograd is measured first
        assert function(*arguments) == first_is_faster
    finally:
        function.cache_clear()
    (record,) = caplog.records
    assert f"so {'Winograd' if first_is_faster else 'direct'} is taken" in record.getMessage()
    ours, theirs = calls[:2]
    assert len(calls) == 8 and ours.shape == theirs.shape
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=2e-2 * theirs.float().abs().max().item())


@pytest.mark.parametrize(
    ("vendor", "mkl", "mkldnn", "expected"),
    [
        ("AuthenticAMD", True, True, True), ("GenuineIntel", True, True, False), ("", True, True, False),
        ("AuthenticAMD", False, True, False), ("AuthenticAMD", True, False, False),
    ],
)  # fmt: skip
def test_matrices_go_by_the_vendor_alone(vendor, mkl, mkldnn, expected, monkeypatch):
    """Without a measurement: processes of one run that chose by their own times would train on different sums."""
    monkeypatch.setattr(cpu_choices, "processor_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    monkeypatch.setattr(cpu_choices, "_seconds", lambda run: pytest.fail("measured"))
    onednn_is_faster.cache_clear()
    try:
        assert onednn_is_faster() == expected
    finally:
        onednn_is_faster.cache_clear()


def test_measurements_take_real_time():
    assert 0 < cpu_choices._seconds(lambda: torch.randn(64, 64) @ torch.randn(64, 64)) < 60
