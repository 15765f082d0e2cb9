"""Classes, things and image sizes of the published models."""

from __future__ import annotations

import pytest

from maskformer_fast.config import BackboneConfig, Config, DecoderConfig, ModelConfig, PixelDecoderConfig
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.data.datasets.presets import preset_metadata
from maskformer_fast.interop.published import published_config, published_metadata, published_recipe, with_things

ENCODER = PixelDecoderConfig(encoder_layers=6)


@pytest.mark.parametrize(
    ("model", "dataset", "short_edge", "size_divisibility", "things"),
    [
        (ModelConfig(num_classes=150), "ade20k_150", 512, 32, 100),
        (ModelConfig(num_classes=150, backbone=BackboneConfig("swin_large")), "ade20k_150", 640, 32, 100),
        (ModelConfig(num_classes=150, pixel_decoder=ENCODER), "ade20k_panoptic", 640, 32, 100),
        (ModelConfig(num_classes=133, pixel_decoder=ENCODER), "coco_panoptic_133", 800, 0, 80),
        (ModelConfig(num_classes=133, backbone=BackboneConfig("swin_tiny")), "coco_panoptic_133", 800, 0, 80),
        (ModelConfig(num_classes=19, backbone=BackboneConfig("resnet101c")), "cityscapes", 1024, 32, 8),
        (ModelConfig(num_classes=171), "coco_stuff_10k", 640, 32, 80),
        (ModelConfig(num_classes=65), "mapillary_vistas", 2048, 32, 37),
        (ModelConfig("per_pixel", num_classes=847), "ade20k_full_847", 512, 0, 0),
    ],
)
def test_the_recipe_of_a_published_model_is_chosen(
    model: ModelConfig, dataset: str, short_edge: int, size_divisibility: int, things: int
) -> None:
    config = published_config(model)
    assert config.data.dataset == dataset
    assert config.test.short_edge == short_edge
    assert config.model.size_divisibility == size_divisibility
    assert (config.model.backbone, config.model.type) == (model.backbone, model.type)
    metadata = published_metadata(model)
    assert metadata == preset_metadata(dataset)
    assert sum(metadata.is_thing) == things


def test_unknown_data_sets_have_generated_metadata() -> None:
    model = ModelConfig(num_classes=3)
    assert published_recipe(model) is None
    assert published_config(model) == Config(model=model)
    metadata = published_metadata(model)
    assert metadata.class_names == ("class_0", "class_1", "class_2") and not any(metadata.is_thing)
    assert len(set(metadata.colors)) == 3
    assert published_metadata(model, ["a", "b", "c"]).class_names == ("a", "b", "c")


def test_names_of_the_source_replace_those_of_the_data_set() -> None:
    model = ModelConfig(num_classes=133)
    coco = preset_metadata("coco_panoptic_133")
    renamed = [name.upper() for name in coco.class_names]
    assert published_metadata(model, renamed).class_names == tuple(renamed)
    assert published_metadata(model, renamed).is_thing == coco.is_thing
    other = published_metadata(model, [f"animal {index}" for index in range(133)])
    assert not any(other.is_thing) and other.name == "converted"


STUFF = Metadata("x", ("a", "b", "c", "d"), (False, True, False, False), (0, 1, 2, 3), ((0, 0, 0),) * 4)


@pytest.mark.parametrize(
    ("things", "expected"),
    [
        (["0-3"], {0, 1, 2, 3}),
        (["0", "2"], {0, 2}),
        (["0,2-3"], {0, 2, 3}),
        (["3-3", "0-1"], {0, 1, 3}),
        ([], set()),
    ],
)
def test_things_are_parsed(things: list[str], expected: set[int]) -> None:
    assert {index for index, thing in enumerate(with_things(STUFF, things).is_thing) if thing} == expected


@pytest.mark.parametrize("things", ["4", "0-4", "2-1", "-1", "a", "", "1-", "0--2", "1 2", "1.5", "²", "99999999999"])
def test_things_that_are_no_classes_are_refused(things: str) -> None:
    with pytest.raises(ValueError, match="things: expected"):
        with_things(STUFF, [things])


@pytest.mark.parametrize(
    ("classes", "backbone", "queries", "recipe", "things"),
    [
        (133, "resnet50", 100, "mask2former/coco_panoptic_r50", 80),
        (133, "swin_large", 200, "mask2former/coco_panoptic_swin_large_in21k_384", 80),
        (80, "swin_tiny", 100, "mask2former/coco_instance_swin_tiny", 80),
        (150, "resnet101", 100, "mask2former/ade20k_semantic_r101", 100),
        (150, "swin_large", 200, "mask2former/ade20k_panoptic_swin_large_in21k_384", 100),
        (100, "resnet50", 100, "mask2former/ade20k_instance_r50", 100),
        (19, "swin_small", 100, "mask2former/cityscapes_semantic_swin_small", 8),
        (19, "swin_large", 200, "mask2former/cityscapes_panoptic_swin_large_in21k_384", 8),
        (8, "resnet50", 100, "mask2former/cityscapes_instance_r50", 8),
        (65, "swin_large", 100, "mask2former/mapillary_semantic_swin_large_in21k_384", 37),
    ],
)
def test_classes_and_queries_decide_the_recipe_of_a_mask2former(
    classes: int, backbone: str, queries: int, recipe: str, things: int
) -> None:
    model = ModelConfig(
        type="mask2former", num_classes=classes, backbone=BackboneConfig(backbone),
        decoder=DecoderConfig(num_queries=queries),
    )  # fmt: skip
    found = published_recipe(model)
    assert found is not None and found.output == f"runs/{recipe}"
    metadata = published_metadata(model)
    assert (metadata.num_classes, sum(metadata.is_thing)) == (classes, things)
    if classes in (8, 80, 100):
        first = {8: "person", 80: "person", 100: "bed"}[classes]
        assert metadata.class_names[0].split(",")[0] == first
