"""``predict`` in a process that is killed (SIGKILL): ``python killed_predict.py RANK COUNT OPTIONS...``.

The process of the rank dies when it has written the files of so many images, and the entries of fewer.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from maskformer_fast import predict
from maskformer_fast.cli import run_command
from maskformer_fast.inference import tiled_files
from maskformer_fast.output.writer import ResultWriter


def die_after(rank: int, count: int) -> None:
    """Make this process die after so many images, if it is of this rank of torchrun."""
    write, segment = ResultWriter.write, tiled_files.segment_file
    written: list[int] = []

    def one_more() -> None:
        written.append(1)
        if len(written) == count and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_and_die(self: ResultWriter, number: int, *arguments: Any) -> bool:
        result = write(self, number, *arguments)
        one_more()
        return result

    def segment_and_die(*arguments: Any) -> bool:
        result = segment(*arguments)
        one_more()
        return result

    ResultWriter.write = write_and_die  # type: ignore[method-assign]
    predict.segment_file = segment_and_die  # type: ignore[attr-defined]


if __name__ == "__main__":
    die_after(int(sys.argv[1]), int(sys.argv[2]))
    run_command(lambda: predict.main(sys.argv[3:]))
