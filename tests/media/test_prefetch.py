"""Stages in threads: how far they run ahead, how they end, what they raise."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from avfast.media.prefetch import prefetch


def test_a_stage_runs_one_item_ahead() -> None:
    made: list[int] = []

    def count() -> Any:
        for i in range(100):
            made.append(i)
            yield i

    items = prefetch(count())
    assert next(items) == 0
    time.sleep(0.2)
    # one handed out, one waiting
    assert len(made) == 2
    threads = threading.active_count()
    items.close()
    assert threading.active_count() == threads - 1 and len(made) == 2
    assert list(prefetch(iter(range(50)))) == list(range(50))


def test_a_stage_passes_its_error_on() -> None:
    def fail() -> Any:
        yield 1
        raise KeyError("gone")

    items = prefetch(fail())
    assert next(items) == 1
    with pytest.raises(KeyError, match="gone"):
        next(items)
    assert list(items) == []
