"""The manifest of a bundle: its types, its checks, and its one canonical text, in which every byte counts.

The text is ``json.dumps(..., sort_keys=True, indent=2)`` and a newline. Its key ``manifest_sha256`` is the SHA-256 of
the same text without that key. A reader writes the text again from the parsed values and demands the same bytes, so
that no byte can change unseen. This reveals accidents and careless edits. Against someone who rewrites all of the
bundle, pin its digest (`maskformer_fast.deploy.bundle.folder.Bundle.open`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from maskformer_fast.core.checks import check
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.core.typed import TypedReader, to_plain
from maskformer_fast.inference_config import PanopticRule

FORMAT = "maskformer_fast.bundle.1"
"""Value of the manifest's key ``format``; another value means another layout."""
MANIFEST_NAME = "manifest.json"
MAX_BYTES = 4 * 2**20
"""Bytes of the largest manifest that is read."""
DIGEST_KEY = "manifest_sha256"
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8"]
"""Precision of most of a network."""
OPENVINO: Literal["openvino"] = "openvino"
"""Value of `Engine.api` of a quantised graph for OpenVINO, which runs on any CPU."""

_DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32")
_MAX_SIDE = 1 << 16
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_TARGET = re.compile(r"sm_[1-9][0-9]{1,3}[a-z]?")
_HEX = re.compile(r"[0-9a-f]{64}")


class BundleError(ValueError):
    """A bundle that is damaged, was changed, or does not suit the machine or the request."""


READER = TypedReader(error=BundleError, locate_checks=True)
"""Reader of a bundle's JSON files: every key must be there, and nothing is converted."""


expect = functools.partial(check, error=BundleError)
"""`core.checks.check` with `BundleError`: arguments condition, key, expected, got."""


def check_file_name(name: str) -> None:
    """Raise `BundleError` unless ``name`` is a relative path of one to four plain parts."""
    parts = name.split("/")
    plain = len(parts) <= 4 and all(_PART.fullmatch(part) for part in parts)
    expect(plain and name != MANIFEST_NAME, "files", "relative paths of letters, digits, '.', '_' and '-'", name)


def check_file_names(names: Iterable[str]) -> None:
    """Raise `BundleError` for a bad name, names that differ by case alone, or a file that is also a folder."""
    kept: dict[str, str] = {MANIFEST_NAME: MANIFEST_NAME}
    files = set(names)
    for name in sorted(files):
        check_file_name(name)
        parts = name.split("/")
        for path in ("/".join(parts[:count]) for count in range(1, len(parts) + 1)):
            other = kept.setdefault(path.lower(), path)
            expect(other == path, "files", "names that differ by more than case", f"{path!r} beside {other!r}")
            expect(path == name or path not in files, "files", "a file or a folder of a name", f"both {path!r}")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph or an engine; dimensions are numbers, or names where they are dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        expect(self.dtype in _DTYPES, "dtype", f"one of {', '.join(_DTYPES)}", self.dtype)
        expect(all(isinstance(size, str) or size > 0 for size in self.shape), "shape", "positive sizes", self.shape)


