"""Reading and checking recorded outputs of the official implementation.

`case.pt` has a batch of images with all outputs of the official network for it. `synth.pt` has outputs of
post-processing and criterion for synthetic predictions, without a network. Both files are dictionaries of tensors and
plain containers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from maskformer_fast.interop.files import load_torch
from maskformer_fast.interop.names import ConvertError
from maskformer_fast.interop.verification.recording_checks import (
    EVALUATION_KEYS,
    TRAINING_KEYS,
    Checker,
    check_case,
    check_synth,
)

CASE_NAME = "case.pt"
SYNTH_NAME = "synth.pt"
DESCRIPTIONS = {
    "images", "image_sizes", "padded_size", "size_divisibility", "sizes", "thresholds", "thresholds_loose", "targets",
    "size", "seed", "torch", "match_same_in_f64",
}  # fmt: skip
"""Keys of a case that are inputs, or describe how it was made."""
Size = tuple[int, int]
Number = float | Tensor
Match = Mapping[str, Tensor]
"""Assignment of one image: the costs ``C``, queries ``i`` and targets ``j``."""
Target = Mapping[str, Tensor]
"""Targets of one image: ``labels`` and ``masks``."""
Segments = Sequence[Mapping[str, Any]]


class Evaluation(NamedTuple):
    """Results of a case for one pair of thresholds."""

    name: str  # "eval" or "eval_loose"
    results: Mapping[str, Any]  # "labels.0", "panoptic_info.1", ...: kind and number of the image -> result
    thresholds: tuple[float, float] | None  # object mask threshold, overlap threshold


class Losses(NamedTuple):
    """Assignments and losses."""

    matches: Mapping[str, Sequence[Match]]  # "0", "1", ..., "final": layer -> assignment of each image
    terms: Mapping[str, Mapping[str, Number]]  # "losses", "losses64" -> term -> value


class Training(NamedTuple):
    """Targets of a case, and the losses and gradients for them."""

    targets: Sequence[Target]
    losses: Losses
    gradient_norms: Mapping[str, float] | None  # official name of the parameter -> norm
    without_gradient: Sequence[str] | None  # official names of parameters whose gradient is zero


class Case(NamedTuple):
    """Content of `case.pt`."""

    images: Sequence[Tensor]  # each [3, H, W] uint8
    image_sizes: Sequence[Size]
    padded_size: Size
    outputs: Mapping[str, Tensor]  # intermediates and logits
    sizes: Sequence[Size]  # of the results
    evaluations: Sequence[Evaluation]
    thing_ids: Sequence[int] | None
    kept_counts: Sequence[int] | None
    training: Training | None
    unknown: Sequence[str]  # other keys


class SynthPost(NamedTuple):
    """Post-processing of synthetic predictions of one image."""

    class_logits: Tensor  # [Q, K+1] float32
    mask_logits: Tensor  # [Q, h, w] float32
    size: Size
    labels: Tensor | None  # [H, W] int16
    margin: Tensor | None  # [H, W], lead of the best class over the second best
    panoptic: Mapping[str, tuple[Tensor, Segments]]  # "panoptic@0.8,0.5" -> id map [H, W] int32, segments
    unknown: Sequence[str]


class SynthCriterion(NamedTuple):
    """Criterion of synthetic predictions of a batch."""

    class_logits: Tensor  # [B, Q, K+1] float32
    mask_logits: Tensor  # [B, Q, h, w] float32
    targets: Sequence[Target]
    match: Sequence[Match] | None
    unweighted_losses: Mapping[str, Number]
    gradients: Mapping[str, Tensor]  # "grad_logits", "grad_masks"
    unknown: Sequence[str]


class Synth(NamedTuple):
    """Content of `synth.pt`."""

    posts: Sequence[SynthPost]
    criteria: Sequence[SynthCriterion]
    unknown: Sequence[str]


class Recordings(NamedTuple):
    """Checked contents of a recording or a folder of recordings; ``None`` for a file that is missing."""

    case: Case | None
    synth: Synth | None


def read_recordings(path: str | Path, num_classes: int) -> Recordings:
    """Read a recording, or a folder with a `case.pt`, a `synth.pt` or both. The content decides which of them it is.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: a file that is no recording (the message has the missing or wrong key), or one of another number of
            classes.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [path / name for name in (CASE_NAME, SYNTH_NAME) if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(f"{path}: expected a recording, {CASE_NAME} or {SYNTH_NAME}, in this folder")
    case, synth = None, None
    for file in files:
        content = _load(file)
        if "post" in content or "criterion" in content:
            check_synth(Checker(file), content, num_classes)
            synth = _synth(content)
        else:
            check_case(Checker(file), content, num_classes)
            case = _case(content)
    return Recordings(case, synth)


def _case(content: Mapping[str, Any]) -> Case:
    training = None
    if "targets" in content:
        terms = {key: content[key] for key in ("losses", "losses64") if key in content}
        norms = content.get("grad_norm")
        training = Training(
            content["targets"],
            Losses(content.get("match", {}), terms),
            None if norms is None else {name: float(norm) for name, norm in norms.items()},
            content.get("no_grad_params"),
        )
    known = {*DESCRIPTIONS, *TRAINING_KEYS, *EVALUATION_KEYS, "f32", "thing_ids", "n_kept"}
    return Case(
        content["images"],
        [_size(size) for size in content["image_sizes"]],
        _size(content["padded_size"]),
        content["f32"],
        [_size(size) for size in content.get("sizes", ())],
        [
            Evaluation(key, content[key], content.get(key.replace("eval", "thresholds")))
            for key in EVALUATION_KEYS
            if content.get(key)
        ],
        content.get("thing_ids"),
        content.get("n_kept"),
        training,
        [name for name in content if name not in known],
    )


def _synth(content: Mapping[str, Any]) -> Synth:
    post_keys = ("mask_cls", "mask_pred", "size", "labels", "margin")
    posts = [
        SynthPost(
            post["mask_cls"],
            post["mask_pred"],
            _size(post["size"]),
            post.get("labels"),
            post.get("margin"),
            {name: (value[0], value[1]) for name, value in post.items() if name.startswith("panoptic@")},
            [name for name in post if name not in post_keys and not name.startswith("panoptic@")],
        )
        for post in content.get("post", [])
    ]
    gradients = ("grad_logits", "grad_masks")
    known = ("pred_logits", "pred_masks", "targets", "match", "unweighted_losses", *gradients)
    criteria = [
        SynthCriterion(
            case["pred_logits"],
            case["pred_masks"],
            case["targets"],
            case.get("match"),
            case.get("unweighted_losses", {}),
            {name: case[name] for name in gradients if name in case},
            [name for name in case if name not in known],
        )
        for case in content.get("criterion", [])
    ]
    return Synth(posts, criteria, [name for name in content if name not in ("post", "criterion")])


def _size(value: Sequence[int]) -> Size:
    return value[0], value[1]


def _load(path: Path) -> dict[str, Any]:
    """Read a file of tensors and plain containers; nothing else is unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recording")
    try:
        content = load_torch(path)
    except ConvertError as error:
        raise ValueError(f"{path}: not a recording of tensors and plain containers: {error}") from error
    Checker(path).keys(content, "", ())
    return content
