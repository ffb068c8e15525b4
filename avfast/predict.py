"""The future of videos, predicted from their first frames and their whole sound: films, pictures and arrays.

    python -m avfast.predict clip.mp4 --checkpoint runs/mmnist-demo
    avfast predict clips/ --checkpoint runs/mmnist-demo/last --horizon 60

Frames are read as the run's own data was: its rate, size, channels and spectrogram. For every video a folder appears,
once everything in it is there:

    predictions/clip/film.mp4 film.gif        true | predicted, the film with the sound that was heard
    predictions/clip/flow.mp4                 the same for the flow, in colours
    predictions/clip/strip.png curves.png     frames, flow and spectrogram over time; scores per frame
    predictions/clip/frames.npy flow.npy      predicted: (P,C,H,W) in [0,1], (P,2,H,W) backward, pixels; float32
    predictions/clip/true_frames.npy          (T',C,H,W) uint8, the given ones first; T' = K + P, or where the film ends
    predictions/clip/prediction.json          every setting, and the scores where there are true frames"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro

from avfast import __version__, runtime
from avfast.cli.command import print_failures, run_command
from avfast.cli.parser import parse
from avfast.data.film_clips import InputSpec, film_rate, planes, sound_windows
from avfast.data.store import Batch
from avfast.errors import InputError
from avfast.files.result_folder import hidden_folder, publish, sweep
from avfast.files.settings import Range, check_values
from avfast.machine.device import choose_device
from avfast.machine.environment import commit
from avfast.media.inputs import Item, find_items, write_failures
from avfast.media.prefetch import prefetch
from avfast.media.sound import Samples, read_sound
from avfast.media.spectrogram import spectrogram
from avfast.media.video_writer import video_writer
from avfast.models.base import Rollout
from avfast.models.registry import load_model
from avfast.opticalflow.tvl1 import tvl1_flow
from avfast.report import refresh_report
from avfast.scoring.counterfactuals import SoundCondition, check_conditions, describe_condition, other_clip
from avfast.scoring.metrics import MetricResult, ProtocolName, get_protocol
from avfast.scoring.predictors import Predictor, copy_last_flow, model_predictor, repeat_last, score
from avfast.scoring.tables import finite
from avfast.training.runs import input_spec, load_run_config, resolve_checkpoint
from avfast.ui import plots
from avfast.ui.progress import Progress

MARKER = "prediction.json"
# of the sound in the films, whatever the model hears
_FILM_RATE = 44_100
# more columns than this make a strip too wide to look at
_STRIP_FRAMES = 20


@dataclass(frozen=True)
class PredictConfig:
    """Predict the future of videos from their first frames and their sound."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO")] = ()
    """Videos with sound, folders of them, quoted globs, .txt files with one of these per line."""
    checkpoint: str | None = None
    """Run folder (its best checkpoint), RUN/last, RUN/best, or a checkpoint folder within a run."""
    onnx: str | None = None
    """Instead: a folder that avfast export has written as ONNX, which onnxruntime runs."""
    out: str = "predictions"
    """Folder for the results: one folder per video, with -2, -3 ... where it exists already."""
    horizon: Annotated[int, Range(1, 100_000)] | None = None
    """Frames to predict, as many as the sound covers at most; by default the run's eval-frames."""
    sound: str | None = None
    """Sound file or film whose sound is heard instead, from its beginning, for all videos."""
    audio: SoundCondition = "own"
    """What the model hears: the video's own sound (or --sound), `shuffled` that of another of the videos, `silent`
    none, `shifted` its own, later by --shift frames and wrapped around."""
    shift: Annotated[int, Range(-(10**6), 10**6)] = 5
    """Frames by which `shifted` sound comes later; below 0 earlier."""
    protocol: ProtocolName = "paper"
    """Definition of SSIM and PSNR."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`."""

    def check(self) -> None:
        """Raise InputError for values that cannot work together."""
        if not self.inputs:
            raise InputError("VIDEO is missing, expected videos, folders, globs or lists")
        if (self.checkpoint is None) == (self.onnx is None):
            raise InputError("expected either --checkpoint PATH (a run folder or a checkpoint) or --onnx FOLDER")
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise InputError(f"out is {self.out}, which is not a folder")
        check_values(self)
        if self.sound is not None and self.audio in ("shuffled", "silent"):
            raise InputError(f"--sound {self.sound} would not be heard: audio is {self.audio}, expected own or shifted")
        choose_device(self.device)


class _Clip(NamedTuple):
    """What is known of one video, on the CPU."""

    item: Item
    fps: float
    start: float
    """Time of the first frame on the file's clock."""
    frames: np.ndarray
    """(T',C,H,W) uint8, K <= T' <= T."""
    waveform: Samples
    """(T * samples per frame,) int16: the sound that the model gets."""
    sound: Path | None
    """Where it comes from; None: silence."""
    played: Samples
    """The same at `_FILM_RATE`, for the films."""


