"""Backend of a GPU: TensorRT runs the engine, the bundle's compiled kernels do the rest, without torch and Triton.

All work of a batch is one CUDA graph: the frames' copy to the device, their resizing, the network, the kernels of the
task, the copy of the results to the host. A graph belongs to one slot and one `LaunchSequence` (task, batch, size of
frames). It is captured at the slot's first batch of the sequence, after one run without capture, in which the libraries
load what they load lazily. After that a batch costs a copy into pinned memory and one launch. Where the engine cannot
be captured, the same work is launched piece by piece: slower, with the same results. `TensorRTBackend.graph_obstacle`
then has the reason, which is also logged once.

A slot is room for one batch: a stream, one piece of device memory for buffers and the network's scratch memory, and one
piece of pinned host memory. All slots are made at the start, as large as the largest sequence needs. With two of them,
the copies and host work of one batch overlap with the network of the other.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from maskformer_fast.config import Task
from maskformer_fast.core.arrays import address_of
from maskformer_fast.core.checks import check
from maskformer_fast.core.results import Result
from maskformer_fast.core.stages import StageSeconds
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.bundle.launches import FILE, Buffer, LaunchFile, LaunchSequence
from maskformer_fast.deploy.bundle.manifest import Precision, expect
from maskformer_fast.deploy.runtime.cuda_driver import CAPTURE_LOCK, Device, Driver
from maskformer_fast.deploy.runtime.cuda_engine import OUTPUTS, Context, Network, check_outputs, choose_engine
from maskformer_fast.deploy.runtime.device_results import read_results
from maskformer_fast.deploy.runtime.replay import LARGE_SHARED_BYTES, Arena, Function, aligned, plan_arena, prepare

logger = logging.getLogger(__name__)


class _Plan(NamedTuple):
    """A launch sequence with the offsets of its buffers in a slot's memory."""

    sequence: LaunchSequence
    arena: Arena
    host: dict[str, int]  # offsets of frames and results in pinned memory
    host_bytes: int


class _PreparedPlan(NamedTuple):
    """A plan that is ready to run in a slot."""

    graph: Any  # executable CUDA graph; None where the work could not be captured
    context: Context
    enqueue: Callable[[], None]  # enqueues the same work without a graph


