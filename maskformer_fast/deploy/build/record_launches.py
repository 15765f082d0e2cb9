"""Records tapes: the real launchers of ``maskformer_fast.kernels`` run on stand-ins, no GPU, nothing computed.

Tensors here are memory on the host that nobody writes. While a launcher runs, what it allocates becomes a buffer of the
tape, what it fills a fill, and a kernel's launch is noted in place of being made, with the specialisation that Triton's
own rules choose for its arguments. Views are free. Any other operation on tensors would be work that the tape does not
do: it is an error. So a launcher is written once, and what it does on the device is what the tape says.
"""

from __future__ import annotations

import base64
import ctypes
import hashlib
import importlib
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
from maskformer_fast.deploy.bundle.manifest import Manifest, Shape
from maskformer_fast.deploy.bundle.launches import (
    FILE,
    Argument,
    Buffer,
    BufferType,
    Cubin,
    Fill,
    Kernel,
    Launch,
    MaskType,
    Parameter,
    Tape,
    TapeFile,
    interface,
    network_size,
    padded_size,
)
from maskformer_fast.ops.resize import filters_columns_first

_TARGET = 80
"""Specialisation does not depend on it: Triton asks for a GPU before it says how arguments specialise."""
_ALLOCATIONS = {"aten::empty.memory_format", "aten::new_empty", "aten::zeros", "aten::new_zeros"}
_DTYPES = ("uint8", "int16", "int32", "int64", "float16", "float32")


class Recording:
    """Tapes and the contents of their constant buffers, by SHA-256."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.kernels: dict[str, Kernel] = {}
        self.constants: dict[str, bytes] = {}


def record_tapes(
    manifest: Manifest,
    frames: Sequence[Shape],
    tasks: Sequence[Task],
    mask_dtype: MaskType = "float32",
) -> Recording:
    """Tapes for every task and every batch of frames, of a network whose mask logits have the type ``mask_dtype``.

    Raises:
        ValueError: a network that the kernels do not serve (more than 256 queries).
        RuntimeError: a launcher did something else than allocate, fill, view and launch, or this process runs Triton's
            interpreter (TRITON_INTERPRET), which does not specialise.
    """
    check(len(frames) > 0, "frames", "at least one shape", frames)
    check(len(tasks) > 0, "tasks", "at least one", tasks)
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("tapes cannot be recorded where TRITON_INTERPRET is set: start Python without it")
    recording = Recording()
    for shape in dict.fromkeys(frames):
        for task in dict.fromkeys(tasks):
            recording.tapes.append(_record_tape(recording, manifest, task, shape, mask_dtype))
    return recording


def compile_tapes(recording: Recording, targets: Sequence[str]) -> dict[str, bytes]:
    """The bundle's files for a recording: the tapes, and every kernel of theirs compiled for every target (``sm_87``).

    Takes one to ten seconds a kernel and target. Raises ValueError for an unknown target, RuntimeError for a kernel
    that a target cannot run or runs badly (spilled registers, too much shared memory).
    """
    from maskformer_fast.kernels.aot import compile_kernel

    check(len(targets) > 0, "targets", "at least one", targets)
    files: dict[str, bytes] = {}
    cubins = []
    for kernel in recording.kernels.values():
        for target in dict.fromkeys(targets):
            compiled = compile_kernel(kernel_variant(kernel), target)
            if compiled.failure:
                raise RuntimeError(f"{kernel.name} for {target} {compiled.failure}")
            expected = tuple((parameter.name, parameter.type) for parameter in kernel.parameters)
            if compiled.arguments != expected:
                raise RuntimeError(f"{kernel.name}: expected the arguments {expected}, compiled {compiled.arguments}")
            cubin = Cubin(kernel.name, target, compiled.symbol, compiled.shared_bytes, compiled.null_pointers)
            files[cubin.file] = compiled.cubin
            cubins.append(cubin)
    constants = {digest: base64.b64encode(content).decode() for digest, content in recording.constants.items()}
    tapes = TapeFile(tuple(recording.kernels.values()), constants, tuple(cubins), tuple(recording.tapes))
    files[FILE] = tapes.to_bytes()
    return files


def kernel_variant(kernel: Kernel) -> Any:
    """What `maskformer_fast.kernels.aot` compiles."""
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


def _record_tape(recording: Recording, manifest: Manifest, task: Task, frames: Shape, mask_dtype: MaskType) -> Tape:
    buffers = interface(manifest, task, frames, mask_dtype)
    tensors = {b.name: torch.empty(b.shape, dtype=getattr(torch, b.dtype)) for b in buffers}
    recorder = _Recorder(recording, tensors)
    size = network_size(manifest.preprocess, frames.height, frames.width)
    with recorder.section() as before:
        _preprocess(tensors["frames"], tensors["images"])
    with recorder.section() as after:
        _postprocess(manifest, task, tensors, size)
    images = Shape(frames.batch, *size)
    return Tape(task, frames, images, mask_dtype, (*buffers, *recorder.buffers), tuple(before), tuple(after))


def _preprocess(frames: Tensor, images: Tensor) -> None:
    from maskformer_fast.kernels.resize import resize_forward

    size = (images.shape[2], images.shape[3])
    resize_forward(frames, size, images, filters_columns_first(tuple(frames.shape[1:3]), size))


def _postprocess(manifest: Manifest, task: Task, tensors: dict[str, Tensor], size: tuple[int, int]) -> None:
    """As `postprocess` in its direct order, with all queries: which ones take part is known on the device only."""
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
        found = (tensors[name] for name in ("masks", "areas", "boxes", "scores"))
        instance_masks(mask_logits, extent, (height, width), *found)


def _constant(content: np.ndarray) -> Tensor:
    """A tensor made outside of the recorder's sight, which it takes for a constant."""
    return torch.from_numpy(content)


