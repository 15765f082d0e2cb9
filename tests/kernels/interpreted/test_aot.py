from __future__ import annotations

import pytest

from maskformer_fast.kernels.aot import all_variants, compile_kernel


def test_interpreter_cannot_compile() -> None:
    with pytest.raises(RuntimeError, match="kernels cannot be compiled where TRITON_INTERPRET is set"):
        compile_kernel(all_variants()["class_probabilities"], "sm_87")
