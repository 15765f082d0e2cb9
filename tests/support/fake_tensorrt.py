"""A stand-in for the module ``tensorrt`` in a build, whose engines are JSON lists of the options that were set.

The environment variable FAKE_TENSORRT has words that change its behaviour: old, crash, kill, unbuildable, unparsable,
foreign (an engine with other outputs), bare (without the flags that a later version may drop). Its parser knows plugins
only after they are registered, as the real one does, and lists them in the engine.
"""

from __future__ import annotations

import enum
import json
import os
import signal
from types import SimpleNamespace

import onnx

WORDS = os.environ.get("FAKE_TENSORRT", "").split()
__version__ = "8.6.1" if "old" in WORDS else "11.0.0"


class ILogger:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)


PLUGINS: set[str] = set()


def init_libnvinfer_plugins(logger, namespace: str) -> bool:
    assert namespace == ""
    PLUGINS.add("MultiscaleDeformableAttnPlugin_TRT")
    return True


class IProgressMonitor:
    pass


DataType = enum.Enum("DataType", "FLOAT HALF BF16 UINT8 INT32 INT64 INT8")
MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
FLAGS = "TF32 REFIT" if "bare" in WORDS else "TF32 REFIT VERSION_COMPATIBLE REQUIRE_USER_ALLOCATION"
BuilderFlag = enum.Enum("BuilderFlag", FLAGS)
CREATION = "" if "bare" in WORDS else "STRONGLY_TYPED"
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", CREATION)


class Config:
    def __init__(self) -> None:
        self.builder_optimization_level = 0
        self.progress_monitor = None
        self.set = {"flags": ["TF32"]}

    def clear_flag(self, flag) -> None:
        self.set["flags"].remove(flag.name)

    def set_flag(self, flag) -> None:
        self.set["flags"].append(flag.name)

    def set_memory_pool_limit(self, pool, size) -> None:
        self.set[pool.name] = size

    def add_optimization_profile(self, profile) -> int:
        self.set["profile"] = profile.shapes
        return 0

    def create_timing_cache(self, content: bytes):
        if content.startswith(b"no cache"):
            return None
        return SimpleNamespace(content=content, serialize=lambda: content + b"+")

    def set_timing_cache(self, cache, ignore_mismatch: bool) -> bool:
        if cache is None:
            raise TypeError("incompatible function arguments")
        assert not ignore_mismatch
        return not cache.content.startswith(b"other GPU")


class Profile:
    def set_shape(self, name, *shapes) -> None:
        self.shapes = {name: shapes}


class Builder:
    def __init__(self, logger) -> None:
        self.logger = logger

    def create_network(self, flags: int):
        return SimpleNamespace(flags=flags)

    create_builder_config = Config
    create_optimization_profile = Profile

    def build_serialized_network(self, network, config) -> bytes | None:
        os.write(1, b"a library's word without an end of line")
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        for step in range(2):
            monitor.phase_start("Timing", "Building", 4)
            for inner in range(4):
                assert monitor.step_complete("Timing", inner)
            monitor.phase_finish("Timing")
            assert monitor.step_complete("Building", step)
        if "crash" in WORDS:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "kill" in WORDS:
            os.kill(os.getpid(), signal.SIGKILL)
        if "unbuildable" in WORDS:
            self.logger.log(ILogger.Severity.ERROR, "no kernel for node conv2")
            return None
        content = {**config.set, "level": config.builder_optimization_level, "network_flags": network.flags}
        content["plugins"] = network.plugins
        return json.dumps(content).encode()


def tensor(value):
    kind = {1: "FLOAT", 2: "UINT8", 10: "HALF", 16: "BF16"}[value.type.tensor_type.elem_type]
    return SimpleNamespace(name=value.name, dtype=DataType[kind], shape=(-1,) * len(value.type.tensor_type.shape.dim))


class OnnxParser:
    def __init__(self, network, logger) -> None:
        self.network, self.num_errors = network, 1

    def parse(self, content: bytes) -> bool:
        graph = onnx.load_from_string(content).graph
        OnnxParser.graph = graph
        self.network.num_inputs, self.network.num_outputs = len(graph.input), len(graph.output)
        self.network.get_input = lambda index: tensor(graph.input[index])
        self.network.get_output = lambda index: tensor(graph.output[index])
        plugins = [node for node in graph.node if node.op_type.endswith("Plugin_TRT")]
        self.error = ("Einsum", "masks") if "unparsable" in WORDS else None
        self.network.plugins = []
        for node in plugins:
            options = {a.name: onnx.helper.get_attribute_value(a).decode() for a in node.attribute}
            if node.op_type not in PLUGINS or len(node.input) != 5 or node.domain:
                self.error = (node.op_type, node.name)
            self.network.plugins.append([node.op_type, options["plugin_version"]])
        return self.error is None

    def get_error(self, index: int):
        operator, name = self.error
        return SimpleNamespace(node_operator=lambda: operator, node_name=lambda: name, desc=lambda: "not known")


class Runtime:
    def __init__(self, logger) -> None:
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, content: bytes):
        if "VERSION_COMPATIBLE" in json.loads(content)["flags"] and not self.engine_host_code_allowed:
            return None
        graph = OnnxParser.graph
        tensors = {t.name: t for t in map(tensor, (*graph.input, *graph.output))}
        if "foreign" in WORDS:
            tensors.pop("mask_logits")
        return SimpleNamespace(
            num_io_tensors=len(tensors), get_tensor_name=list(tensors).__getitem__,
            get_tensor_dtype=lambda name: tensors[name].dtype, get_tensor_shape=lambda name: tensors[name].shape,
        )
