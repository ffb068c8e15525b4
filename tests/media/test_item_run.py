"""The engine of the commands that work through films: each item once, what ends a run, and what it leaves."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from avfast.errors import InputError
from avfast.files.result_folder import ResultFolder
from avfast.media.inputs import Item
from avfast.media.item_run import ItemRun, Stopped


def made_up(count: int) -> list[Item]:
    return [Item(str(number), Path(f"{number}.mp4")) for number in range(count)]


def test_every_item_goes_to_one_thread() -> None:
    run, seen = ItemRun(made_up(100)), []

    def work() -> None:
        for item in run.items():
            seen.append(item.name)
            time.sleep(0.0001)

    run.run([work] * 4)
    assert sorted(map(int, seen)) == list(range(100)) and run.waiting == 0


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_the_first_error_ends_the_run(error: BaseException, tmp_path: Path) -> None:
    """The others stop, also in the middle of an item, and nothing is left hidden when the error is raised."""
    run, threads, begun = ItemRun(made_up(5)), threading.active_count(), threading.Barrier(2)
    ended: list[str] = []

    def long_work() -> None:
        item = next(run.items())
        assert run.claim(ResultFolder(tmp_path / item.name))
        begun.wait()
        try:
            while True:
                run.raise_if_stopped()
                time.sleep(0.001)
        except Stopped:
            ended.append(item.name)
            raise

    def fail() -> None:
        begun.wait()
        raise error

    with pytest.raises(type(error)) as raised:
        run.run([long_work, fail])
    assert raised.value is error and len(ended) == 1 and list(run.items()) == []
    assert threading.active_count() == threads and not list(tmp_path.iterdir())


def test_what_became_of_the_items(tmp_path: Path) -> None:
    run, items = ItemRun([]), made_up(3)
    held = ResultFolder(tmp_path / "0")
    assert held.claim() and not run.claim(ResultFolder(tmp_path / "0")) and run.claim(ResultFolder(tmp_path / "1"))
    run.skip()
    run.fail(items[0], InputError("0.mp4: 1 frame"))
    run.fail(items[1], OSError(13, "Permission denied", "1.mp4"))
    assert run.counts() == {"done": 0, "skipped": 1, "elsewhere": 1}
    assert run.failed == {"0": "1 frame", "1": "Permission denied"}
    held.discard()
