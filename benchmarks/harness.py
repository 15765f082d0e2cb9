"""Times an operation beside its peer, and measures the memory of both: a `Case`, and the process that measures it.

A case and what is measured of it, "time" or "memory", are a *unit*. ``python -m benchmarks.harness FILE`` reads a list
of units of FILE's ``cases()`` from its input and measures one after another; `benchmarks.cpu` starts such processes.
Units of time share their process, and so what the file caches. Each unit of memory has a process of its own, forked
from one that has imported modules and run nothing: that is as fresh, and starts in no time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

from benchmarks.bounds import Bound

Operation = Callable[[], Any]
Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
SAMPLE_SECONDS = 0.01  # at least, for one sample: short operations are repeated, as reading a clock takes time too
SLOW_SECONDS = 1.0  # a first call of so long is not followed by a second look: it is slow, whatever disturbed it
ROUNDS_SECONDS = 1.5  # rounds go on up to this time, between these numbers of them
MIN_ROUNDS, MAX_ROUNDS = 3, 25
SHARED_VARIABLE = "BENCHMARKS_SHARED"
"""Environment variable: folder for what is costly to make and serves several processes of a run."""
PRELOADED = ("transformers.models.maskformer.modeling_maskformer", "scipy.optimize")
"""Peers' modules of slow import, where they are installed."""


class Sides(NamedTuple):
    """What a case's setup makes."""

    ours: Operation
    peer: Operation
    check: Callable[[Any, Any], None] | None = None
    """Of our result and the peer's: raises where they do not agree. They are those of the first calls."""


@dataclass(frozen=True)
class Case:
    """One operation of one size on one kind of data, beside one peer."""

    name: str  # operator, size, kind of data; unique among all files
    peer: str  # what it is compared with
    goal: float | None  # peer's time / our time to reach; None: none is stated
    setup: Callable[[], Sides | tuple[Operation, Operation]]  # each time anew
    threads: int = 2
    rank: int = 0  # units of rank 0 are measured first, of all files
    bound: Bound | Callable[[], Bound] | None = None  # what it cannot do without; a function is called after the setup
    memory: bool = True  # no: it is other processes', or not worth its time
    memory_goal: float | None = None  # our peak memory / peer's, at most: memory is measured along with the time
    patience: float = 0.0  # seconds that a unit may take beyond others': something large is built

    def __post_init__(self) -> None:
        for name, low in (("goal", 0), ("threads", 1), ("rank", 0), ("memory_goal", 0), ("patience", 0)):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"{name}: expected >= {low}, got {value!r} in the case {self.name!r}")


def load_cases(path: Path) -> list[Case]:
    """The cases of one file, imported by its path.

    Raises:
        ValueError: two cases of one name.
        Exception: whatever the file itself raises.
    """
    cases: list[Case] = _load_module(path).cases()
    names = [case.name for case in cases]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"cases: expected a name each, got {sorted(twice)} more than once in {path}")
    return cases


def _load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"path: expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses of the file look their module up
    spec.loader.exec_module(module)
    return module


def environment(kind: str, threads: int) -> dict[str, str]:
    """This process's environment, with every pool of threads that NumPy, SciPy and PyTorch may start at `threads`."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    changed = dict.fromkeys(names, str(threads))
    if kind == "memory":  # freed memory goes back to the system at once, so that reused memory is not missed
        changed |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return {**os.environ, **changed}


def measure_time(case: Case) -> Row:
    """The part of the row about time, measured in this process: medians and quartiles in ms, and what bounds it."""
    sides = Sides(*case.setup())
    samples = time_interleaved(sides.ours, sides.peer, check=sides.check)
    ours, peer = ([1e3 * seconds for seconds in side] for side in samples)
    bound = case.bound() if callable(case.bound) else case.bound
    row = {
        "ours_ms": statistics.median(ours),
        "peer_ms": statistics.median(peer),
        "ours_quartiles_ms": quartiles(ours),
        "peer_quartiles_ms": quartiles(peer),
        "rounds": len(ours),
    }
    return row if bound is None else {**row, "bound": asdict(bound)}


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third, interpolated; the only value twice where there is one."""
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def measure_memory(case: Case) -> Row:
    """The part of the row about memory, measured in this process."""
    sides = Sides(*case.setup())
    return {"ours_peak_mib": peak_memory(sides.ours), "peer_peak_mib": peak_memory(sides.peer)}


TIME, MEMORY = "time", "memory"
MEASURES: dict[str, Callable[[Case], Row]] = {TIME: measure_time, MEMORY: measure_memory}


