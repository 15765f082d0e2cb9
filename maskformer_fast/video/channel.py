"""A bounded channel between two threads, which either side may close."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Closed(Exception):
    """The channel is closed, and for a reader also empty."""


class Channel(Generic[T]):
    """Items in order. A writer waits while there are ``size`` items, a reader while there is none."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = False

    def put(self, item: T) -> None:
        """Add an item; waits for room. Raises `Closed` if the channel is closed."""
        with self._changed:
            while len(self._items) >= self._size and not self._ended:
                self._changed.wait()
            if self._ended:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()

    def put_newest(self, item: T, is_old: Callable[[T], bool]) -> bool:
        """Add an item without waiting: if there is no room, the oldest one for which ``is_old`` makes room -> if so.

        Raises:
            Closed: the channel is closed.
        """
        with self._changed:
            if self._ended:
                raise Closed
            dropped = None
            if len(self._items) >= self._size:
                dropped = next((at for at, old in enumerate(self._items) if is_old(old)), 0)
                del self._items[dropped]
            self._items.append(item)
            self._changed.notify_all()
            return dropped is not None

    def get(self) -> T:
        """Take the oldest item; waits for one. Raises `Closed` if there is none and the channel is closed."""
        with self._changed:
            while not self._items and not self._ended:
                self._changed.wait()
            if not self._items:
                raise Closed
            self._changed.notify_all()
            return self._items.popleft()

    def is_empty(self) -> bool:
        """Whether a `get` would wait or raise `Closed` now."""
        with self._changed:
            return not self._items

    def end(self) -> None:
        """Close the channel; items that are in it can still be taken."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Close the channel and drop its items."""
        with self._changed:
            self._items.clear()
            self._ended = True
            self._changed.notify_all()
