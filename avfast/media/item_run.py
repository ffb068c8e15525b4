"""What the commands share that work through many films in threads: which item is next, what became of each, and how a
run ends. `avfast flow` and `avfast prepare` add what they do with an item."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import Any

from avfast.files.result_folder import ResultFolder
from avfast.media.inputs import Item


class Stopped(Exception):
    """The run ends: another thread has failed, or the user has interrupted."""


class ItemRun:
    """The items of one run, shared by its threads. Each item is either done, skipped (finished before), elsewhere
    (another run holds it), or failed."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.done = self.skipped = self.elsewhere = 0
        self.failed: dict[str, str] = {}
        """The reason by the name of the item."""
        self.lock = threading.Lock()
        """Held while anything that threads share is changed."""
        self._waiting = deque(items)
        self._claimed: list[ResultFolder] = []
        self._stop = threading.Event()
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._began

    @property
    def waiting(self) -> int:
        """Number of items that no thread has taken yet."""
        return len(self._waiting)

    def counts(self) -> dict[str, int]:
        """Number of items by what became of them, without those that failed."""
        return {"done": self.done, "skipped": self.skipped, "elsewhere": self.elsewhere}

    def items(self) -> Iterator[Item]:
        """The items for the thread that asks, each for one thread only, until none is left or the run stops."""
        with suppress(IndexError):
            while not self._stop.is_set():
                yield self._waiting.popleft()

    def claim(self, result: ResultFolder) -> bool:
        """Claim the folder of an item. Where another run holds it, count the item as elsewhere and return False."""
        if result.claim():
            self._claimed.append(result)
            return True
        with self.lock:
            self.elsewhere += 1
        return False

    def skip(self) -> None:
        """Count an item that is finished already."""
        with self.lock:
            self.skipped += 1

    def fail(self, item: Item, error: Exception) -> None:
        """Note why an item cannot be done."""
        with self.lock:
            self.failed[item.name] = item.reason(error)

    def raise_if_stopped(self) -> None:
        """Raise Stopped when the run ends. Long work on one item calls this now and then."""
        if self._stop.is_set():
            raise Stopped

    def run(self, workers: Sequence[Callable[[], Any]]) -> None:
        """Call every function in a thread of its own and wait until all have returned. The first exception of one, or
        an interrupt of the user, stops the others and is raised when they have ended. What was claimed and not
        published is then removed."""
        try:
            # the pool waits for its threads whatever happens: none may write when this function has ended
            with ThreadPoolExecutor(len(workers)) as pool:
                running = [pool.submit(worker) for worker in workers]
                try:
                    for worker in as_completed(running):
                        worker.result()
                except BaseException:
                    self._stop.set()
                    raise
        finally:
            for result in self._claimed:
                result.discard()
