"""Records kernel launches: the launchers of ``maskformer_fast.kernels`` run on stand-ins, without GPU or computation.

Tensors here are memory on the host that nobody writes. While a launcher runs, its allocations become buffers of a
`LaunchSequence`, its zeros become fills, and launches of kernels are recorded and not made, with the specialisation
that Triton's own rules choose for the arguments. Views are free. Any other operation on tensors raises an error, for a
replay would not do it. So a launcher is written once, and the recorded launches are all that it does on a device.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maskformer_fast.config import Task
from maskformer_fast.core.checks import check
from maskformer_fast.deploy.bundle.launches import (
    FILE,
    Argument,
    Buffer,
    BufferType,
    Cubin,
    Fill,
    Kernel,
    Launch,
    LaunchFile,
    LaunchSequence,
    MaskType,
    Parameter,
    interface,
    network_size,
    padded_size,
)
from maskformer_fast.deploy.bundle.manifest import Manifest, Shape
from maskformer_fast.ops.resize import filters_columns_first

logger = logging.getLogger(__name__)

_ALLOCATIONS = {"aten::empty.memory_format", "aten::new_empty", "aten::zeros", "aten::new_zeros"}
_DTYPES = ("uint8", "int16", "int32", "int64", "float16", "float32")


class RecordedLaunches:
    """Launch sequences with their kernels, by name, and the contents of their constant buffers, by SHA-256."""

    def __init__(self) -> None:
        self.sequences: list[LaunchSequence] = []
        self.kernels: dict[str, Kernel] = {}
        self.constants: dict[str, bytes] = {}


def record_launches(
    manifest: Manifest,
    frames: Sequence[Shape],
    tasks: Sequence[Task],
    mask_dtype: MaskType = "float32",
) -> RecordedLaunches:
    """Record the launches of every task for every shape of frames.

    Args:
        manifest: network, pre- and post-processing.
        frames: batches of frames.
        tasks: tasks.
        mask_dtype: type of the network's mask logits.

    Raises:
        ValueError: a network with more than 256 queries, which the kernels do not take.
        RuntimeError: a launcher did something other than allocate, fill, view and launch, or this process runs Triton's
            interpreter (TRITON_INTERPRET), which does not specialise.
    """
    check(len(frames) > 0, "frames", "at least one shape", frames)
    check(len(tasks) > 0, "tasks", "at least one", tasks)
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("launches cannot be recorded where TRITON_INTERPRET is set: start Python without it")
    recorded = RecordedLaunches()
    for shape in dict.fromkeys(frames):
        for task in dict.fromkeys(tasks):
            recorded.sequences.append(_record_sequence(recorded, manifest, task, shape, mask_dtype))
    return recorded


def compile_launches(recorded: RecordedLaunches, targets: Sequence[str]) -> dict[str, bytes]:
    """Compile the kernels of recorded launches for every target (``sm_87``) -> the bundle's files, launches included.

    Each kernel takes one to ten seconds for each target. A kernel that spills registers is somewhat slower; it is
    logged. Raises ValueError for an unknown target, RuntimeError for a kernel that a target cannot run (too much shared
    memory).
    """
    from maskformer_fast.kernels.aot import compile_kernel

    check(len(targets) > 0, "targets", "at least one", targets)
    files: dict[str, bytes] = {}
    cubins = []
    for kernel in recorded.kernels.values():
        for target in dict.fromkeys(targets):
            compiled = compile_kernel(kernel_variant(kernel), target)
            if compiled.obstacle:
                raise RuntimeError(f"{kernel.name} for {target} {compiled.obstacle}")
            if compiled.failure:
                logger.warning("%s for %s %s: it is somewhat slower", kernel.name, target, compiled.failure)
            expected = tuple((parameter.name, parameter.type) for parameter in kernel.parameters)
            if compiled.arguments != expected:
                raise RuntimeError(f"{kernel.name}: expected the arguments {expected}, compiled {compiled.arguments}")
            cubin = Cubin(kernel.name, target, compiled.symbol, compiled.shared_bytes, compiled.null_pointers)
            files[cubin.file] = compiled.cubin
            cubins.append(cubin)
    constants = {digest: base64.b64encode(content).decode() for digest, content in recorded.constants.items()}
    launch_file = LaunchFile(tuple(recorded.kernels.values()), constants, tuple(cubins), tuple(recorded.sequences))
    files[FILE] = launch_file.to_bytes()
    return files


def kernel_variant(kernel: Kernel) -> Any:
    """The kernel as `maskformer_fast.kernels.aot` compiles it."""
    from maskformer_fast.kernels.variant import KernelVariant

    module = importlib.import_module(f"maskformer_fast.kernels.{kernel.module}")
    return KernelVariant(
        kernel.name,
        getattr(module, kernel.function),
        {parameter.name: parameter.type for parameter in kernel.parameters},
        dict(kernel.constants),
        kernel.num_warps,
        kernel.num_stages,
        tuple(parameter.name for parameter in kernel.parameters if parameter.aligned),
    )


def _record_sequence(
    recorded: RecordedLaunches, manifest: Manifest, task: Task, frames: Shape, mask_dtype: MaskType
) -> LaunchSequence:
    buffers = interface(manifest, task, frames, mask_dtype)
    tensors = {b.name: torch.empty(b.shape, dtype=getattr(torch, b.dtype)) for b in buffers}
    recorder = _LaunchRecorder(recorded, tensors)
    size = network_size(manifest.preprocess, frames.height, frames.width)
    with recorder.section() as before:
        _preprocess(tensors["frames"], tensors["images"])
    with recorder.section() as after:
        _postprocess(manifest, task, tensors, size)
    images = Shape(frames.batch, *size)
    return LaunchSequence(task, frames, images, mask_dtype, (*buffers, *recorder.buffers), tuple(before), tuple(after))


def _preprocess(frames: Tensor, images: Tensor) -> None:
    from maskformer_fast.kernels.resize import resize_forward

    size = (images.shape[2], images.shape[3])
    resize_forward(frames, size, images, filters_columns_first(tuple(frames.shape[1:3]), size))


def _postprocess(manifest: Manifest, task: Task, tensors: dict[str, Tensor], size: tuple[int, int]) -> None:
    """Launch the work of `postprocess` in its direct order for all queries: they are selected on the device."""
    from maskformer_fast.kernels.class_scores import class_scores
    from maskformer_fast.kernels.segments_instances import instance_masks
    from maskformer_fast.kernels.segments_panoptic import panoptic_segments
    from maskformer_fast.kernels.semantic import semantic_from_logits

    settings = manifest.postprocess
    class_logits, mask_logits = tensors["class_logits"], tensors["mask_logits"]
    padded = padded_size(manifest.preprocess, *size)
    extent = (size[0] * mask_logits.shape[2] / padded[0], size[1] * mask_logits.shape[3] / padded[1])
    if task == "semantic":
        semantic_from_logits(mask_logits, class_logits, extent, tensors["labels"])
    elif task == "panoptic":
        class_scores(class_logits, settings.object_mask_threshold, tensors["scores"], tensors["categories"])
        things = _constant(np.array(manifest.metadata.is_thing, dtype=np.bool_))
        panoptic_segments(
            mask_logits, tensors["scores"], tensors["categories"], things, extent, settings.overlap_threshold,
            settings.panoptic_rule, tensors["id_map"], tensors["ids"], tensors["areas"],
        )  # fmt: skip
    else:
        height, width = tensors["frames"].shape[1:3]
        outputs = (tensors[name] for name in ("masks", "areas", "boxes", "scores"))
        instance_masks(mask_logits, extent, (height, width), *outputs)


def _constant(content: np.ndarray) -> Tensor:
    """A tensor whose allocation is not recorded, so that the recorder takes it for a constant."""
    return torch.from_numpy(content)


class _Pointer:
    """Stand-in for a tensor, with what Triton's rules of specialisation read: dtype and address."""

    def __init__(self, tensor: Tensor, buffer: str, offset: int) -> None:
        self.dtype = tensor.dtype
        self.buffer = buffer
        self.offset = offset

    def data_ptr(self) -> int:
        """Address as if the buffer began at 0; real buffers begin at multiples of 256."""
        return self.offset


