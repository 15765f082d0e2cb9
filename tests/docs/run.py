"""Run or parse every command and every Python block of the documentation (``make docs-check``).

The commands of a page run one after the other in a folder of small data (`world.make_world`). `REDUCTIONS` are appended
to them, for fewer steps and smaller batches. Commands that cannot be run are parsed, and the printed list gives the
reason. The exit status is 1 if a command fails, would be refused by its program, or calls an unknown program.

    python -m tests.docs.run [README.md docs/PAGE.md ...]
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import torch

from tests.docs.pages import ROOT, SHELL, Block, Command, blocks, commands, pages
from tests.docs.parsing import Call, CommandError, check, check_python, check_recipe, module_options, split_command
from tests.docs.prose import problems
from tests.docs.world import make_world

REDUCTIONS = {
    "maskformer_fast.train": (
        "--solver.max-steps 2 --solver.batch-size 2 --solver.warmup-steps 0 --data.workers 0 --log.every 1 "
        "--log.checkpoint-every 2 --log.validate-every 0 --log.pictures 1 --data.shapes.train-images 8 "
        "--data.shapes.val-images 2"
    ),
    "maskformer_fast.evaluate": "--limit 2 --data.workers 0",
    "maskformer_fast.predict": "",
    "maskformer_fast.convert": "",
    "maskformer_fast.convert_labels": "",
    "maskformer_fast.inspect_data": "",
    "maskformer_fast.export": "--sizes 64x96",
    "maskformer_fast.benchmark": "--seconds 0.05 --batches 1 --size 64x96 --against eager",
    "maskformer_fast.deploy.triton_server": "",
}
"""Commands that are run -> options that are appended."""
NOT_RUN = {
    "/data/*": "needs a data set",
    "model*.pkl": "needs a published checkpoint",
    "maskformer-swin-*": "needs a published checkpoint",
    "maskformer-resnet*": "needs a published checkpoint",
    "resnet50-imagenet.pth": "needs a published checkpoint",
    "r50.safetensors": "needs a published checkpoint",
    "weights/*": "needs a published checkpoint",
    "case.pt": "needs recorded outputs",
    "runs/ade20k_150/*": "needs a trained run",
    "runs/coco_panoptic/*": "needs a trained run",
    "--solver.compile": "compiles for minutes",
    "--profile": "needs more steps",
    "--solver.early-stopping": "needs validations, which the check leaves out",
    "--engine-only": "needs the GPU that the engine is for",
    "engine": "needs the GPU that the engine is for",
    "tensorrt": "needs the GPU that the engine is for",
    "int8": "needs an INT8 engine, which takes a minute to make",
}
"""Pattern of an argument with which a command is parsed only -> the reason."""
OMITTED = ("--target", "--frames", "--sizes")
"""Options that are left out, with their values: kernels compile for a minute, and large sizes are slow."""


def why_not_run(call: Call, reason: str) -> str:
    """Return the reason why a command is parsed only; empty if it can be run."""
    if reason:
        return reason
    if call.program.startswith("torchrun"):
        return "starts several processes"
    module = call.program.removeprefix("python -m ")
    if module == call.program:
        return "no module of this project"
    if module not in REDUCTIONS:
        return "takes too long"
    for word in call.arguments:
        for pattern, why in NOT_RUN.items():
            if fnmatch(word, pattern):
                return why
    options = module_options(module, call.arguments)
    if options is None:
        return "" if "--help" in call.arguments or "--list-recipes" in call.arguments else "help"
    data = getattr(getattr(options, "config", None), "data", None)  # of commands that take a recipe
    if data is not None and data.dataset != "shapes" and (data.root is None or fnmatch(data.root, "/data/*")):
        return "needs a data set"
    return ""


def in_child(work: Callable[[], None], log: Path) -> int:
    """Call a function in a forked process, with its output in a file -> exit status.

    A fork spares the ten seconds in which a new Python imports PyTorch and Transformers. It uses one thread, because
    OpenMP's threads do not survive a fork.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        with log.open("wb") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))  # pytest replaces them
        torch.set_num_threads(1)
        work()
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def without_options(arguments: list[str], names: tuple[str, ...]) -> list[str]:
    """Leave options out of a command's arguments, together with their values."""
    kept, skips = [], False
    for word in arguments:
        skips = word in names if word.startswith("--") else skips
        kept += [] if skips else [word]
    return kept