def predict(config: PredictConfig) -> dict[str, Any]:
    """Predict every video of the inputs and write its folder, see PredictConfig and the module's docstring. Returns
    `out`, `predictions`, a list of the contents of prediction.json with "folder" added, `seconds`, and `failed`, a list
    of {"input", "reason"} that failed.json in `out` holds too. Raises InputError when nothing could be done and for
    settings that do not work, OSError when the results cannot be written."""
    config.check()
    predictor = _Predictor(config)
    items, unusable = find_items(config.inputs, MARKER)
    films = [item for item in items if item.images is None]
    if config.audio == "shuffled" and len(films) < 2:
        raise InputError(f"audio is shuffled, which wants two videos or more, and there are {len(films)}")
    failed = [{"input": text, "reason": reason} for text, reason in unusable.items()]
    failed += [{"input": str(i.path), "reason": "images have no sound"} for i in items if i.images is not None]
    sweep(Path(config.out) / item.name for item in films)

    began = time.monotonic()
    predictions: list[dict[str, Any]] = []
    with (
        Progress("predicting, videos", total=len(films)) as progress,
        closing(prefetch(predictor.clips(films))) as clips,
    ):
        for done, (item, clip) in enumerate(clips, start=1):
            if isinstance(clip, str):
                failed.append({"input": str(item.path), "reason": clip.removeprefix(f"{item.path}: ")})
            else:
                predictions.append(predictor.predict(clip))
            progress.update(done, len(films), item.name)
    write_failures(Path(config.out), failed, bool(predictions))
    refresh_report(Path(config.out))
    seconds = time.monotonic() - began
    return {"out": config.out, "predictions": predictions, "seconds": seconds, "failed": failed}


class _Predictor:
    """A model with its run's way to read videos; a thread may read clips ahead while another predicts."""

    def __init__(self, config: PredictConfig) -> None:
        self._config = config
        self._device = torch.device(choose_device(config.device))
        source, spec = self._load(config)
        self._spec, self._settings = spec, spec.clips
        self._k, self._total = spec.context_frames, spec.context_frames + (config.horizon or spec.eval_frames)
        check_conditions((config.audio,), config.shift, self._total)
        self._settings_record = {
            **source,
            "given_frames": self._k,
            "predicted_frames": self._total - self._k,
            "audio": config.audio,
            "audio_words": describe_condition(config.audio, config.shift),
            "reading": dataclasses.asdict(self._settings),
            "flow_preset": spec.flow_preset,
            "protocol": {"name": config.protocol, "words": get_protocol(config.protocol).words},
            "version": __version__,
            "commit": commit(),
        }

    def _load(self, config: PredictConfig) -> tuple[dict[str, str], InputSpec]:
        """Set `_predict`; return what prediction.json says of the model, and how the model is fed."""
        if config.checkpoint is not None:
            checkpoint = resolve_checkpoint(config.checkpoint)
            self._predict = model_predictor(load_model(checkpoint, device=self._device))
            return {"checkpoint": str(checkpoint.resolve())}, input_spec(checkpoint, load_run_config(checkpoint))
        assert config.onnx is not None
        exported = runtime.Predictor(config.onnx, device=choose_device(config.device))

        def predict(batch: Batch, k: int) -> Rollout:
            inputs = batch.frames[:, :k], batch.flow[:, :k], batch.audio
            arrays = exported.rollout(*(x.cpu().numpy() for x in inputs))
            return Rollout(*(torch.from_numpy(x).to(self._device) for x in arrays))

        self._predict = predict
        return {"onnx": str(Path(config.onnx).resolve()), "device": exported.device}, exported.input_spec

    def clips(self, films: list[Item]) -> Iterator[tuple[Item, _Clip | str]]:
        """Every video read, or the reason why it cannot be."""
        for index, item in enumerate(films):
            sound = item.path if self._config.sound is None else Path(self._config.sound)
            if self._config.audio == "shuffled":
                sound = films[other_clip(index, len(films))].path
            try:
                yield item, self._read(item, sound)
            except InputError as error:
                yield item, str(error)

    def _read(self, item: Item, sound: Path) -> _Clip:
        settings, condition, shift = self._settings, self._config.audio, self._config.shift
        fps = film_rate(item.path, settings)
        frames = list(islice(settings.read_video(item.path, fps), self._total))
        if len(frames) < self._k:
            found = f"{len(frames)} frames at {fps:g} a second"
            raise InputError(f"{item.path}: {found}, expected the {self._k} given ones at least")
        start = frames[0].time
        assert start is not None
        seconds = self._total / fps
        if condition == "silent":
            waveform = np.zeros(self._total * settings.samples_per_frame, np.int16)
            played = np.zeros(round(seconds * _FILM_RATE), np.int16)
        else:
            # another sound from its own beginning, the film's from its first frame on
            first = start if sound == item.path else read_sound(sound, settings.sample_rate, seconds=0).start
            waveform = sound_windows(sound, settings, first + np.arange(self._total) / fps)
            played = read_sound(sound, _FILM_RATE, start=first, seconds=seconds).samples
        if condition == "shifted":
            waveform = np.roll(waveform, shift * settings.samples_per_frame)
            played = np.roll(played, round(shift / fps * _FILM_RATE))
        return _Clip(item, fps, start, planes(frames), waveform, None if condition == "silent" else sound, played)

    def predict(self, clip: _Clip) -> dict[str, Any]:
        """Predict one video and write its folder; what prediction.json holds, and the folder."""
        k = self._k
        frames = torch.from_numpy(clip.frames).to(self._device)[None]
        flow = tvl1_flow(frames, preset=self._spec.flow_preset)
        waveform = torch.from_numpy(clip.waveform).to(self._device)[None]
        audio = spectrogram(waveform, self._settings.spectrogram)
        batch = Batch(frames.float() / 255, audio, flow, waveform)
        rollout = self._predict(batch, k)
        results = _scores(batch, rollout, k, self._config.protocol)
        record = {
            "video": str(clip.item.path),
            "sound": None if clip.sound is None else str(clip.sound),
            "fps": clip.fps,
            "start_seconds": clip.start,
            "true_frames": len(clip.frames),
            **self._settings_record,
            "scores": {name: result.as_dict() for name, result in results.items()},
        }
        final = Path(self._config.out) / clip.item.name
        with hidden_folder(final) as unfinished:
            _write(unfinished, clip, batch, rollout, results, k)
            (unfinished / MARKER).write_text(json.dumps(finite(record), indent=2, allow_nan=False) + "\n")
            folder = publish(unfinished, final)
        return record | {"folder": str(folder)}


