"""Counts of machine instructions: the reader of listings, the model, and the recorded rows of the goal calls."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytest.importorskip("triton", reason="needs Triton")

from maskformer_fast.kernels import report
from maskformer_fast.kernels.disassembly import count_runs, parse
from maskformer_fast.kernels.report import pipe_of, warps_per_multiprocessor

pytestmark = pytest.mark.no_cover  # kernels/ is not measured anyway

COMMAND = ("-m", "maskformer_fast.kernels.aot", "--report")
QUICK = ("class_scores", "resize")
"""Modules whose goal calls compile in seconds."""

SOURCE = """\
def kernel():
    for row in range(rows):
        if wanted:
            total += row
        for tap in range(taps):
            total += tap
    store(total)
"""


def listing(folder: Path, code: str) -> str:
    """A listing of lines ``NUMBER OPCODE OPERANDS`` and ``LABEL:`` about `SOURCE`."""
    path = folder / "source.py"
    path.write_text(SOURCE)
    lines, address = [], 0
    for line in filter(None, map(str.strip, code.splitlines())):
        if line.endswith(":"):
            lines.append(line)
            continue
        number, instruction = line.split(maxsplit=1)
        lines += [f'\t//## File "{path}", line {number}', f"        /*{address:04x}*/     {instruction} ;"]
        address += 16
    return "\n".join(lines)


def counts(folder: Path, code: str, runs: dict[str, float]) -> dict[str, float]:
    """Runs of the first operand of each FADD, which stands for a place in the code."""
    found = count_runs(listing(folder, code), runs)
    return {one.operands.split(",")[0]: round(times, 6) for one, times in found if one.name == "FADD"}


def test_parse(tmp_path: Path) -> None:
    instructions, labels = parse(listing(tmp_path, "1 @!P0 LDG.E.64 R2, desc[UR4][R2.64]\n.L_x_0:\n7 EXIT"))
    assert [(one.opcode, one.name, one.predicate, one.source[1]) for one in instructions] == [
        ("LDG.E.64", "LDG", "!P0", 1),
        ("EXIT", "EXIT", "", 7),
    ]
    assert labels == {".L_x_0": 1} and instructions[1].text == "store(total)"
    with pytest.raises(ValueError, match="listing: expected instructions"):
        parse("nothing")


NESTED = """
1 FADD START, R0
2 @!P1 BRA `(.L_end)
.L_row:
3 @P0 BRA `(.L_skip)
4 FADD WANTED, R0
4 FADD WANTED, R0
.L_skip:
5 @P3 BRA `(.L_next)
.L_tap:
6 FADD TAP, R0
5 @P2 BRA `(.L_tap)
.L_next:
2 @P1 BRA `(.L_row)
.L_end:
7 FADD END, R0
7 EXIT
.L_padding:
7 BRA `(.L_padding)
"""


def test_loops_and_branches(tmp_path: Path) -> None:
    found = counts(tmp_path, NESTED, {"for row": 10, "for tap": 4})
    assert found == {"START": 1, "WANTED": 10, "TAP": 40, "END": 1}


def test_entries(tmp_path: Path) -> None:
    runs = {"for row in": 2.5, "for tap in range(taps)": 0, "if wanted:": 0.2}
    assert counts(tmp_path, NESTED, runs) == {"START": 1, "WANTED": 0.5, "TAP": 0, "END": 1}
    with pytest.raises(ValueError, match="expected an entry for the loop 'for tap in"):
        count_runs(listing(tmp_path, NESTED), {"for row in": 2})
    with pytest.raises(ValueError, match="got .'cake'.; known are for row in range"):
        count_runs(listing(tmp_path, NESTED), runs | {"cake": 1})


UNROLLED = """
5 @!P1 BRA `(.L_end)
5 @P2 BRA `(.L_two)
.L_four:
6 LDG.E R1, [R2]
6 LDG.E R1, [R2]
6 LDG.E R1, [R2]
6 LDG.E R1, [R2]
6 FADD FOUR, R0
6 FADD FOUR, R0
6 FADD FOUR, R0
5 @P3 BRA `(.L_four)
.L_two:
5 @P4 BRA `(.L_one)
6 LDG.E R1, [R2]
6 LDG.E R1, [R2]
6 FADD TWO, R0
6 FADD TWO, R0
.L_one:
5 @P5 BRA `(.L_end)
.L_rest:
6 LDG.E R1, [R2]
6 FADD ONE, R0
5 @P6 BRA `(.L_rest)
.L_end:
7 FADD END, R0
7 EXIT
"""


@pytest.mark.parametrize(
    ("taps", "expected"), [(1, (0, 0, 1)), (2, (0, 1, 0)), (3, (0, 1, 1)), (4, (1, 0, 0)), (11, (2, 1, 1))]
)
def test_unrolled_loop(tmp_path: Path, taps: int, expected: tuple[int, int, int]) -> None:
    found = counts(tmp_path, UNROLLED, {"for tap": taps})
    assert (found["FOUR"], found["TWO"], found["ONE"], found["END"]) == (*expected, 1)


def test_slow_paths(tmp_path: Path) -> None:
    """A division's call does not run by default, nor a wait for threads that diverged; a comparison's line counts."""
    code = """
    1 ISETP.GT.AND P0, PT, R1, R2, PT
    1 @P0 BRA `(.L_fast)
    1 FADD SLOW, R0
    1 CALL.REL.NOINC `($division)
    1 BRA `(.L_join)
    .L_fast:
    1 FADD FAST, R0
    .L_join:
    1 BRA.DIV UR4, `(.L_diverged)
    3 ISETP.GT.AND P2, PT, R1, R2, PT
    4 @P2 BRA `(.L_end)
    4 FADD WANTED, R0
    .L_end:
    7 EXIT
    $division:
    1 FADD DIVISION, R0
    1 RET.REL.NODEC R2 `(kernel)
    .L_diverged:
    1 FADD DIVERGED, R0
    1 BRA `(.L_end)
    """
    expected = {"SLOW": 0, "FAST": 1, "WANTED": 0.25, "DIVISION": 0, "DIVERGED": 0}
    assert counts(tmp_path, code, {"if wanted:": 0.25}) == expected


def test_a_long_side_with_a_call_inside_runs(tmp_path: Path) -> None:
    code = """
    3 @P0 BRA `(.L_end)
    4 FADD WANTED, R0
    4 BRA.DIV ~URZ, `(.L_diverged)
    .L_join:
    4 FADD WANTED, R0
    .L_end:
    7 FADD END, R0
    7 EXIT
    .L_diverged:
    4 CALL.REL.NOINC `($shuffle)
    4 FADD DIVERGED, R0
    4 BRA `(.L_join)
    $shuffle:
    4 RET.REL.NODEC R2 `(kernel)
    """
    assert counts(tmp_path, code, {}) == {"WANTED": 1, "END": 1, "DIVERGED": 0}


@pytest.mark.parametrize(
    ("code", "pipe", "clocks"),
    [
        ("IADD3 R1, R2, R3, R4", "alu", 2),
        ("FFMA R1, R2, R3, R4", "fma", 1),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", "fma", 1),
        ("IMAD R1, R2, R3, R4", "imad", 2),
        ("MUFU.EX2 R1, R2", "xu", 8),
        ("F2F.F64.F32 R2, R1", "convert64", 8),
        ("F2I.TRUNC R1, R2", "xu", 8),
        ("DFMA R2, R4, R6, R8", "fp64", 2),
        ("HMMA.16816.F32 R4, R4, R8, RZ", "tensor", 4),
        ("HMMA.1688.F32.TF32 R4, R4, R8, RZ", "tensor", 4),
        ("HGMMA.64x32x16.F32 R24, gdesc[UR8], R24", "tensor", 16),
        ("LDS.128 R4, [R1]", "lsu", 16),
        ("LDSM.16.M88.4 R4, [R1]", "lsu", 16),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1f", "lsu", 4),
        ("UIADD3 UR4, UR5, 0x1, URZ", "control", 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "control", 0),
    ],
)
def test_pipes(tmp_path: Path, code: str, pipe: str, clocks: float) -> None:
    (instruction,), _ = parse(listing(tmp_path, f"1 {code}"))
    assert pipe_of(instruction) == pipe
    assert report.clocks_of(instruction, pipe, report.TARGETS["sm_90"]) == clocks


def test_warps_per_multiprocessor() -> None:
    assert warps_per_multiprocessor("sm_90", 163, 16384, 8) == 8  # 168 registers of 256 threads: one block
    assert warps_per_multiprocessor("sm_90", 64, 0, 1) == 32  # 32 blocks
    assert warps_per_multiprocessor("sm_90", 32, 0, 4) == 64  # 64 warps
    assert warps_per_multiprocessor("sm_87", 32, 0, 4) == 48
    assert warps_per_multiprocessor("sm_120", 32, 40 << 10, 4) == 8  # two of 41 KiB in 100


def test_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RECORD", tmp_path / "rows.jsonl")

    def row(call: str, module: str, issue: int) -> dict[str, object]:
        return {"call": call, "target": "sm_90", "module": module, "triton": "3.7", "issue": issue}

    report.write_record([row("b", "x", 100), row("a", "x", 10), row("c", "y", 5)])
    report.write_record([row("b", "x", 102)])  # a was removed from the module, c belongs to another
    assert [line["call"] for line in report.read_record().values()] == ["b", "c"]
    assert report.risen([row("b", "x", 107), row("c", "y", 4)]) == []
    assert report.risen([row("b", "x", 108), row("d", "x", 1)]) == [
        "b, sm_90: 102 instructions recorded, 108 now",
        "d, sm_90: not recorded",
    ]
    assert report.risen([row("d", "x", 1) | {"triton": "3.8"}]) == []  # nothing of this version is


def check_counts(modules: tuple[str, ...], targets: tuple[str, ...]) -> None:
    version = ".".join(importlib.metadata.version("triton").split(".")[:2])
    if version not in {row["triton"] for row in report.read_record().values()}:
        pytest.skip(f"no row is recorded for Triton {version}; record: {sys.executable} {' '.join(COMMAND)} --record")
    options = ("--targets", ",".join(targets), "--kernels", ",".join(modules))
    result = subprocess.run(
        [sys.executable, *COMMAND, *options], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_quick_kernels_have_the_recorded_counts() -> None:
    check_counts(QUICK, ("sm_90",))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_87", "sm_90"])  # of `report.TARGETS`; each takes a minute
def test_all_kernels_have_the_recorded_counts(target: str) -> None:
    from maskformer_fast.kernels.aot import KERNEL_MODULES

    check_counts(KERNEL_MODULES, (target,))