class _Pointer:
    """What Triton's rules of specialisation want to know of a tensor."""

    def __init__(self, tensor: Tensor, buffer: str, offset: int) -> None:
        self.dtype = tensor.dtype
        self.buffer = buffer
        self.offset = offset

    def data_ptr(self) -> int:
        """As if buffers began at address 0: they begin at multiples of 256."""
        return self.offset


class _Recorder(TorchDispatchMode):
    """Notes what launchers do, section by section."""

    def __init__(self, recording: Recording, known: dict[str, Tensor]) -> None:
        super().__init__()
        self.buffers: list[Buffer] = []
        self._recording = recording
        self._launches: list[Launch] = []
        self._fills: list[Fill] = []
        # by address of the storage; the tensors are kept, so that no address is used twice
        self._known = {tensor.untyped_storage().data_ptr(): (tensor, name) for name, tensor in known.items()}

    @contextmanager
    def section(self) -> Iterator[list[Launch]]:
        """Within it, launches are added to the list."""
        from triton.runtime.jit import JITFunction

        launches: list[Launch] = []
        self._launches = launches
        launch = JITFunction.run
        recorder = self

        def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            recorder._note(kernel, grid, args, kwargs)

        JITFunction.run = note
        try:
            with self:
                yield launches
        finally:
            JITFunction.run = launch
        if self._fills:
            raise RuntimeError(f"tape: expected a launch after every fill, got none after that of {self._fills[-1]}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func._schema.name}{'.' * bool(func._schema.overload_name)}{func._schema.overload_name}"
        if name in _ALLOCATIONS:
            result = func(*args, **(kwargs or {}))
            self._allocate(result, zeros="zeros" in name)
            return result
        if func.is_view:
            return func(*args, **(kwargs or {}))
        raise RuntimeError(f"tape: expected allocations, zeros, views and launches of kernels only, got {name}")

    def _allocate(self, tensor: Tensor, zeros: bool) -> None:
        if tensor.numel() == 0:
            return
        name = f"scratch_{len(self.buffers)}"
        buffer = Buffer(name, _dtype(tensor), tuple(tensor.shape), "")
        self._known[tensor.untyped_storage().data_ptr()] = (tensor, name)
        self.buffers.append(buffer)
        if zeros:
            self._fills.append(Fill(name, 0, buffer.bytes, 0))

    def _note(self, kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound, specialised, options = _bind(
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
            raise RuntimeError(f"tape: expected launches with num_warps and num_stages alone, got {sorted(unknown)}")
        launched = self._kernel(kernel.fn, parameters, constants, _default_options() | options)
        sides = cast(tuple[int, int, int], (*grid, 1, 1)[:3])
        self._launches.append(Launch(launched.name, sides, tuple(arguments), tuple(self._fills)))
        self._fills = []

    def _stand_in(self, value: Any) -> Any:
        """Of a tensor; memory of which nothing is known yet is a constant's."""
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
        return self._recording.kernels.setdefault(kernel.name, kernel)

    def _keep(self, tensor: Tensor) -> str:
        storage = tensor.untyped_storage()
        content = ctypes.string_at(storage.data_ptr(), storage.nbytes())
        digest = hashlib.sha256(content).hexdigest()
        self._recording.constants[digest] = content
        name = f"constant_{len(self.buffers)}"
        self.buffers.append(Buffer(name, "uint8", (len(content),), digest))
        return name


def _bind(kernel: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """Arguments by name, the type and attribute that Triton gives each, and the options of the launch."""
    from triton.runtime.jit import create_function_from_signature

    binder = create_function_from_signature(kernel.signature, kernel.params, _backend())
    return binder(*args, **kwargs)


def _backend() -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    return make_backend(GPUTarget("cuda", _TARGET, 32))


def _default_options() -> dict[str, Any]:
    options = _backend().parse_options({})
    return {"num_warps": options.num_warps, "num_stages": options.num_stages}


def _dtype(tensor: Tensor) -> BufferType:
    name = str(tensor.dtype).removeprefix("torch.")
    check(name in _DTYPES, "dtype", f"one of {', '.join(_DTYPES)}", name)
    return cast(BufferType, name)
