"""Tapes: what the Triton kernels before and after the network are launched with, written down for a runtime without
torch and Triton.

A tape belongs to one task, batch and size of frames: which kernels, how many programs, which numbers, which places in
which buffers. `deploy.build.record_launches` makes tapes, `deploy.runtime.replay` plays them. They travel in
the bundle as ``kernels/tapes.json``; the kernels as ``kernels/TARGET/NAME.cubin``.

A file of tapes is checked as a whole before anything is launched: all that a launch says must lie within its buffers
and within what a GPU takes, and the buffers that the runtime fills and reads must be those of the task. What a kernel
does inside is its machine code's affair, for which the bundle's digest vouches.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from maskformer_fast.config import Task
from maskformer_fast.core.image_resize import short_edge_size
from maskformer_fast.core.typed import to_plain
from maskformer_fast.deploy.bundle.manifest import READER, BundleError, Manifest, Preprocess, Shape, expect

FILE = "kernels/tapes.json"
FORMAT = "maskformer_fast.tapes.1"
MAX_FILE_BYTES = 64 << 20
MAX_SHARED_BYTES = 227 << 10
"""Of a block, the most that any GPU has."""
ELEMENT_BYTES = {
    "*i1": 1, "*i8": 1, "*u8": 1, "*i16": 2, "*u16": 2, "*fp16": 2, "*bf16": 2, "*i32": 4, "*u32": 4, "*fp32": 4,
    "*i64": 8, "*u64": 8, "*fp64": 8,
}  # fmt: skip
"""Triton's types of pointers -> bytes of what they point to."""
SCALAR_RANGES = {"i32": (-(1 << 31), (1 << 31) - 1), "i64": (-(1 << 63), (1 << 63) - 1)}
"""Triton's types of whole numbers -> least and largest; beside them there is fp32."""
MaskType = Literal["float16", "float32"]
BufferType = Literal["uint8", "int16", "int32", "int64", "float16", "float32"]

_MAX_GRID = ((1 << 31) - 1, 65535, 65535)
_MAX_BUFFER_BYTES = 1 << 40
_NAME = re.compile(r"[a-z][a-z0-9_]{0,79}")
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Buffer:
    """Device memory, C-contiguous, beginning at a multiple of 256 bytes."""

    name: str
    dtype: BufferType
    shape: tuple[int, ...]
    constant: str
    """SHA-256 of the content it always has, or nothing where kernels or the runtime write it."""

    def __post_init__(self) -> None:
        expect(_NAME.fullmatch(self.name) is not None, "name", "a name of small letters and digits", self.name)
        expect(all(side > 0 for side in self.shape), "shape", "positive sizes", self.shape)
        expect(self.bytes <= _MAX_BUFFER_BYTES, "shape", f"at most {_MAX_BUFFER_BYTES} bytes", self.shape)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Fill:
    """Bytes of a buffer set to one value."""

    buffer: str
    offset: int
    bytes: int
    value: int


@dataclass(frozen=True)
class Argument:
    """A place in a buffer, or a number."""

    buffer: str | None
    value: int | float
    """Offset in bytes, or the number."""


@dataclass(frozen=True)
class Launch:
    """One kernel's launch, and what is filled just before it."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]
    fills: tuple[Fill, ...]

    def __post_init__(self) -> None:
        fits = all(1 <= side <= most for side, most in zip(self.grid, _MAX_GRID, strict=True))
        expect(fits, "grid", f"1..{', 1..'.join(map(str, _MAX_GRID))}", self.grid)

    def buffers(self) -> set[str]:
        """Names of the buffers that it touches."""
        return {argument.buffer for argument in self.arguments if argument.buffer is not None} | {
            fill.buffer for fill in self.fills
        }


@dataclass(frozen=True)
class Parameter:
    """A run-time argument of a kernel."""

    name: str
    type: str
    """Triton's name: ``*fp16``, ``i32``, ``fp32``."""
    aligned: bool
    """The kernel was compiled for multiples of 16: of bytes, or the number itself."""

    def __post_init__(self) -> None:
        known = self.type in ELEMENT_BYTES or self.type in SCALAR_RANGES or self.type == "fp32"
        expect(known, "type", "one of Triton's that a tape can pass", self.type)


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel and its specialisation: all that compiling it takes, and what it is passed."""

    name: str
    module: str
    """Below ``maskformer_fast.kernels``."""
    function: str
    parameters: tuple[Parameter, ...]
    constants: dict[str, int | float | bool | None]
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        expect(_NAME.fullmatch(self.name) is not None, "name", "a name of small letters and digits", self.name)
        for name in (self.module, self.function):
            expect(_SYMBOL.fullmatch(name) is not None, "module, function", "identifiers", name)
        expect(self.num_warps in (1, 2, 4, 8, 16, 32), "num_warps", "1, 2, 4, 8, 16 or 32", self.num_warps)
        expect(1 <= self.num_stages <= 8, "num_stages", "1..8", self.num_stages)


@dataclass(frozen=True)
class Cubin:
    """A kernel compiled for a target, and what launching it takes beside the tape."""

    kernel: str
    target: str
    symbol: str
    shared_bytes: int
    null_pointers: int
    """Parameters after the kernel's own, for scratch memory that it does not use."""

    def __post_init__(self) -> None:
        expect(_SYMBOL.fullmatch(self.symbol) is not None, "symbol", "an identifier", self.symbol)
        within = 0 <= self.shared_bytes <= MAX_SHARED_BYTES
        expect(within, "shared_bytes", f"0..{MAX_SHARED_BYTES}", self.shared_bytes)
        expect(0 <= self.null_pointers <= 4, "null_pointers", "0..4", self.null_pointers)

    @property
    def file(self) -> str:
        return f"kernels/{self.target}/{self.kernel}.cubin"


