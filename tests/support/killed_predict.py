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
from maskformer_fast.output.writer import ResultWriter


def main() -> int:
    """Run predict, and die amid it."""
    rank, count = int(sys.argv[1]), int(sys.argv[2])
    write, written = ResultWriter.write, []

    def write_and_die(self: ResultWriter, number: int, *arguments: Any) -> bool:
        result = write(self, number, *arguments)
        written.append(number)
        if len(written) == count and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    ResultWriter.write = write_and_die  # type: ignore[method-assign]
    return predict.main(sys.argv[3:])


if __name__ == "__main__":
    run_command(main)
