"""Clips against made films: sight and sound in step at every rate, fit, lengths, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from avfast.data.film_clips import ClipSettings, film_rate, iter_clips, read_clip, sound_windows
from avfast.errors import InputError
from avfast.media.spectrogram import spectrogram

REAL = Path(__file__).parents[3] / "shared" / "data" / "clips"
RATES = {"23.976": Fraction(24000, 1001), "25": Fraction(25), "29.97": Fraction(30000, 1001), "30": Fraction(30)}
COLOURS = np.arange(90) % 7 * 30 + 20


def film(path: Path, make_film, fps: Fraction = Fraction(30), frames: int = 90, h: int = 48, w: int = 64, **options):
    """Frame i is one grey level, the sound a ramp of levels that names the time."""
    images = np.broadcast_to(COLOURS[:frames, None, None, None].astype(np.uint8), (frames, h, w, 3))
    seconds = float(frames / fps)
    samples = (np.arange(round(seconds * 22_050)) // 22).astype(np.int16)
    return make_film(path, images, samples, fps=fps, **options)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    ("suffix", "codecs"),
    [(".mkv", ("ffv1", "pcm_s16le")), (".mp4", ("libx264", "aac")), (".webm", ("libvpx", "libopus"))],
)
def test_flash_and_click_of_one_frame_stay_in_one_frame(
    rate: str, suffix: str, codecs: tuple[str, str], tmp_path: Path, make_film
) -> None:
    """Flashes late in the film too: a drift of one sample a frame would have grown to 4 ms there. The codecs smear a
    click, by less than 5 ms."""
    fps, count, flashes = RATES[rate], 150, (10, 77, 140)
    images = np.zeros((count, 32, 32, 3), np.uint8)
    samples = np.zeros(round(count / fps * 48_000), np.int16)
    for frame in flashes:
        images[frame] = 255
        middle = round((frame + 0.5) / fps * 48_000)
        samples[middle : middle + 24] = 30_000
    path = make_film(tmp_path / f"a{suffix}", images, samples, fps=fps, rate=48_000, codecs=codecs)
    for settings in (ClipSettings(size=(32, 32)), ClipSettings(size=(32, 32), fps=12.0)):
        wanted = count if settings.fps == 30 else 55
        clip = read_clip(path, settings, frames=wanted)
        assert clip.fps == pytest.approx(min(float(fps), settings.fps), rel=1e-4)
        assert clip.frames.shape == (wanted, 3, 32, 32) and clip.frames.dtype == np.uint8
        windows = clip.waveform.reshape(wanted, settings.samples_per_frame).astype(int)
        bright = clip.frames.mean((1, 2, 3)) > 128
        loud = np.abs(windows).max(1) > 8000
        if settings.fps == 30:
            assert bright.nonzero()[0].tolist() == list(flashes)
            assert loud.nonzero()[0].tolist() == list(flashes)
            for frame in flashes:
                heard = clip.times[frame] + np.abs(windows[frame]).argmax() / 22_050
                assert heard == pytest.approx(float((frame + 0.5) / fps), abs=0.005)
        else:
            # fewer frames than the film has: a flash may fall between two, its click may not be more than one away
            for frame in loud.nonzero()[0]:
                assert np.abs(np.array(flashes) / float(fps) * 12 - frame).min() <= 1
            for frame in bright.nonzero()[0]:
                assert loud[max(0, frame - 1) : frame + 2].any()


@pytest.mark.parametrize("rate", RATES)
def test_windows_begin_at_their_frames_time(rate: str, tmp_path: Path, make_film) -> None:
    """The sound is a ramp, so its first sample in each window tells the time it was taken at."""
    fps = RATES[rate]
    clip = read_clip(film(tmp_path / "a.mkv", make_film, fps), ClipSettings(), frames=85, start=0.1)
    first = clip.waveform.reshape(85, -1)[:, 0]
    np.testing.assert_allclose(clip.times, 0.1 + np.arange(85) / float(fps), atol=2e-3)
    assert np.abs(first - clip.times * 22_050 / 22).max() < 1.6


def test_frames_and_consecutive_clips(tmp_path: Path, make_film) -> None:
    path = film(tmp_path / "a.mkv", make_film)
    clips = list(iter_clips(path, ClipSettings(), frames=40))
    assert [c.times[0] for c in clips] == pytest.approx([0.0, 40 / 30], abs=2e-3)
    for number, clip in enumerate(clips):
        levels = clip.frames[:, :, 20, 20]
        assert (levels == COLOURS[40 * number : 40 * number + 40, None]).all()
        np.testing.assert_array_equal(read_clip(path, ClipSettings(), frames=40, start=40 * number / 30)[1], clip[1])
    half = read_clip(path, ClipSettings(fps=15.0), frames=40)
    assert (half.frames[:, 0, 5, 5] == COLOURS[:80:2]).all()
    assert half.waveform.shape == (40 * 1470,)


def test_a_slower_film_keeps_its_rate_and_the_spectrograms_shape(tmp_path: Path, make_film) -> None:
    path = film(tmp_path / "a.mkv", make_film, Fraction(24))
    clip = read_clip(path, ClipSettings(), frames=80)
    assert clip.fps == film_rate(path, ClipSettings()) == 24
    assert (clip.frames[:, 0, 0, 0] == COLOURS[:80]).all()
    image = spectrogram(torch.from_numpy(clip.waveform), ClipSettings().spectrogram)
    assert image.shape == (80, 1, 45, 17)


@pytest.mark.parametrize(("h", "w"), [(48, 120), (120, 48), (33, 77)])
def test_crop_and_letterbox(h: int, w: int, tmp_path: Path, make_film) -> None:
    """A grey film with white edges: cropping a square out of its middle leaves no edge on the long sides, bars leave
    the whole picture."""
    images = np.full((4, h, w, 3), 100, np.uint8)
    edge = 8
    along = (slice(None), slice(None), slice(0, edge)) if w > h else (slice(None), slice(0, edge))
    images[along] = 255
    path = make_film(tmp_path / "a.mkv", images, np.zeros(22_050, np.int16))
    settings = ClipSettings(size=(32, 32))
    assert (read_clip(path, settings, frames=2).frames == 100).all()
    boxed = read_clip(path, replace(settings, fit="letterbox"), frames=2).frames[0, 0]
    boxed = boxed if w > h else boxed.T
    inner = round(32 * min(h, w) / max(h, w))
    top = (32 - inner) // 2
    assert not boxed[:top].any() and not boxed[top + inner :].any()
    assert (boxed[top : top + inner, 0] == 255).all() and (boxed[top : top + inner, -1] == 100).all()


def test_4k(tmp_path: Path, make_film) -> None:
    images = np.zeros((3, 2160, 3840, 3), np.uint8)
    images[:, :, 840:3000] = 200
    path = make_film(tmp_path / "a.mp4", images, np.zeros(22_050, np.int16), codecs=("libx264", "aac"))
    frames = read_clip(path, ClipSettings(), frames=3).frames
    assert frames.shape == (3, 3, 64, 64) and np.abs(frames.astype(int) - 200).max() <= 3


def test_grey_is_one_channel(tmp_path: Path, make_film) -> None:
    images = np.zeros((3, 32, 32, 3), np.uint8) + np.array([200, 100, 50], np.uint8)
    path = make_film(tmp_path / "a.mkv", images, np.zeros(22_050, np.int16))
    frames = read_clip(path, ClipSettings(size=(16, 16), channels=1), frames=3).frames
    assert frames.shape == (3, 1, 16, 16)
    assert np.abs(frames - (0.299 * 200 + 0.587 * 100 + 0.114 * 50)).max() <= 0.51


def test_too_short_mute_and_silent_ends(tmp_path: Path, make_film) -> None:
    path = film(tmp_path / "a b ü.mkv", make_film, frames=30)
    with pytest.raises(InputError, match="too short, its video or its sound ends before 31 frames from 0 s"):
        read_clip(path, ClipSettings(), frames=31)
    with pytest.raises(InputError, match="too short"):
        read_clip(path, ClipSettings(), frames=5, start=9.0)
    images = np.zeros((60, 16, 16, 3), np.uint8)
    with pytest.raises(InputError, match="no sound track in it"):
        read_clip(make_film(tmp_path / "mute.mkv", images, None), ClipSettings(), frames=5)
    # sound for 40 of 60 frames, and a little less than 60 frames of it
    short = make_film(tmp_path / "short.mkv", images, np.ones(40 * 735, np.int16))
    assert len(list(iter_clips(short, ClipSettings(), frames=20))) == 2
    nearly = make_film(tmp_path / "nearly.mkv", images, np.ones(58 * 735, np.int16))
    clip = read_clip(nearly, ClipSettings(), frames=60)
    assert clip.waveform[: 58 * 735].all() and not clip.waveform[58 * 735 :].any()


def test_sound_of_another_file(tmp_path: Path, make_film) -> None:
    path = film(tmp_path / "a.mkv", make_film)
    clip = read_clip(path, ClipSettings(), frames=90)
    np.testing.assert_array_equal(sound_windows(path, ClipSettings(), clip.times), clip.waveform)
    with pytest.raises(InputError, match=r"sound ends at 3.00 s, 4.00 s and a frame are wanted"):
        sound_windows(path, ClipSettings(), np.array([0.0, 4.0]))


@pytest.mark.skipif(not REAL.exists(), reason="the real films are not there")
@pytest.mark.parametrize(
    ("name", "fps"), [("brush.avi", 25), ("bunny.webm", 24), ("chaplin.mp4", 25), ("nasa.mp4", 25), ("tennis.mp4", 30)]
)
def test_real_films(name: str, fps: float, tmp_path: Path) -> None:
    """AVI, WebM and MP4 with MP3, Vorbis and AAC at 8 and 44.1 kHz; no magnitude is clamped."""
    clip = read_clip(REAL / name, ClipSettings(), frames=30, start=2.0)
    assert clip.fps == pytest.approx(fps, rel=1e-3) and clip.frames.shape == (30, 3, 64, 64)
    assert clip.frames.std() > 5 and np.abs(clip.waveform.astype(int)).max() > 300
    assert spectrogram(torch.from_numpy(clip.waveform), ClipSettings().spectrogram).max() < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 0.0}, "fps is 0.0, expected above 0 and at most 1000"),
        ({"size": (64, 60)}, "size is 64 60, expected multiples of 16"),
        ({"hop": 0}, "hop is 0, expected at least 1"),
        ({"fps": 600.0}, "n_fft is 88"),
    ],
)
def test_settings_that_cannot_work(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(ClipSettings(), **change).check()