@dataclass(frozen=True)
class Tape:
    """From frames to the network's input (``before``), and from its outputs to a task's results (``after``)."""

    task: Task
    frames: Shape
    images: Shape
    """What the frames become: the network's input."""
    mask_dtype: MaskType
    """Type of the network's mask logits; class logits are float32."""
    buffers: tuple[Buffer, ...]
    before: tuple[Launch, ...]
    after: tuple[Launch, ...]

    @property
    def results(self) -> tuple[str, ...]:
        """Names of the buffers that are copied to the host."""
        return _RESULTS[self.task]

    def buffer(self, name: str) -> Buffer:
        """Raises KeyError where there is none of that name."""
        return {buffer.name: buffer for buffer in self.buffers}[name]


_RESULTS: dict[Task, tuple[str, ...]] = {
    "semantic": ("labels",),
    "panoptic": ("id_map", "ids", "areas", "scores", "categories"),
    "instance": ("masks", "areas", "boxes", "scores", "class_logits"),
}


def network_size(preprocess: Preprocess, height: int, width: int) -> tuple[int, int]:
    """Height and width that a frame has as the network's input, before the padding that is the graph's part."""
    if preprocess.short_edge is None:
        return height, width
    return short_edge_size(height, width, preprocess.short_edge, preprocess.max_size)