def _scores(batch: Batch, rollout: Rollout, k: int, protocol: ProtocolName) -> dict[str, MetricResult]:
    """Of the predicted frames that have a true one, beside two predictors that need no training; none without."""
    count = batch.frames.shape[1] - k
    if not count:
        return {}
    predicted = rollout.first_frames(count)
    predictors: dict[str, Predictor] = {
        "predicted": lambda *_: predicted,
        "repeat last frame": repeat_last,
        "copy-last-flow": copy_last_flow,
    }
    return score([batch], predictors, k, protocol)


def _write(folder: Path, clip: _Clip, batch: Batch, rollout: Rollout, results: dict[str, MetricResult], k: int) -> None:
    true, true_flow = batch.frames[0].cpu(), batch.flow[0].cpu()
    frames, flow = rollout.frames[0].cpu(), None if rollout.flow is None else rollout.flow[0].cpu()
    np.save(folder / "frames.npy", frames.numpy())
    np.save(folder / "true_frames.npy", clip.frames)
    films = {"film.mp4": plots.film_frames(true, frames, context_frames=k)}
    if flow is not None:
        np.save(folder / "flow.npy", flow.numpy())
        films["flow.mp4"] = plots.flow_film_frames(true_flow, flow, context_frames=k)
    for name, pictures in films.items():
        with video_writer(folder / name, clip.fps, (clip.played, _FILM_RATE)) as write:
            for number, picture in enumerate(pictures):
                write(picture, number / clip.fps)
    plots.save_gif(folder / "film.gif", true, frames, context_frames=k, frames_per_second=clip.fps)
    total = k + len(frames)
    chosen = {*np.linspace(1, total, min(total, _STRIP_FRAMES)).round().astype(int).tolist(), k, k + 1}
    path, audio = folder / "strip.png", batch.audio[0].cpu()
    plots.save_strip(path, true, frames, true_flow, flow, audio, context_frames=k, frames=chosen)
    if results:
        references = results.keys() - {"predicted"}
        plots.save_metric_curves(folder / "curves.png", results, context_frames=k, references=references)


def main(argv: list[str] | None = None) -> None:
    summary = predict(parse(PredictConfig, prog="avfast predict", argv=argv))
    for done in summary["predictions"]:
        scores = done["scores"].get("predicted")
        quality = f", SSIM {scores['mean_ssim']:.3f}, PSNR {scores['mean_psnr']:.2f} dB" if scores else ""
        print(f"{done['video']}: {done['predicted_frames']} frames predicted{quality}: {done['folder']}")
    print_failures(summary["failed"])


if __name__ == "__main__":
    run_command(main)
