"""Instance results of one image as run lengths, beside Hugging Face's function.

The official code has no instance inference. For 100 instances both implementations need the same product of embeddings,
of more time than all the rest of ours, so the row is from mask logits only. Ours gives the run lengths of each of 100
masks, Hugging Face's those of the map that they are painted on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases.inputs import Size
from benchmarks.cases.segments import HUGGINGFACE, huggingface_outputs, huggingface_processor, smooth_fields
from benchmarks.harness.case import Bound, Case, Work
from maskformer_fast.ops import instance_inference
from maskformer_fast.ops.rle import encode_packed_masks

QUERIES, THINGS = 100, 80
LOW, HIGH = (160, 240), (640, 960)


def instance_logits(low: Size) -> tuple[Tensor, Tensor]:
    """Class logits [Q, K+1] and mask logits [Q, h, w]: blobs of all sizes, which overlap, each sure of its class."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(QUERIES, THINGS + 1, generator=generator)
    classes[torch.arange(QUERIES), torch.randint(0, THINGS, (QUERIES,), generator=generator)] += 12
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in low), indexing="ij")
    center = torch.rand(QUERIES, 2, 1, 1, generator=generator) * torch.tensor(low)[:, None, None]
    radius = 3 * 20 ** torch.rand(QUERIES, 2, 1, 1, generator=generator)  # 3 to 60 map pixels
    distance = torch.hypot((y - center[:, 0]) / radius[:, 0], (x - center[:, 1]) / radius[:, 1])
    return classes, (8 * (1 - distance)).clamp(-8, 8) + 0.5 * smooth_fields(QUERIES, (40, 60), generator, low)


def setup(device: torch.device, low: Size = LOW, high: Size = HIGH) -> Work:
    classes, masks = (logits.to(device) for logits in instance_logits(low))

    def ours() -> object:
        """The best pairs of query and class, best first, as run lengths."""
        probabilities = classes.softmax(-1)[:, :-1]
        best, pairs = probabilities.flatten().topk(QUERIES)
        queries, labels = pairs // probabilities.shape[1], pairs % probabilities.shape[1]
        used, slots = queries.unique(return_inverse=True)
        result = instance_inference(masks[None] if len(used) == len(masks) else masks[used][None], low, high)
        scores, order = (best * result.scores[0, slots]).sort(descending=True)
        rles = encode_packed_masks(result.masks[0].numpy(), high[1])
        return labels[order], scores, [rles[slot] for slot in slots[order].tolist()]

    def theirs() -> object:
        return huggingface_processor().post_process_instance_segmentation(
            huggingface_outputs(classes, masks), threshold=0.0, target_sizes=[high], return_coco_annotation=True
        )

    return Work(ours, {HUGGINGFACE: theirs})


def cases(device: str) -> list[Case]:
    if device != "cpu":
        return []
    bound = Bound(QUERIES * (4 * LOW[0] * LOW[1] + HIGH[0] * HIGH[1] / 8))
    name = f"instance 160x240 -> 640x960 from mask logits, {QUERIES} results as RLE"
    return [Case(name, HUGGINGFACE, 10.0, setup, bound=bound)]
