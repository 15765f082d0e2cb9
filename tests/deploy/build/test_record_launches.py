"""Launches recorded from the real launchers: replayed in Triton's interpreter on a fake GPU, compiled, and damaged."""

from __future__ import annotations

import base64
import copy
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("triton", reason="needs Triton")

from maskformer_fast.config import TASKS
from maskformer_fast.core.image_resize import resize_array
from maskformer_fast.deploy.build.record_launches import (
    RecordedLaunches,
    _LaunchRecorder,
    compile_launches,
    record_launches,
)
from maskformer_fast.deploy.bundle.launches import (
    FILE,
    Argument,
    BufferType,
    Cubin,
    Kernel,
    Launch,
    LaunchFile,
    MaskType,
    Parameter,
    network_size,
    padded_size,
)
from maskformer_fast.deploy.bundle.manifest import BundleError, FileEntry, Manifest, Shape
from maskformer_fast.deploy.runtime.replay import ALIGNMENT, Function, PreparedLaunch, plan_arena
from maskformer_fast.inference import postprocess
from maskformer_fast.ops.semantic import semantic_inference
from maskformer_fast.structures import Predictions
from tests.support.fake_engine import logits_of
from tests.support.launch_cases import (
    CLASSES,
    QUERIES,
    SHAPES,
    TARGET,
    THINGS,
    fake_files,
    make_bundle,
    make_frames,
    make_manifest,
    read_parameters,
)


@pytest.fixture(scope="module")
def recorded() -> RecordedLaunches:
    return record_launches(make_manifest(), SHAPES, TASKS)


@pytest.fixture(scope="module")
def files(recorded: RecordedLaunches) -> dict[str, bytes]:
    return fake_files(make_manifest(), recorded)


def listed(manifest: Manifest, files: dict[str, bytes]) -> Manifest:
    """The manifest with entries for the files."""
    return replace(manifest, files={name: FileEntry("0" * 64, len(content)) for name, content in files.items()})


