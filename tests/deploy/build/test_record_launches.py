"""Tapes, recorded from the real launchers: played in Triton's interpreter on a fake GPU, compiled, and damaged."""

from __future__ import annotations
from tests.support.paths import ROOT

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

pytest.importorskip("triton", reason="needs Triton")

from maskformer_fast.inference import postprocess
from maskformer_fast.config import TASKS, Task
from maskformer_fast.deploy.bundle.manifest import BundleError, FileEntry, Manifest, Shape
from maskformer_fast.deploy.runtime.replay import ALIGNMENT, Function, PreparedLaunch, plan_arena
from maskformer_fast.deploy.build.record_launches import Recording, _Recorder, compile_tapes, record_tapes
from maskformer_fast.deploy.bundle.launches import (
    FILE,
    Argument,
    BufferType,
    Cubin,
    Kernel,
    Launch,
    MaskType,
    Parameter,
    TapeFile,
    network_size,
    padded_size,
)
from maskformer_fast.ops.semantic import semantic_inference
from maskformer_fast.core.image_resize import resize_array
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
def recording() -> Recording:
    return record_tapes(make_manifest(), SHAPES, TASKS)


@pytest.fixture(scope="module")
def files(recording: Recording) -> dict[str, bytes]:
    return fake_files(make_manifest(), recording)


def listed(manifest: Manifest, files: dict[str, bytes]) -> Manifest:
    """The manifest with the files, as a bundle has them."""
    return replace(manifest, files={name: FileEntry("0" * 64, len(content)) for name, content in files.items()})


