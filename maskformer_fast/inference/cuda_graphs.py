"""CUDA graphs for batches whose sizes repeat: network and post-processing of a batch become one launch of the host.

A graph replays recorded kernels on the memory that they had while it was captured. So it reads the network's parameters
where they are: a step of training, which changes them in place, leaves it valid, and a parameter in other memory makes
it invalid. Its input is copied into memory of its own, and its results are copied out of it.

Capturing takes about as long as several batches, and each graph keeps the memory of its results. So a graph is captured
when a batch comes again, and the number of graphs is bounded; memory that is used within a batch only is common to all.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from maskformer_fast.deploy.runtime.cuda_driver import CAPTURE_LOCK
from maskformer_fast.inference.device_parts import DevicePart

logger = logging.getLogger(__name__)

MAX_GRAPHS = 8
"""Graphs that are kept, the most recently used ones."""
MAX_COUNTED = 256
"""Kinds of batches whose uses are counted, the most recent ones."""
DUE = 2
"""Uses of a kind of batch at which its graph is captured."""
DUE_AGAIN = 10
"""The same for a graph that was dropped for others: more, as captures by turns would cost more than they save."""

Work = Callable[[Tensor], list[DevicePart]]


class _Graph(NamedTuple):
    graph: Any  # torch.cuda.CUDAGraph
    images: Tensor  # read by the graph
    parts: list[DevicePart]  # written by the graph
    work: Work  # owns the other tensors that the graph reads


class GraphCache:
    """Graphs of one network's batches on one GPU. Threads may share it; their batches wait for each other on the GPU.

    Attributes:
        obstacle: why nothing is captured any more; None while captures succeed.
    """

    def __init__(self) -> None:
        self.obstacle: str | None = None
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._uses: OrderedDict[Hashable, int] = OrderedDict()
        self._weights: _Weights | None = None
        self._stream: Any = None  # of the captures
        self._pool: Any = None  # memory of all graphs, which never run at the same time
        self._done: Any = None  # event after the last replay

    def run(
        self,
        key: Hashable,
        network: nn.Module,
        images: Tensor,  # on the GPU
        work: Work,
    ) -> list[DevicePart] | None:
        """Replay the graph of a kind of batch -> copies of its results, or None where the batch is to run without one.

        Args:
            key: says all on which the work depends, but for the pixels and the network's weights.
            network: its forward hooks would not be called in a replay, so with any there is none.
            work: the function that is captured; it takes the images, and owns all else that it reads but the weights.
        """
        with self._lock:
            if self.obstacle is not None:
                return None
            if self._weights is None or not self._weights.are_of(network):
                self._drop_graphs()
                self._weights = _Weights(network)
            if self._weights.have_hooks():
                return None
            graph = self._graphs.get(key)
            if graph is None:
                if not self._is_due(key):
                    return None
                graph = self._try_to_capture(images, work)
                if graph is None:
                    return None
                self._graphs[key] = graph
            self._graphs.move_to_end(key)
            return self._replay(graph, images)

    def _is_due(self, key: Hashable) -> bool:
        """Count a use -> whether it is time to capture."""
        uses = self._uses[key] = self._uses.pop(key, 0) + 1
        if len(self._uses) > MAX_COUNTED:
            self._uses.popitem(last=False)
        return uses >= DUE

    def _try_to_capture(self, images: Tensor, work: Work) -> _Graph | None:
        if len(self._graphs) >= MAX_GRAPHS:
            self._done.synchronize()  # a graph is not destroyed while it runs
            key, _ = self._graphs.popitem(last=False)
            self._uses[key] = DUE - DUE_AGAIN
        try:
            # A wait for the device in another thread would spoil the capture.
            with CAPTURE_LOCK, torch.cuda.device(images.device), _uncached_casts():
                return self._capture(images, work)
        except Exception as error:  # of any library that the network calls
            self.obstacle = f"{type(error).__name__}: {error}"
            self._drop_graphs()
            logger.warning("batches run without CUDA graphs, as one could not be captured: %s", self.obstacle)
            return None

    def _capture(self, images: Tensor, work: Work) -> _Graph:
        """Run the work once, so that libraries load what they load lazily, and record it in a second run."""
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(images.device), torch.cuda.graph_pool_handle()
            self._done = torch.cuda.Event()
        current = torch.cuda.current_stream(images.device)
        own = images.clone()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):  # also leaves the stream where the capture ends with an error
            work(own)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                parts = work(own)
        current.wait_stream(self._stream)
        return _Graph(graph, own, parts, work)

    def _replay(self, graph: _Graph, images: Tensor) -> list[DevicePart]:
        with torch.cuda.device(images.device):
            stream = torch.cuda.current_stream(images.device)
            stream.wait_event(self._done)  # threads may have streams of their own
            graph.images.copy_(images, non_blocking=True)
            graph.graph.replay()
            copies = [_copy(part) for part in graph.parts]
            self._done.record(stream)
        return copies

    def _drop_graphs(self) -> None:
        if self._graphs:
            self._done.synchronize()
            self._graphs.clear()


class _Weights:
    """Where a network's parameters, buffers and modules are."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._modules = list(network.modules())
        owners = [own for m in self._modules for own in (m._parameters, m._buffers, m._modules)]
        self._places = [(own, name, value, _address(value)) for own in owners for name, value in own.items()]

    def are_of(self, network: nn.Module) -> bool:
        """Whether this is the network, and all that it had is where it was."""
        return network is self._network and all(
            own.get(name) is value and _address(value) == address for own, name, value, address in self._places
        )

    def have_hooks(self) -> bool:
        """Whether a forward pass calls functions beside the modules' own."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)


def _address(value: object) -> int:
    return value.data_ptr() if isinstance(value, Tensor) else 0


def _copy(part: Any) -> Any:
    """A part with copies of its tensors."""
    values: list[Any] = []
    for value in part:
        if isinstance(value, list):
            values.append([tensor.clone() for tensor in value])
        else:
            values.append(value.clone() if isinstance(value, Tensor) else value)
    return type(part)(*values)


@contextmanager
def _uncached_casts() -> Iterator[None]:
    """Make autocast cast weights anew: a cached cast would keep the weights of the time of the capture."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