class TensorRTBackend:
    """A `Backend` for one GPU. Several may live in a process, on one GPU or several."""

    max_tasks = 1
    """A launch sequence is for one task."""

    def __init__(self, bundle: Bundle, device: int, in_flight: int, precision: Precision | None = None) -> None:
        """Check the bundle against the GPU, then load engine and kernels and set all memory aside.

        Args:
            device: number of the CUDA device.
            in_flight: batches that are worked on at once.
            precision: of the engine; None takes the first that fits.

        Raises:
            BundleError: no engine or kernels for this GPU, or parts that contradict each other. Nothing is deserialised
                where the manifest shows it.
            ModuleNotFoundError: cuda-python or the engine's TensorRT is not installed.
            RuntimeError: no driver, an error of the driver (`DriverError`), or one of TensorRT.
            ValueError: no such device.
        """
        check(in_flight > 0, "in_flight", "> 0", in_flight)
        manifest = bundle.manifest
        self._things = manifest.metadata.is_thing
        self._top_k = manifest.postprocess.top_k
        self.graph_obstacle: str | None = None
        """Reason why batches are launched piece by piece, where the engine cannot be captured as a CUDA graph."""
        self._lock = threading.RLock()
        self._collected = threading.Condition(self._lock)
        self._collecting = 0
        self._tickets = itertools.count()
        self._batches: dict[int, tuple[_Slot, _Plan, int]] = {}
        self._slots: deque[_Slot] = deque()
        self._network: Network | None = None
        driver = Driver()
        self._device = Device(driver, device)
        try:
            target = self._device.target
            entry, library = choose_engine(manifest, target, precision)
            got = ", ".join(manifest.kernels) or "none"
            expect(target in manifest.kernels, "kernels", f"those for this GPU ({target})", got)
            launch_file = LaunchFile.parse(bundle.read(FILE), manifest)
            dtypes = {spec.name: spec.dtype for spec in entry.outputs}
            usable = [
                sequence for sequence in launch_file.sequences
                if entry.profile.contains(sequence.images) and dtypes.get("mask_logits") == sequence.mask_dtype
            ]  # fmt: skip
            low, high = entry.profile.minimum, entry.profile.maximum
            expect(bool(usable), FILE, f"launches for {entry.file}, which takes {low} to {high} and gives {dtypes}",
                   [f"{s.frames} -> {s.images}, {s.mask_dtype}" for s in launch_file.sequences])  # fmt: skip
            self._plans = _plans(usable)
            with self._device.current(), CAPTURE_LOCK:
                self._network = Network(bundle, entry, library)
                self._load(bundle, launch_file, target, usable, in_flight)
        except BaseException:
            self.close()
            raise

    def max_batch(self, height: int, width: int, task: Task) -> int:
        """Largest batch that launches were recorded for. Raises ``ValueError`` for a size without launches."""
        sizes = sorted({key[1:] for key in self._plans if key[0] == task})
        known = ", ".join(f"{h}x{w}" for h, w in sizes) or "none"
        check((height, width) in sizes, "frames", f"a size that the bundle has kernels for, height x width ({task}: "
              f"{known}); others are added by export --frames", f"{height}x{width}")  # fmt: skip
        return max(self._plans[task, height, width])

    def submit(self, frames: Sequence[np.ndarray], *tasks: Task) -> int:
        """Begin a batch of frames of one size -> a ticket. Raises RuntimeError where `in_flight` are under way."""
        check(len(frames) > 0, "frames", "at least one", len(frames))
        check(len(tasks) == 1, "tasks", "one", tasks)
        task = tasks[0]
        height, width = frames[0].shape[:2]
        for frame in frames:
            fits = frame.shape == (height, width, 3) and frame.dtype == np.uint8
            check(fits, "frames", f"uint8 [{height}, {width}, 3], as the first", f"{frame.dtype} {list(frame.shape)}")
        with self._lock:
            if self._network is None:
                raise RuntimeError("backend: expected an open one, but it was closed")
            most = self.max_batch(height, width, task)
            check(len(frames) <= most, "frames", f"at most {most} of this size", len(frames))
            batches = self._plans[task, height, width]
            plan = batches[min(batch for batch in batches if batch >= len(frames))]
            if not self._slots:
                raise RuntimeError("backend: expected a batch to be collected before the next, all slots are in use")
            slot = self._slots.popleft()
            try:
                with self._device.current():
                    slot.run(plan, frames)
            except BaseException:
                self._slots.append(slot)
                raise
            ticket = next(self._tickets)
            self._batches[ticket] = (slot, plan, len(frames))
        return ticket

    def collect(self, ticket: int) -> tuple[list[Result], StageSeconds]:
        """Wait for a batch -> its results."""
        with self._lock:
            slot, plan, count = self._batches.pop(ticket)
            self._collecting += 1
        try:
            with self._device.current():
                preprocess, network, postprocess = slot.wait()
            start = perf_counter()
            arrays = {name: slot.host_array(plan, name) for name in plan.sequence.results}
            width = plan.sequence.frames.width
            results = read_results(plan.sequence.task, arrays, count, width, self._things, self._top_k)
            postprocess += perf_counter() - start
        finally:
            with self._lock:
                self._slots.append(slot)
                self._collecting -= 1
                self._collected.notify_all()
        return results, StageSeconds(preprocess, network, postprocess, preprocess + network + postprocess)

    def close(self) -> None:
        """Wait for the device and for threads that collect, and release everything. A second call does nothing."""
        with self._lock:
            self._collected.wait_for(lambda: not self._collecting)  # they read the memory that is released here
            slots = [*self._slots, *(slot for slot, _, _ in self._batches.values())]
            self._slots.clear()
            self._batches.clear()
            network, self._network = self._network, None
            try:
                with self._device.current(), CAPTURE_LOCK:  # TensorRT releases memory of the current device
                    try:
                        self._device.synchronize()
                    finally:
                        for slot in slots:
                            slot.close()
                        if network is not None:
                            network.close()
            finally:
                self._device.close()

    def _load(
        self, bundle: Bundle, launch_file: LaunchFile, target: str, usable: list[LaunchSequence], in_flight: int
    ) -> None:
        """Load kernels and constants and make the slots for the sequences that this engine can replay."""
        assert self._network is not None  # loaded before this call
        used = {launch.kernel for sequence in usable for launch in (*sequence.before, *sequence.after)}
        kernels = {kernel.name: kernel for kernel in launch_file.kernels}
        functions = {}
        attribute = self._device.driver.api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        for cubin in launch_file.cubins:
            if cubin.target == target and cubin.kernel in used:
                handle = self._device.function(bundle.read(cubin.file), cubin.symbol)
                if cubin.shared_bytes > LARGE_SHARED_BYTES:
                    self._device.driver.call("cuFuncSetAttribute", handle, attribute, cubin.shared_bytes)
                functions[cubin.kernel] = Function(kernels[cubin.kernel], cubin, handle)
        constants = {buffer.constant for sequence in usable for buffer in sequence.buffers if buffer.constant}
        addresses = {}
        for digest, content in launch_file.contents().items():
            if digest in constants:
                addresses[digest] = self._device.allocate(len(content))
                self._device.driver.call("cuMemcpyHtoD", addresses[digest], content, len(content))
        self._device.synchronize()  # the slots' streams would not wait for copies that are still under way
        scratch = max(_scratch_bytes(self._network, sequence) for sequence in {t.images: t for t in usable}.values())
        plans = [plan for batches in self._plans.values() for plan in batches.values()]
        for _ in range(in_flight):
            slot = _Slot(self._device, self._network, functions, addresses, plans, scratch, self._do_without_graphs)
            self._slots.append(slot)

    def _do_without_graphs(self, reason: str) -> None:
        """Keep and log the reason, the first time."""
        if self.graph_obstacle is None:
            self.graph_obstacle = reason
            logger.warning("batches are launched piece by piece, which is slower than a CUDA graph: %s", reason)


