"""Folders of Hugging Face's MaskFormer, Mask2Former and EoMT: ``config.json``, weights, image processor.

Every version of `transformers` so far (4.17 to 5.23) saves and reads the same parameter names. Version 5 has other
names of the decoder in memory, which `RULES` lists after them. Both are read, and the saved names are written. Folders
written here were loaded by 4.27, 4.36, 4.57 and 5.23 with no missing or unexpected names. Versions before 4.26 have no
ResNet backbones.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from maskformer_fast.config import BackboneConfig, Config
from maskformer_fast.core.files import write_json
from maskformer_fast.core.metadata import Metadata
from maskformer_fast.interop.architecture import check_fit, meta_model
from maskformer_fast.interop.eomt import (
    MODEL_TYPES as EOMT_TYPES,
)
from maskformer_fast.interop.eomt import (
    eomt_from_ours,
    eomt_to_ours,
    read_eomt,
    rules_of,
    write_eomt,
)
from maskformer_fast.interop.files import read_folder_weights
from maskformer_fast.interop.huggingface_config import (
    Section,
    read_class_names,
    read_config,
    write_config,
    write_processor,
)
from maskformer_fast.interop.huggingface_mask2former import MODEL_TYPE as MASK2FORMER
from maskformer_fast.interop.huggingface_mask2former import RULES as MASK2FORMER_RULES
from maskformer_fast.interop.huggingface_mask2former import (
    mask2former_constants,
    read_mask2former,
    write_mask2former,
)
from maskformer_fast.interop.names import ConvertError, Renamed, Rule, from_ours, to_ours
from maskformer_fast.interop.published import with_published_classes
from maskformer_fast.modeling.backbone import is_swin, resolve_backbone
from maskformer_fast.modeling.swin import WindowAttention
from maskformer_fast.modeling.weights import Checkpoint, CheckpointError, check_depth

CONFIG_NAME = "config.json"
PROCESSOR_NAME = "preprocessor_config.json"
WEIGHTS_NAME = "model.safetensors"

_ENCODER = "model.pixel_level_module.encoder"
_FPN = "model.pixel_level_module.decoder.fpn"
_BLOCK = f"{_ENCODER}.model.encoder.layers.{{i}}.blocks.{{j}}"
_OUR_BLOCK = "backbone.layers.{i}.blocks.{j}"
_LAYER = "model.transformer_module.decoder.layers.{i}"
_OUR_LAYER = "predictor.transformer.decoder.layers.{i}"
_CONV_NORM = (("convolution.weight", "weight"), ("normalization.{leaf}", "norm.{leaf}"))
_SEQUENCE = (("0.weight", "weight"), ("1.{leaf}", "norm.{leaf}"))
_CRITERION = "criterion.empty_weight"
_FINAL_NORM = f"{_ENCODER}.model.layernorm"
_INDEX = f"{_BLOCK}.attention.self.relative_position_index"

_RESNET = [
    *(Rule(f"{_ENCODER}.embedder.embedder.{a}", f"backbone.stem.conv1.{b}") for a, b in _CONV_NORM),
    *(
        Rule(f"{_ENCODER}.encoder.stages.{stage}.layers.{{i}}.{theirs}.{a}", f"backbone.{res}.{{i}}.{ours}.{b}")
        for stage, res in enumerate(("res2", "res3", "res4", "res5"))
        for theirs, ours in (("layer.0", "conv1"), ("layer.1", "conv2"), ("layer.2", "conv3"), ("shortcut", "shortcut"))
        for a, b in _CONV_NORM
    ),
]
_SWIN = [
    Rule(f"{_ENCODER}.model.embeddings.patch_embeddings.projection.{{leaf}}", "backbone.patch_embed.proj.{leaf}"),
    Rule(f"{_ENCODER}.model.embeddings.norm.{{leaf}}", "backbone.patch_embed.norm.{leaf}"),
    Rule(f"{_ENCODER}.hidden_states_norms.{{i}}.{{leaf}}", "backbone.norm{i}.{leaf}"),
    Rule(f"{_ENCODER}.model.encoder.layers.{{i}}.downsample.{{rest*}}", "backbone.layers.{i}.downsample.{rest*}"),
    *(
        Rule(f"{_BLOCK}.attention.self.{name}.{{leaf}}", f"{_OUR_BLOCK}.attn.qkv.{{leaf}}", part=(index, 3))
        for index, name in enumerate(("query", "key", "value"))
    ),
    Rule(f"{_BLOCK}.attention.self.relative_position_bias_table", f"{_OUR_BLOCK}.attn.relative_position_bias_table"),
    *(
        Rule(f"{_BLOCK}.{theirs}.{{leaf}}", f"{_OUR_BLOCK}.{ours}.{{leaf}}")
        for theirs, ours in (
            ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
        )
    ),
    Rule(_INDEX, None),  # follows from the size of the window
    Rule(f"{_FINAL_NORM}.{{leaf}}", None),  # for a pooled output; the features of each stage have their own norm
]
_PIXEL_DECODER = [
    *(Rule(f"{_FPN}.stem.{a}", f"pixel_decoder.layer_4.{b}") for a, b in _SEQUENCE),
    *(
        Rule(f"{_FPN}.layers.{index}.{theirs}.{a}", f"pixel_decoder.{ours}_{3 - index}.{b}")
        for index in range(3)
        for theirs, ours in (("proj", "adapter"), ("block", "layer"))
        for a, b in _SEQUENCE
    ),
    Rule("model.pixel_level_module.decoder.mask_projection.{leaf}", "pixel_decoder.mask_features.{leaf}"),
]
_HEAD = [
    Rule("model.transformer_module.queries_embedder.{leaf}", "predictor.query_embed.{leaf}"),
    Rule("model.transformer_module.input_projection.{leaf}", "predictor.input_proj.{leaf}"),
    *(
        Rule(f"{_LAYER}.{theirs}.{part}_proj.{{leaf}}", f"{_OUR_LAYER}.{ours}.in_proj_{{leaf}}", part=(index, 3))
        for theirs, ours in (("self_attn", "self_attn"), ("encoder_attn", "multihead_attn"))
        for index, part in enumerate("qkv")
    ),
    *(
        Rule(f"{_LAYER}.{theirs}.{{leaf}}", f"{_OUR_LAYER}.{ours}.{{leaf}}")
        for theirs, ours in (
            ("self_attn.out_proj", "self_attn.out_proj"),
            ("encoder_attn.out_proj", "multihead_attn.out_proj"),
            ("fc1", "linear1"),
            ("fc2", "linear2"),
            ("self_attn_layer_norm", "norm1"),
            ("encoder_attn_layer_norm", "norm2"),
            ("final_layer_norm", "norm3"),
            # Names in the memory of version 5, for state dictionaries saved without `save_pretrained`.
            ("self_attn.o_proj", "self_attn.out_proj"),
            ("encoder_attn.o_proj", "multihead_attn.out_proj"),
            ("mlp.fc1", "linear1"),
            ("mlp.fc2", "linear2"),
        )
    ),
    Rule("model.transformer_module.decoder.layernorm.{leaf}", "predictor.transformer.decoder.norm.{leaf}"),
    Rule("class_predictor.{leaf}", "predictor.class_embed.{leaf}"),
    Rule("mask_embedder.{i}.0.{leaf}", "predictor.mask_embed.layers.{i}.{leaf}"),
    Rule(_CRITERION, None),  # follows from the configuration's no_object_weight
]
RULES = [*_RESNET, *_SWIN, *_PIXEL_DECODER, *_HEAD]
"""Rules of MaskFormer."""


class HuggingFaceModel(NamedTuple):
    """Content of a folder. It has no information on which classes are things."""

    weights: dict[str, Tensor]
    """Weights under our names: exactly those of the network of ``config.model``."""
    config: Config
    """Configuration of network, loss weights and inference; the rest has our defaults."""
    class_names: tuple[str, ...] | None
    """Names of the classes; ``None`` where the folder has only generated ones."""


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder in which `transformers` saved a model; checkpoints of ours have no ``config.json``."""
    return Path(path, CONFIG_NAME).is_file()


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a folder as a checkpoint of ours, with the classes that `published_metadata` finds.

    Errors are those of `read_folder`.
    """
    model = read_folder(path)
    config, metadata = with_published_classes(model.config, model.class_names)
    return Checkpoint(config, metadata, model.weights, step=0)


def read_folder(path: str | os.PathLike[str]) -> HuggingFaceModel:
    """Read a model folder of `transformers` 4 or 5.

    Raises:
        FileNotFoundError: no ``config.json``, or no weights beside it.
        ConvertError: a file is damaged; tensors are unknown, missing or misshapen (all are listed); or the
            configuration describes a computation that our network does not have.
    """
    folder = Path(path)
    config = Section(str(folder / CONFIG_NAME), _read_json(folder / CONFIG_NAME))
    processor = None
    if (folder / PROCESSOR_NAME).exists():
        processor = Section(str(folder / PROCESSOR_NAME), _read_json(folder / PROCESSOR_NAME))
    theirs = read_folder_weights(folder)
    classifier = theirs.get("class_predictor.bias")
    if classifier is None or classifier.ndim != 1 or len(classifier) < 2:
        raise ConvertError(f"{folder}: class_predictor.bias: expected one value a class and one for no-object, got "
                           f"{'nothing' if classifier is None else tuple(classifier.shape)}")  # fmt: skip
    class_names = read_class_names(config, len(classifier) - 1)
    if config.get("model_type", "") in EOMT_TYPES:
        try:
            eomt = read_eomt(config, processor, len(classifier) - 1)
        except ConvertError:
            raise
        except ValueError as error:
            raise ConvertError(f"{folder}: {error}") from error
        return HuggingFaceModel(eomt_to_ours(theirs, eomt, folder), eomt, class_names)
    is_mask2former = config.get("model_type", "") == MASK2FORMER
    rules, read = (MASK2FORMER_RULES, read_mask2former) if is_mask2former else (RULES, read_config)
    try:
        ours = read(config, processor, len(classifier) - 1)
        check_depth(ours.model, len(theirs), folder / CONFIG_NAME)
        network = meta_model(ours.model, folder)
    except ConvertError:
        raise
    except CheckpointError as error:
        raise ConvertError(str(error)) from error
    except (ValueError, RuntimeError) as error:
        raise ConvertError(f"{folder}: {error}") from error
    renamed = to_ours(theirs, rules)
    check_fit(network, renamed, rules, folder)
    return HuggingFaceModel(renamed.weights, ours, class_names)


def write_folder(
    path: str | os.PathLike[str], weights: Mapping[str, Tensor], config: Config, metadata: Metadata
) -> None:
    """Write a folder that `transformers` loads, completely or not at all.

    Args:
        path: the folder to make; it may be an empty folder.
        weights: weights of the network of ``config.model``, under our names.
        config: network, loss weights and sizes at inference.
        metadata: classes, and the data set, which decides the values of label images. The format does not store which
            classes are things: ``post_process_panoptic_segmentation`` takes them as ``label_ids_to_fuse``.

    Raises:
        ConvertError: Hugging Face's network cannot express the model (MaskFormer: a transformer encoder in the pixel
            decoder, ResNet-101c, unusual widths; Mask2Former: a ResNet; per-pixel baselines), or the weights are not
            the network's. Nothing is written.
        FileExistsError: ``path`` is a file or a folder that is not empty.
        OSError: the disk is full or cannot be written.
    """
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder}: expected no file, or an empty folder")
    if config.data.channels:
        raise ConvertError(f"checkpoint: expected a network of RGB pictures of 8 bits, as transformers has, got one of "
                           f"{config.data.channels} bands")
    is_mask2former, is_eomt = config.model.type == MASK2FORMER, config.model.type == "eomt"
    write = write_eomt if is_eomt else write_mask2former if is_mask2former else write_config
    config_json = write(config, metadata)
    processor_json = write_processor(config, metadata)
    check_fit(meta_model(config.model, "model"), Renamed(dict(weights), {}, []), (), "weights")
    rules = rules_of(config.model) if is_eomt else MASK2FORMER_RULES if is_mask2former else RULES
    renamed = from_ours(weights, rules).weights
    if is_eomt:
        renamed = eomt_from_ours(renamed, config)
    # Parts of packed tensors share memory, which the format does not allow.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in renamed.items()}
    if is_mask2former:
        tensors |= mask2former_constants(renamed, config)
    elif not is_eomt:
        tensors |= _constants(renamed, resolve_backbone(config.model.backbone), config)
    with _atomic_folder(folder) as temporary:
        try:
            save_file(tensors, str(temporary / WEIGHTS_NAME), metadata={"format": "pt"})
        except SafetensorError as error:  # raised for a full disk, too
            raise OSError(f"{folder}: the weights could not be written: {error}") from error
        write_json(temporary / CONFIG_NAME, config_json)
        write_json(temporary / PROCESSOR_NAME, processor_json)


def _constants(theirs: Mapping[str, Tensor], backbone: BackboneConfig, config: Config) -> dict[str, Tensor]:
    """Buffers of their network, so that none is reported as missing."""
    class_weights = torch.ones(theirs["class_predictor.bias"].shape)
    class_weights[-1] = config.loss.no_object_weight
    constants = {_CRITERION: class_weights}
    if is_swin(backbone):
        channels = theirs[f"{_ENCODER}.hidden_states_norms.3.weight"].shape
        constants |= {f"{_FINAL_NORM}.weight": torch.ones(channels), f"{_FINAL_NORM}.bias": torch.zeros(channels)}
        index = WindowAttention(1, backbone.window_size or 0, 1).relative_position_index
        for stage, depth in enumerate(backbone.depths or ()):
            constants |= {_INDEX.format(i=stage, j=block): index.clone() for block in range(depth)}
    # Frozen norms do not count batches.
    for name in [name for name in theirs if name.endswith(".running_var")]:
        counter = f"{name.removesuffix('running_var')}num_batches_tracked"
        if counter not in theirs:
            constants[counter] = torch.zeros((), dtype=torch.int64)
    return constants


@contextlib.contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Make a temporary folder beside ``folder``, which is renamed to it after the block or removed after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{secrets.token_hex(8)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())  # which may begin with a byte order mark
    except (ValueError, RecursionError) as error:  # ValueError: of JSON or of the encoding
        raise ConvertError(f"{path}: not readable JSON: {error}") from error