@dataclass(frozen=True)
class Graph:
    """An ONNX file whose input is ``images``: uint8 [B, 3, H, W] RGB, or float32 [B, C, H, W] of a network of bands."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    dynamic: bool


@dataclass(frozen=True)
class Shape:
    """A batch of images of one size, in pixels."""

    batch: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for f in fields(self):
            expect(getattr(self, f.name) > 0, f.name, "a positive integer", getattr(self, f.name))

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``HxW`` (batch 1) or ``BxHxW``. Raises ``ValueError``."""
        numbers = text.lower().split("x")
        if len(numbers) not in (2, 3) or not all(n.isascii() and n.isdecimal() and int(n) > 0 for n in numbers):
            raise ValueError(f"shape: expected HEIGHTxWIDTH or BATCHxHEIGHTxWIDTH, got {text!r}")
        sizes = [int(n) for n in numbers]
        return cls(*([1] if len(sizes) == 2 else []), *sizes)

    def __str__(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Profile:
    """Shapes that an engine takes: minimum to maximum in every dimension. It is fastest at the optimum."""

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def __post_init__(self) -> None:
        for f in fields(Shape):
            low, best, high = (getattr(shape, f.name) for shape in (self.minimum, self.optimum, self.maximum))
            expect(low <= best <= high, f.name, "minimum <= optimum <= maximum", (low, best, high))

    def contains(self, shape: Shape) -> bool:
        """Whether the engine takes images of this shape."""
        return all(
            getattr(self.minimum, f.name) <= getattr(shape, f.name) <= getattr(self.maximum, f.name)
            for f in fields(shape)
        )


@dataclass(frozen=True)
class Engine:
    """An engine of the flavour ``raw``, with the library that built it and the GPUs that run it.

    It is a file of TensorRT, or a quantised graph for OpenVINO: an XML file with its weights beside it.
    """

    file: str
    api: Literal["tensorrt", "tensorrt_rtx", "openvino"]
    api_version: str
    precision: str
    targets: tuple[str, ...]  # architectures of the GPUs that run it: "sm_87" ...; none for OpenVINO
    profile: Profile
    options: dict[str, str | int | bool]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        _check_targets("targets", self.targets)

    @property
    def weights(self) -> str | None:
        """File of the weights, where they are not in `file`."""
        return self.file.removesuffix(".xml") + ".bin" if self.api == OPENVINO else None


@dataclass(frozen=True)
class Preprocess:
    """Steps from a frame to the network's input. The runtime resizes; the graph normalises and pads."""

    mean: tuple[float, ...]  # RGB, on the 0..255 scale; or of each band, on the scale of its values
    std: tuple[float, ...]
    short_edge: int | tuple[int, int] | None  # a tuple: height and width of every frame; None: frames keep their size
    max_size: int
    size_divisibility: int  # 0: no padding

    def __post_init__(self) -> None:
        expect(all(s > 0 for s in self.std), "std", "positive numbers", self.std)
        expect(len(self.mean) == len(self.std) > 0, "std", "as many numbers as mean", self.std)
        edge = self.short_edge
        sides = edge if isinstance(edge, tuple) else (1 if edge is None else edge,)
        fits = min(sides) >= 1 and max(sides) <= _MAX_SIDE
        expect(fits, "short_edge", f"1..{_MAX_SIDE} or null, or a list of two", edge)
        expect(1 <= self.max_size < 1 << 31, "max_size", f"1..{(1 << 31) - 1}", self.max_size)
        fits = 0 <= self.size_divisibility <= _MAX_SIDE
        expect(fits, "size_divisibility", f"0..{_MAX_SIDE}", self.size_divisibility)


@dataclass(frozen=True)
class Postprocess:
    """Settings of post-processing; the names are those of `maskformer_fast.config.TestConfig`."""

    object_mask_threshold: float
    overlap_threshold: float
    top_k: int
    panoptic_rule: PanopticRule

    def __post_init__(self) -> None:
        for name in ("object_mask_threshold", "overlap_threshold"):
            expect(0.0 <= getattr(self, name) <= 1.0, name, "0..1", getattr(self, name))
        expect(self.top_k > 0, "top_k", "> 0", self.top_k)


@dataclass(frozen=True)
class Parity:
    """One comparison of a graph with PyTorch, made when the bundle was written."""

    flavour: str
    shape: Shape
    logit_error: float  # largest absolute difference / largest logit
    labels_equal: float  # share of the pixels
    labels_equal_at_margin: float  # share of the pixels whose winner leads by more than `deploy.build.parity.MARGIN`


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 and size that a file of the bundle must have."""

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        expect(_HEX.fullmatch(self.sha256) is not None, "sha256", "64 hexadecimal digits", self.sha256)
        expect(self.bytes >= 0, "bytes", ">= 0", self.bytes)


@dataclass(frozen=True)
class Manifest:
    """Everything that a runtime must know about a bundle. ``files`` lists every file but the manifest itself."""

    name: str
    created_with: dict[str, str]
    num_queries: int
    num_classes: int
    metadata: Metadata
    preprocess: Preprocess
    postprocess: Postprocess
    graphs: dict[str, Graph]
    engines: tuple[Engine, ...] = ()
    kernels: tuple[str, ...] = ()  # targets with compiled kernels
    parity: tuple[Parity, ...] = ()
    files: dict[str, FileEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expect(self.num_queries > 0, "num_queries", "> 0", self.num_queries)
        expect(self.num_classes == self.metadata.num_classes, "num_classes",
               f"{self.metadata.num_classes}, as many as metadata names", self.num_classes)
        shades = [shade for color in self.metadata.colors for shade in color]
        expect(all(0 <= shade <= 255 for shade in shades), "metadata.colors", "0..255", self.metadata.colors)
        _check_targets("kernels", self.kernels)
        fits = self.channels > 0 or len(self.preprocess.mean) == 3
        expect(fits, "preprocess.mean", "3 numbers, as graphs take uint8 RGB", self.preprocess.mean)
        check_file_names(self.files)

    @property
    def channels(self) -> int:
        """Number of bands of a frame, as ``data.channels``: 0 for RGB of 8 bits.

        Graphs of a network of bands take float32 on the scale of the frames, which are of 8 or 16 bits: resized bands
        are not rounded.
        """
        takes_rgb = all(spec.dtype == "uint8" for graph in self.graphs.values() for spec in graph.inputs)
        return 0 if takes_rgb else len(self.preprocess.mean)

    def to_json(self) -> dict[str, Any]:
        """Plain containers, as `from_json` reads them."""
        return {"format": FORMAT, **to_plain(self)}

    @classmethod
    def from_json(cls, data: object) -> Manifest:
        """Read `to_json`'s containers. Raises `BundleError` for an unknown or missing key, or a value of a wrong type.
        """
        if not isinstance(data, dict):
            raise BundleError(f"manifest: expected an object, got {type(data).__name__}")
        expect(data.get("format") == FORMAT, "format", repr(FORMAT), data.get("format"))
        content = {key: value for key, value in data.items() if key != "format"}
        manifest: Manifest = READER.read(cls, content, "manifest")
        return manifest


def manifest_bytes(manifest: Manifest) -> tuple[bytes, str]:
    """The canonical file of a manifest, and its digest."""
    data = manifest.to_json()
    digest = _digest(data)
    return _canonical({**data, DIGEST_KEY: digest}), digest


def parse_manifest(content: bytes) -> tuple[Manifest, str]:
    """Manifest and digest of a file's content. Raises `BundleError` for a text that `manifest_bytes` does not write."""
    expect(len(content) <= MAX_BYTES, MANIFEST_NAME, f"at most {MAX_BYTES} bytes", len(content))
    try:
        data = json.loads(content.decode("ascii"))
        canonical = _canonical(data)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{MANIFEST_NAME}: expected JSON text, got {type(error).__name__}: {error}") from None
    expect(isinstance(data, dict), MANIFEST_NAME, "an object", type(data).__name__)
    digest = data.pop(DIGEST_KEY, None)
    if content != canonical or digest != _digest(data):
        raise BundleError(f"{MANIFEST_NAME} was changed after it was written: it does not match its own {DIGEST_KEY}")
    return Manifest.from_json(data), digest


def _canonical(data: object) -> bytes:
    return (json.dumps(data, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(data)).hexdigest()


def _check_targets(name: str, targets: tuple[str, ...]) -> None:
    expect(all(_TARGET.fullmatch(target) for target in targets), name, "targets as sm_87", targets)
