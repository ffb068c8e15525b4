"""A run as one web page: curves, tables, strips, GIFs and films, all inside the file, nothing from the network.

    python -m avfast.report runs/mmnist-demo

`report.html` lies in the run folder. train writes it at its end, evaluate and predict whenever their results lie in the
run folder. Parts that a run does not have are left out."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from markdown_it import MarkdownIt

from avfast import __version__
from avfast.cli.command import run_command
from avfast.cli.parser import parse
from avfast.errors import InputError
from avfast.files.atomic import replacing
from avfast.training.runs import Run

REPORT = "report.html"
# films and strips have 0.1 to 1 MB each, so this keeps a page below about 40 MB
_MAX_SAMPLES, _MAX_PREDICTIONS = 4, 12
_MEDIA_TYPES = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
.wide { overflow-x: auto; }
img, video { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.strip img { max-width: none; }
.curves img { min-width: 44rem; }
figure { margin: 1rem 0; }
figcaption, .note { font-size: .85rem; opacity: .8; overflow-wrap: anywhere; }
.films { display: flex; flex-wrap: wrap; gap: 1rem; }
.films figure { margin: 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--soft); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
th:first-child { background: linear-gradient(var(--soft), var(--soft)), Canvas; }
code { background: var(--soft); padding: 0 .2em; border-radius: 3px; }
details pre { overflow-x: auto; font-size: .8rem; }
"""
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{style}</style>
</head>
<body>
<h1>{name}</h1>
{sections}
<p class="note">avfast {version}</p>
</body>
</html>
"""


def write_report(run: str | Path) -> Path:
    """Write report.html into a run folder from the files there, and return its path. Raises InputError for a folder
    that is no run folder, OSError if the page cannot be written."""
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run} is not a run folder (no config.yaml)")
    sections = [*_training(run), *_evaluations(run), *_predictions(run), *_settings(run)]
    name = html.escape(run.absolute().name)
    page = _PAGE.format(name=name, style=_STYLE, sections="\n".join(sections), version=html.escape(__version__))
    with replacing(run / REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return run / REPORT


def refresh_report(results: str | Path) -> None:
    """Write the report again of the run folder that holds a folder of results, or is it; without one do nothing."""
    results = Path(results).resolve()
    for folder in (results, *results.parents):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            write_report(folder)


def _training(run: Path) -> Iterator[str]:
    summary = Run(run).summary()
    samples = sorted((run / "samples").glob("*.png"), key=lambda path: path.stem.rpartition("_")[2])
    if not summary and not samples:
        return
    yield "<h2>Training</h2>"
    if summary:
        yield f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in summary)}</ul>"
    yield from _figure(run / "curves.png", "Loss on training and validation clips")
    if samples:
        last = samples[-1]
        yield from _figure(last, f"A validation clip at the end of training, {last.stem}")
        yield from _figure(last.with_suffix(".gif"), f"Validation clips, {last.stem}")


def _evaluations(run: Path) -> Iterator[str]:
    for table in sorted(run.glob("eval*/table.md"), key=lambda path: path.stat().st_mtime):
        folder = table.parent
        yield f"<h2>Evaluation <code>{html.escape(folder.name)}</code></h2>"
        # names of runs and films stand in the table: none of them may load anything
        text = MarkdownIt("js-default").disable(["link", "image"]).render(table.read_text("utf-8", errors="replace"))
        yield text.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
        yield from _figure(folder / "curves.png", "Scores over the frame number; dashed: reference predictors")
        for picture in sorted(folder.glob("sample_*.png"))[:_MAX_SAMPLES]:
            yield from _figure(picture, picture.stem)
        yield '<div class="films">'
        for picture in sorted(folder.glob("samples_*.gif"))[:_MAX_SAMPLES]:
            yield from _figure(picture, picture.stem)
        yield "</div>"


def _predictions(run: Path) -> Iterator[str]:
    found = sorted(run.glob("**/prediction.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    if found:
        yield "<h2>Predictions</h2>"
    for path in found[:_MAX_PREDICTIONS]:
        folder = path.parent
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            facts = [
                f"{made['predicted_frames']} frames predicted from {made['given_frames']} of {made['video']}",
                f"sound heard: {made['audio_words']}" + (f" ({made['sound']})" if made["sound"] else ""),
            ]
            if scores := made["scores"].get("predicted"):
                facts.append(f"SSIM {scores['mean_ssim']:.3f}, PSNR {scores['mean_psnr']:.2f} dB")
        except (ValueError, KeyError, TypeError, AttributeError):
            # somebody's own file of that name, or a damaged one: the rest of the page is no worse for it
            facts = [f"{path.name} is damaged"]
        yield f"<h3>{html.escape(folder.name)}</h3>"
        yield f'<p class="note">{html.escape("; ".join(facts))}.</p>'
        yield '<div class="films">'
        yield from _figure(folder / "film.mp4", "True and predicted, with the sound that was heard")
        yield from _figure(folder / "flow.mp4", "Flow, true and predicted")
        yield "</div>"
        yield from _figure(folder / "strip.png", "Frames, flow and sound")
        yield from _figure(folder / "curves.png", "Scores over the frame number")
    if len(found) > _MAX_PREDICTIONS:
        yield f'<p class="note">{len(found) - _MAX_PREDICTIONS} older predictions are left out.</p>'


def _settings(run: Path) -> Iterator[str]:
    yield "<h2>Settings</h2>"
    for name in ("config.yaml", "data.json", "command.txt", "env.json"):
        if (run / name).is_file():
            text = html.escape((run / name).read_text(encoding="utf-8", errors="replace").rstrip())
            yield f"<details><summary>{name}</summary>\n<pre>{text}</pre></details>"


def _figure(path: Path, caption: str) -> Iterator[str]:
    """A picture or film with its caption; nothing if the file does not exist."""
    if not path.is_file():
        return
    data = f"data:{_MEDIA_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    caption = html.escape(caption)
    if path.suffix == ".mp4":
        media = f'<video controls loop playsinline src="{data}"></video>'
    else:
        media = f'<img src="{data}" alt="{caption}">'
    if path.suffix == ".png":
        # strips are wider than most screens, curves wider than a phone's: they scroll instead of shrinking
        kind = "curves" if path.stem == "curves" else "strip"
        media = f'<div class="wide {kind}">{media}</div>'
    yield f"<figure>{media}<figcaption>{caption}</figcaption></figure>"


@dataclass(frozen=True)
class ReportConfig:
    """Write a run's report.html, one page with everything in it."""

    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    """Run folder."""


def report(config: ReportConfig) -> Path:
    """Write the report of a run: `write_report` with the settings of the command."""
    if config.run is None:
        raise InputError("RUN is missing, expected a run folder")
    return write_report(config.run)


def main(argv: list[str] | None = None) -> None:
    print(report(parse(ReportConfig, prog="avfast report", argv=argv)))


if __name__ == "__main__":
    run_command(main)
