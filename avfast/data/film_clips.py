"""Clips out of videos with sound: frames at a steady rate, and to each frame the sound that begins with it.

Frame j of a clip that starts `start` seconds after the film's first frame is the film's frame nearest to the time
first + start + j / fps, by timestamps. fps is that of the settings, or the film's own mean rate where that is lower: a
film of 24 frames a second stretched to 30 would teach a stutter.

The sound of a frame is the `samples_per_frame` samples that begin at the frame's time, rounded to whole samples frame
by frame, so that no drift builds up. `samples_per_frame` is round(sample_rate / fps) of the settings, for slower films
too: every film gives spectrograms of one shape. Of a slower film the sound between two windows is left out (at 24
frames a second and settings of 30, a fifth)."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from avfast.errors import InputError
from avfast.files.settings import Count, FrameRate, Positive, Side, check_values
from avfast.media.images import Frame, Pixels
from avfast.media.sound import Samples, SoundTrack
from avfast.media.spectrogram import SpectrogramConfig
from avfast.media.video import probe_video, read_video

# encoders cut the sound a little short of the last frame: this many seconds without it are silence, more are an error
_SOUND_SLACK = 0.1


@dataclass(frozen=True)
class ClipSettings:
    """How clips are read out of videos: everything that decides their bytes."""

    fps: FrameRate = 30.0
    """Frames per second; of a slower film its own rate."""
    size: tuple[Side, Side] = (64, 64)
    """Width and height, multiples of 16."""
    fit: Literal["crop", "letterbox"] = "crop"
    """Other proportions lose their edges evenly, or stand between black bars."""
    channels: Literal[1, 3] = 3
    """RGB, or 1 for grey."""
    sample_rate: Count = 22_050
    """Samples of sound per second; mono."""
    n_fft: Count = 88
    """Length of the spectrogram's window and transform, in samples."""
    hop: Count = 44
    """Samples between the spectrogram's columns."""
    spectrogram_scale: Positive = 16.0
    """The magnitude that becomes 1, larger ones are clamped; n_fft / 2 is never exceeded. Speech, music and effects of
    five films reached 7.7 to 14.4."""

    @property
    def spectrogram(self) -> SpectrogramConfig:
        """45 x 17 per frame by default."""
        samples = round(self.sample_rate / self.fps)
        return SpectrogramConfig(self.sample_rate, samples, self.n_fft, self.hop, self.spectrogram_scale)

    @property
    def samples_per_frame(self) -> int:
        """Samples of sound that belong to a frame."""
        return self.spectrogram.samples_per_frame

    def check(self) -> None:
        """Raise InputError for values that cannot work."""
        check_values(self)
        if min(self.size) < 16 or any(side % 16 for side in self.size):
            raise InputError(f"size is {' '.join(map(str, self.size))}, expected multiples of 16")
        # it checks itself
        _ = self.spectrogram

    def read_video(self, path: str | Path, fps: float | None = None, start: float = 0.0) -> Iterator[Frame]:
        """The frames of a film at this size, see `avfast.media.video.read_video`."""
        return read_video(path, fps=fps, start=start, size=self.size, fit=self.fit, grey=self.channels == 1)


@dataclass(frozen=True)
class InputSpec:
    """How a trained model is fed: context_frames = K, the given frames; eval_frames, predicted where nobody asks for
    another number; the TV-L1 preset of the given frames' flow; and how films are read for it."""

    context_frames: int
    eval_frames: int
    flow_preset: str
    clips: ClipSettings

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputSpec:
        """Back from `dataclasses.asdict`, through JSON or not."""
        clips = dict(values["clips"])
        return cls(**{**values, "clips": ClipSettings(**{**clips, "size": tuple(clips["size"])})})


class VideoClip(NamedTuple):
    """T frames of a film with their sound: frames (T,C,H,W) uint8; waveform (T * samples_per_frame,) int16, the frames'
    windows one after another; fps, their rate, see `film_rate`; times (T,), seconds on the file's clock."""

    frames: Pixels
    waveform: Samples
    fps: float
    times: NDArray[np.float64]


