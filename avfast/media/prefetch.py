"""Stages of a pipeline: generators that run in threads of their own."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

T = TypeVar("T")


def prefetch(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items. While one of them is used, a thread takes the next one from `items`. What the thread raises is
    raised here. Closing this generator ends the thread and closes `items`."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, end)
        try:
            while (item := coming.result()) is not end:
                coming = thread.submit(next, items, end)
                yield cast(T, item)
        finally:
            # in the same thread: a generator that is running cannot be closed
            if isinstance(items, Generator):
                thread.submit(items.close).result()
