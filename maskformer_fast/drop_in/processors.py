"""Equip an image processor of transformers with the fast functions, and take them off again."""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any, TypeVar

from maskformer_fast.drop_in import eomt, mask2former, maskformer, oneformer
from maskformer_fast.drop_in.swap import restore_methods, swap_methods

Processor = TypeVar("Processor")
METHODS = (
    "post_process_semantic_segmentation",
    "post_process_instance_segmentation",
    "post_process_panoptic_segmentation",
)
_FAMILIES: dict[str, ModuleType] = {
    "Mask2Former": mask2former, "MaskFormer": maskformer, "OneFormer": oneformer, "Eomt": eomt
}  # fmt: skip


def equip(processor: Processor, **options: Any) -> Processor:
    """Replace the post-processing of one image processor, and return it.

    The processor gets a subclass of its class, of the same name, so that saving, copying and pickling go on as before.

    Args:
        processor: of MaskFormer, Mask2Former, OneFormer or EoMT (which EoMT-DINOv3 shares), with any backend; also a
            processor that has it as ``image_processor``. Classes are told by their names, and nothing is imported.
        options: arguments for every call that takes them, such as ``exact="official"``.

    Raises:
        TypeError: a processor of another family, options that no function takes.
    """
    target = _image_processor(unequip(processor))
    family = _family(target)
    accepted = {name: set(inspect.signature(getattr(family, name)).parameters) for name in METHODS}
    if unknown := set(options) - set().union(*accepted.values()):
        raise TypeError(f"options: expected arguments of {family.__name__}, got {', '.join(sorted(unknown))}")
    methods = {}
    for name in METHODS:
        taken = {key: value for key, value in options.items() if key in accepted[name]}
        if "antialias" in accepted[name]:
            taken.setdefault("antialias", not type(target).__name__.endswith("Pil"))
        methods[name] = _method(family, name, taken)
    swap_methods(target, methods, equip, options)
    return processor


def unequip(processor: Processor) -> Processor:
    """Take the fast functions off again, so that the processor has its own, and return it."""
    target = _image_processor(processor)
    restore_methods(target)
    return processor


def _image_processor(processor: Any) -> Any:
    return getattr(processor, "image_processor", processor)


def _family(processor: object) -> ModuleType:
    for parent in type(processor).__mro__:
        for prefix, family in _FAMILIES.items():
            if parent.__name__.startswith(f"{prefix}ImageProcessor"):
                return family
    expected = ", ".join(f"{prefix}ImageProcessor" for prefix in _FAMILIES)
    raise TypeError(f"processor: expected one of {expected}, got {type(processor).__name__}")


def _method(family: ModuleType, name: str, options: dict[str, Any]) -> Any:
    function = getattr(family, name)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        given = signature.bind_partial(*arguments, **keywords)
        for key, value in options.items():
            given.arguments.setdefault(key, value)
        # read at each call, as the methods that are replaced do
        if family is eomt and given.arguments.get("size") is None:
            given.arguments["size"] = self.size
        if family is oneformer and name == "post_process_instance_segmentation":
            for key in ("metadata", "class_info_file"):
                given.arguments.setdefault(key, getattr(self, key, None))
        return function(*given.args, **given.kwargs)

    owner = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    vars(call)["__signature__"] = signature.replace(parameters=[owner, *signature.parameters.values()])
    return call