class _LaunchRecorder(TorchDispatchMode):
    """Records allocations, fills and launches of the code that runs in a `section`."""

    def __init__(self, recorded: RecordedLaunches, known: dict[str, Tensor]) -> None:
        super().__init__()
        self.buffers: list[Buffer] = []
        self._recorded = recorded
        self._launches: list[Launch] = []
        self._fills: list[Fill] = []
        # Keys are addresses of storages. The tensors are kept, so that no address is used twice.
        self._known = {tensor.untyped_storage().data_ptr(): (tensor, name) for name, tensor in known.items()}

    @contextmanager
    def section(self) -> Iterator[list[Launch]]:
        """Record the launches of the block into the list that is given."""
        from triton.runtime.jit import JITFunction

        launches: list[Launch] = []
        self._launches = launches
        launch = JITFunction.run
        recorder = self

        def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            recorder._record(kernel, grid, args, kwargs)

        JITFunction.run = record
        try:
            with self:
                yield launches
        finally:
            JITFunction.run = launch
        if self._fills:
            raise RuntimeError(f"launches: expected one after every fill, got none after {self._fills[-1]}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func._schema.name}{'.' * bool(func._schema.overload_name)}{func._schema.overload_name}"
        if name in _ALLOCATIONS:
            result = func(*args, **(kwargs or {}))
            self._allocate(result, zeros="zeros" in name)
            return result
        if func.is_view:
            return func(*args, **(kwargs or {}))
        raise RuntimeError(f"launches: expected allocations, zeros, views and launches of kernels only, got {name}")

    def _allocate(self, tensor: Tensor, zeros: bool) -> None:
        if tensor.numel() == 0:
            return
        name = f"scratch_{len(self.buffers)}"
        buffer = Buffer(name, _dtype(tensor), tuple(tensor.shape), "")
        self._known[tensor.untyped_storage().data_ptr()] = (tensor, name)
        self.buffers.append(buffer)
        if zeros:
            self._fills.append(Fill(name, 0, buffer.bytes, 0))

    def _record(self, kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from maskformer_fast.kernels.variant import bind_launch

        bound, specialised, options = bind_launch(
            kernel, [self._stand_in(value) for value in args], {n: self._stand_in(value) for n, value in kwargs.items()}
        )
        parameters, arguments = [], []
        constants: dict[str, Any] = {}
        for (name, value), (kind, attribute) in zip(bound.items(), specialised, strict=True):
            if kind == "constexpr":
                constants[name] = value
                continue
            check(attribute in (None, "", "D"), name, "at most a hint of divisibility", attribute)
            parameters.append(Parameter(name, kind, attribute == "D"))
            if isinstance(value, _Pointer):
                arguments.append(Argument(value.buffer, value.offset))
            else:
                arguments.append(Argument(None, float(value) if kind == "fp32" else value))
        unknown = options.keys() - {"num_warps", "num_stages"}
        if unknown:  # the kernel would be compiled without them
            raise RuntimeError(f"launches: expected the options num_warps and num_stages alone, got {sorted(unknown)}")
        launched = self._kernel(kernel.fn, parameters, constants, options)
        blocks = cast(tuple[int, int, int], (*grid, 1, 1)[:3])
        self._launches.append(Launch(launched.name, blocks, tuple(arguments), tuple(self._fills)))
        self._fills = []

    def _stand_in(self, value: Any) -> Any:
        """Stand-in for an argument that is a tensor; unknown memory becomes a constant buffer."""
        if not isinstance(value, Tensor):
            return value
        start = value.untyped_storage().data_ptr()
        if start not in self._known:
            self._known[start] = (value, self._keep(value))
        return _Pointer(value, self._known[start][1], value.data_ptr() - start)

    def _kernel(self, function: Any, parameters: list[Parameter], constants: dict[str, Any], options: Any) -> Kernel:
        name = function.__name__.strip("_").removesuffix("_kernel")
        kernel = Kernel(
            name, function.__module__.rsplit(".", 1)[1], function.__name__, tuple(parameters), constants,
            options["num_warps"], options["num_stages"],
        )  # fmt: skip
        digest = hashlib.sha256(repr(kernel).encode()).hexdigest()[:12]
        kernel = replace(kernel, name=f"{name}_{digest}")
        return self._recorded.kernels.setdefault(kernel.name, kernel)

    def _keep(self, tensor: Tensor) -> str:
        storage = tensor.untyped_storage()
        content = ctypes.string_at(storage.data_ptr(), storage.nbytes())
        digest = hashlib.sha256(content).hexdigest()
        self._recorded.constants[digest] = content
        name = f"constant_{len(self.buffers)}"
        self.buffers.append(Buffer(name, "uint8", (len(content),), digest))
        return name


def _dtype(tensor: Tensor) -> BufferType:
    name = str(tensor.dtype).removeprefix("torch.")
    check(name in _DTYPES, "dtype", f"one of {', '.join(_DTYPES)}", name)
    return cast(BufferType, name)
