"""The report as a browser reads it: valid nesting, everything inside the file, text escaped, missing parts left out."""

from __future__ import annotations

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from PIL import Image

from avfast.errors import InputError
from avfast.files.settings import to_dict
from avfast.media.video_writer import video_writer
from avfast.report import ReportConfig, main, refresh_report, report, write_report
from avfast.scoring.metrics import MetricResult
from avfast.scoring.tables import TableInfo, format_tables
from avfast.training.config import TrainConfig

VOID = {"meta", "img"}
# what may stand in a document without a word from anywhere else
KNOWN = {"html", "head", "title", "style", "body", "h1", "h2", "h3", "p", "ul", "li", "div", "figure", "figcaption"} | {
    *("table", "thead", "tbody", "tr", "th", "td", "strong", "em", "code", "details", "summary", "pre", "video", "img"),
    "meta",
}
ATTRIBUTES = {"style", "lang", "charset", "name", "content", "class", "src", "alt", "controls", "loop", "playsinline"}


class Page(HTMLParser):
    """A strict reader: every element closed where it belongs, text and data URIs collected."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.links: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in KNOWN, tag
        if tag == "p":
            assert "p" not in self.open
        for name, value in attrs:
            assert name in ATTRIBUTES
            if name == "src":
                self.links.append((tag, value or ""))
        if tag == "img":
            assert dict(attrs)["alt"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def data(self, tag: str) -> list[tuple[str, bytes]]:
        """Type and content of the elements of one kind."""
        found = []
        for name, link in self.links:
            kind, _, content = link.removeprefix("data:").partition(";base64,")
            assert link.startswith("data:") and content
            if name == tag:
                found.append((kind, base64.b64decode(content, validate=True)))
        return found


def picture(path: Path, level: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), (level, level, level)).save(path)
    return path


def level(content: bytes) -> int:
    return Image.open(io.BytesIO(content)).convert("RGB").getpixel((3, 3))[0]


def prediction(folder: Path, **changes: object) -> None:
    folder.mkdir(parents=True)
    about = {
        "predicted_frames": 7,
        "given_frames": 3,
        "video": "films/<b>loud</b> & clear.mp4",
        "audio_words": "silence",
        "sound": None,
        "scores": {"predicted": {"mean_ssim": 0.5, "mean_psnr": 20.25}},
    }
    (folder / "prediction.json").write_text(json.dumps(about | changes))
    for name in ("film.mp4", "flow.mp4"):
        with video_writer(folder / name, 10, (np.zeros(4410, np.int16), 44_100)) as write:
            write(np.zeros((32, 32, 3), np.uint8), 0.0)
    picture(folder / "strip.png", 60)
    picture(folder / "curves.png", 61)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with everything, its name and its texts full of what HTML would take for its own."""
    folder = tmp_path / "mmnist-<i>&name"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(TrainConfig(name="<script>alert(1)</script>"))))
    (folder / "command.txt").write_text("train --name '<script>alert(1)</script>' &")
    records = [{"stage": "mme", "step": 0, "val_loss": 3.0}, {"stage": "mme", "step": 9, "val_loss": 1.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    picture(folder / "curves.png", 10)
    for name, grey in (("mme_00000009.png", 20), ("car_00000020.png", 30), ("car_00000020.gif", 40)):
        picture(folder / "samples" / name, grey)
    results = {"a/best <x>": MetricResult("paper", 2, [0.9], [20.0], 0.0, 19.0, [0.1])}
    black = {"black": MetricResult("paper", 2, [0.7], [14.0], 0.0, 14.0, None)}
    tables = format_tables(results, black, TableInfo(5, (6,), "films & <more>", sound={"own": "the clip's own"}))
    picture(folder / "eval" / "curves.png", 50)
    (folder / "eval" / "table.md").write_text(tables.markdown)
    picture(folder / "eval" / "sample_a_1.png", 51)
    prediction(folder / "predictions" / "clip <1>")
    return folder


def test_a_whole_report(run: Path) -> None:
    assert write_report(run) == run / "report.html"
    text = (run / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and "<script" not in text and "http" not in text
    page = Page(text)
    assert page.texts["h1"] == page.texts["title"] == ["mmnist-<i>&name"]
    assert page.texts["h2"] == ["Training", "Evaluation ", "Predictions", "Settings"]
    assert page.texts["li"] == ["stage mme: validation loss 3 untrained, 1.5 at best"]
    # the last sample of the last stage, in the order in which they were written
    kinds = [(kind, level(content)) for kind, content in page.data("img")]
    assert kinds == [
        *(("image/png", 10), ("image/png", 30), ("image/gif", 40)),
        *(("image/png", 50), ("image/png", 51), ("image/png", 60), ("image/png", 61)),
    ]
    films = page.data("video")
    assert [kind for kind, _ in films] == ["video/mp4"] * 2
    assert films[0][1] == (run / "predictions" / "clip <1>" / "film.mp4").read_bytes()
    with av.open(io.BytesIO(films[0][1])) as container:
        assert len(container.streams.video) == len(container.streams.audio) == 1
    assert page.texts["h3"] == ["clip <1>"]
    notes = "\n".join(page.texts["p"])
    for words in (
        "7 frames predicted from 3 of films/<b>loud</b> & clear.mp4; sound heard: silence; SSIM 0.500, PSNR 20.25 dB",
        "2 clips of films & <more>",
        "sound heard: the clip's own (own)",
    ):
        assert words in notes
    assert "train --name '<script>alert(1)</script>' &" in page.texts["pre"]


def test_tables_are_tables(run: Path) -> None:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    heads = ["Method", "SSIM ↑ Fr 6", "SSIM ↑ Mean", "PSNR ↑ Fr 6", "PSNR ↑ Mean", "Capped %", "Pooled PSNR ↑"]
    assert page.texts["th"] == [*heads, "Method", "AEPE ↓ Fr 6", "AEPE ↓ Mean"]
    assert page.texts["strong"] == ["0.9000", "0.9000", "20.00", "20.00", "19.00", "10.00", "10.00"]
    assert page.texts["td"] == ["a/best <x>", "0.0", "black", "0.7000", "0.7000", "14.00", "14.00", "0.0", "14.00"] + [
        "a/best <x>"
    ]
    assert page.texts["em"] == ["reference"] and "paper" in page.texts["code"]


def test_what_is_missing_is_left_out(run: Path) -> None:
    for part, gone in (
        ("predictions", "Predictions"),
        ("eval", "Evaluation "),
        ("samples", None),
        ("curves.png", None),
        ("metrics.jsonl", "Training"),
    ):
        path = run / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        page = Page(write_report(run).read_text(encoding="utf-8"))
        assert gone not in page.texts["h2"]
    assert page.texts["h2"] == ["Settings"] and page.links == []


def test_predictions_without_true_frames_and_too_many(run: Path) -> None:
    for number in range(13):
        prediction(run / "predictions" / f"p{number}", scores={}, sound="other.wav")
        (run / "predictions" / f"p{number}" / "curves.png").unlink()
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert len(page.texts["h3"]) == 12 and "2 older predictions are left out." in page.texts["p"]
    assert any("; sound heard: silence (other.wav)." in note for note in page.texts["p"])


def test_damaged_results_do_not_cost_the_report(run: Path) -> None:
    for i, content in enumerate((b"{", b"[]", b"{}", b"\xff")):
        (run / "predictions" / f"bad{i}").mkdir(parents=True)
        (run / "predictions" / f"bad{i}" / "prediction.json").write_bytes(content)
    page = write_report(run).read_text()
    assert page.count("prediction.json is damaged") == 4


def test_results_know_their_run(run: Path, tmp_path: Path) -> None:
    for results in (run / "eval", run):
        refresh_report(results)
        assert (run / "report.html").exists()
        (run / "report.html").unlink()
    refresh_report(run / "predictions" / "clip <1>")
    (tmp_path / "elsewhere" / "predictions").mkdir(parents=True)
    refresh_report(tmp_path / "elsewhere" / "predictions")
    assert [p.name for p in tmp_path.rglob("report.html")] == ["report.html"]


def test_the_old_report_stays_until_the_new_one_is_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(run)
    before = (run / "report.html").read_bytes()

    def full(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before and not list(run.glob(".*"))


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    with pytest.raises(InputError, match="RUN is missing"):
        report(ReportConfig())
    with pytest.raises(InputError, match="nowhere is not a run folder"):
        report(ReportConfig(str(tmp_path / "nowhere")))
