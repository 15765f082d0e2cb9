"""Instruction sets of the C++ operators: those of this processor, and a switch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from maskformer_fast.core.extension import load_extension

ALL_SETS: list[str] = load_extension().available_isas()
"""Names of the instruction sets that this processor runs, the narrowest first."""
INSTRUCTION_SETS = [name for name in ALL_SETS if name not in ("avx512_bf16", "avx512_amx")]
"""Those for which every operator is compiled; the others are of attention alone."""


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run the operators with one instruction set in place of the widest."""
    load_extension().use_isa(name)
    try:
        yield
    finally:
        load_extension().use_isa("auto")
