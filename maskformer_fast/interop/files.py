"""Reading tensors from files of other implementations, without running code that such files may contain.

The first bytes decide the kind of a file, not its name: a zip archive or an old stream of ``torch.save``, a safetensors
file, or a plain pickle as detectron2 writes it.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskformer_fast.interop.archive import check_archive
from maskformer_fast.interop.names import ConvertError
from maskformer_fast.interop.unpickle import inspect_torch
from maskformer_fast.interop.unpickle import load as load_pickle
from maskformer_fast.modeling.weights import read_tensors

logger = logging.getLogger(__name__)

FOLDER_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Names of the files of weights in a Hugging Face folder, in the order of preference."""

_ZIP = b"PK\x03\x04"
_OLD_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before 1.6
_OLD_PICKLES = 5  # magic number, version, system, content, names of the storages
_OTHERS = {
    b"<": "HTML or XML: perhaps a download that failed", b"\x1f\x8b": "a file of gzip: unpack it first",
    b"\x89HDF": "HDF5, as Keras writes it: save the weights by PyTorch", b"\x93NUMPY": "a single array of NumPy",
    b'{"': "JSON: the weights are another file", b"\x08": "perhaps ONNX: a graph, whose weights have other names",
}  # fmt: skip
"""Beginnings of files that are taken for weights, and what they are."""
_GIT_LFS = b"version https://"  # text file in the place of a large file that was not fetched
_WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "module", "network", "net", "weights", "params",
             "state", "ema", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema")  # fmt: skip
"""Keys below which training programs store the named tensors; the first is opened, also one in another."""
_PREFIXES = ("module.", "model.", "_orig_mod.", "_fsdp_wrapped_module.", "network.", "net.")
"""Beginnings of all names of a wrapped network (of DistributedDataParallel, Lightning, torch.compile, FSDP)."""
_WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of names that wrappers of a part of a network add, anywhere in a name."""
_LANDMARKS = ("sem_seg_head.", "class_predictor.")
"""Names of an official model and of one of Hugging Face, by which a network is found among other tensors."""
_MAX_WRAPPERS = 4
_NUMPY = ("numpy.dtype", "numpy.ndarray", *(
    f"numpy.{module}.multiarray.{name}" for module in ("core", "_core") for name in ("scalar", "_reconstruct")
))  # fmt: skip
"""NumPy's names in states of training (metrics, random numbers), each of which has a stand-in that is never used."""
_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_MAX_SHARING = 4
"""Largest ratio of the tensors' bytes to the file's: tensors that share memory could otherwise fill all memory."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the named tensors of a file, on the CPU, in the file's order.

    Args:
        path: a pickle of NumPy arrays (``.pkl``), a file of ``torch.save`` (``.pth``, ``.pt``, ``.bin``), a safetensors
            file, or the ``.index.json`` of a sharded one. ``{"model": {...}}``, ``{"state_dict": {...}}`` and the like
            are unwrapped; other entries beside them (optimiser, iteration) are ignored.

    Returns:
        Floating-point tensors as float32, others with their own type. What wrappers add to names (``module.``,
        ``model.``, ``_orig_mod.``) is taken off, and tensors beside a network (of metrics or a loss) are left out; both
        are logged.

    Raises:
        FileNotFoundError: no such file.
        ConvertError: a file that is damaged, empty, of another kind, or that imports other names than those of arrays;
            or several networks.
    """
    path = Path(path)
    weights = _without_common_prefix(_read_named(path), path)
    weights = _without_common_prefix(_without_wrapped_parts(weights, path), path)
    return _network_of(weights, path)