def read_clip(path: str | Path, settings: ClipSettings, *, start: float = 0.0, frames: int) -> VideoClip:
    """The clip of `frames` frames that starts `start` seconds after the film's first frame. Raises InputError for a
    file that cannot be read, without video or sound, or whose video or sound is too short."""
    with closing(iter_clips(path, settings, frames=frames, start=start)) as clips:
        clip = next(clips, None)
    if clip is None:
        raise InputError(f"{path}: too short, its video or its sound ends before {frames} frames from {start:g} s")
    return clip


def iter_clips(
    path: str | Path, settings: ClipSettings, *, frames: int, start: float = 0.0
) -> Generator[VideoClip, None, None]:
    """Consecutive clips of `frames` frames, from `start` seconds after the film's first frame on. What does not fill a
    clip at the end, or has no sound, is left out. Holds one clip at a time. Raises InputError, while it is iterated,
    for a file that cannot be read to its end or has no sound track."""
    settings.check()
    if frames < 1 or not start >= 0:
        raise ValueError(f"frames is {frames} and start {start}: expected at least 1 frame and 0 seconds")
    fps = film_rate(path, settings)
    with SoundTrack(path, settings.sample_rate) as track:
        film = settings.read_video(path, fps, start)
        while len(images := list(islice(film, frames))) == frames:
            clip = _with_sound(images, fps, track, settings)
            if len(clip.frames) == frames:
                yield clip


def film_rate(path: str | Path, settings: ClipSettings) -> float:
    """Frames per second at which a film's clips are read: the settings', or the film's own where it is lower. Raises
    InputError where it cannot be opened as a video."""
    own = probe_video(path).fps
    return settings.fps if own is None else min(settings.fps, own)


def read_film(path: str | Path, settings: ClipSettings, *, max_frames: int | None = None) -> VideoClip:
    """A whole film as one clip, as far as its sound covers it. Raises InputError as `iter_clips` does, for more than
    `max_frames` frames, and where the sound covers none."""
    settings.check()
    fps = film_rate(path, settings)
    images = list(islice(settings.read_video(path, fps), None if max_frames is None else max_frames + 1))
    if max_frames is not None and len(images) > max_frames:
        raise InputError(f"{path}: longer than {max_frames} frames at {fps:g} per second, the limit")
    with SoundTrack(path, settings.sample_rate) as track:
        clip = _with_sound(images, fps, track, settings)
    if not len(clip.frames):
        raise InputError(f"{path}: its sound covers none of its {len(images)} frames")
    return clip


def _with_sound(images: list[Frame], fps: float, track: SoundTrack, settings: ClipSettings) -> VideoClip:
    """Frames at a rate with their sound, as far as the track covers them."""
    times = np.array([image.time for image in images], np.float64)
    waveform, covered = _windows(track, settings, times)
    waveform = waveform[: covered * settings.samples_per_frame]
    return VideoClip(planes(images)[:covered], waveform, fps, times[:covered])


def sound_windows(path: str | Path, settings: ClipSettings, times: NDArray[np.float64]) -> Samples:
    """(T * samples_per_frame,) int16: the windows that begin at T increasing times on the file's clock, out of a film
    or a sound file. Raises InputError as `read_sound` does, and where the track ends before the last window."""
    with SoundTrack(path, settings.sample_rate) as track:
        waveform, covered = _windows(track, settings, times)
        if covered < len(times):
            end = track.end / settings.sample_rate
            wanted = f"{times[-1]:.2f} s and a frame are wanted: it covers {covered} of {len(times)} frames"
            raise InputError(f"{path}: its sound ends at {end:.2f} s, {wanted}")
    return waveform


def _windows(track: SoundTrack, settings: ClipSettings, times: NDArray[np.float64]) -> tuple[Samples, int]:
    """The windows that begin at these times, and how many of them the track covers, or ends a little before."""
    count, rate = settings.samples_per_frame, settings.sample_rate
    firsts = [round(time * rate) for time in times.tolist()]
    windows = np.concatenate([track.window(first, count) for first in firsts])
    end = track.end + _SOUND_SLACK * rate
    return windows, sum(first + count <= end for first in firsts)


def planes(images: Sequence[Frame]) -> Pixels:
    """The pixels (T,C,H,W) of T frames."""
    frames = np.stack([frame.image for frame in images])
    return frames[:, None] if frames.ndim == 3 else np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