def predictions(manifest: Manifest, shape: Shape, dtype: MaskType) -> Predictions:
    """Predictions of the fake network for the test's frames, resized by Pillow."""
    rule = manifest.preprocess
    images = np.stack([
        resize_array(frame, rule.short_edge, rule.max_size).transpose(2, 0, 1) for frame in make_frames(shape, 1)
    ])  # fmt: skip
    padded = padded_size(rule, *images.shape[2:])
    mask_size = (padded[0] // 4, padded[1] // 4)
    class_logits, mask_logits = (
        torch.from_numpy(logits) for logits in logits_of(images, QUERIES, CLASSES, mask_size, dtype)
    )
    eye = torch.eye(QUERIES).expand(shape.batch, -1, -1)  # as embeddings, which makes features mask logits
    sizes = torch.tensor([images.shape[2:]] * shape.batch)
    return Predictions(class_logits[None], eye[None], mask_logits, sizes, padded)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rule"), [("float32", "maskformer"), ("float16", "mask2former")])
def test_replayed_launches_equal_the_operators_on_the_cpu(dtype: MaskType, rule: Any, tmp_path: Path) -> None:
    """The backend on a fake GPU turns Pillow's pixels into the results of `postprocess` on the CPU."""
    shapes = SHAPES if dtype == "float32" else SHAPES[:1]
    manifest = make_manifest(dtype, rule)
    bundle = make_bundle(tmp_path / "bundle", manifest, shapes)
    out = tmp_path / "results"
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "tests.support.replay_launches"]
    replayed = subprocess.run(
        [*command, str(bundle.folder), str(out)], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert replayed.returncode == 0, replayed.stderr[-3000:]
    results = pickle.loads(out.read_bytes())
    settings = manifest.postprocess
    segments = instances = 0
    for shape in shapes:
        predicted = predictions(manifest, shape, dtype)
        sizes = [(shape.height, shape.width)] * shape.batch
        valid = network_size(manifest.preprocess, *sizes[0])
        sizes_of_axes = zip(valid, predicted.pixel_features.shape[2:], predicted.input_size, strict=True)
        extent = tuple(length * cells / padded for length, cells, padded in sizes_of_axes)
        oracle = semantic_inference(
            predicted.pixel_features.float(), predicted.class_logits[0], (extent[0], extent[1]), sizes[0],
            with_margins=True,
        )  # fmt: skip
        assert oracle.margins is not None
        sure = oracle.margins > (1e-4 if dtype == "float32" else 1e-2)  # masks are rounded to halves with half logits
        assert sure.float().mean() > 0.9
        for row, result in enumerate(results[str(shape), "semantic"]):
            labels = torch.from_numpy(result.labels)
            assert labels.dtype == torch.uint8 and len(labels.unique()) > 1
            assert torch.equal(labels[sure[row]], oracle.labels[row][sure[row]])
        panoptic = postprocess.panoptic(
            predicted, sizes, THINGS, settings.object_mask_threshold, settings.overlap_threshold, rule=rule
        )
        for result, expected in zip(results[str(shape), "panoptic"], panoptic, strict=True):
            assert np.array_equal(result.id_map, expected.id_map.numpy())
            segments += len(expected.segments)
            for segment, other in zip(result.segments, expected.segments, strict=True):
                assert replace(segment, score=0) == replace(other, score=0)
                assert segment.score == pytest.approx(other.score, rel=1e-5)
        instance = postprocess.instances(predicted, sizes, THINGS, settings.top_k)
        for result, expected in zip(results[str(shape), "instance"], instance, strict=True):
            instances += len(expected.labels)
            assert result.size == expected.size and np.array_equal(result.labels, expected.labels.numpy())
            assert np.array_equal(result.masks, expected.masks.numpy())
            assert np.array_equal(result.boxes, expected.boxes.numpy())
            assert np.allclose(result.scores, expected.scores.numpy(), rtol=1e-5)
    assert segments > 3 and instances > 9


def test_every_task_and_shape_is_recorded(recorded: RecordedLaunches) -> None:
    assert [(s.task, s.frames) for s in recorded.sequences] == [(task, shape) for shape in SHAPES for task in TASKS]
    for sequence in recorded.sequences:
        functions = [launch.kernel.rsplit("_", 1)[0] for launch in sequence.after]
        expected = {
            "semantic": ["probabilities", "semantic_logits", "semantic_general"],
            "panoptic": ["class_scores", "bounds", "claim", "decide", "number"],
            "instance": ["masks", "finish"],
        }
        assert functions == expected[sequence.task]
        assert [launch.kernel.rsplit("_", 1)[0] for launch in sequence.before] == ["resize"]
    assert len(recorded.constants) == 5  # two tables for each size, and one of things


def test_recorded_specialisation_is_that_of_a_launch(recorded: RecordedLaunches) -> None:
    """Multiples of 16 are promised only where they are; sizes of 1 become constants."""
    kernels = recorded.kernels
    hints = {True: 0, False: 0}
    for sequence in recorded.sequences:
        for launch in (*sequence.before, *sequence.after):
            for argument, parameter in zip(launch.arguments, kernels[launch.kernel].parameters, strict=True):
                assert not parameter.aligned or argument.value % 16 == 0
                hints[parameter.aligned] += 1
    assert min(hints.values()) > 10
    assert any(kernel.constants.get("stride_x") == 1 for kernel in kernels.values())
    (resize, *_) = [kernel for kernel in kernels.values() if kernel.module == "resize"]
    assert resize.constants["levels"] is None and [p.type for p in resize.parameters if p.name == "image"] == ["*u8"]


def test_semantic_programs_do_not_depend_on_the_device_that_records() -> None:
    manifest = make_manifest(num_queries=100)
    for batch, programs in ((1, 264), (8, 264), (3, 264), (300, 300)):
        (sequence,) = record_launches(manifest, [Shape(batch, 1080, 1920)], ["semantic"], "float16").sequences
        grids = {launch.kernel.rsplit("_", 1)[0]: launch.grid for launch in sequence.after}
        assert grids["semantic_logits"] == grids["semantic_general"] == (programs, 1, 1)
        # The place of the frames is used again.
        assert plan_arena(sequence).bytes < sum(buffer.bytes for buffer in sequence.buffers)


def test_launches_with_options_that_are_not_compiled_are_refused() -> None:
    from maskformer_fast.kernels.class_scores import _class_scores_kernel

    tensors = {name: torch.empty(64) for name in ("scores", "categories", "logits")}
    recorder = _LaunchRecorder(RecordedLaunches(), tensors)
    with pytest.raises(RuntimeError, match="num_stages alone, got .'maxnreg'"), recorder.section():
        _class_scores_kernel[(1,)](*tensors.values(), 64, 8, 1, 8, 7, 0.5, BLOCK=16, maxnreg=32)


def test_recording_of_other_work_than_launches_is_refused() -> None:
    recorder = _LaunchRecorder(RecordedLaunches(), {})
    with pytest.raises(RuntimeError, match="aten::add"), recorder.section():
        torch.zeros(3) + 1
    with pytest.raises(RuntimeError, match="expected one after every fill"), recorder.section():
        torch.zeros(3)


def test_recording_under_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="launches cannot be recorded where TRITON_INTERPRET is set"):
        record_launches(make_manifest(), SHAPES, ["semantic"])


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_buffers_that_live_at_one_time_do_not_overlap(batch: int) -> None:
    for sequence in record_launches(make_manifest(), [Shape(batch, 333, 250)], TASKS).sequences:
        arena = plan_arena(sequence)
        steps = [{"frames"}, *(launch.buffers() for launch in sequence.before)]
        steps += [{"images", "class_logits", "mask_logits"}]
        steps += [launch.buffers() for launch in sequence.after] + [set(sequence.results)]
        sizes = {buffer.name: buffer.bytes for buffer in sequence.buffers if not buffer.constant}
        assert set(arena.offsets) == set(sizes)
        alive = [
            {name for name in sizes if any(name in s for s in steps[: now + 1]) and any(name in s for s in steps[now:])}
            for now in range(len(steps))
        ]
        for names in alive:
            places = sorted((arena.offsets[name], arena.offsets[name] + sizes[name]) for name in names)
            assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
            assert places[-1][1] <= arena.bytes
        assert all(offset % ALIGNMENT == 0 for offset in arena.offsets.values())