def _without_common_prefix(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Take the `_PREFIXES` off that all names begin with."""
    prefix = ""
    while common := [text for text in _PREFIXES if weights and all(name.startswith(text) for name in weights)]:
        weights = {name.removeprefix(common[0]): tensor for name, tensor in weights.items()}
        prefix += common[0]
    if prefix:
        logger.info("%s: all names begin with %r, which was taken off", path, prefix)
    return weights


def _without_wrapped_parts(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Take the parts `_WRAPPED` out of all names, unless two names would become one."""
    names = {name: ".".join(part for part in name.split(".") if part not in _WRAPPED) for name in weights}
    changed = [name for name, plain in names.items() if name != plain]
    if not changed or len(set(names.values())) < len(names) or "" in names.values():
        return weights
    parts = [f"{part}." for part in _WRAPPED if any(part in name.split(".") for name in changed)]
    listed = " and ".join(map(repr, parts))
    logger.info("%s: %s taken out of %d names, as of %s", path, listed, len(changed), changed[0])
    return {names[name]: tensor for name, tensor in weights.items()}


def _network_of(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Choose the tensors of the one network whose `_LANDMARKS` stand below another name.

    Raises:
        ConvertError: there are several.
    """
    found = (name.partition(mark)[0] for name in weights for mark in _LANDMARKS if f".{mark}" in f".{name}")
    prefixes = sorted({prefix for prefix in found if not prefix or prefix.endswith(".")})
    if len(prefixes) > 1:
        raise ConvertError(f"{path}: expected one network, got {len(prefixes)}, whose names begin with "
                           f"{', '.join(map(repr, prefixes))}: save one of them alone")
    if prefixes in ([], [""]):
        return weights
    chosen = {name.removeprefix(prefixes[0]): tensor for name, tensor in weights.items()
              if name.startswith(prefixes[0])}
    others = [name for name in weights if not name.startswith(prefixes[0])]
    logger.info("%s: took the names that begin with %r, without that; left out %d others%s", path, prefixes[0],
                len(others), f": {', '.join(others[:5])}" if others else "")
    return chosen


def _read_named(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a file, under the names that they have there."""
    if path.is_dir():
        raise ConvertError(f"{path}: expected a file of weights, got a folder")
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if not start:
            raise ConvertError("expected weights, got an empty file")
        if start == _GIT_LFS:
            raise ConvertError("expected weights, got a pointer of Git LFS: fetch the file itself with `git lfs pull`")
        if path.name.endswith(".index.json"):
            return _read_shards(path)
        if path.suffix == ".safetensors" or (start[8:9] == b"{" and start[:1] != b"\x80"):
            content: Any = _read_safetensors(path)
        elif start.startswith(_ZIP) or start.startswith(_OLD_TORCH):
            content = load_torch(path)
        elif other := [name for beginning, name in _OTHERS.items() if start.startswith(beginning)]:
            raise ConvertError(f"expected weights, got {other[0]}")
        else:
            with path.open("rb") as file:
                content = load_pickle(file)
        return _tensors(content, _MAX_SHARING * path.stat().st_size)
    except ConvertError as error:
        raise ConvertError(f"{path}: {error}") from error


def read_folder_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read the named tensors of a Hugging Face folder from the first of `FOLDER_FILES` that exists.

    Raises:
        FileNotFoundError: none of them exists.
        ConvertError: as in `read_weights`.
    """
    for name in FOLDER_FILES:
        if (path := Path(folder) / name).is_file():
            return read_weights(path)
    raise FileNotFoundError(f"{folder}: expected one of {', '.join(FOLDER_FILES)}, found none")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as reader:
            return read_tensors(reader)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ConvertError(f"not a readable safetensors file: {error}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Tensors of all files that an index lists, which must lie beside it."""
    try:
        listed = json.loads(index.read_bytes())["weight_map"]
        files = sorted(set(listed.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConvertError(f"not a readable index of shards: {error}") from error
    weights: dict[str, Tensor] = {}
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or name.endswith(".index.json"):
            raise ConvertError(f"expected names of files beside the index, got {name!r}")
        if not (index.parent / name).is_file():
            raise ConvertError(f"shard {name}: no such file")
        shard = _read_named(index.parent / name)
        if twice := sorted(set(shard) & set(weights)):
            raise ConvertError(f"shard {name}: {', '.join(twice)}: in another shard too")
        weights |= shard
    if absent := sorted(set(listed) - set(weights)):
        raise ConvertError(f"expected the shards to hold {', '.join(absent)}")
    return weights


def load_torch(path: Path) -> Any:
    """Read tensors and plain containers by `torch.load`, on the CPU. Refuse archives that unpack to more than the file.

    Raises:
        ConvertError: a file that is damaged, of another kind, or refused. The message does not have the path.
    """
    try:
        with path.open("rb") as file:
            is_old = file.read(len(_OLD_TORCH)) == _OLD_TORCH
            if is_old:
                file.seek(0)
                inspect_torch(file, _OLD_PICKLES)
        if not is_old:  # what is none of both is no file of torch.save
            check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged files seem to be of unknown versions
            with torch.serialization.safe_globals([(_NumpyValue, name) for name in _NUMPY]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except ConvertError:
        raise
    except Exception as error:  # torch raises nearly anything for a damaged file
        # torch's own text recommends to switch the protection off.
        if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ConvertError(f"refused: the file imports {refused[1]}, expected tensors in plain containers alone; "
                               "nothing of it was run; where the file is trusted, let the program that wrote it save "
                               "the named tensors alone") from error
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConvertError(f"not a readable file of torch.save: {text[:300]}") from error


class _NumpyValue:
    """Stand-in for a number or array of NumPy: nothing of it is made."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def _tensors(content: Any, limit: int) -> dict[str, Tensor]:
    """Unwrap and convert named tensors, whose original types may take ``limit`` bytes in total."""
    for _ in range(_MAX_WRAPPERS):  # a dictionary may contain itself
        inner = [content[key] for key in _WRAPPERS if isinstance(content, Mapping) and key in content]
        content = next((part for part in inner if isinstance(part, Mapping)), content)
    if not isinstance(content, Mapping):
        raise ConvertError(f"expected a dictionary of named tensors, got {type(content).__name__}")
    if not content:
        raise ConvertError("expected named tensors, got an empty dictionary")
    problems: list[str] = []
    weights: dict[str, Tensor] = {}
    taken = 0
    for name, value in content.items():
        if not isinstance(name, str) or not name.isprintable():
            problems.append(f"{name!r}: expected a printable text as a name")
            continue
        try:
            _check_plain(value)
            taken += value.nbytes
            if taken > limit:
                raise ConvertError(f"{name}: expected tensors that take no more than the file, got the same memory "
                                   "again and again")
            weights[name] = _tensor(value)
        except TypeError as error:
            problems.append(f"{name}: {error}")
    if problems:
        if any(isinstance(value, Mapping) for value in content.values()):
            problems.append(f"(tensors in a dictionary are read where its key is one of {', '.join(_WRAPPERS)})")
        raise ConvertError("expected named tensors, got\n  " + "\n  ".join(problems))
    return weights


def _check_plain(value: Any) -> None:
    """Raise ``TypeError`` unless the value is an array or a tensor of numbers in memory."""
    if isinstance(value, (np.ndarray, np.generic)):
        return
    if isinstance(value, _NumpyValue):
        raise TypeError("a number or array of NumPy, which is not read from files of torch.save")
    if not isinstance(value, Tensor):
        raise TypeError(f"an object of type {type(value).__name__}")
    if value.layout != torch.strided or value.dtype not in _DTYPES or value.device.type != "cpu":
        raise TypeError(f"a tensor that is not a plain one of numbers ({value.layout}, {value.dtype}, {value.device})")


def _tensor(value: np.ndarray | np.generic | Tensor) -> Tensor:
    """Copy a value to a tensor, floating point as float32."""
    if isinstance(value, Tensor):
        tensor = value.detach().clone(memory_format=torch.contiguous_format)
    else:
        array = np.asarray(value)
        tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    if not tensor.is_floating_point():
        return tensor
    single = tensor.to(torch.float32)
    if tensor.dtype == torch.float64 and bool((single.isinf() & tensor.isfinite()).any()):
        raise TypeError("numbers too large for float32")
    return single
