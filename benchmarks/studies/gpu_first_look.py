"""First look at a GPU: the figures that were predicted from the machine code, beside those that it measures.

    python -m benchmarks.studies.gpu_first_look [--seconds 170]

`make gpu` begins with it. Each step is a process of its own with a limit of time, so that one that fails or hangs costs
only itself; rows are printed, and written to benchmarks/output/gpu_first_look.json, as they come. The steps: kernels
compile for this GPU; the operators' tests; ceilings of copies and products; counters of Nsight Compute (`ncu`, where it
is installed); times of graph replays and of eager calls.

Predictions are sums over a call's launches in benchmarks/results/kernel_report.jsonl: ``predicted_us`` is the time of
the busiest pipe, of which a real launch is expected to take 1.4 to 2.2 times; ``floor_us`` that of memory and tensor
cores. Record and GPU may differ in Triton version and model of GPU: a row names what was predicted for.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.clock import CudaClock
from benchmarks.harness.runner import ROOT
from benchmarks.studies import OUTPUT
from maskformer_fast.core.files import write_json
from maskformer_fast.core.machine import describe_machine

MODULE = "benchmarks.studies.gpu_first_look"
FILE = OUTPUT / "gpu_first_look.json"
KERNELS = "class_scores,resize,segments_panoptic,segments_instances,semantic"
TESTS = ("semantic", "segments", "matching_cost", "mask_loss", "assignment", "resize", "compute_sanitizer")
METRICS = (
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
"""Warp instructions; share of clocks with an instruction issued; resident warps, of the most."""
COUNTED = (
    "semantic 512x512 K=150 B=1 fp16", "panoptic 800x1333 N=30 fp32", "instances 800x1333 N=100 fp32",
    "rle 800x1333 N=100 fp32", "matching cost L=6 B=16 Q=100 T=20 fp16",
    "mask loss P=300 128x128 -> 512x512: forward", "mask loss P=300 128x128 -> 512x512: backward",
)  # fmt: skip
"""Calls whose instructions are counted."""
REPLAYS = 15

Row = dict[str, Any]
Call = Callable[[], object]


@dataclass(frozen=True)
class Step:
    name: str
    share: float
    """Limit of time, as a share of that of all steps."""
    command: tuple[str, ...]


def steps(target: str) -> list[Step]:
    python = (sys.executable, "-m")
    tests = [f"tests/ops/test_{name}_gpu.py" for name in TESTS]
    return [
        Step("compile", 0.1, (*python, "maskformer_fast.kernels.aot", "--check", "--targets", target,
                               "--kernels", KERNELS)),
        Step("tests", 0.2, (*python, "pytest", "-q", "-m", "gpu", "--maxfail", "20", *tests)),
        *(Step(name, share, (*python, MODULE, "--step", name))
          for name, share in (("ceilings", 0.08), ("times", 0.38), ("counters", 0.24))),
    ]  # fmt: skip


def run_steps(todo: Sequence[Step], seconds: float, file: Path, machine: Row) -> list[Row]:
    """Run the steps one after the other -> their outcomes and rows, which `file` holds after each line too."""
    outcomes: list[Row] = []
    for step in todo:
        outcome: Row = {"step": step.name, "status": "running", "seconds": 0.0, "rows": [], "log": []}
        outcomes.append(outcome)
        print(f"-- {step.name}", flush=True)
        start = time.monotonic()
        limit = step.share * seconds
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                start_new_session=True, errors="replace",
            )  # fmt: skip
        except OSError as error:
            outcome["status"] = str(error)
            write_json(file, {"machine": machine, "steps": outcomes})
            continue
        watchdog = threading.Timer(limit, _kill, (process,))
        watchdog.start()
        assert process.stdout is not None
        for line in process.stdout:
            _keep(outcome, line.rstrip())
            write_json(file, {"machine": machine, "steps": outcomes})
        status = process.wait()
        watchdog.cancel()
        elapsed = time.monotonic() - start
        timed_out = elapsed >= limit and status == -signal.SIGKILL
        outcome["status"] = "out of time" if timed_out else "done" if status == 0 else f"failed with status {status}"
        outcome["seconds"] = round(elapsed, 1)
        print(f"-- {step.name}: {outcome['status']} in {elapsed:.0f} s", flush=True)
        write_json(file, {"machine": machine, "steps": outcomes})
    return outcomes


def _kill(process: subprocess.Popen[str]) -> None:
    """End a step with the processes that it started."""
    os.killpg(process.pid, signal.SIGKILL)


def _keep(outcome: Row, line: str) -> None:
    """Add a step's line of output: a row where it is one in JSON, else the log's last lines."""
    print(line, flush=True)
    if line.startswith("{"):
        outcome["rows"].append(json.loads(line))
    else:
        outcome["log"] = [*outcome["log"][-39:], line]


def predicted(call: str, target: str) -> Row:
    """Sums of the recorded launches of a call for a target; empty where nothing is recorded."""
    from maskformer_fast.kernels.report import read_record

    fitting = [
        row for row in read_record().values() if row["target"] == target and f"{row['call']}: ".startswith(f"{call}: ")
    ]
    version = max((row["triton"] for row in fitting), default="")
    rows = [row for row in fitting if row["triton"] == version]
    if not rows:
        return {}
    return {
        "predicted_us": round(sum(row["busiest_us"] for row in rows), 1),
        "floor_us": round(sum(row["floor_us"] for row in rows), 1),
        "predicted_instructions": sum(row["issue"] * row["programs"] * row["warps"] for row in rows),
        "predicted_for": f"{target}, Triton {version}",
    }


def calls(device: torch.device) -> Iterator[tuple[str, Call]]:
    """Goal calls on random inputs, by the names that the record has for their launches."""
    from benchmarks.cases import rle, segments
    from benchmarks.cases.assignment import random_costs
    from benchmarks.cases.semantic import semantic_logits
    from maskformer_fast.kernels.mask_loss import mask_sums_backward, mask_sums_forward
    from maskformer_fast.kernels.matching_cost import matching_cost_forward
    from maskformer_fast.kernels.resize import resize_forward
    from maskformer_fast.kernels.rle import encode_masks
    from maskformer_fast.kernels.semantic import semantic_from_logits
    from maskformer_fast.ops import linear_sum_assignment

    torch.manual_seed(0)

    def semantic(classes: int, batch: int, size: tuple[int, int]) -> Call:
        masks, logits = (x.to(device) for x in semantic_logits("random", classes, 100, batch, size))
        masks = masks.half().contiguous(memory_format=torch.channels_last)  # queries innermost
        dtype = torch.int16 if classes > 255 else torch.uint8
        labels = torch.empty(batch, 4 * size[0], 4 * size[1], dtype=dtype, device=device)
        return partial(semantic_from_logits, masks, logits, size, labels)

    for classes, batch in ((150, 1), (150, 8), (19, 1), (847, 1)):
        yield f"semantic 512x512 K={classes} B={batch} fp16", semantic(classes, batch, (128, 128))
    yield "semantic 1024x2048 K=150 B=1 fp16", semantic(150, 1, (256, 512))

    for name, setup in (("panoptic 800x1333 N=30 fp32", segments.kept_setup),
                        ("instances 800x1333 N=100 fp32", segments.instances_setup)):  # fmt: skip
        work = setup(device)
        yield name, partial(work.ours, *work.draw(0))
    low, high = segments.CUDA_LOW, segments.CUDA_HIGH
    masks = rle.instance_logits(low)[1].to(device)[None]
    data = torch.empty(8 << 20, dtype=torch.uint8, device=device)
    starts = torch.empty(masks.shape[1] + 1, dtype=torch.int64, device=device)
    yield "rle 800x1333 N=100 fp32", partial(encode_masks, masks, low, high, data, starts)

    focal, packed = (0.25, 0.75, 2.0), torch.randint(256, (100, 512, 64), dtype=torch.uint8, device=device)
    for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32")):
        class_logits, embeddings, pixels = (
            torch.randn(shape, device=device).to(dtype)
            for shape in ((6, 16, 100, 151), (6, 16, 100, 256), (16, 256, 128, 128))
        )
        labels = torch.randint(150, (16, 20), device=device)
        counts, sizes = torch.full((16,), 20, device=device), torch.full((16, 2), 512, device=device)
        targets = torch.randint(256, (16, 20, 512, 64), dtype=torch.uint8, device=device)
        cost = torch.empty(6, 16, 100, 20, device=device)
        yield f"matching cost L=6 B=16 Q=100 T=20 {name}", partial(
            matching_cost_forward, class_logits, embeddings / 8, pixels, labels, counts, targets, sizes, (512, 512),
            (1.0, 20.0, 1.0), focal, cost,
        )  # fmt: skip
    logits, rows = torch.randn(300, 128, 128, device=device), torch.arange(300, device=device) % 100
    arguments = (logits, packed, rows, torch.full((100, 2), 512, device=device), 512, focal)
    gradient = torch.randn(300, 4, device=device)
    yield "mask loss P=300 128x128 -> 512x512: forward", partial(mask_sums_forward, *arguments)
    yield "mask loss P=300 128x128 -> 512x512: backward", partial(mask_sums_backward, gradient, *arguments)

    frames = torch.randint(256, (1, 1080, 1920, 3), dtype=torch.uint8, device=device)
    out = torch.empty(1, 3, 512, 928, dtype=torch.uint8, device=device)
    yield "resize 1080x1920 -> 512x910 uint8", partial(resize_forward, frames, (512, 910), out, False)
    costs = random_costs("matcher-like", (96, 100, 20)).to(device)
    yield "assignment 96 x 100x20", partial(linear_sum_assignment, costs)


def ceilings() -> Iterator[Row]:
    """Bytes a second of a copy, and operations a second of products of halves."""
    clock = CudaClock()
    source = torch.empty(1 << 30, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    seconds = _median(clock, partial(target.copy_, source))
    yield {"ceiling": "copy", "measured_tb_per_s": round(2 * source.numel() / seconds / 1e12, 2)}
    del source, target
    for dtype in (torch.float16, torch.bfloat16):
        side = 8192
        factor = torch.randn(side, side, device=clock.device).to(dtype)
        seconds = _median(clock, partial(torch.mm, factor, factor))
        yield {"ceiling": f"product {str(dtype)[6:]}", "measured_tflop_per_s": round(2 * side**3 / seconds / 1e12, 1)}


def times() -> Iterator[Row]:
    """Replays of a graph of each call, and calls through Python."""
    clock = CudaClock()
    for name, call in calls(clock.device):
        row: Row = {"call": name, **predicted(name, _target())}
        try:
            call()
            row["measured_call_us"] = round(1e6 * _median(clock, call), 1)
            row["measured_us"] = round(1e6 * _median(clock, clock.capture(call)), 1)
        except Exception as error:  # the other calls are still worth their time
            row["error"] = f"{type(error).__name__}: {error}"[:300]
            if not clock.works():
                yield row
                raise
        yield row


def counters() -> Iterator[Row]:
    """Counters of each launch of a call, as Nsight Compute reads them."""
    ncu = shutil.which("ncu")
    if ncu is None:
        print("ncu is not installed: no counters")
        return
    for name in COUNTED:
        command = [ncu, "--csv", "--clock-control", "none", "--profile-from-start", "off", "--metrics",
                   ",".join(METRICS), sys.executable, "-m", MODULE, "--call", name]  # fmt: skip
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        row: Row = {"call": name, **predicted(name, _target())}
        launches = read_counters(result.stdout)
        if not launches:
            row["error"] = (result.stdout + result.stderr)[-300:]
        yield row | {"measured_instructions": sum(int(one[METRICS[0]]) for one in launches), "launches": launches}


def read_counters(text: str) -> list[Row]:
    """Counters of each launch in the output of ``ncu --csv``."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, Row] = {}
    for line in csv.DictReader(lines[start:]):
        launch = launches.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
        launch[line["Metric Name"]] = float(line["Metric Value"].replace(",", ""))
    return list(launches.values())


