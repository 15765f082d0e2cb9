"""Results of a batch from the arrays that the kernels wrote, once they are on the host.

This is the part of post-processing that is too small for a kernel: lists of segments, and the choice of the best
instances among pairs of query and class. The arrays are the runtime's own memory, so results keep copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from maskformer_fast.config import Task
from maskformer_fast.core.metadata import segments_of_rows
from maskformer_fast.core.results import InstanceResult, PanopticResult, Result, SemanticResult
from maskformer_fast.deploy.runtime.ranking import QueryMasks, best_instances, best_pairs


def read_results(
    task: Task,
    arrays: Mapping[str, np.ndarray],  # the results of a launch sequence by name, each [B, ...]
    count: int,
    width: int,
    is_thing: Sequence[bool],
    top_k: int,
) -> list[Result]:
    """Results of the first ``count`` frames of a batch, each ``width`` pixels wide."""
    results: list[Result] = []
    for row in range(count):
        image = {name: array[row] for name, array in arrays.items()}
        if task == "semantic":
            results.append(SemanticResult(image["labels"].copy()))
        elif task == "panoptic":
            rows = zip(*(image[name].tolist() for name in ("ids", "categories", "areas", "scores")), strict=True)
            results.append(PanopticResult(image["id_map"].copy(), segments_of_rows(rows, is_thing)))
        else:
            results.append(_instances(image, width, is_thing, top_k))
    return results


def _instances(image: Mapping[str, np.ndarray], width: int, is_thing: Sequence[bool], top_k: int) -> InstanceResult:
    pairs = best_pairs(image["class_logits"], is_thing, top_k)
    masks = QueryMasks(image["masks"], image["boxes"], image["areas"], image["scores"])
    return best_instances(pairs, pairs.queries, masks, (masks.packed.shape[1], width))
