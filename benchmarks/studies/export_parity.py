"""Parity of full-size networks as ONNX graphs with PyTorch, and the time of the export.

    python -m benchmarks.studies.export_parity [--backbones resnet50 swin_tiny swin_base] [--output FILE]
    python -m benchmarks.studies.export_parity --model mask2former --backbones resnet50 swin_tiny --openvino

Takes minutes a network, which is why it is no test. Weights are untrained; queries are made to differ. Results go to
benchmarks/output/export_parity.jsonl, one JSON object a line, and to standard output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.studies import OUTPUT
from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import BackboneConfig, ModelConfig
from maskformer_fast.core.files import atomic_write
from maskformer_fast.deploy.build.onnx import Flavour, export_graphs
from maskformer_fast.deploy.build.parity import ParityError, check_parity
from maskformer_fast.deploy.bundle.manifest import Shape
from maskformer_fast.modeling import build_model
from maskformer_fast.recipes import load_recipe


@dataclass(frozen=True)
class ParityOptions:
    """Compare exported graphs with PyTorch."""

    model: Literal["maskformer", "mask2former"] = "maskformer"
    backbones: tuple[str, ...] = ("resnet50", "swin_tiny", "swin_base")
    sizes: tuple[str, ...] = ("1x512x512", "1x333x250", "2x200x264", "1x1024x2048")
    static: bool = False
    """Export anew for each size, instead of once for all."""
    any_batch: bool = False
    """Export anew for each size, for any batch; batches of 1 and 3 are compared."""
    openvino: bool = False
    """Compare the raw graph as OpenVINO runs it, too."""
    classes: int = 150
    output: Path = OUTPUT / "export_parity.jsonl"
    """File of one JSON object a comparison."""


@torch.no_grad()
def spread_queries(
    network: Any,  # a MaskFormer or Mask2Former in evaluation mode, changed in place
    images: torch.Tensor,  # [B, 3, H, W] uint8
) -> None:
    """Enlarge the differences between untrained queries, as training would, so that labels differ."""
    head = network.predictor
    predictions = network(images)
    for layer, outputs, size in (
        (head.class_embed, predictions.class_logits, 3.0),
        (head.mask_embed.layers[-1], predictions.mask_embeddings, 1.0),
    ):
        outputs = outputs.flatten(0, 2)
        scale = size / outputs.std(0).mean()
        layer.bias.sub_(outputs.mean(0)).mul_(scale)
        layer.weight.mul_(scale)


def build(backbone: str, classes: int, model: str = "maskformer") -> torch.nn.Module:
    """An untrained network whose queries differ."""
    torch.manual_seed(0)
    config = ModelConfig(num_classes=classes, backbone=BackboneConfig(backbone))
    if model == "mask2former":
        recipe = load_recipe("mask2former/ade20k_semantic_r50").model
        config = replace(recipe, num_classes=classes, backbone=BackboneConfig(backbone), weights=None)
    network = build_model(config).eval()
    spread_queries(network, torch.randint(0, 256, (1, 3, 256, 320), dtype=torch.uint8))
    return network


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(ParityOptions, arguments, prog="python -m benchmarks.studies.export_parity")
    lines: list[str] = []
    shapes = [Shape.parse(text) for text in options.sizes]
    for backbone in options.backbones:
        network = build(backbone, options.classes, options.model)
        one_size = options.static or options.any_batch
        for group in [[shape] for shape in shapes] if one_size else [shapes]:
            started = time.process_time()
            graphs = export_graphs(network, static=group[0] if one_size else None, any_batch=options.any_batch)
            seconds = time.process_time() - started
            if options.any_batch:
                group = [replace(group[0], batch=batch) for batch in (1, 3)]
            contents = {flavour: content for flavour, (content, _) in graphs.items()}
            for shape in group:
                found = [("onnxruntime", entry) for entry in check_parity(network, contents, [shape])]
                if options.openvino:
                    raw: dict[Flavour, bytes] = {"raw": contents["raw"]}
                    found += [("openvino", entry) for entry in check_parity(network, raw, [shape], "openvino")]
                for library, entry in found:
                    record: dict[str, Any] = {"backbone": backbone, "graph": graphs["raw"][1].inputs[0].shape}
                    if options.model != "maskformer" or library != "onnxruntime":
                        record = {"model": options.model, "library": library} | record
                    record["export_cpu_seconds"] = round(seconds, 1)
                    lines.append(json.dumps(record | asdict(entry)))
                    print(lines[-1], flush=True)
                    with atomic_write(options.output) as file:
                        file.write("".join(f"{line}\n" for line in lines).encode())
    return 0


if __name__ == "__main__":
    run_command(main, ParityError)
