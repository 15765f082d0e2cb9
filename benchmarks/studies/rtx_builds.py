"""Builds by TensorRT for RTX of every graph in every precision for every GPU: seconds, and MiB of each engine.

    python -m maskformer_fast.export ade20k_150/maskformer_r50 --output r50
    python -m benchmarks.studies.rtx_builds r50 [swin ...] [--precision fp32 fp16] [--targets sm_80 sm_86 sm_89 sm_120]

Needs no GPU. Takes bundles, and ``raw`` graphs as ONNX files. Each build is a process of its own; status 1 if one
fails. Results go to benchmarks/output/rtx_builds.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.harness.machine import describe
from benchmarks.studies import OUTPUT
from maskformer_fast.cli import parse, run_command
from maskformer_fast.core.files import write_json
from maskformer_fast.deploy.build.tensorrt import EngineConfig, EngineError, build_engine


@dataclass(frozen=True)
class BuildOptions:
    """Build engines with TensorRT for RTX, for GPUs that need not be here."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Bundles or ONNX files of the flavour raw."""
    precision: tuple[Literal["fp32", "fp16", "bf16"], ...] = ("fp32", "fp16")
    """Precisions to build each engine in."""
    targets: tuple[str, ...] = ("sm_80", "sm_86", "sm_89", "sm_120")
    """GPUs; one engine serves them all."""
    output: Path = OUTPUT / "rtx_builds.json"
    """JSON file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(BuildOptions, arguments, prog="python -m benchmarks.studies.rtx_builds")
    rows = []
    print("| graph | precision | seconds | engine MiB | outcome |\n| --- | --- | --- | --- | --- |")
    for name in options.models:
        path = Path(name) / "raw.onnx" if Path(name).is_dir() else Path(name)
        graph = path.read_bytes()
        for precision in options.precision:
            config = EngineConfig(precision=precision, api="tensorrt_rtx", targets=options.targets)
            start = time.perf_counter()
            size, outcome, version = 0, "built", ""
            try:
                content, engine = build_engine(graph, config, progress=False)
                size, version = len(content), engine.api_version
            except EngineError as error:
                outcome = str(error)
            seconds = time.perf_counter() - start
            row = {"graph": Path(name).name, "precision": precision, "seconds": round(seconds, 1), "bytes": size,
                   "version": version, "targets": list(options.targets), "outcome": outcome}
            rows.append(row)
            print(f"| {Path(name).name} | {precision} | {seconds:.0f} | {size / 2**20:.0f} | {outcome} |", flush=True)
    write_json(options.output, {"machine": describe("cpu"), "builds": rows})
    return int(any(row["outcome"] != "built" for row in rows))


if __name__ == "__main__":
    run_command(main)