def predictions(manifest: Manifest, shape: Shape, dtype: MaskType) -> Predictions:
    """Of the fake network for the test's frames, resized by Pillow."""
    rule = manifest.preprocess
    images = np.stack([
        resize_array(frame, rule.short_edge, rule.max_size).transpose(2, 0, 1) for frame in make_frames(shape, 1)
    ])  # fmt: skip
    padded = padded_size(rule, *images.shape[2:])
    maps = (padded[0] // 4, padded[1] // 4)
    class_logits, mask_logits = (
        torch.from_numpy(logits) for logits in logits_of(images, QUERIES, CLASSES, maps, dtype)
    )
    eye = torch.eye(QUERIES).expand(shape.batch, -1, -1)  # as embeddings, which makes features mask logits
    sizes = torch.tensor([images.shape[2:]] * shape.batch)
    return Predictions(class_logits[None], eye[None], mask_logits, sizes, padded)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rule"), [("float32", "maskformer"), ("float16", "mask2former")])
def test_tapes_give_what_the_operators_give(dtype: MaskType, rule: Any, tmp_path: Path) -> None:
    """The whole backend on a fake GPU: Pillow's pixels in, results equal to those of `postprocess` on the CPU out."""
    shapes = SHAPES if dtype == "float32" else SHAPES[:1]
    manifest = make_manifest(dtype, rule)
    bundle = make_bundle(tmp_path / "bundle", manifest, shapes)
    out = tmp_path / "results"
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "tests.support.replay_launches"]
    played = subprocess.run(
        [*command, str(bundle.folder), str(out)], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert played.returncode == 0, played.stderr[-3000:]
    results = pickle.loads(out.read_bytes())
    settings = manifest.postprocess
    segments = instances = 0
    for shape in shapes:
        said = predictions(manifest, shape, dtype)
        sizes = [(shape.height, shape.width)] * shape.batch
        valid = network_size(manifest.preprocess, *sizes[0])
        extent = tuple(v * m / i for v, m, i in zip(valid, said.pixel_features.shape[2:], said.input_size, strict=True))
        oracle = semantic_inference(
            said.pixel_features.float(), said.class_logits[0], (extent[0], extent[1]), sizes[0], with_margins=True
        )
        assert oracle.margins is not None
        sure = oracle.margins > (1e-4 if dtype == "float32" else 1e-2)  # masks are rounded to halves with half logits
        assert sure.float().mean() > 0.9
        for row, result in enumerate(results[str(shape), "semantic"]):
            labels = torch.from_numpy(result.labels)
            assert labels.dtype == torch.uint8 and len(labels.unique()) > 1
            assert torch.equal(labels[sure[row]], oracle.labels[row][sure[row]])
        wanted = postprocess.panoptic(
            said, sizes, THINGS, settings.object_mask_threshold, settings.overlap_threshold, rule=rule
        )
        for result, expected in zip(results[str(shape), "panoptic"], wanted, strict=True):
            assert np.array_equal(result.id_map, expected.id_map.numpy())
            segments += len(expected.segments)
            for segment, other in zip(result.segments, expected.segments, strict=True):
                assert replace(segment, score=0) == replace(other, score=0)
                assert segment.score == pytest.approx(other.score, rel=1e-5)
        for result, truth in zip(
            results[str(shape), "instance"], postprocess.instances(said, sizes, THINGS, settings.top_k), strict=True
        ):
            instances += len(truth.labels)
            assert result.size == truth.size and np.array_equal(result.labels, truth.labels.numpy())
            assert np.array_equal(result.masks, truth.masks.numpy())
            assert np.array_equal(result.boxes, truth.boxes.numpy())
            assert np.allclose(result.scores, truth.scores.numpy(), rtol=1e-5)
    assert segments > 3 and instances > 9


def test_every_tape_is_recorded(recording: Recording) -> None:
    assert [(tape.task, tape.frames) for tape in recording.tapes] == [(task, s) for s in SHAPES for task in TASKS]
    for tape in recording.tapes:
        functions = [launch.kernel.rsplit("_", 1)[0] for launch in tape.after]
        expected = {
            "semantic": ["probabilities", "semantic_logits"],
            "panoptic": ["class_scores", "claim", "decide", "number"],
            "instance": ["masks", "finish"],
        }
        assert functions == expected[tape.task]
        assert [launch.kernel.rsplit("_", 1)[0] for launch in tape.before] == ["resize"]
    assert len(recording.constants) == 5  # two tables for each size, and one of things


def test_specialisation_is_that_of_a_launch(recording: Recording) -> None:
    """Multiples of 16 are promised where they are, and never else; sizes of 1 become constants."""
    kernels = recording.kernels
    hints = {True: 0, False: 0}
    for tape in recording.tapes:
        for launch in (*tape.before, *tape.after):
            for argument, parameter in zip(launch.arguments, kernels[launch.kernel].parameters, strict=True):
                assert not parameter.aligned or argument.value % 16 == 0
                hints[parameter.aligned] += 1
    assert min(hints.values()) > 10
    assert any(kernel.constants.get("stride_x") == 1 for kernel in kernels.values())
    (resize, *_) = [kernel for kernel in kernels.values() if kernel.module == "preprocess"]
    assert resize.constants["levels"] is None and [p.type for p in resize.parameters if p.name == "image"] == ["*u8"]


def test_pruned_semantic_inference_is_recorded_where_it_pays() -> None:
    manifest = make_manifest(num_queries=100)
    (tape,) = record_tapes(manifest, [Shape(8, 1080, 1920)], ["semantic"], "float16").tapes
    functions = [launch.kernel.rsplit("_", 1)[0] for launch in tape.after]
    assert functions == ["probabilities", "pruned", "unproven"]
    (fill,) = tape.after[0].fills
    assert fill.bytes == tape.buffer(fill.buffer).bytes and fill.value == 0
    assert plan_arena(tape).bytes < sum(buffer.bytes for buffer in tape.buffers)  # frames make room for the rest


def test_options_that_are_not_compiled_are_refused() -> None:
    from maskformer_fast.kernels.class_scores import _class_scores_kernel

    tensors = {name: torch.empty(64) for name in ("scores", "categories", "logits")}
    recorder = _Recorder(Recording(), tensors)
    with pytest.raises(RuntimeError, match="num_stages alone, got .'maxnreg'"), recorder.section():
        _class_scores_kernel[(1,)](*tensors.values(), 64, 8, 1, 8, 7, 0.5, BLOCK=16, maxnreg=32)


def test_anything_but_launches_is_refused() -> None:
    recorder = _Recorder(Recording(), {})
    with pytest.raises(RuntimeError, match="aten::add"), recorder.section():
        torch.zeros(3) + 1
    with pytest.raises(RuntimeError, match="a launch after every fill"), recorder.section():
        torch.zeros(3)


def test_recording_needs_no_interpreter() -> None:
    code = (
        "from tests.support.launch_cases import *\nfrom maskformer_fast.deploy.build.record_launches import record_tapes\n"
        "record_tapes(make_manifest(), SHAPES, ['semantic'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "tapes cannot be recorded where TRITON_INTERPRET is set" in result.stderr


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_arena_holds_what_lives_at_a_time(batch: int) -> None:
    for tape in record_tapes(make_manifest(), [Shape(batch, 333, 250)], TASKS).tapes:
        arena = plan_arena(tape)
        steps = [{"frames"}, *(launch.buffers() for launch in tape.before), {"images", "class_logits", "mask_logits"}]
        steps += [launch.buffers() for launch in tape.after] + [set(tape.results)]
        sizes = {buffer.name: buffer.bytes for buffer in tape.buffers if not buffer.constant}
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


def test_parameters_lie_as_the_driver_reads_them() -> None:
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


@pytest.mark.slow
def test_cubins_take_what_tapes_pass(tmp_path: Path) -> None:
    """Compiled for real: the sizes of parameters that the machine code declares are those that the player passes."""
    import triton

    recording = record_tapes(make_manifest(), SHAPES[:1], ["panoptic"])
    files = compile_tapes(recording, [TARGET])
    manifest = listed(make_manifest(), files | {"engines/fake.engine": b""})
    tapes = TapeFile.parse(files[FILE], manifest)
    assert tapes.to_bytes() == files[FILE] and tapes.tapes == tuple(recording.tapes)
    kernels = {kernel.name: kernel for kernel in tapes.kernels}
    assert len(tapes.cubins) == len(kernels) == 5
    for cubin in tapes.cubins:
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


def launch_of(data: Any, tape: int = 0, launch: int = 0) -> Any:
    return data["tapes"][tape]["after"][launch]


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
    "a float for a whole number": (set_at(f"{POINTER}.value", 0.5), "a whole number"),
    "a bool for a number": (set_at(f"{NUMBER}.value", True), "an integer or a finite number"),
    "no such buffer": (set_at(f"{POINTER}.buffer", "elsewhere"), "one of the tape's buffers"),
    "an address": (set_at(f"{POINTER}.buffer", None), "one of the tape's buffers"),
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
    "too few arguments": (lambda data: launch_of(data)["arguments"].pop(), "arguments"),
    "a fill too long": (lambda data: launch_of(data)["fills"].append(FILL | {"bytes": 1 << 20}), "fill"),
    "a fill before": (lambda data: launch_of(data)["fills"].append(FILL | {"offset": -1}), "fill"),
    "a fill of no byte": (lambda data: launch_of(data)["fills"].append(FILL | {"value": 256}), "a byte"),
    "a fill of a constant": (lambda data: launch_of(data)["fills"].append(FILL | {"buffer": "constant_0"}), "a buffer"),
    "a smaller result": (set_at("tapes.0.buffers.4.shape", [2, 5, 19]), "buffer labels"),
    "a giant buffer": (set_at("tapes.0.buffers.5.shape", [1 << 20, 1 << 21]), "at most"),
    "a negative size": (set_at("tapes.0.buffers.5.shape", [-4]), "positive"),
    "a buffer twice": (lambda data: data["tapes"][0]["buffers"].extend(data["tapes"][0]["buffers"]), "no name twice"),
    "other images": (set_at("tapes.0.images.height", 64), "images"),
    "the task of another": (set_at("tapes.0.task", "panoptic"), "buffer"),
    "no task": (set_at("tapes.0.task", "depth"), "one of"),
    "a tape twice": (lambda data: data["tapes"].append(data["tapes"][0]), "no name twice"),
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
def test_hostile_tapes_are_refused(files: dict[str, bytes], case: str) -> None:
    change, message = HOSTILE[case]
    data = json.loads(files[FILE])
    change(data)
    with pytest.raises(BundleError, match=re.escape(message)):
        TapeFile.parse(json.dumps(data).encode(), listed(make_manifest(), files))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format": NaN}'])
def test_what_is_no_tape_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError):
        TapeFile.parse(content, make_manifest())


def test_constants_are_what_their_names_say(files: dict[str, bytes]) -> None:
    data = json.loads(files[FILE])
    for text, message in (("*", "base64"), (base64.b64encode(b"other").decode(), "content of SHA-256")):
        changed = copy.deepcopy(data)
        changed["constants"][next(iter(changed["constants"]))] = text
        with pytest.raises(BundleError, match=message):
            TapeFile.parse(json.dumps(changed).encode(), listed(make_manifest(), files))
    del data["constants"][next(iter(data["constants"]))]
    with pytest.raises(BundleError, match="constant bytes"):
        TapeFile.parse(json.dumps(data).encode(), listed(make_manifest(), files))


def test_a_file_of_tapes_is_read_as_written(recording: Recording, files: dict[str, bytes]) -> None:
    found = TapeFile.parse(files[FILE], listed(make_manifest(), files))
    assert found.tapes == tuple(recording.tapes) and found.contents() == recording.constants
    assert found.to_bytes() == files[FILE]
    with pytest.raises(BundleError, match="files of the bundle"):  # the manifest does not list the cubins
        TapeFile.parse(files[FILE], make_manifest())
    assert set(get_args(BufferType)) >= {buffer.dtype for tape in found.tapes for buffer in tape.buffers}


def test_a_tape_of_each_task() -> None:
    tasks: tuple[Task, ...] = TASKS
    with pytest.raises(ValueError, match="tasks"):
        record_tapes(make_manifest(), SHAPES, [])
    with pytest.raises(ValueError, match="at most 256"):
        record_tapes(make_manifest(num_queries=300), SHAPES, tasks[:1])