def time_interleaved(
    first: Operation, second: Operation, repeats: int = MIN_ROUNDS,
    check: Callable[[Any, Any], None] | None = None,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Seconds per call of each operation, one sample a round; they take turns in going first.

    The first calls tell how often a short operation is repeated for a sample. There are `repeats` rounds at least, and
    more in `ROUNDS_SECONDS`. `check` gets the results of the first calls, and may raise.
    """
    operations = (first, second)
    inner, results = [], []
    for operation in operations:  # warm-up: code is loaded, buffers are made
        start = time.perf_counter()
        results.append(operation())
        seconds = time.perf_counter() - start
        if seconds < SLOW_SECONDS:
            seconds = _seconds(operation, 1)
        if seconds < 10 * SAMPLE_SECONDS:  # one look may be disturbed
            seconds = min(seconds, *(_seconds(operation, 1) for _ in range(3)))
        inner.append(max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-7))))
    if check is not None:
        check(*results)
    del results
    samples: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(max(repeats, MAX_ROUNDS)):
            if done >= repeats and time.perf_counter() - start > ROUNDS_SECONDS:
                break
            for side in (0, 1) if done % 2 == 0 else (1, 0):
                samples[side].append(_seconds(operations[side], inner[side]) / inner[side])
    finally:
        gc.enable()
    return samples


def _seconds(operation: Operation, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        operation()
    return time.perf_counter() - start


def peak_memory(operation: Operation) -> float | None:
    """The most memory in MiB that a call of `operation` adds to the process, its result included.

    The rise of the peak resident set (Linux resets it by ``/proc/self/clear_refs``) over the resident set before the
    call. The operation has run before, so that loaded code is not counted; nor is what it keeps from call to call.
    Accurate to some 0.3 MiB in a process with `environment`'s settings for it. None where the system has no such peak.
    """
    operation()
    gc.collect()
    _return_free_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        before = _status_kib("VmHWM")
        operation()
        return max(0.0, (_status_kib("VmHWM") - before) / 1024)
    except (OSError, KeyError):
        return None


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int({key: value for key, _, value in (line.partition(":") for line in lines)}[field].split()[0])


def _return_free_memory() -> None:
    """Free memory that the allocator holds would be reused and not show; most but glibc hold little."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="benchmarks")  # removed when the process ends


def shared(name: str, make: Callable[[Path], object]) -> Path:
    """The file or folder `name`, made once in a run of the suite by whichever process first asks for it.

    `make` gets the path where it is to be; one that was interrupted is made anew.
    """
    folder = Path(os.environ.get(SHARED_VARIABLE) or _own_folder().name)
    path, part = folder / name, folder / f"{name}.part"
    if not path.exists():
        shutil.rmtree(part, ignore_errors=True)
        make(part)
        part.rename(path)
    return path


class Worker:
    """Measures units and reports them as lines of JSON."""

    def __init__(self, path: Path, out: TextIO) -> None:
        self.cases = {case.name: case for case in load_cases(path)}
        self.out = out

    def report(self, **message: Any) -> None:
        self.out.write(json.dumps(message) + "\n")
        self.out.flush()

    def run(self, units: Sequence[tuple[str, str]]) -> None:
        if any(kind == MEMORY for _, kind in units):
            for module in PRELOADED:
                with contextlib.suppress(ImportError):
                    importlib.import_module(module)
        for unit in units:
            self.report(unit=unit, stage="begun", result={}, said=os.fstat(2).st_size)
            measure = self.measure if unit[1] == TIME else self.measure_forked
            self.report(unit=unit, stage="done", result=measure(self.cases[unit[0]], unit[1]))

    def measure(self, case: Case, kind: str) -> Row:
        """-> a part of the row; ``error`` or ``absent`` says why there is none."""
        import torch

        torch.set_num_threads(case.threads)
        torch.manual_seed(0)
        try:
            return MEASURES[kind](case)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in ("maskformer_fast", "benchmarks"):
                return {"error": describe(error)}
            return {"absent": str(error)}
        except Exception as error:
            traceback.print_exc()
            return {"error": describe(error)}

    def measure_forked(self, case: Case, kind: str) -> Row:
        """`measure` in a process of its own."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with os.fdopen(writer, "w") as file:
                    json.dump(self.measure(case, kind), file)
                status = 0
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as file:
            text = file.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != 0:
            return {"error": f"its process ended with status {status}"}
        row: Row = json.loads(text)
        return row


def describe(error: BaseException) -> str:
    """One line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def main(path: str) -> None:
    units = [(name, kind) for name, kind in json.load(sys.stdin)]
    # What libraries print goes to the error stream; the real output is the report's.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    Worker(Path(path), out).run(units)


if __name__ == "__main__":
    from benchmarks import harness  # not this module, __main__, but the one whose classes the cases use

    harness.main(*sys.argv[1:])