def test_parameters_lie_in_memory_as_the_driver_reads_them() -> None:
    names = {"p": "*fp16", "n": "i32", "far": "i64", "x": "fp32", "q": "*i64"}
    kernel = Kernel("k", "m", "f", tuple(Parameter(n, t, False) for n, t in names.items()), {}, 4, 2)
    values = (Argument("a", 6), Argument(None, -5), Argument(None, 1 << 40), Argument(None, 0.1), Argument("b", 0))
    launch = Launch("k", (3, 2, 1), values, ())
    function = Function(kernel, Cubin("k", TARGET, "f", 7, 2), "handle")
    prepared = PreparedLaunch(launch, function, {"a": 4096, "b": 1 << 47})
    seen: list[Any] = []

    class Driver:
        def call(self, name: str, *arguments: Any) -> None:
            seen.append((name, *arguments))

    prepared.enqueue(Driver(), "stream")
    ((name, handle, x, y, z, *block, shared, stream, parameters, extra),) = seen
    assert (name, handle, x, y, z, block, shared, stream, extra) == (
        "cuLaunchKernel", "handle", 3, 2, 1, [128, 1, 1], 7, "stream", 0,
    )  # fmt: skip
    assert read_parameters(parameters, list(names.values()), 2) == [
        4102, -5, 1 << 40, pytest.approx(0.1), 1 << 47,
    ]  # fmt: skip


def test_a_kernel_that_spills_is_told_and_one_that_cannot_run_is_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from maskformer_fast.kernels import aot

    recorded = record_launches(make_manifest(), SHAPES[:1], ["panoptic"])
    numbers = {"spilled_bytes": 32, "shared_bytes": 0}

    def compiled(variant: Any, target: str) -> aot.CompiledKernel:
        return aot.CompiledKernel(variant.name, target, "symbol", b"", tuple(variant.arguments.items()), 0, 4,
                                  registers=255, seconds=0.0, triton_version="0.0", **numbers)  # fmt: skip

    monkeypatch.setattr(aot, "compile_kernel", compiled)
    compile_launches(recorded, [TARGET])
    assert caplog.text.count("spills 32 bytes a thread: it is somewhat slower") == len(recorded.kernels)
    numbers["shared_bytes"] = 1 << 20
    with pytest.raises(RuntimeError, match="bytes of shared memory"):
        compile_launches(recorded, [TARGET])


