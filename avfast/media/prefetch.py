"""Stages of a pipeline: generators that run in threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import Empty, Queue
from typing import TypeVar, cast

T = TypeVar("T")


def prefetch(items: Iterator[T], depth: int = 1) -> Generator[T, None, None]:
    """The same items. A thread takes them from `items` in advance and keeps at most `depth` of them waiting.

    What the thread raises is raised here. Closing this generator ends the thread and closes `items`.
    """
    waiting: Queue[tuple[T | None, BaseException | None]] = Queue(depth)
    closed = threading.Event()
    end = StopIteration()

    def run() -> None:
        error: BaseException = end
        try:
            for item in items:
                waiting.put((item, None))
                if closed.is_set():
                    break
        except BaseException as raised:
            error = raised
        finally:
            if isinstance(items, Generator):
                items.close()
            waiting.put((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is end:
                return
            if error is not None:
                raise error
            yield cast(T, item)
    finally:
        closed.set()
        # a thread that waits for room gets it
        while thread.is_alive():
            try:
                waiting.get_nowait()
            except Empty:
                thread.join(0.01)
