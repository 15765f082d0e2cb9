"""``python -m maskformer_fast.demo``: a local web page that segments images and shows the results."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from PIL import Image

from maskformer_fast.cli import parse, run_command
from maskformer_fast.config import ShapesConfig
from maskformer_fast.core.checks import check
from maskformer_fast.data.datasets.shapes import ShapesDataset
from maskformer_fast.demo.page import DemoImage, build_app, import_gradio
from maskformer_fast.demo.stages import StagedPredictor
from maskformer_fast.deploy.bundle.manifest import Precision
from maskformer_fast.deploy.runtime.selection import Backend
from maskformer_fast.inference.bundle_predictor import BundlePredictor
from maskformer_fast.inference.load import load
from maskformer_fast.inference.predictor import Predictor
from maskformer_fast.recipes import recipe_names

DEFAULT_CHECKPOINT = "runs/demo"
SCENES = 8
"""Number of synthetic scenes on the page."""
SCENE_SIZE = (384, 512)
"""Height, width of the scenes for a network that was trained on another data set."""
LOOPBACK = ("127.0.0.1", "localhost")
"""Hosts that only this machine reaches."""


@dataclass(frozen=True)
class DemoOptions:
    """Serve a page to drop images on, which shows each task's result and the time of every stage.

    The page is served on this machine alone unless another ``--host`` is given; nothing is fetched from elsewhere.
    """

    checkpoint: tyro.conf.Positional[str] = DEFAULT_CHECKPOINT
    """Run folder (its best checkpoint), checkpoint folder, weights file, bundle, or the name of a packaged recipe
    (untrained)."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 gives every machine of the network access, without a password."""
    port: int = 7860
    """Port to listen on; 0 takes any free one."""
    device: str = "auto"
    """``auto`` takes the GPU where there is one."""
    backend: Backend = "auto"
    """Backend of a bundle: ``auto`` takes TensorRT where the bundle has an engine for this GPU, else on the CPU
    openvino where it is installed, else onnxruntime."""
    precision: Precision | None = None
    """Precision of a bundle's network. On a CPU: fp32, bf16 (openvino, where the processor has it) or int8 (an engine
    of openvino in the bundle); by default int8 where the bundle has it, else fp32. On a GPU: that of an engine."""

    def __post_init__(self) -> None:
        check(0 <= self.port <= 65535, "port", "0 to 65535", self.port)


def check_checkpoint(path: str) -> None:
    """Raise ``FileNotFoundError`` with the command that trains the default checkpoint, if that is missing."""
    if path == DEFAULT_CHECKPOINT and not Path(path).exists():
        raise FileNotFoundError(
            f"checkpoint: there is no {path} yet; train it (three minutes on two cores) with: make demo\n"
            "or name a checkpoint, a bundle or a recipe: python -m maskformer_fast.demo CHECKPOINT"
        )


def scene_config(predictor: Predictor | BundlePredictor) -> ShapesConfig:
    """Options for synthetic scenes: those of the network's training, or scenes of a size that it takes."""
    if isinstance(predictor, Predictor):
        data = predictor.config.data
        return data.shapes if data.dataset == "shapes" else replace(ShapesConfig(), size=SCENE_SIZE)
    sizes = [graph.inputs[0].shape[2:] for graph in predictor.runtime.manifest.graphs.values() if graph.inputs]
    fixed = [(height, width) for height, width in sizes if isinstance(height, int) and isinstance(width, int)]
    config = ShapesConfig()
    metadata = predictor.metadata
    if metadata.name == "shapes":
        things = sum(metadata.is_thing)
        config = replace(config, num_things=things, num_stuff=metadata.num_classes - things)
    elif not fixed:
        config = replace(config, size=SCENE_SIZE)
    return replace(config, size=fixed[0]) if fixed else config


def write_scenes(folder: Path, config: ShapesConfig) -> list[Path]:
    """Write scenes of the validation split, which no network was trained on, as PNG files -> their paths."""
    scenes = ShapesDataset(replace(config, val_images=SCENES), "val")
    paths = []
    for number in range(SCENES):
        path = folder / f"scene_{number + 1}.png"
        Image.fromarray(scenes[number].image).save(path)
        paths.append(path)
    return paths


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ``OSError`` with the option to change."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(f"host: expected an address of this machine, got {host!r} ({error})") from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(
            f"port: cannot listen on {host} port {port} ({error.strerror}); name another with --port, "
            "0 takes any that is free"
        ) from error
    return bound


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status after Ctrl-C."""
    options = parse(DemoOptions, list(sys.argv[1:] if argv is None else argv), prog="python -m maskformer_fast.demo")
    import_gradio()
    import uvicorn

    check_checkpoint(options.checkpoint)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the page as Ctrl-C does, with all clean-up
    with (
        tempfile.TemporaryDirectory(prefix="maskformer_fast_demo_") as folder,
        listen(options.host, options.port) as bound,
    ):
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "uploads"))  # uploads are removed at the end
        predictor = load(
            options.checkpoint, options.device, backend=options.backend, precision=options.precision
        )
        bands = predictor.channels
        check(bands == 0, "checkpoint", "a network of RGB pictures of 8 bits, which the page takes", f"{bands} bands")
        staged = StagedPredictor(predictor)
        scenes = write_scenes(Path(folder), scene_config(predictor))
        DemoImage(staged, scenes[0]).show(staged.tasks[0])  # a warm-up: the first run of a network is slower
        untrained = not Path(options.checkpoint).exists() and options.checkpoint in recipe_names()
        shown = Path(options.checkpoint).name if Path(options.checkpoint).is_absolute() else options.checkpoint
        title = shown + " (a recipe: the weights are random)" * untrained
        app = build_app(staged, title, scenes, LOOPBACK if options.host in LOOPBACK else ())
        bound.listen()  # whoever reads the address may connect at once, and waits until the server has started
        name, port = bound.getsockname()[:2]
        print(f"{options.checkpoint} is shown at http://{f'[{name}]' if ':' in name else name}:{port} "
              "(Ctrl-C ends it)", flush=True)  # fmt: skip
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C is the regular end
            server.run(sockets=[bound])
    return 0


if __name__ == "__main__":
    run_command(main)
