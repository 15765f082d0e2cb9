"""A model's configuration for the server: its tensors, and ``config.pbtxt`` in protocol buffers' text format.

It follows the server's documented schema (``ModelConfig`` of its ``model_config.proto``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskformer_fast.deploy.triton_server.options import TritonServerOptions


@dataclass(frozen=True)
class ServedTensor:
    """An input or output in the server's terms."""

    name: str
    kind: str  # TYPE_UINT8 ...
    dims: tuple[int, ...]  # without the batch where the server batches


@dataclass(frozen=True)
class ServedModel:
    """A model of the repository: its configuration and files."""

    backend: str  # name of the server's backend
    platform: str  # name of the server's platform; empty for the Python backend
    inputs: tuple[ServedTensor, ...]
    outputs: tuple[ServedTensor, ...]
    max_batch: int  # 0: the server does not batch, and shapes include the batch
    preferred: tuple[int, ...]  # batch sizes that the server prefers; may be empty
    files: Mapping[str, bytes]  # path in the version's folder -> content


def model_config(model: ServedModel, name: str, options: TritonServerOptions) -> str:
    """The text of ``config.pbtxt``."""
    fields: list[tuple[str, Any]] = [("name", name), ("backend", model.backend)]
    if model.platform:
        fields.append(("platform", model.platform))
    fields.append(("max_batch_size", model.max_batch))
    for key, tensors in (("input", model.inputs), ("output", model.outputs)):
        fields += [(key, tensor_fields(tensor)) for tensor in tensors]
    fields.append(("instance_group", [("count", options.instances), ("kind", Word(f"KIND_{options.device.upper()}"))]))
    if model.max_batch > 1:
        batching: list[tuple[str, Any]] = [("preferred_batch_size", size) for size in model.preferred]
        if options.queue_delay_us:
            batching.append(("max_queue_delay_microseconds", options.queue_delay_us))
        fields.append(("dynamic_batching", batching))
    if options.response_cache:
        fields.append(("response_cache", [("enable", Word("true"))]))
    if model.backend == "python":
        parameters: list[tuple[str, str]] = [("task", options.task), ("backend", options.backend)]
        parameters += [("precision", options.precision)] if options.precision else []
        for key, value in parameters:
            fields.append(("parameters", [("key", key), ("value", [("string_value", value)])]))
    return text_format(fields)


def tensor_fields(tensor: ServedTensor) -> list[tuple[str, Any]]:
    return [("name", tensor.name), ("data_type", Word(tensor.kind)), *(("dims", size) for size in tensor.dims)]


class Word(str):
    """A value that the text format writes without quotes: a name of an enumeration, or true."""


def text_format(fields: Sequence[tuple[str, Any]], indent: str = "") -> str:
    """Text format of fields in order. A list is a message; a repeated field has several entries."""
    lines = []
    for key, value in fields:
        if isinstance(value, list):
            lines.append(f"{indent}{key} {{\n{text_format(value, indent + '  ')}{indent}}}\n")
        elif isinstance(value, (int, Word)):
            lines.append(f"{indent}{key}: {value}\n")
        else:
            lines.append(f"{indent}{key}: {quoted(value)}\n")
    return "".join(lines)


def quoted(text: str) -> str:
    """A string of the text format. Other characters than plain ASCII become octal bytes of their UTF-8."""
    characters = (chr(b) if 32 <= b < 127 and chr(b) not in '"\\' else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(characters)}"'
