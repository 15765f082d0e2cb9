"""PyAV, imported when it is first needed."""

from __future__ import annotations

from typing import Any


def av_tools() -> Any:
    """The package ``av``, imported on first use.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'PyAV is needed for videos; install it with: pip install "maskformer_fast[video]"', name=error.name
        ) from error
    return av
