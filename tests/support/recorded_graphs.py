"""A stand-in of `torch.cuda`'s graphs on CPU tensors: a graph records operations and repeats them in the same memory.

Like a GPU, it refuses what the driver refuses while a stream is captured: reads of values and copies from memory of the
host that is not pinned. Results of a replay are written over those of the capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.support.host_reads import NoHostRead


class CaptureError(RuntimeError):
    """What CUDA reports for a call that is not permitted while a stream is captured."""


class FakeCuda:
    """Counts what the host does on the fake device.

    Attributes:
        calls: names of calls and launches, in their order; those in a capture or a replay are not launches.
        failure: error that the next capture ends with.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failure: Exception | None = None
        self.capturing: _Recorder | None = None

    @contextmanager
    def installed(self) -> Iterator[FakeCuda]:
        """Replace the graph API of `torch.cuda`, and make `Tensor`'s reads fail in a capture."""
        fake = self

        class CUDAGraph:
            recorder: _Recorder

            def replay(self) -> None:
                fake.calls.append("replay")
                self.recorder.repeat()

            def spoil(self, kept: Any) -> int:
                return self.recorder.spoil(kept)

        class Event:
            def record(self, stream: object) -> None:
                fake.calls.append("record")

            def synchronize(self) -> None:
                fake.calls.append("synchronize")

        class Stream:
            def __init__(self, device: object = None) -> None:
                pass

            def wait_stream(self, other: Stream) -> None:
                pass

            def wait_event(self, event: Event) -> None:
                fake.calls.append("wait_event")

        @contextmanager
        def graph(made: Any, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
            assert pool == "pool" and isinstance(stream, Stream) and capture_error_mode == "thread_local"
            assert not torch.is_autocast_cache_enabled()
            fake.calls.append("capture")
            made.recorder = fake.capturing = _Recorder()
            try:
                with made.recorder:
                    yield
            finally:
                fake.capturing = None
            if fake.failure is not None:
                raise fake.failure

        default = Stream()
        replaced = {
            "CUDAGraph": CUDAGraph, "Event": Event, "Stream": Stream, "graph": graph,
            "graph_pool_handle": lambda: "pool", "current_stream": lambda device: default,
            "stream": lambda stream: nullcontext(), "device": lambda device: nullcontext(),
        }  # fmt: skip
        with pytest.MonkeyPatch.context() as patched:
            for name, value in replaced.items():
                patched.setattr(torch.cuda, name, value)
            for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
                patched.setattr(Tensor, name, self._guarded(getattr(Tensor, name)))
            yield self

    def _guarded(self, read: Any) -> Any:
        def guarded(tensor: Tensor, *arguments: Any) -> Any:
            if self.capturing is not None and self.capturing.made(tensor):
                raise CaptureError("a read of a tensor's values is not permitted when stream is capturing")
            return read(tensor, *arguments)

        return guarded


class Launches(TorchDispatchMode):
    """Adds the names of operations that work on data, not those that make views, to `FakeCuda.calls`."""

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in _tensors(result) if not _aliases(leaf, args)]
        if made or func.name().partition(".")[0].endswith("_"):
            self._fake.calls.append(func.name().removeprefix("aten::").partition(".")[0])
        return result


class _Recorder(NoHostRead):
    """Operations of a capture, with the tensors that they made."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[tuple[Any, Any, Any, Any]] = []
        self._made: dict[int, Tensor] = {}  # by the address of the storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "lift_fresh" in func.name():
            raise CaptureError("a copy from pageable memory is not permitted when stream is capturing")
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        except AssertionError as error:
            raise CaptureError(str(error)) from error
        self._steps.append((func, args, kwargs or {}, result))
        made = [tensor for tensor in _tensors(result) if not _aliases(tensor, (args, kwargs))]
        self._made.update((_storage(tensor), tensor) for tensor in made)
        return result

    def made(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._made

    @torch.no_grad()
    def spoil(self, kept: Any) -> int:
        """Overwrite all memory of the capture but that of some tensors -> number of tensors."""
        spoilt = [tensor for tensor in self._made.values() if tensor.numel() and not _aliases(tensor, kept)]
        for tensor in spoilt:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
        return len(spoilt)

    @torch.no_grad()
    def repeat(self) -> None:
        """Run the operations again, each into the memory of its recorded results."""
        with _disable_current_modes():
            for func, args, kwargs, recorded in self._steps:
                result = func(*args, **kwargs)
                for new, old in zip(_tensors(result), _tensors(recorded), strict=True):
                    if _storage(new) != _storage(old):
                        old.copy_(new)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)


def _aliases(tensor: Tensor, values: Any) -> bool:
    return _storage(tensor) in {_storage(other) for other in _tensors(values)}