@pytest.mark.slow
def test_cubins_declare_the_parameters_that_launches_pass(tmp_path: Path) -> None:
    """Compiled for real: the machine code declares parameters of the sizes that a replay passes."""
    import triton

    recorded = record_launches(make_manifest(), SHAPES[:1], ["panoptic"])
    files = compile_launches(recorded, [TARGET])
    manifest = listed(make_manifest(), files | {"engines/fake.engine": b""})
    launch_file = LaunchFile.parse(files[FILE], manifest)
    assert launch_file.to_bytes() == files[FILE] and launch_file.sequences == tuple(recorded.sequences)
    kernels = {kernel.name: kernel for kernel in launch_file.kernels}
    assert len(launch_file.cubins) == len(kernels) == 6
    for cubin in launch_file.cubins:
        path = tmp_path / "kernel.cubin"
        path.write_bytes(files[cubin.file])
        dump = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-elf", str(path)], capture_output=True, text=True, check=True
        ).stdout
        found = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x\w+\s+Size\s+: 0x(\w+)", dump)
        sizes = [size for _, size in sorted((int(ordinal, 16), int(size, 16)) for ordinal, size in found)]
        widths = {"i32": 4, "fp32": 4, "i64": 8}
        expected = [widths.get(parameter.type, 8) for parameter in kernels[cubin.kernel].parameters]
        assert sizes == expected + [8] * cubin.null_pointers and cubin.symbol in dump


def first_launch(data: Any) -> Any:
    return data["tapes"][0]["after"][0]


