"""Predicted cost of the kernels in the calls that the performance goals name, from their machine code.

    python -m maskformer_fast.kernels.aot --report [--record] [--targets sm_90] [--kernels semantic]

**The model.** A warp's instructions are counted in the code of ``nvdisasm``, weighted by how often each runs
(`disassembly`). Each of a multiprocessor's four parts issues one warp instruction a clock. Each pipe is busy for some
clocks a warp instruction:

    ALU (integers, logic, comparisons, selects)      2      MUFU and other conversions (XU)       8
    FMA (float32, halves in pairs)                   1      64-bit conversions                    8, or 64
    IMAD (integer products, a half of the FMA pipe)  2      FP64                                  2, or 64
    LSU (memory, shared memory, shuffles)            4 times the 4-byte words of a thread
    tensor cores                                     multiply-adds over a quarter of `Target.products`

The larger numbers are those of targets with few float64 units. The time of the busiest pipe is that of all programs on
all multiprocessors with this pipe never idle: memory latency, bank conflicts, the last wave and idle issue slots come
on top. The floor is the time in which memory moves the least bytes, or tensor cores do the least products of the call.
Nothing here was measured.

Registers limit a multiprocessor's warps (65,536 in all, given to warps in blocks of 256), and so do shared memory
(1 KiB more than a block asks for), warps and blocks.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from maskformer_fast.kernels.disassembly import Instruction, count_runs

if TYPE_CHECKING:
    from maskformer_fast.kernels.variant import GoalLaunch

RECORD = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "kernel_report.jsonl"
"""Recorded rows, one a line, sorted by call and target."""
ALLOWED_RISE = 1.05
"""Largest ratio of a weighted count to the recorded one."""
PARTS = 4
"""Parts of a multiprocessor that issue instructions."""


@dataclass(frozen=True)
class Target:
    """One GPU of a target."""

    name: str
    multiprocessors: int
    gigahertz: float
    bandwidth: float
    """Bytes a second of memory that a copy reaches or, where none was published, 90 % of the nominal figure."""
    products: int
    """Multiply-adds of float16 with float32 sums of a multiprocessor's tensor cores a clock; half as many of tf32."""
    max_warps: int
    max_blocks: int
    shared_bytes: int
    """Shared memory of a multiprocessor."""
    double_clocks: int
    """Clocks a warp instruction of float64."""
    conversion_clocks: int
    """Clocks a warp conversion from or to 64 bits."""


TARGETS = {
    "sm_87": Target("Jetson AGX Orin 64 GB", 16, 1.3, 0.9 * 204.8e9, 1024, 48, 16, 164 << 10, 64, 64),
    "sm_90": Target("H100 SXM", 132, 1.755, 3.0e12, 2048, 64, 32, 228 << 10, 2, 8),
    "sm_100": Target("B200", 148, 1.85, 0.9 * 8e12, 4096, 64, 32, 228 << 10, 2, 8),
    "sm_120": Target("GeForce RTX 5090", 170, 2.407, 0.9 * 1792e9, 256, 48, 24, 100 << 10, 64, 64),
}
"""Sources: warps, blocks, shared memory, float64 and conversion rates from the CUDA C++ programming guide ("compute
capabilities", "arithmetic instructions"; those of sm_87 are taken to be those of sm_86). The rest from NVIDIA's papers:
Jetson AGX Orin technical brief (16 SMs at 1.3 GHz, 204.8 GB/s; 85 dense INT8 TOPS, half of that in float16), H100 white
paper (132 SMs, 989 TFLOP/s; a clock under load, and a copy of 3.0 of 3.35 TB/s), HGX B200 data sheet (148 SMs, 2.25
PFLOP/s dense, which is 4096 a clock at 1.85 GHz, 8 TB/s), RTX Blackwell white paper (170 SMs, 2.407 GHz boost, 209.5
TFLOP/s with float32 sums, 1792 GB/s)."""

