"""``python -m maskformer_fast.deploy.triton_server BUNDLE`` writes a model repository for NVIDIA's Triton server."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from maskformer_fast.cli import parse, run_command
from maskformer_fast.deploy.bundle.folder import Bundle
from maskformer_fast.deploy.triton_server.options import TritonServerOptions
from maskformer_fast.deploy.triton_server.repository import write_repository


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(TritonServerOptions, arguments, prog="python -m maskformer_fast.deploy.triton_server")
    bundle = Bundle.open(options.bundle, options.digest)
    folder = write_repository(bundle, options)
    print(f"{folder}: serve it with tritonserver --model-repository={folder.parent.resolve()}")
    return 0


if __name__ == "__main__":
    run_command(main)
