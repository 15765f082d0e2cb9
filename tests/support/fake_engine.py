"""A stand-in for `tensorrt` on a fake GPU.

Its network writes logits that depend on the images, and overwrites its scratch memory.
"""

from __future__ import annotations

import ctypes
import json
import types
from enum import IntEnum
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np

from tests.support.fake_cuda import POISON, FakeDriver


def logits_of(
    images: np.ndarray, queries: int, classes: int, mask_size: tuple[int, int], dtype: str
) -> list[np.ndarray]:
    """Logits of the fake network for images [B, 3, h, w]: class logits [B, Q, K+1], mask logits [B, Q, h', w']."""
    logits = []
    for image in images:
        random = np.random.default_rng(image.astype(np.int64).sum() % (1 << 31))
        height, width = mask_size
        coarse = random.normal(0, 4, (queries, 4, 4)).repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)
        masks = coarse[:, :height, :width] + random.normal(0, 1, (queries, height, width))
        logits.append((random.normal(0, 3, (queries, classes + 1)), masks))
    class_logits, mask_logits = (np.stack(parts) for parts in zip(*logits, strict=True))
    return [class_logits.astype(np.float32), mask_logits.astype(dtype)]


def array_at(address: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype).reshape(shape)


def fake_tensorrt(driver: FakeDriver, version: str = "10.9.0.34", rtx: bool = False) -> types.ModuleType:
    """The module. An engine's file is JSON: queries, classes, divisor of padding, type of mask logits, scratch bytes.

    With ``rtx`` contexts take settings, as in TensorRT for RTX.
    """
    module = types.ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)
    module.__version__ = version

    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    class ILogger:
        pass

    ILogger.Severity = Severity  # type: ignore[attr-defined]

    class Strategy(IntEnum):
        STATIC = 0
        USER_MANAGED = 2

    class Specialisation(IntEnum):
        LAZY = 0
        EAGER = 1

    class Settings:
        dynamic_shapes_kernel_specialization_strategy = Specialisation.LAZY
        strategy = Strategy.STATIC

        def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
            self.strategy = strategy

    class DataType(IntEnum):
        FLOAT = 0
        HALF = 1
        UINT8 = 5

        def __str__(self) -> str:
            return f"DataType.{self.name}"

    class Context:
        active_optimization_profile = 0

        def __init__(self, facts: dict[str, Any]) -> None:
            self.facts = facts
            self.addresses: dict[str, int] = {}
            module.contexts += 1

        def __del__(self) -> None:
            module.contexts -= 1

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shape = shape
            return name == "images" and shape[2] <= self.facts.get("most", 1 << 30)

        def update_device_memory_size_for_shapes(self) -> int:
            return int(self.facts["scratch"])

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            batch, _, height, width = self.shape
            step, queries = self.facts["divisor"], self.facts["queries"]
            if name == "class_logits":
                return batch, queries, self.facts["classes"] + 1
            return batch, queries, -(-height // step) * step // 4, -(-width // step) * step // 4

        def set_device_memory(self, address: int, size: int) -> None:
            assert address % 256 == 0 and size >= self.facts["scratch"]
            self.scratch = (address, size)

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert address % 256 == 0
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            module.enqueued += 1
            if self.facts.get("uncapturable") and stream in driver.capturing:
                module.logger.log(Severity.ERROR, "not permitted when stream is capturing")
                return False
            if self.facts.get("broken"):
                module.logger.log(Severity.ERROR, "the fake network is broken")
                return False
            driver.do(stream, self._work)
            return True

        def _work(self) -> None:
            images = array_at(self.addresses["images"], "uint8", self.shape).copy()
            ctypes.memset(self.scratch[0], POISON, self.scratch[1])
            mask_size = self.get_tensor_shape("mask_logits")[2:]
            facts = self.facts
            logits = logits_of(images, facts["queries"], facts["classes"], mask_size, facts["dtype"])
            for name, content in zip(("class_logits", "mask_logits"), logits, strict=True):
                array_at(self.addresses[name], str(content.dtype), content.shape)[:] = content

    class Engine:
        names = ("images", "class_logits", "mask_logits")
        num_io_tensors = 3

        def __init__(self, facts: dict[str, Any]) -> None:
            self.facts = facts

        def get_tensor_name(self, index: int) -> str:
            return self.names[index]

        def get_tensor_dtype(self, name: str) -> DataType:
            if name == "images":
                return DataType.UINT8
            half = name == "mask_logits" and self.facts["dtype"] == "float16"
            return DataType.HALF if half else DataType.FLOAT

        def create_execution_context(self, settings: Any) -> Context:
            if rtx:
                assert settings.dynamic_shapes_kernel_specialization_strategy == Specialisation.EAGER
                settings = settings.strategy
            assert settings == Strategy.USER_MANAGED
            return Context(self.facts)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            module.logger = logger

        def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
            module.deserialised += 1
            try:
                return Engine(json.loads(content))
            except ValueError:
                module.logger.log(Severity.ERROR, "no engine of mine")
                return None

    if rtx:
        Context.is_stream_capturable = lambda self, stream: not self.facts.get("uncapturable")  # type: ignore[attr-defined]
        module.DynamicShapesKernelSpecializationStrategy = Specialisation
        Engine.create_runtime_config = lambda self: Settings()  # type: ignore[attr-defined]
    module.ILogger, module.Runtime, module.ExecutionContextAllocationStrategy = ILogger, Runtime, Strategy
    module.contexts = module.enqueued = module.deserialised = 0
    return module