_PIPES = {
    "fma": {"FFMA", "FMUL", "FADD", "FSWZADD", "HADD2", "HMUL2", "HFMA2", "FFMA2", "FADD2", "FMUL2"},
    "imad": {"IMAD", "IMUL", "IDP"},
    "xu": {"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"},
    "fp64": {"DFMA", "DADD", "DMUL", "DSETP", "DMNMX"},
    "tensor": {"HMMA", "IMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "OMMA", "QMMA"},
    "lsu": {
        "LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "LDL", "STL", "LD", "ST", "ATOM", "ATOMG", "ATOMS", "RED",
        "REDG", "REDUX", "CREDUX", "SHFL", "LDTM", "STTM", "MATCH",
    },
    "control": {
        "BRA", "EXIT", "RET", "CALL", "BSSY", "BSYNC", "BREAK", "NOP", "YIELD", "WARPSYNC", "BAR", "DEPBAR",
        "LDGDEPBAR", "MEMBAR", "FENCE", "WARPGROUP", "CCTL", "ERRBAR", "NANOSLEEP", "KILL", "BPT", "SYNCS", "ELECT",
        "LDC", "LDCU", "S2R", "S2UR", "R2UR", "CS2R", "BMOV", "ACQBULK", "ARRIVES", "ENDCOLLECTIVE", "COLLECTIVE",
    },
}  # fmt: skip
"""Pipes -> opcodes. Those that begin with U belong to the uniform data path, all others to the ALU."""
COUNTED = ("issue", "alu", "fma", "imad", "xu", "convert64", "fp64", "tensor", "lsu")
"""Columns of a row that hold numbers of warp instructions; issue is all of them."""


def pipe_of(instruction: Instruction) -> str:
    """Pipe of an instruction; "control" for those that are issued only."""
    name = instruction.name
    if name in ("F2F", "F2I", "I2F", "FRND") and "64" in instruction.opcode:
        return "convert64"
    for pipe, names in _PIPES.items():
        if name in names:
            return "fma" if instruction.opcode.startswith("IMAD.MOV") else pipe
    return "control" if name.startswith("U") else "alu"


def clocks_of(instruction: Instruction, pipe: str, target: Target) -> float:
    """Clocks for which a warp instruction keeps its pipe busy."""
    if pipe == "tensor":
        return _products_of(instruction) * PARTS / target.products
    if pipe == "lsu":
        bits = re.search(r"\.(64|128|M88\.2|M88\.4)(?:\.|$)", instruction.opcode + ".")
        return 4 * {"": 1, "64": 2, "M88.2": 2, "128": 4, "M88.4": 4}[bits[1] if bits else ""]
    return {
        "alu": 2, "fma": 1, "imad": 2, "xu": 8, "convert64": target.conversion_clocks, "fp64": target.double_clocks,
        "control": 0,
    }[pipe]  # fmt: skip


def _products_of(instruction: Instruction) -> float:
    """Multiply-adds of float16 that take the time of one warp's tensor instruction; 0 where its name does not tell."""
    opcode = instruction.opcode
    double = 2.0 if "TF32" in opcode else 1.0
    if match := re.search(r"\.64x(\d+)x(\d+)", opcode):  # of a warp group
        return 64 * int(match[1]) * int(match[2]) * double / 4
    if match := re.search(r"\.(168|1688|16816|16832)(?:\.|$)", opcode):
        depth = int(match[1][3:] or 8)
        return 16 * 8 * depth * double
    return 0.0


def disassemble(cubin: bytes) -> str:
    """Listing of a cubin with labels and lines of source."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-g", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def warps_per_multiprocessor(target: str, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Warps that are resident at a time."""
    limits = TARGETS[target]
    register_blocks = -(-registers * 32 // 256) * 256 * num_warps
    fitting = [65536 // register_blocks, limits.max_warps // num_warps, limits.max_blocks]
    fitting.append(limits.shared_bytes // (shared_bytes + 1024))
    return min(fitting) * num_warps


class MachineCode(Protocol):
    """Properties of `aot.CompiledKernel` that `predict` uses."""

    target: str
    cubin: bytes
    num_warps: int
    shared_bytes: int
    registers: int
    triton_version: str


def predict(module: str, launch: GoalLaunch, kernel: MachineCode) -> dict[str, Any]:
    """Row of a launch: sizes, instructions of a warp by pipe, times in microseconds."""
    target = TARGETS[kernel.target]
    counts: Counter[str] = Counter()
    clocks: Counter[str] = Counter()
    unknown = False
    for instruction, times in count_runs(disassemble(kernel.cubin), launch.work.runs):
        pipe = pipe_of(instruction)
        counts[pipe] += times
        counts["issue"] += times
        clocks["issue"] += times
        clocks[pipe] += times * clocks_of(instruction, pipe, target)
        unknown |= pipe == "tensor" and times > 0 and _products_of(instruction) == 0
    clocks["xu"] += clocks.pop("convert64", 0) if target.conversion_clocks == 8 else 0
    if unknown:  # the instruction's shape is not in its name: at least the products that the call needs
        clocks["tensor"] = launch.work.products / launch.programs / kernel.num_warps * PARTS / target.products
    warps = warps_per_multiprocessor(kernel.target, kernel.registers, kernel.shared_bytes, kernel.num_warps)
    second = target.multiprocessors * PARTS * target.gigahertz * 1e9  # clocks of all parts
    busiest = max(clocks, key=clocks.__getitem__)
    rate = target.products * target.multiprocessors * target.gigahertz * 1e9
    return {
        "call": launch.name,
        "target": kernel.target,
        "module": module,
        "triton": kernel.triton_version,
        "registers": kernel.registers,
        "shared_bytes": kernel.shared_bytes,
        "warps": kernel.num_warps,
        "warps_per_sm": warps,
        "programs": launch.programs,
        "waves": round(launch.programs * kernel.num_warps / (warps * target.multiprocessors), 2) if warps else inf,
        **{name: round(counts[name]) for name in COUNTED},
        "megabytes": round(launch.work.bytes / 1e6, 2),
        "busiest": busiest,
        "busiest_us": round(clocks[busiest] * launch.programs * kernel.num_warps / second * 1e6, 1),
        "floor_us": round(max(launch.work.bytes / target.bandwidth, launch.work.products / rate) * 1e6, 1),
    }


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as text, the calls of a target together."""
    heads = {
        "registers": "regs", "shared_bytes": "shared", "warps_per_sm": "warps/SM", "programs": "programs",
        "waves": "waves", **{name: name for name in COUNTED}, "megabytes": "MB", "busiest": "busiest",
        "busiest_us": "us", "floor_us": "floor us",
    }  # fmt: skip
    lines, target = [], None
    for row in sorted(rows, key=lambda row: (row["target"], row["call"])):
        if row["target"] != target:
            target = row["target"]
            lines.append(f"\n{target}, {TARGETS[target].name}, Triton {row['triton']}")
            lines.append(f"{'':52s}" + "".join(f"{head:>{max(7, len(head) + 1)}s}" for head in heads.values()))
        cells = (f"{row[name]!s:>{max(7, len(head) + 1)}s}" for name, head in heads.items())
        lines.append(f"{row['call']:52s}" + "".join(cells))
    return "\n".join(lines)


def read_record() -> dict[tuple[str, str, str], dict[str, Any]]:
    """Recorded rows by call, target and Triton version."""
    if not RECORD.exists():
        return {}
    return {key_of(row): row for row in map(json.loads, RECORD.read_text().splitlines())}


def write_record(rows: Iterable[dict[str, Any]]) -> None:
    """Replace the recorded rows of the modules, targets and Triton version of the given ones."""
    rows = list(rows)
    replaced = {(row["module"], row["target"], row["triton"]) for row in rows}
    kept = {
        key: row for key, row in read_record().items() if (row["module"], row["target"], row["triton"]) not in replaced
    }
    kept |= {key_of(row): row for row in rows}
    RECORD.write_text("".join(json.dumps(kept[key]) + "\n" for key in sorted(kept)))


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["call"], row["target"], row["triton"]


def risen(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Complaints about rows whose weighted count is more than `ALLOWED_RISE` times the recorded one, or not recorded.

    Rows of a Triton version of which nothing is recorded are left out.
    """
    record = read_record()
    versions = {row["triton"] for row in record.values()}
    complaints = []
    for row in rows:
        if row["triton"] not in versions:
            continue
        recorded = record.get(key_of(row))
        if recorded is None:
            complaints.append(f"{row['call']}, {row['target']}: not recorded")
        elif row["issue"] > ALLOWED_RISE * recorded["issue"]:
            found = f"{recorded['issue']} instructions recorded, {row['issue']} now"
            complaints.append(f"{row['call']}, {row['target']}: {found}")
    return complaints
