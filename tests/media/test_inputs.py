"""What a command line stands for: trees, globs, lists, pictures, and the names of the results."""

from __future__ import annotations

from pathlib import Path

import pytest

from avfast.media.inputs import find_items


def names(folder: Path, *inputs: str) -> dict[str, str]:
    items, failed = find_items([str(folder / i) for i in inputs], "done.json")
    found = {item.name: str(item.path.relative_to(folder)) for item in items}
    assert len(found) == len(items)
    return found | {f"failed {text}": reason for text, reason in failed.items()}


def test_items_of_a_tree(tmp_path: Path) -> None:
    for name in ("a.mp4", "b/a.MKV", "b/a.avi", "b/deep/c.webm", "b/cover.jpg", "b/.hidden.mp4", ".git/d.mp4", "e.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    for name in ("s/1.png", "s/2.png", "s/t/1.jpg", "done/1.png", "done/done.json", "a/1.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "s" / "loop").symlink_to(tmp_path / "in")
    found = names(tmp_path, "in")
    # two of one name keep their suffixes; a folder above another has none and gets a digest
    above = next(name for name in found if name.startswith("s-"))
    assert found == {
        "a.mp4": "in/a.mp4",
        "a": "in/a",
        "b/a.MKV": "in/b/a.MKV",
        "b/a.avi": "in/b/a.avi",
        "b/deep/c": "in/b/deep/c.webm",
        "s/t": "in/s/t",
        above: "in/s",
    }
    assert names(tmp_path, "in") == found
    assert names(tmp_path, "in/b") == {"a.MKV": "in/b/a.MKV", "a.avi": "in/b/a.avi", "deep/c": "in/b/deep/c.webm"}


def test_items_of_globs_lists_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/1/a.mp4", "x/2/a.mp4", "x/2/b.mp4", "p/f10.png", "p/f9.png", "p/f1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert names(tmp_path, "x/*/*.mp4") == {"1/a": "x/1/a.mp4", "2/a": "x/2/a.mp4", "2/b": "x/2/b.mp4"}
    assert names(tmp_path, "x/**/b.mp4", "x/2/b.mp4").keys() == {"2/b"}
    two = names(tmp_path, "x/1/a.mp4", "x/2/a.mp4")
    assert len(two) == 2 and all(name.startswith("a.mp4-") for name in two)
    items, _ = find_items([str(tmp_path / "p" / "f10.png"), str(tmp_path / "p" / "f9.png")], "done.json")
    assert [(item.name, [p.name for p in item.files()]) for item in items] == [("p", ["f9.png", "f10.png"])]
    assert names(tmp_path, "p/*.png").keys() == {"p"}
    assert [p.name for p in find_items([str(tmp_path / "p")], "")[0][0].files()] == ["f1.png", "f9.png", "f10.png"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text(f"# all\nx/1/a.mp4\n\nx/2/*.mp4  # two\n{tmp_path}/x/2/b.mp4\nnone.mp4\n")
    items, failed = find_items(["list.txt"], "done.json")
    assert [item.name for item in items] == ["x/1/a", "a", "b"]
    assert failed == {"none.mp4": "No such file or directory"}