def run_module(call: Call) -> None:
    """Run a command with its reductions; ``--help`` is run unchanged."""
    module = call.program.removeprefix("python -m ")
    is_help = "--help" in call.arguments or "--list-recipes" in call.arguments
    more = [] if is_help else shlex.split(REDUCTIONS[module])
    if "--static" in call.arguments:  # it determines the only size of an export
        more = []
    if "--resume" in call.arguments:  # one step more than the run has
        more = [word if word != "2" or more[at - 1] != "--solver.max-steps" else "3" for at, word in enumerate(more)]
    os.environ.update({"PYTHONPATH": str(ROOT), **call.variables})  # for child processes of the command
    sys.argv = [module, *without_options(call.arguments, OMITTED), *more]
    for name in (module, f"{module}.__main__"):  # parsing imported it, but the command must run it anew
        sys.modules.pop(name, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_python(block: Block) -> None:
    """Run a Python block; tracebacks have the line numbers of its page."""
    text = "\n" * (block.place.line - 1) + block.text
    exec(compile(text, str(ROOT / block.place.page), "exec"), {"__name__": "__main__"})


class Report:
    """Result of each check as a line, and counts by kind and reason."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()

    @property
    def failed(self) -> int:
        return self.counts["FAILED"]

    def add(self, result: str, place: object, text: str, seconds: float = 0.0, reason: str = "") -> None:
        self.counts[result] += 1
        if reason:
            self.reasons[reason] += 1
        took = f" {seconds:.1f} s" if seconds else ""
        why = f" ({reason})" if reason else ""
        self.lines.append(f"{result:7}{took:>8}  {place}  {text[:110]}{why}")

    def failure(self, place: object, text: str, message: str) -> None:
        self.add("FAILED", place, text)
        self.lines.append("    " + message.strip()[-4000:].replace("\n", "\n    "))


def check_command(command: Command, world: Path, report: Report) -> None:
    """Parse a command, and run it if it can be run."""
    try:
        check(command, world)
        call = split_command(command.text)
        previous = Path.cwd()
        os.chdir(world)
        try:
            reason = why_not_run(call, command.reason)
        finally:
            os.chdir(previous)
    except CommandError as error:
        return report.failure(command.place, command.text, str(error))
    if reason:
        return report.add("parsed", command.place, command.text, reason=reason)
    return timed(command.place, command.text, lambda: run_module(call), world, report)


def check_block(block: Block, world: Path, report: Report) -> None:
    """Run a Python block, or parse it if the page says that it cannot be run."""
    text = block.text.strip().splitlines()[0]
    if not block.reason:
        return timed(block.place, text, lambda: run_python(block), world, report)
    try:
        check_python(block.text)
    except CommandError as error:
        return report.failure(block.place, text, str(error))
    return report.add("parsed", block.place, text, reason=block.reason)


def timed(place: object, text: str, work: Callable[[], None], world: Path, report: Report) -> None:
    """Call a function in a forked process within ``world``; report its time or its failure."""

    def work_in_folder() -> None:
        os.chdir(world)
        work()

    started, log = time.perf_counter(), world / ".log"
    status = in_child(work_in_folder, log)
    if status:
        return report.failure(place, text, f"exit status {status}\n{log.read_text(errors='replace')}")
    return report.add("ran", place, text, time.perf_counter() - started)


def check_page(path: Path) -> Report:
    """Check one page from top to bottom, in a new folder."""
    report = Report()
    for problem in problems(path):
        report.failure(path.name, "prose", problem)
    with tempfile.TemporaryDirectory(prefix="docs-check-") as folder:
        world = Path(folder)
        make_world(world)
        page_blocks = blocks(path)
        for block in page_blocks:  # recipes first, since a page may show one after the command that uses it
            if block.language == "yaml":
                try:
                    check_recipe(block.text, world)
                    report.add("loaded", block.place, "a recipe")
                except CommandError as error:
                    report.failure(block.place, "a recipe", str(error))
        for block in page_blocks:
            if block.language in SHELL:
                for command in commands(block):
                    check_command(command, world, report)
            elif block.language == "python":
                check_block(block, world, report)
    return report


def main() -> int:
    """Check all pages, or those given as arguments; returns the exit status."""
    import maskformer_fast.interop.huggingface
    import maskformer_fast.training.trainer  # noqa: F401  # imported once, before the forks

    started, counts, reasons = time.perf_counter(), Counter[str](), Counter[str]()
    wanted = [path for path in pages() if not sys.argv[1:] or path.relative_to(ROOT).as_posix() in sys.argv[1:]]
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        for report in pool.map(check_page, wanted):
            print("\n".join(report.lines), flush=True)
            counts, reasons = counts + report.counts, reasons + report.reasons
    total = ", ".join(f"{number} {what}" for what, number in counts.items())
    print(f"{total} in {time.perf_counter() - started:.0f} s")
    for reason, number in sorted(reasons.items()):
        print(f"  not run: {number:3}  {reason}")
    return int(counts["FAILED"] > 0)


if __name__ == "__main__":
    sys.exit(main())
