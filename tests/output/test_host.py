"""Results on the host: one wait for all tensors of all results, on a stand-in of a GPU, and on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maskformer_fast.core.results import InstanceResult, PanopticResult, SemanticResult
from maskformer_fast.output import host
from maskformer_fast.output.host import on_host


def results(device: str = "cpu") -> list[Any]:
    labels = torch.arange(6, device=device).view(2, 3)
    instances = InstanceResult(labels[0], labels[0].float(), labels.to(torch.uint8)[:, None], labels.float(), (2, 3))
    return [SemanticResult(labels), PanopticResult(labels.int(), []), instances, SemanticResult(labels, labels.float())]


def values(result: Any) -> list[Any]:
    return [value.tolist() if isinstance(value, torch.Tensor) else value for value in vars(result).values()]


def test_the_host_waits_once_after_all_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            calls.append("wait")

    class OnGpu(torch.Tensor):
        def to(self, *arguments: Any, **options: Any) -> torch.Tensor:
            assert (arguments, options) == (("cpu",), {"non_blocking": True})
            calls.append("copy")
            return self.as_subclass(torch.Tensor)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(host, "_is_on_gpu", lambda value: isinstance(value, OnGpu))
    given = results()
    for result in given[:3]:
        for name, value in vars(result).items():
            if isinstance(value, torch.Tensor):
                setattr(result, name, value.as_subclass(OnGpu))
    moved = on_host(given)
    assert calls == ["copy"] * 6 + ["wait"]
    assert [values(result) for result in moved] == [values(result) for result in results()]
    assert moved[3] is given[3] and type(moved[0].labels) is torch.Tensor
    assert isinstance(given[0].labels, OnGpu), "the caller's results stay as they are"


@pytest.mark.gpu
def test_results_of_a_gpu_are_copied() -> None:
    moved = on_host(results("cuda"))
    assert [values(result) for result in moved] == [values(result) for result in results()]
    assert not any(value.is_cuda for r in moved for value in vars(r).values() if isinstance(value, torch.Tensor))
