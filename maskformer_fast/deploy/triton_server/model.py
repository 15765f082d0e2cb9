"""The model that NVIDIA's Triton Inference Server runs by its Python backend: it serves results, not logits.

The server imports ``model.py`` of a model repository (`deploy.triton_server.repository`), whose class is a
`ServedBundle`. Its Python needs numpy, this package and the libraries of the bundle's backend. The bundle lies beside
``model.py``.

=========  ==============================================================================================
task       outputs for ``images`` uint8 [B, H, W, 3] RGB, results at the images' own size
=========  ==============================================================================================
semantic   ``labels`` [B, H, W] uint8, or int16 for more than 255 classes
panoptic   ``id_map`` int32 [B, H, W], -1 without a segment; ``segments`` [B, 1], a JSON text for each image
instance   ``count`` int32 [B, 1]; ``labels`` int64 [B, N], ``scores`` float32 [B, N], ``boxes`` float32 [B, N, 4],
           ``masks`` uint8 [B, N, H, ceil(W/8)] (8 pixels to a byte, the first one lowest), best first. N is the
           largest ``count`` of the request; rows of an image beyond its ``count`` are zeros.
=========  ==============================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskformer_fast.core.metadata import Metadata

__all__ = ["ServedBundle"]


class ServedBundle:
    """A served bundle. The server calls ``initialize`` once, ``execute`` many times, and ``finalize`` once."""

    bundle: Path
    """Folder of the bundle."""
    digest: str
    """Expected digest; any other bundle in the folder is refused."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle for the device of this instance. The server passes the configuration as JSON text."""
        import triton_python_backend_utils as pb_utils  # exists in the server only

        from maskformer_fast.deploy.runtime.session import load

        parameters = {
            key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        self.server = pb_utils
        self.task: Any = parameters["task"]
        on_cpu = args["model_instance_kind"] == "CPU"
        backend: Any = parameters["backend"]
        precision: Any = parameters.get("precision")
        self.runtime = load(
            self.bundle,
            backend,
            digest=self.digest,
            device=None if on_cpu else int(args["model_instance_device_id"]),
            precision=precision,
        )
        self.metadata = self.runtime.manifest.metadata

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request, in order. Requests of one call run together."""
        batches = [self.server.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        try:
            results = self.predict(batches)
        except Exception as error:
            if len(requests) > 1:  # one bad request must not fail the others
                return [response for request in requests for response in self.execute([request])]
            message = self.server.TritonError(f"{type(error).__name__}: {error}")
            return [self.server.InferenceResponse(output_tensors=[], error=message)]
        return [self.server.InferenceResponse(output_tensors=self.tensors(of_request)) for of_request in results]

    def predict(self, batches: Sequence[np.ndarray]) -> list[list[Any]]:
        """Results for each request's images [B, H, W, 3]."""
        results = iter(self.runtime.predict([image for batch in batches for image in batch], self.task))
        return [[next(results) for _ in batch] for batch in batches]

    def tensors(self, results: Sequence[Any]) -> list[Any]:
        arrays = OUTPUTS[self.task](results, self.metadata)
        return [self.server.Tensor(name, array) for name, array in arrays.items()]

    def finalize(self) -> None:
        """Release everything before the server unloads the model."""
        self.runtime.close()


def semantic_outputs(results: Sequence[Any], _: Metadata) -> dict[str, np.ndarray]:
    return {"labels": np.stack([result.labels for result in results])}


def panoptic_outputs(results: Sequence[Any], metadata: Metadata) -> dict[str, np.ndarray]:
    texts = [
        json.dumps([
            {
                "id": segment.id, "category": segment.category, "category_id": metadata.category_ids[segment.category],
                "name": metadata.class_names[segment.category], "is_thing": segment.is_thing, "score": segment.score,
                "area": segment.area,
            }
            for segment in result.segments
        ])
        for result in results
    ]  # fmt: skip
    segments = np.array([[text.encode()] for text in texts], dtype=object)
    return {"id_map": np.stack([result.id_map for result in results]), "segments": segments}


def instance_outputs(results: Sequence[Any], _: Metadata) -> dict[str, np.ndarray]:
    counts = [len(result.scores) for result in results]
    outputs = {"count": np.array(counts, dtype=np.int32).reshape(-1, 1)}
    for name in ("labels", "scores", "boxes", "masks"):
        arrays = [np.asarray(getattr(result, name)) for result in results]
        outputs[name] = np.zeros((len(arrays), max(counts), *arrays[0].shape[1:]), arrays[0].dtype)
        for row, array in zip(outputs[name], arrays, strict=True):
            row[: len(array)] = array
    return outputs


OUTPUTS = {"semantic": semantic_outputs, "panoptic": panoptic_outputs, "instance": instance_outputs}
