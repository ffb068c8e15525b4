"""Folders that appear whole: who writes them, what a reader sees while one replaces another, what a kill leaves."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from avfast.files import result_folder
from avfast.files.result_folder import ResultFolder, hidden_folder, lock_folder, publish, remove_folder, sweep

# writes "new" over a folder that holds "old", and is killed just before or after the n-th change of the file system
KILLED = """
import itertools, os, sys
from pathlib import Path
from avfast.files import result_folder
final, step, exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchange"
numbers = itertools.count()
def killed_at(function):
    def call(*arguments, **settings):
        if next(numbers) == step:
            os._exit(9)
        result = function(*arguments, **settings)
        if next(numbers) == step:
            os._exit(9)
        return result
    return call
os.rename = killed_at(os.rename)
os.rmdir = killed_at(os.rmdir)
result_folder._exchange = killed_at(result_folder._exchange) if exchange else lambda one, other: False
result = result_folder.ResultFolder(final)
assert result.claim()
with result.writing() as folder:
    (folder / "1").write_text("new")
    (folder / "2").write_text("new")
"""


def content(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.iterdir())]


def folder_of(path: Path, text: str) -> Path:
    path.mkdir(parents=True)
    for name in ("1", "2"):
        (path / name).write_text(text)
    return path


def hidden(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways to replace a folder; the second is that of file systems without the first."""
    if request.param == "two renames":
        monkeypatch.setattr(result_folder, "_exchange", lambda one, other: False)
    return request.param


def write(final: Path, text: str) -> None:
    result = ResultFolder(final)
    assert result.claim()
    with result.writing() as folder:
        for name in ("1", "2"):
            (folder / name).write_text(text)


def test_a_folder_replaces_another(way: str, tmp_path: Path) -> None:
    write(tmp_path / "deep" / "a", "old")
    assert content(tmp_path / "deep" / "a") == ["old"] * 2
    write(tmp_path / "deep" / "a", "new")
    assert content(tmp_path / "deep" / "a") == ["new"] * 2 and not hidden(tmp_path / "deep")
    # names as long as names can be
    for text in ("old", "new"):
        write(tmp_path / ("n" * 255), text)
    assert content(tmp_path / ("n" * 255)) == ["new"] * 2 and not hidden(tmp_path)


def test_a_link_is_replaced_and_what_it_leads_to_stays(way: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "disk" / "a", "old")
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "a")
    write(tmp_path / "a", "new")
    assert not (tmp_path / "a").is_symlink() and content(tmp_path / "a") == ["new"] * 2
    assert content(tmp_path / "disk" / "a") == ["old"] * 2 and not hidden(tmp_path)


def test_this_file_system_exchanges_names(tmp_path: Path) -> None:
    one, other = folder_of(tmp_path / "one", "one"), folder_of(tmp_path / "other", "other")
    if not result_folder._exchange(one, other):
        pytest.skip("renameat2 does not exchange here")
    assert content(one) == ["other"] * 2 and content(other) == ["one"] * 2
    with pytest.raises(FileNotFoundError, match="none"):
        result_folder._exchange(one, tmp_path / "none")


def test_a_reader_always_finds_a_whole_folder(tmp_path: Path) -> None:
    """While one folder after another replaces the one before."""
    final = folder_of(tmp_path / "a", "old")
    if not result_folder._exchange(final, folder_of(tmp_path / "b", "old")):
        pytest.skip("renameat2 does not exchange here")
    ended = threading.Event()

    def write_again_and_again() -> None:
        for _ in range(300):
            write(final, "new")
        ended.set()

    writer = threading.Thread(target=write_again_and_again)
    writer.start()
    reads = 0
    while not ended.is_set() or reads == 0:
        # one look at the name: the folder that is open may be replaced and deleted after it
        descriptor = os.open(final, os.O_RDONLY)
        os.close(descriptor)
        reads += 1
    writer.join()
    assert content(final) == ["new"] * 2


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_killed_at_every_step(way: str, tmp_path: Path) -> None:
    """Old or new, never a mixture, and never nothing once the next run has begun; with the exchange never at all."""
    seen = set()
    for step in itertools.count():
        parent = tmp_path / str(step)
        folder_of(parent / "a", "old")
        command = [sys.executable, "-c", KILLED, str(parent / "a"), str(step), way]
        ended = subprocess.run(command, cwd=Path(__file__).parents[2], env=os.environ)
        found = content(parent / "a") if (parent / "a").exists() else None
        seen.add(None if found is None else found[0])
        assert found is None and way == "two renames" or found in (["old"] * 2, ["new"] * 2)
        sweep([parent / "a"])
        assert content(parent / "a") == (found or ["old"] * 2) and not hidden(parent)
        if ended.returncode == 0:
            break
        assert ended.returncode == 9
    assert found == ["new"] * 2 and step >= 4
    assert seen == ({"old", "new"} if way == "exchange" else {"old", "new", None})


