"""``python -m maskformer_fast.benchmark BUNDLE``: time a bundle on this machine, beside PyTorch eager and compiled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Annotated, Any, Literal

import tyro

from maskformer_fast.benchmark.measure import measure_batch
from maskformer_fast.benchmark.report import require_matplotlib, write_report
from maskformer_fast.benchmark.runners import Kind, Setting
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import Amp, Task
from maskformer_fast.core.checks import check
from maskformer_fast.core.machine import describe_machine
from maskformer_fast.deploy.bundle.folder import Bundle, check_outside
from maskformer_fast.deploy.bundle.manifest import Precision, Shape
from maskformer_fast.deploy.runtime.selection import Backend


@dataclass(frozen=True)
class BenchmarkOptions:
    """Time a bundle: latency, throughput, memory and the stages' shares, for several batch sizes.

    Writes ``benchmark.json``, ``benchmark.md`` and ``benchmark.png``. With a checkpoint, the one that the bundle was
    exported from, PyTorch runs beside it on the same frames and the same kind of device: the GPU where the bundle runs
    by TensorRT, else the CPU. Each runs in a separate process; they take turns. Exit status 1 if one failed.
    """

    bundle: tyro.conf.Positional[str]
    """Bundle, as ``python -m maskformer_fast.export`` writes it."""
    checkpoint: str | None = None
    """Checkpoint to compare with; without one the bundle runs alone and torch is not needed."""
    against: tuple[Literal["eager", "compile"], ...] = ("eager", "compile")
    """Modes in which PyTorch runs the checkpoint."""
    batches: tuple[int, ...] = (1, 2, 4, 8)
    """Frames in one call."""
    size: str = "512x512"
    """HEIGHTxWIDTH of the frames."""
    task: Task = "semantic"
    """Task whose results are asked for."""
    backend: Backend = "auto"
    """Backend of a bundle: ``auto`` takes TensorRT where the bundle has an engine for this GPU, else on the CPU
    openvino where it is installed, else onnxruntime."""
    precision: Precision | None = None
    """Precision of a bundle's network. On a CPU: fp32, bf16 (openvino, where the processor has it) or int8 (an engine
    of openvino in the bundle); by default int8 where the bundle has it, else fp32. On a GPU: that of an engine."""
    amp: Amp = "off"
    """Precision of PyTorch."""
    pictures: str | None = None
    """Folder with pictures to run on, as the time of post-processing depends on them; by default random rectangles."""
    seconds: float = 5.0
    """Measured time of each runner at each batch size, in seconds."""
    in_flight: int | None = None
    """Frames that a stream of the bundle has in flight. By default 2, for the least latency of single frames. With a
    given number above 1, openvino divides the threads among the frames, for the most frames a second."""
    device: int = 0
    """Number of the GPU."""
    digest: str | None = None
    """Digest that the bundle must have."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "benchmark"
    """Folder for the report."""

    def __post_init__(self) -> None:
        check(len(self.batches) > 0 and min(self.batches) > 0, "batches", "positive numbers", self.batches)
        check(self.seconds > 0, "seconds", "> 0", self.seconds)
        check(self.in_flight is None or self.in_flight > 0, "in_flight", "> 0", self.in_flight)
        check(Shape.parse(self.size).batch == 1, "size", "HEIGHTxWIDTH", self.size)

    def settings(self, batch: int, channels: int = 0) -> list[Setting]:
        """Settings of the runners at a batch size, for frames of so many bands (0: RGB); the bundle's first."""
        shape = Shape.parse(self.size)
        kinds: tuple[Kind, ...] = ("bundle", *self.against) if self.checkpoint else ("bundle",)
        return [
            Setting(
                kind, self.bundle if kind == "bundle" else str(self.checkpoint), batch, (shape.height, shape.width),
                self.task, self.backend, self.device, self.in_flight, self.amp, self.digest, self.pictures,
                self.precision, channels,
            )
            for kind in kinds
        ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(BenchmarkOptions, arguments, prog="python -m maskformer_fast.benchmark")
    require_matplotlib()  # before minutes of measuring
    bundle = Bundle.open(options.bundle, options.digest)
    check_outside(bundle, options.output)
    start = monotonic()
    content: dict[str, Any] = {
        "bundle": {"name": bundle.manifest.name, "digest": bundle.digest}, "options": asdict(options),
        "machine": describe_machine(), "rows": [],
    }  # fmt: skip
    for batch in options.batches:
        content["rows"] += measure_batch(options.settings(batch, bundle.manifest.channels), options.seconds)
        content["seconds"] = round(monotonic() - start, 1)
        text = write_report(content, Path(options.output))  # after each batch size, so that little is lost at a stop
    print(text)
    return 1 if any("error" in row for row in content["rows"]) else 0


if __name__ == "__main__":
    run_command(main)