def set_at(path: str, value: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        *parents, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
        for key in parents:
            data = data[key]
        data[last] = value

    return change


POINTER, NUMBER = "tapes.0.after.0.arguments.0", "tapes.0.after.1.arguments.9"
FILL = {"buffer": "labels", "offset": 0, "bytes": 4, "value": 0}
HOSTILE: dict[str, tuple[Callable[[Any], None], str]] = {
    "another format": (set_at("format", "other"), "the format"),
    "an unknown key": (set_at("tapes.0.more", 1), "an unknown key"),
    "a float for a whole number": (set_at(f"{POINTER}.value", 0.5), "an integer"),
    "a bool for a number": (set_at(f"{NUMBER}.value", True), "an integer or a finite number"),
    "no such buffer": (set_at(f"{POINTER}.buffer", "elsewhere"), "one of the sequence's buffers"),
    "an address": (set_at(f"{POINTER}.buffer", None), "one of the sequence's buffers"),
    "a pointer for a number": (set_at(f"{NUMBER}.buffer", "labels"), "a number of"),
    "before the buffer": (set_at(f"{POINTER}.value", -16), "within the buffer"),
    "behind the buffer": (set_at(f"{POINTER}.value", 1 << 30), "within the buffer"),
    "between elements": (set_at(f"{POINTER}.value", 1), "an element"),
    "not aligned as promised": (set_at(f"{POINTER}.value", 2), "a multiple of 16"),
    "a number too large": (set_at(f"{NUMBER}.value", 1 << 31), "a number of"),
    "no blocks": (set_at("tapes.0.after.0.grid", [0, 1, 1]), "grid"),
    "too many blocks": (set_at("tapes.0.after.0.grid", [1, 65536, 1]), "grid"),
    "a grid of two": (set_at("tapes.0.after.0.grid", [1, 1]), "a list of 3"),
    "an unknown kernel": (set_at("tapes.0.after.0.kernel", "other"), "kernel"),
    "too few arguments": (lambda data: first_launch(data)["arguments"].pop(), "arguments"),
    "a fill too long": (lambda data: first_launch(data)["fills"].append(FILL | {"bytes": 1 << 20}), "fill"),
    "a fill before": (lambda data: first_launch(data)["fills"].append(FILL | {"offset": -1}), "fill"),
    "a fill of no byte": (lambda data: first_launch(data)["fills"].append(FILL | {"value": 256}), "a byte"),
    "a fill of a constant": (
        lambda data: first_launch(data)["fills"].append(FILL | {"buffer": "constant_0"}), "a buffer",
    ),
    "a smaller result": (set_at("tapes.0.buffers.4.shape", [2, 5, 19]), "buffer labels"),
    "a giant buffer": (set_at("tapes.0.buffers.5.shape", [1 << 20, 1 << 21]), "at most"),
    "a negative size": (set_at("tapes.0.buffers.5.shape", [-4]), "positive"),
    "a buffer twice": (lambda data: data["tapes"][0]["buffers"].extend(data["tapes"][0]["buffers"]), "no name twice"),
    "other images": (set_at("tapes.0.images.height", 64), "images"),
    "the task of another": (set_at("tapes.0.task", "panoptic"), "buffer"),
    "no task": (set_at("tapes.0.task", "depth"), "one of"),
    "a sequence twice": (lambda data: data["tapes"].append(data["tapes"][0]), "no name twice"),
    "a kernel twice": (lambda data: data["kernels"].append(data["kernels"][0]), "no name twice"),
    "a type unheard of": (set_at("kernels.0.parameters.0.type", "*void"), "Triton's"),
    "too many warps": (set_at("kernels.0.num_warps", 64), "num_warps"),
    "a kernel elsewhere": (set_at("kernels.0.name", "../../x"), "name"),
    "a module elsewhere": (set_at("kernels.0.module", "os.path"), "identifiers"),
    "a cubin of no kernel": (set_at("cubins.0.kernel", "other"), "kernels of the file"),
    "a cubin elsewhere": (set_at("cubins.0.target", "../sm_87"), "targets of the bundle"),
    "a symbol with spaces": (set_at("cubins.0.symbol", "a b"), "an identifier"),
    "too much shared memory": (set_at("cubins.0.shared_bytes", 1 << 30), "shared_bytes"),
    "less than none": (set_at("cubins.0.shared_bytes", -1), "shared_bytes"),
    "many more parameters": (set_at("cubins.0.null_pointers", 1000), "null_pointers"),
    "no cubins": (set_at("cubins", []), "one for each kernel"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_launches_are_refused(files: dict[str, bytes], case: str) -> None:
    change, message = HOSTILE[case]
    data = json.loads(files[FILE])
    change(data)
    with pytest.raises(BundleError, match=re.escape(message)):
        LaunchFile.parse(json.dumps(data).encode(), listed(make_manifest(), files))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format": NaN}'])
def test_files_without_launches_are_refused(content: bytes) -> None:
    with pytest.raises(BundleError):
        LaunchFile.parse(content, make_manifest())


def test_constants_of_another_hash_are_refused(files: dict[str, bytes]) -> None:
    data = json.loads(files[FILE])
    for text, message in (("*", "base64"), (base64.b64encode(b"other").decode(), "content of SHA-256")):
        changed = copy.deepcopy(data)
        changed["constants"][next(iter(changed["constants"]))] = text
        with pytest.raises(BundleError, match=message):
            LaunchFile.parse(json.dumps(changed).encode(), listed(make_manifest(), files))
    del data["constants"][next(iter(data["constants"]))]
    with pytest.raises(BundleError, match="constant bytes"):
        LaunchFile.parse(json.dumps(data).encode(), listed(make_manifest(), files))


def test_a_file_of_launches_is_read_as_written(recorded: RecordedLaunches, files: dict[str, bytes]) -> None:
    found = LaunchFile.parse(files[FILE], listed(make_manifest(), files))
    assert found.sequences == tuple(recorded.sequences) and found.contents() == recorded.constants
    assert found.to_bytes() == files[FILE]
    with pytest.raises(BundleError, match="files of the bundle"):  # this manifest does not list the cubins
        LaunchFile.parse(files[FILE], make_manifest())
    assert set(get_args(BufferType)) >= {buffer.dtype for sequence in found.sequences for buffer in sequence.buffers}


def test_recording_without_tasks_or_for_too_many_queries_is_refused() -> None:
    with pytest.raises(ValueError, match="tasks"):
        record_launches(make_manifest(), SHAPES, [])
    with pytest.raises(ValueError, match="at most 256"):
        record_launches(make_manifest(num_queries=300), SHAPES, ["panoptic"])