def profile(name: str) -> None:
    """Make one call between the marks between which a profiler looks."""
    call = next(call for known, call in calls(torch.device("cuda", 0)) if known == name)
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def _median(clock: CudaClock, call: Call) -> float:
    """Median of seconds for one of several calls in a row."""
    clock.seconds(call, 3)
    times = max(1, min(50, int(clock.sample_seconds / max(clock.seconds(call), 1e-7))))
    return statistics.median(clock.seconds(call, times) / times for _ in range(REPLAYS))


def _target() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


STEPS: dict[str, Callable[[], Iterator[Row]]] = {"ceilings": ceilings, "times": times, "counters": counters}


def main() -> int:
    # argparse: tyro, which the commands use, may be missing on a GPU machine without a network
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=170.0, help="time for all steps")
    parser.add_argument("--step", choices=STEPS, help="run this step in this process")
    parser.add_argument("--call", help="run this call once, for a profiler")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing to look at", file=sys.stderr)
        return 1
    if options.call:
        profile(options.call)
        return 0
    if options.step:
        for row in STEPS[options.step]():
            print(json.dumps(row), flush=True)
        return 0
    outcomes = run_steps(steps(_target()), options.seconds, FILE, describe_machine())
    return 0 if all(outcome["status"] == "done" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