def padded_size(preprocess: Preprocess, height: int, width: int) -> tuple[int, int]:
    """The network's input with the graph's padding."""
    step = max(1, preprocess.size_divisibility)
    return -(-height // step) * step, -(-width // step) * step


def interface(manifest: Manifest, task: Task, frames: Shape, mask_dtype: MaskType) -> tuple[Buffer, ...]:
    """The buffers of a tape that the runtime or the network write or read: frames, images, logits and results."""
    batch, height, width = frames.batch, frames.height, frames.width
    size = network_size(manifest.preprocess, height, width)
    maps = tuple(-(-side // 4) for side in padded_size(manifest.preprocess, *size))
    queries, classes = manifest.num_queries, manifest.num_classes
    found: list[tuple[str, BufferType, tuple[int, ...]]] = [
        ("frames", "uint8", (batch, height, width, 3)),
        ("images", "uint8", (batch, 3, *size)),
        ("class_logits", "float32", (batch, queries, classes + 1)),
        ("mask_logits", mask_dtype, (batch, queries, *maps)),
    ]
    if task == "semantic":
        found += [("labels", "uint8" if classes <= 255 else "int16", (batch, height, width))]
    elif task == "panoptic":
        found += [("id_map", "int32", (batch, height, width)), ("ids", "int32", (batch, queries))]
        found += [("categories", "int64", (batch, queries))]
    else:
        found += [("masks", "uint8", (batch, queries, height, -(-width // 8)))]
        found += [("boxes", "float32", (batch, queries, 4))]
    if task != "semantic":
        found += [("areas", "int64", (batch, queries)), ("scores", "float32", (batch, queries))]
    return tuple(Buffer(name, dtype, shape, "") for name, dtype, shape in found)


@dataclass(frozen=True)
class TapeFile:
    """All tapes of a bundle, and what they share."""

    kernels: tuple[Kernel, ...]
    constants: dict[str, str]
    """Contents of constant buffers in base64, by SHA-256."""
    cubins: tuple[Cubin, ...]
    tapes: tuple[Tape, ...]

    def to_bytes(self) -> bytes:
        """The file."""
        data = {"format": FORMAT, **to_plain(self)}
        return (json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode("ascii")

    @classmethod
    def parse(cls, content: bytes, manifest: Manifest) -> TapeFile:
        """The tapes of a bundle. Raises `BundleError` for anything that `to_bytes` would not write or that does not fit
        the bundle."""
        expect(len(content) <= MAX_FILE_BYTES, FILE, f"at most {MAX_FILE_BYTES} bytes", len(content))
        try:
            data = json.loads(content.decode("ascii"))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{FILE}: expected JSON text, got {type(error).__name__}: {error}") from None
        expect(isinstance(data, dict) and data.pop("format", None) == FORMAT, FILE, f"the format {FORMAT}", "another")
        found: TapeFile = READER.read(cls, data, "tapes")
        found.check(manifest)
        return found

    def contents(self) -> dict[str, bytes]:
        """Contents of constant buffers by SHA-256. Raises `BundleError` where one is not what its name says."""
        found = {}
        for digest, text in self.constants.items():
            try:
                found[digest] = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                raise BundleError(f"constants.{digest}: expected base64") from None
            same = hashlib.sha256(found[digest]).hexdigest() == digest
            expect(same, "constants", f"content of SHA-256 {digest}", text)
        return found

    def check(self, manifest: Manifest) -> None:
        """Raise `BundleError` where tapes, kernels, cubins and manifest do not fit each other."""
        kernels = _by_name("kernels", ((kernel.name, kernel) for kernel in self.kernels))
        sizes = {digest: len(content) for digest, content in self.contents().items()}
        for tape in self.tapes:
            where = f"tape {tape.task} {tape.frames}"
            _check_interface(where, tape, manifest)
            buffers = _by_name(where, ((buffer.name, buffer) for buffer in tape.buffers))
            for buffer in tape.buffers:
                size = sizes.get(buffer.constant, buffer.bytes if not buffer.constant else None)
                expect(size == buffer.bytes, f"{where}, buffer {buffer.name}", f"{buffer.bytes} constant bytes", size)
            for launch in (*tape.before, *tape.after):
                expect(launch.kernel in kernels, f"{where}, kernel", "one of the file's", launch.kernel)
                _check_launch(f"{where}, {launch.kernel}", launch, kernels[launch.kernel], buffers)
        _by_name("tapes", ((f"{t.task} {t.frames} {t.mask_dtype}", t) for t in self.tapes))
        self._check_cubins(manifest, kernels)

    def _check_cubins(self, manifest: Manifest, kernels: dict[str, Kernel]) -> None:
        cubins = _by_name("cubins", ((cubin.file, cubin) for cubin in self.cubins))
        for file, cubin in cubins.items():
            expect(cubin.kernel in kernels, "cubins", "kernels of the file", cubin.kernel)
            known = cubin.target in manifest.kernels
            expect(known, "cubins", f"targets of the bundle {manifest.kernels}", cubin.target)
            expect(file in manifest.files, "cubins", "files of the bundle", file)
        for target in manifest.kernels:
            missing = [name for name in kernels if f"kernels/{target}/{name}.cubin" not in cubins]
            expect(not missing, f"cubins for {target}", "one for each kernel", f"none for {missing}")


def _by_name(where: str, items: Iterable[tuple[str, _Item]]) -> dict[str, _Item]:
    found: dict[str, _Item] = {}
    for name, item in items:
        expect(name not in found, where, "no name twice", name)
        found[name] = item
    return found


def _check_interface(where: str, tape: Tape, manifest: Manifest) -> None:
    size = network_size(manifest.preprocess, tape.frames.height, tape.frames.width)
    expected = Shape(tape.frames.batch, *size)
    expect(tape.images == expected, f"{where}, images", str(expected), str(tape.images))
    for buffer in interface(manifest, tape.task, tape.frames, tape.mask_dtype):
        expect(buffer in tape.buffers, f"{where}, buffer {buffer.name}", f"{buffer.dtype} {buffer.shape}", "another")


def _check_launch(where: str, launch: Launch, kernel: Kernel, buffers: dict[str, Buffer]) -> None:
    for fill in launch.fills:
        expect(fill.buffer in buffers and not buffers[fill.buffer].constant, f"{where}, fill", "a buffer", fill.buffer)
        inside = fill.offset >= 0 and 0 < fill.bytes <= buffers[fill.buffer].bytes - fill.offset
        expect(inside, f"{where}, fill", f"bytes of the {buffers[fill.buffer].bytes} in {fill.buffer}", fill)
        expect(0 <= fill.value <= 255, f"{where}, fill", "a byte", fill.value)
    expected = f"{len(kernel.parameters)}"
    expect(len(launch.arguments) == len(kernel.parameters), f"{where}, arguments", expected, len(launch.arguments))
    for argument, parameter in zip(launch.arguments, kernel.parameters, strict=True):
        name = f"{where}, {parameter.name}"
        value = argument.value
        if parameter.type == "fp32":
            fits = isinstance(value, float) and abs(value) <= float(np.finfo(np.float32).max)
            expect(argument.buffer is None and fits, name, "a float32", argument)
            continue
        expect(type(value) is int, name, "a whole number", value)
        if parameter.type in SCALAR_RANGES:
            least, most = SCALAR_RANGES[parameter.type]
            expect(argument.buffer is None and least <= value <= most, name, f"a number of {least}..{most}", argument)
        else:
            expect(argument.buffer in buffers, name, "one of the tape's buffers", argument.buffer)
            size = buffers[argument.buffer or ""].bytes
            whole = value % ELEMENT_BYTES[parameter.type] == 0
            expect(whole and 0 <= value < size, name, f"an element within the buffer's {size} bytes", value)
        expect(not parameter.aligned or value % 16 == 0, name, "a multiple of 16", value)