def _plans(sequences: Sequence[LaunchSequence]) -> dict[tuple[Task, int, int], dict[int, _Plan]]:
    """Plans of launch sequences by task, height and width, then by batch."""
    plans: dict[tuple[Task, int, int], dict[int, _Plan]] = {}
    for sequence in sequences:
        offsets, end = {}, 0
        for name in ("frames", *sequence.results):
            offsets[name] = end
            end += aligned(sequence.buffer(name).bytes)
        key = (sequence.task, sequence.frames.height, sequence.frames.width)
        plans.setdefault(key, {})[sequence.frames.batch] = _Plan(sequence, plan_arena(sequence), offsets, end)
    return plans


def _scratch_bytes(network: Network, sequence: LaunchSequence) -> int:
    """Bytes of scratch memory of the network for a sequence's images. Its outputs must have the recorded shapes."""
    context = network.context(sequence.images)
    try:
        check_outputs(context, [(name, sequence.buffer(name).shape) for name in OUTPUTS])
        return context.scratch_bytes
    finally:
        context.close()


class _Slot:
    """Room for one batch. One thread at a time calls its methods, with the device current."""

    def __init__(
        self, device: Device, network: Network, functions: dict[str, Function], constants: dict[str, int],
        plans: Sequence[_Plan], scratch: int, do_without_graphs: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._device = device
        self._driver = device.driver
        self._network = network
        self._functions = functions
        self._constants = constants
        self._scratch_bytes = scratch
        self._do_without_graphs = do_without_graphs
        arena = max(plan.arena.bytes for plan in plans)
        self._memory = device.allocate(arena + aligned(scratch))
        self._scratch = self._memory + arena
        self._host = device.pinned(max(plan.host_bytes for plan in plans))
        self._stream = device.stream()
        self._stages = [device.event(timing=True) for _ in range(4)]
        self._done = device.event(timing=False)
        self._prepared: dict[int, _PreparedPlan] = {}  # by the plan's identity: plans live as long as the backend

    def run(self, plan: _Plan, frames: Sequence[np.ndarray]) -> None:
        """Begin a batch. Rows of the batch beyond ``frames`` keep their old pixels."""
        prepared = self._prepared.get(id(plan))
        if prepared is None:
            with CAPTURE_LOCK:
                prepared = self._prepare(plan)
        target = self.host_array(plan, "frames")
        for row, frame in enumerate(frames):
            target[row] = frame
        if prepared.graph is None:
            prepared.enqueue()
        else:
            self._driver.call("cuGraphLaunch", prepared.graph, self._stream)
        self._driver.call("cuEventRecord", self._done, self._stream)

    def wait(self) -> tuple[float, float, float]:
        """Wait until the batch is done -> seconds of the three stages. Copies count with the stage beside them."""
        self._driver.call("cuEventSynchronize", self._done)
        times = [self._driver.call("cuEventElapsedTime", *pair) / 1000 for pair in itertools.pairwise(self._stages)]
        return times[0], times[1], times[2]

    def host_array(self, plan: _Plan, name: str) -> np.ndarray:
        """Frames or a result in pinned memory."""
        buffer = plan.sequence.buffer(name)
        start = plan.host[name]
        return self._host[start : start + buffer.bytes].view(buffer.dtype).reshape(buffer.shape)

    def close(self) -> None:
        """Release the engine's contexts. `Device.close` releases the rest."""
        for prepared in self._prepared.values():
            prepared.context.close()
        self._prepared.clear()

    def _prepare(self, plan: _Plan) -> _PreparedPlan:
        """Run a plan once, so that everything lazy is loaded, and capture the same work as a graph, if possible."""
        sequence = plan.sequence
        addresses = {name: self._memory + offset for name, offset in plan.arena.offsets.items()}
        addresses |= {buffer.name: self._constants[buffer.constant] for buffer in sequence.buffers if buffer.constant}
        context = self._network.context(sequence.images)
        context.bind(self._scratch, self._scratch_bytes, addresses)
        before = prepare(sequence.before, self._functions, addresses)
        after = prepare(sequence.after, self._functions, addresses)
        host = address_of(self._host, "host", "uint8", self._host.shape)

        def enqueue(capturing: bool) -> None:
            self._mark(0, capturing)
            self._upload(addresses["frames"], host + plan.host["frames"], sequence.buffer("frames"))
            for launch in before:
                launch.enqueue(self._driver, self._stream)
            self._mark(1, capturing)
            context.enqueue(self._stream)
            self._mark(2, capturing)
            for launch in after:
                launch.enqueue(self._driver, self._stream)
            for name in sequence.results:
                self._download(host + plan.host[name], addresses[name], sequence.buffer(name))
            self._mark(3, capturing)

        try:
            enqueue(capturing=False)
            self._driver.call("cuStreamSynchronize", self._stream)
            graph = self._capture(context, lambda: enqueue(capturing=True))
        except BaseException:
            context.close()
            raise
        prepared = _PreparedPlan(graph, context, lambda: enqueue(capturing=False))
        self._prepared[id(plan)] = prepared
        return prepared

    def _capture(self, context: Context, enqueue: Callable[[], None]) -> Any:
        """Capture the work that ``enqueue`` enqueues -> a graph ready to launch; None if it cannot be captured.

        The same work has just run without a capture, so an error here is one of the capture. An error of the device
        would come again at the next launch.
        """
        if not context.capturable(self._stream):
            self._do_without_graphs("the engine's library says that it cannot be captured")
            return None
        # Calls of this thread alone are captured: other threads may allocate meanwhile, as PyTorch does.
        mode = self._driver.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        try:
            self._driver.call("cuStreamBeginCapture", self._stream, mode)
            try:
                enqueue()
            except BaseException:
                self._driver.abandon_capture(self._stream)
                raise
            graph = self._device.keep_graph(self._driver.call("cuStreamEndCapture", self._stream))
            self._driver.call("cuGraphUpload", graph, self._stream)
        except RuntimeError as error:  # raised by the driver or by TensorRT
            self._do_without_graphs(str(error))
            return None
        return graph

    def _mark(self, stage: int, capturing: bool) -> None:
        """Record the time of a stage's begin or end. In a graph it becomes a node, which every replay repeats."""
        flags = self._driver.api.CUevent_record_flags
        flag = flags.CU_EVENT_RECORD_EXTERNAL if capturing else flags.CU_EVENT_RECORD_DEFAULT
        self._driver.call("cuEventRecordWithFlags", self._stages[stage], self._stream, int(flag))

    def _upload(self, device: int, host: int, buffer: Buffer) -> None:
        self._driver.call("cuMemcpyHtoDAsync", device, host, buffer.bytes, self._stream)

    def _download(self, host: int, device: int, buffer: Buffer) -> None:
        self._driver.call("cuMemcpyDtoHAsync", host, device, buffer.bytes, self._stream)
