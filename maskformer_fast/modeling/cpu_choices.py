"""Which implementation of a layer is the fastest on this processor.

Libraries differ by factors from processor to processor: MKL multiplies float32 matrices on some of AMD's slower than
oneDNN, and oneDNN's bfloat16 convolutions use matrix units that only some have. Matrices go by a rule.
Convolutions go by measurements of some milliseconds, which inference alone asks for. Each is made once, when the first
map of such a size comes, and told to this module's logger with its times (level INFO). The times are kept in the file
``cpu_choices.json`` of the user's cache folder, by processor, version of PyTorch and number of threads. The environment
variable ``MASKFORMER_FAST_CACHE`` names another folder; empty, it prevents the file. A file that is damaged or cannot
be written costs new measurements and nothing else.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskformer_fast.core.files import write_json
from maskformer_fast.core.machine import processor_name, processor_vendor
from maskformer_fast.ops.convolution import conv3x3_winograd, pack_winograd_weights
from maskformer_fast.ops.linear import has_avx512, has_both_libraries

logger = logging.getLogger(__name__)

_PRODUCTS = 2**26
"""Products of the maps on which convolutions are compared, for each tap: those of a ResNet's stages at 512x512."""
_LARGEST_SIDE = 128
"""Largest height and width of these maps; they shrink to those of the network's, by powers of two."""
_SHORT_SUM = 128
"""Inputs of a linear layer up to which oneDNN is faster than MKL on processors without AVX-512."""
_ROUNDS = 4
"""Calls of each implementation, by turns; the least time counts."""
PLAIN: tuple[str, list[Any], str] = ("none", [], "")
"""What oneDNN's linear layers take for "no activation"."""
GEOMETRY: tuple[list[int], list[int], list[int], int] = ([1, 1], [1, 1], [1, 1], 1)
"""Padding, stride, dilation and groups of a 3x3 convolution that keeps the size."""


def packed_linear_is_faster(channels: int, gelu: bool = False) -> bool:
    """Whether oneDNN with packed weights computes a float32 layer of so many inputs faster than MKL does.

    It does with AVX-512: by up to twice on AMD's processors, and by some percent on Intel's, as bias, activation and
    residual are applied where the product is written. Without AVX-512 MKL is faster, but where the sums are short, and
    on AMD's with GELU. A rule, as `onednn_is_faster` is.
    """
    if not has_both_libraries():
        return False
    return has_avx512() or channels <= _SHORT_SUM or (gelu and processor_vendor() == "AuthenticAMD")


def winograd_is_faster(in_channels: int, out_channels: int, dtype: torch.dtype, pixels: int) -> bool:
    """Whether `conv3x3_winograd` is faster than oneDNN's direct convolution in this dtype, on maps of so many pixels.

    On small maps it is slower, as its weights take four times the memory.
    """
    most = max(math.isqrt(_PRODUCTS // (in_channels * out_channels)), 1)
    side = min(2 ** round(math.log2(pixels) / 2), most, _LARGEST_SIDE)
    return _winograd_wins(in_channels, out_channels, dtype, side, torch.get_num_threads())


@functools.cache
def _winograd_wins(in_channels: int, out_channels: int, dtype: torch.dtype, side: int, threads: int) -> bool:
    def runs() -> dict[str, Callable[[], object]]:
        images = _random(1, in_channels, side, side).to(dtype, memory_format=torch.channels_last)
        weight = _random(out_channels, in_channels, 3, 3)
        transformed = pack_winograd_weights(weight)
        direct = weight.to(dtype, memory_format=torch.channels_last)
        packed = torch.ops.mkldnn._reorder_convolution_weight(direct, *GEOMETRY, list(images.shape))
        return {
            "Winograd": lambda: conv3x3_winograd(images, transformed, None, out_channels),
            "direct": lambda: torch.ops.mkldnn._convolution_pointwise(images, packed, None, *GEOMETRY, *PLAIN),
        }

    what = f"{dtype} convolution 3x3, {in_channels} to {out_channels} channels, {side}x{side}"
    return _fastest(what, ("Winograd", "direct"), runs, threads) == "Winograd"


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _fastest(
    what: str, names: tuple[str, ...], runs: Callable[[], Mapping[str, Callable[[], object]]], threads: int
) -> str:
    """Name of the function that takes the least time, by the cache or a measurement."""
    machine = f"{processor_name()}, torch {torch.__version__}, {threads} threads"
    least = _cached_times(machine, what, names)
    origin = "kept" if least is not None else "measured"
    if least is None:
        times: dict[str, list[float]] = {name: [] for name in names}
        functions = runs()
        for _ in range(_ROUNDS):
            for name in names:
                times[name].append(_seconds(functions[name]))
        least = {name: min(seconds) for name, seconds in times.items()}
        _keep(machine, what, least)
    best = min(least, key=least.__getitem__)
    found = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in least.items())
    logger.info("%s: %s (%s), so %s is taken", what, found, origin, best)
    return best


def cache_file() -> Path | None:
    """File that keeps the measured times; None where the environment prevents it."""
    folder = os.environ.get("MASKFORMER_FAST_CACHE")
    if folder is None:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "maskformer_fast")
    return Path(folder, "cpu_choices.json") if folder else None


def _read_cache() -> dict[str, Any]:
    """Content of the cache, {machine: {what: {name: seconds}}}; empty where there is none or it is damaged."""
    file = cache_file()
    try:
        content = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _cached_times(machine: str, what: str, names: tuple[str, ...]) -> dict[str, float] | None:
    of_machine = _read_cache().get(machine)
    times = of_machine.get(what) if isinstance(of_machine, dict) else None
    if not isinstance(times, dict) or set(times) != set(names):
        return None
    fits = all(isinstance(seconds, float) and 0 < seconds < math.inf for seconds in times.values())
    return {name: times[name] for name in names} if fits else None


def _keep(machine: str, what: str, times: Mapping[str, float]) -> None:
    """Add times to the cache; what another process writes at the same moment may be lost, and is measured again."""
    file = cache_file()
    if file is None:
        return
    content = _read_cache()
    of_machine = content.get(machine)
    content[machine] = {**(of_machine if isinstance(of_machine, dict) else {}), what: dict(times)}
    try:
        write_json(file, content)
    except OSError as error:
        logger.info("%s: the times are not kept, as it cannot be written (%s)", file, error)


def _seconds(run: Callable[[], object]) -> float:
    # A single thread's own time leaves out what other processes, and other threads of this one, do meanwhile.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        run()
    return clock() - start
