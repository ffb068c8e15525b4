"""Results as tables in the layout of the paper: SSIM and PSNR (Tables 1 and 5), AEPE (Table 4), and beside them the
position error of one object, in three formats."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from avfast import __version__
from avfast.scoring.metrics import MetricResult, get_protocol


@dataclass(frozen=True)
class TableInfo:
    """What the tables say about themselves."""

    context_frames: int
    """K; the first predicted frame is number K + 1."""
    frames: tuple[int, ...]
    """Frame numbers that get a column of their own."""
    source: str
    """What was scored on, in words."""
    data_seed: int | None = None
    """Seed of the data; None for data that was not generated."""
    training_seeds: Mapping[str, int] = field(default_factory=dict)
    """Seed of the training per model, where it is known."""
    sound: Mapping[str, str] = field(default_factory=dict)
    """What the models heard: each kind (avfast.scoring.counterfactuals) in words; empty where nothing was heard."""
    commit: str | None = None
    """Of avfast; None outside a checkout."""
    version: str = __version__
    flow_preset: str | None = None
    regenerated: bool = False
    """The data is a regeneration of a published set."""


class Tables(NamedTuple):
    """The same results three times: Markdown to read, CSV with a row per method, JSON with everything. In JSON a score
    that is not finite is null."""

    markdown: str
    csv: str
    json: str


def default_frames(context_frames: int, pred_frames: int) -> tuple[int, ...]:
    """The first, middle and last predicted frame, numbered from 1: 6, 15, 25 for K = 5, P = 20 (the paper's choice)."""
    return tuple(sorted({context_frames + 1, context_frames + (pred_frames + 1) // 2, context_frames + pred_frames}))


def format_tables(
    models: Mapping[str, MetricResult], references: Mapping[str, MetricResult], info: TableInfo
) -> Tables:
    """Lay results out as the paper's Tables 1 and 5 (SSIM, PSNR) and Table 4 (AEPE), with one of position errors where
    there are any; references below the models. The best model's value is bold in every column. ValueError: no results,
    results of several protocols, clip counts or lengths, a frame number that was not predicted."""
    results = {**models, **references}
    if len({(r.protocol, r.clips, len(r.ssim)) for r in results.values()}) != 1:
        raise ValueError("models and references: expected results of one protocol, clip count and length")
    one = next(iter(results.values()))
    last = info.context_frames + len(one.ssim)
    for number in info.frames:
        if not info.context_frames < number <= last:
            raise ValueError(f"frames holds {number}, expected numbers from {info.context_frames + 1} to {last}")

    def pick(values: Sequence[float]) -> list[float]:
        return [*(values[n - info.context_frames - 1] for n in info.frames), math.fsum(values) / len(values)]

    kinds = {name: "model" if name in models else "reference" for name in results}
    footer = [
        f"{one.clips} clips of {info.source}, windows from the clip's first frame",
        f"data seed {info.data_seed}" if info.data_seed is not None else "",
        _training_seeds(info.training_seeds),
        _sound(info.sound),
        f"commit {info.commit}" if info.commit else f"version {info.version}",
        f"flow: TV-L1 preset `{info.flow_preset}`" if info.flow_preset else "",
    ]
    facts = "; ".join(filter(None, footer)) + "."
    if info.regenerated:
        facts += " Not comparable with the published row: the data set is regenerated."

    heads = [*(f"Fr {n}" for n in info.frames), "Mean"]
    columns = [(f"SSIM ↑ {h}", ".4f", 1) for h in heads] + [(f"PSNR ↑ {h}", ".2f", 1) for h in heads]
    columns += [("Capped %", ".1f", 0), ("Pooled PSNR ↑", ".2f", 1)]
    rows = {n: [*pick(r.ssim), *pick(r.psnr), 100 * r.capped_share, r.pooled_psnr] for n, r in results.items()}
    protocol = get_protocol(one.protocol)
    parts = [
        _markdown(columns, rows, kinds),
        f"Protocol `{one.protocol}`: {protocol.words}. Capped: share of PSNR values that the cap cut; pooled PSNR: of "
        f"the squared error pooled over clips, frames and pixels. {facts}",
    ]
    positions = {n: pick(r.position_error) for n, r in results.items() if r.position_error is not None}
    if positions:
        parts += [
            _markdown([(f"Position ↓ {h}", ".2f", -1) for h in heads], positions, kinds),
            "Position error in pixels: distance of the predicted frame's centre of mass from the true one's; a black "
            f"frame counts as the frame's middle. {facts}",
        ]
    flows = {n: [100 * v for v in pick(r.aepe)] for n, r in results.items() if r.aepe is not None}
    if flows:
        # repeating the last frame is warping it by no flow, and is called so where the flow is scored
        rows = {"zero flow" if n == "repeat last frame" else n: row for n, row in flows.items()}
        columns = [(f"AEPE ↓ {h}", ".2f", -1) for h in heads]
        parts += [
            _markdown(columns, rows, kinds),
            f"AEPE in 10^-2 pixels, all pixels, mean over frames {info.context_frames + 1} to {last}. {facts}",
        ]

    described = asdict(info) | {"protocol": one.protocol, "protocol_words": protocol.words, "clips": one.clips}
    document = described | {
        f"{kind}s": {n: r.as_dict() for n, r in results.items() if kinds[n] == kind} for kind in ("model", "reference")
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    said = {
        key: described[key]
        for key in ("protocol", "clips", "source", "data_seed", "commit", "version", "flow_preset", "regenerated")
    }
    lists = {n: {"ssim": r.ssim, "psnr": r.psnr, "aepe_px": r.aepe} for n, r in results.items()}
    if positions:
        lists = {n: scores | {"position_error_px": results[n].position_error} for n, scores in lists.items()}
    numbers = [f"{m}_{n}" for m in next(iter(lists.values())) for n in (*(f"fr{n}" for n in info.frames), "mean")]
    writer.writerow(["method", "kind", *numbers, "capped_share", "pooled_psnr", "training_seed", *said])
    for name, r in results.items():
        scores = [[None] * len(heads) if values is None else pick(values) for values in lists[name].values()]
        others = [r.capped_share, r.pooled_psnr, info.training_seeds.get(name)]
        writer.writerow([name, kinds[name], *chain(*scores), *others, *said.values()])
    strict = json.dumps(finite(document), indent=2, allow_nan=False)
    return Tables("\n\n".join(parts) + "\n", text.getvalue(), strict + "\n")


def _training_seeds(seeds: Mapping[str, int]) -> str:
    """The footer's words: one seed where all models share it, else each with its model."""
    different = set(seeds.values())
    if len(different) > 1:
        return "training seeds " + ", ".join(f"{seed} ({name})" for name, seed in seeds.items())
    return f"training seed {different.pop()}" if different else ""


def _sound(sound: Mapping[str, str]) -> str:
    """The footer's words: a row without a kind in its name heard its own."""
    return "sound heard: " + ", ".join(f"{words} ({kind})" for kind, words in sound.items()) if sound else ""


def finite(value: Any) -> Any:
    """The same document with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(columns: list[tuple[str, str, int]], rows: dict[str, list[float]], kinds: dict[str, str]) -> str:
    """An aligned table. columns: title, format, and whether more is better (1), worse (-1) or neither (0); the best
    model of a column is bold, with those that print the same."""
    cells = {name: [format(v, column[1]) for v, column in zip(row, columns, strict=True)] for name, row in rows.items()}
    models = [name for name in rows if kinds.get(name) == "model"]
    for i, (_, _, sign) in enumerate(columns):
        ranked = {name: sign * float(cells[name][i]) for name in models}
        best = max((v for v in ranked.values() if not math.isnan(v)), default=None)
        for name in models:
            if sign and ranked[name] == best:
                cells[name][i] = f"**{cells[name][i]}**"
    table = [["Method", *(title for title, _, _ in columns)]]
    table += [[name, *cells[name]] for name in models]
    if models and len(rows) > len(models):
        table.append(["*reference*", *[""] * len(columns)])
    table += [[name, *cells[name]] for name in rows if name not in models]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in table
    ]
    lines.insert(1, [":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