def test_what_cannot_be_renamed_leaves_the_old_folder(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(tmp_path / "a", "old")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "a" and "/replaced/" not in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    def fail_to_exchange(one: Path, other: Path) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    if way == "exchange":
        monkeypatch.setattr(result_folder, "_exchange", fail_to_exchange)
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path / "a", "new")
    assert error.value.filename == str(tmp_path / "a")
    assert content(tmp_path / "a") == ["old"] * 2 and not hidden(tmp_path)


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    result = ResultFolder(tmp_path / "a")
    assert result.claim()
    with pytest.raises(KeyboardInterrupt), result.writing() as folder:
        (folder / "1").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), hidden_folder(tmp_path / "a") as folder:
        (folder / "1").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_one_writer_at_a_time_and_its_folder_is_not_swept(tmp_path: Path) -> None:
    first, second = ResultFolder(tmp_path / "a"), ResultFolder(tmp_path / "a")
    assert first.claim() and not second.claim()
    second.discard()
    (first.folder / "1").touch()
    sweep([tmp_path / "a"])
    assert (first.folder / "1").exists()
    first.discard()
    assert not list(tmp_path.iterdir()) and second.claim()
    second.discard()


def test_the_next_writer_begins_while_this_one_ends(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused while the old folder is deleted, which has the hidden name then; from there on safe from this writer."""
    replace, remove, next_writer = result_folder._replace, result_folder._remove, ResultFolder(tmp_path / "a")

    def then_claim(hidden: Path, final: Path) -> None:
        replace(hidden, final)
        assert next_writer.claim()

    def claim_first(folder: Path) -> None:
        if folder == next_writer.folder and folder.exists():
            assert not next_writer.claim()
        remove(folder)

    write(tmp_path / "a", "old")
    monkeypatch.setattr(result_folder, "_replace", then_claim)
    monkeypatch.setattr(result_folder, "_remove", claim_first)
    write(tmp_path / "a", "new")
    monkeypatch.undo()
    with next_writer.writing() as folder:
        (folder / "1").write_text("newer")
    assert content(tmp_path / "a") == ["newer"] and not hidden(tmp_path)


def test_a_killed_writer_frees_its_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from avfast.files.result_folder import *\n"
        "claimed = ResultFolder(Path(sys.argv[1])); assert claimed.claim(); (claimed.folder / '1').touch()\n"
        "with hidden_folder(sys.argv[1]) as folder: (folder / '1').touch(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], cwd=Path(__file__).parents[2])
    assert len(hidden(tmp_path)) == 2
    sweep([tmp_path / "b"])
    assert not list(tmp_path.iterdir())


def test_hidden_folders_of_another_machine_stay(tmp_path: Path) -> None:
    """Its locks may not reach this one."""
    with hidden_folder(tmp_path / "a") as folder:
        name = folder.name
    assert name.endswith(f"@{socket.gethostname()}")
    (tmp_path / f"{name}-other").mkdir()
    (tmp_path / name).mkdir()
    sweep([tmp_path / "a"])
    assert hidden(tmp_path) == [f"{name}-other"]


def test_several_writers_get_numbers(tmp_path: Path) -> None:
    with hidden_folder(tmp_path / "a") as one, hidden_folder(str(tmp_path / "a")) as other:
        for folder, text in ((one, "one"), (other, "other")):
            (folder / "1").write_text(text)
        assert publish(other, tmp_path / "a") == tmp_path / "a" and publish(one, tmp_path / "a") == tmp_path / "a-2"
    (tmp_path / "a-3").touch()
    (tmp_path / "a-4").symlink_to("nowhere")
    with hidden_folder(tmp_path / "a") as folder:
        assert publish(folder, tmp_path / "a") == tmp_path / "a-5"
    assert content(tmp_path / "a") == ["other"] and content(tmp_path / "a-2") == ["one"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a-2", "a-3", "a-4", "a-5"]


def test_another_process_takes_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    folder_of(tmp_path / "a", "theirs")
    with hidden_folder(tmp_path / "a") as folder:
        (folder / "1").write_text("ours")
        assert publish(folder, tmp_path / "a") == tmp_path / "a-2"
    assert content(tmp_path / "a") == ["theirs"] * 2


def test_without_locks_everybody_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(result_folder.fcntl, "flock", refuse)
    write(tmp_path / "a", "old")
    write(tmp_path / "a", "new")
    assert content(tmp_path / "a") == ["new"] * 2 and not hidden(tmp_path)


def test_a_folder_is_removed_under_a_hidden_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "a", "old")
    remove_folder(tmp_path / "a")
    assert not list(tmp_path.iterdir())
    folder_of(tmp_path / "a", "old")
    monkeypatch.setattr(result_folder, "_remove", lambda folder: None)
    remove_folder(tmp_path / "a")
    monkeypatch.undo()
    assert not (tmp_path / "a").exists() and len(hidden(tmp_path)) == 1
    sweep([tmp_path / "a"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        remove_folder(tmp_path / "a")


def test_a_lock_is_of_the_folder_that_has_the_name_now(tmp_path: Path) -> None:
    assert lock_folder(tmp_path / "none") is None
    (tmp_path / "a").mkdir()
    lock = lock_folder(tmp_path / "a")
    assert lock is not None and lock_folder(tmp_path / "a") is None
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "a").mkdir()
    other = lock_folder(tmp_path / "a")
    assert other is not None and lock_folder(tmp_path / "b") is None
    os.close(lock)
    os.close(other)
