"""Random predictions and all their results, for tests of postprocessing."""

from __future__ import annotations

import torch

from maskformer_fast.inference import postprocess
from maskformer_fast.structures import Predictions

INPUT_SIZE = (40, 56)
VALID_SIZES = [(40, 56), (33, 41), (40, 56), (1, 7)]
OUTPUT_SIZES = [(40, 56), (33, 41), (25, 91), (9, 9)]



def random_predictions(
    seed: int = 0, classes: int = 7, queries: int = 9, valid_sizes: list[tuple[int, int]] = VALID_SIZES
) -> Predictions:
    """Two decoder layers, of which only the last should count; embedding values make logits of a few units."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(valid_sizes)
    return Predictions(
        3 * torch.randn(2, batch, queries, classes + 1, generator=generator),
        torch.randn(2, batch, queries, 16, generator=generator),
        torch.randn(batch, 16, INPUT_SIZE[0] // 4, INPUT_SIZE[1] // 4, generator=generator),
        torch.tensor(valid_sizes),
        INPUT_SIZE,
    )


def all_results(predictions: Predictions, sizes: list[tuple[int, int]]) -> list[list[object]]:
    is_thing = [True, False, True, False, True, False, True]
    semantic = postprocess.semantic(predictions, sizes, with_scores=True)
    panoptic = postprocess.panoptic(predictions, sizes, is_thing, 0.4, 0.3)
    instance = postprocess.instances(predictions, sizes, is_thing, 10)
    return [
        [s.labels, s.scores, p.id_map, p.segments, i.labels, i.scores, i.masks, i.boxes]
        for s, p, i in zip(semantic, panoptic, instance, strict=True)
    ]
