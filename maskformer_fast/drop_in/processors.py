"""Equip an image processor of transformers with the fast functions, and take them off again."""

from __future__ import annotations

import functools
import inspect
from types import ModuleType, new_class
from typing import Any, TypeVar

from maskformer_fast.drop_in import eomt, mask2former, maskformer, oneformer

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
    members: dict[str, Any] = {"_plain_class": type(target), "_options": options, "__reduce__": _reduce}
    for name in METHODS:
        taken = {key: value for key, value in options.items() if key in accepted[name]}
        if "antialias" in accepted[name]:
            taken.setdefault("antialias", not type(target).__name__.endswith("Pil"))
        members[name] = _method(family, name, taken)
    plain: Any = type(target)
    members.update((key, getattr(plain, key)) for key in ("__module__", "__qualname__", "__doc__"))
    target.__class__ = new_class(plain.__name__, (plain,), exec_body=lambda names: names.update(members))
    return processor


def unequip(processor: Processor) -> Processor:
    """Take the fast functions off again, so that the processor has its own, and return it."""
    target = _image_processor(processor)
    if plain_class := vars(type(target)).get("_plain_class"):
        target.__class__ = plain_class
    return processor


def _image_processor(processor: Any) -> Any:
    return getattr(processor, "image_processor", processor)


def _reduce(self: Any) -> tuple[Any, ...]:
    return _restore, (self._plain_class, self._options, self.__dict__)


def _restore(plain_class: type, options: dict[str, Any], state: dict[str, Any]) -> Any:
    processor: Any = object.__new__(plain_class)
    processor.__dict__.update(state)
    return equip(processor, **options)


def _family(processor: object) -> ModuleType:
    for parent in type(processor).__mro__:
        for prefix, family in _FAMILIES.items():
            if parent.__name__.startswith(f"{prefix}ImageProcessor"):
                return family
    expected = ", ".join(f"{prefix}ImageProcessor" for prefix in _FAMILIES)
    raise TypeError(f"processor: expected one of {expected}, got {type(processor).__name__}")


def _method(family: ModuleType, name: str, options: dict[str, Any]) -> Any:
    function = getattr(family, name)

    @functools.wraps(function)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        # read at each call, as the methods that are replaced do
        if family is eomt and keywords.get("size") is None:
            place = {"post_process_semantic_segmentation": 2, "post_process_instance_segmentation": 3}.get(name, 6)
            if len(arguments) <= place:
                keywords["size"] = self.size
        if family is oneformer and name == "post_process_instance_segmentation":
            keywords.setdefault("metadata", getattr(self, "metadata", None))
            keywords.setdefault("class_info_file", getattr(self, "class_info_file", None))
        return function(*arguments, **{**options, **keywords})

    return call
