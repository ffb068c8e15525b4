"""Sound against made tracks whose every sample is known: rates, layouts, offsets, gaps, and what cannot be read."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from avfast.errors import InputError
from avfast.media.sound import SoundTrack, read_sound

BLACK = np.zeros((30, 16, 16, 3), np.uint8)


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0, level: float = 12000.0) -> np.ndarray:
    return np.rint(level * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.int16)


def wav(path: Path, samples: np.ndarray, rate: int, layout: str = "mono") -> Path:
    with av.open(str(path), "w") as container:
        track = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=layout)
        frame.rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(track.encode(frame))
    return path


def test_samples_at_their_own_rate_are_unchanged(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 30_000).astype(np.int16)
    sound = read_sound(wav(tmp_path / "a.wav", samples, 22_050), 22_050)
    assert (sound.rate, sound.start) == (22_050, 0.0)
    np.testing.assert_array_equal(sound.samples, samples)


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 48_000, 96_000])
def test_every_rate_becomes_the_wanted_one(rate: int, tmp_path: Path) -> None:
    """A sine at the new rate is the same function of time: a shift by one sample alone would be off by 1500."""
    sound = read_sound(wav(tmp_path / "a.wav", tone(rate), rate), 22_050)
    assert len(sound.samples) == pytest.approx(22_050, abs=2)
    inner = slice(1000, 21_000)
    error = sound.samples[inner].astype(float) - tone(22_050)[inner]
    assert np.abs(error).max() < 40


@pytest.mark.parametrize(
    ("layout", "gains"),
    # ITU-R BS.775, scaled so that all channels at full level do not clip; FFmpeg leaves the bass channel out
    [("stereo", [1, 1]), ("quad", [1, 1, 0.5**0.5, 0.5**0.5]), ("5.1", [1, 1, 2**0.5, 0, 0.5**0.5, 0.5**0.5])],
)
def test_every_layout_becomes_mono(layout: str, gains: list[float], tmp_path: Path) -> None:
    signals = np.stack([tone(22_050, hertz=200.0 * (i + 1)) for i in range(len(gains))], 1)
    sound = read_sound(wav(tmp_path / "a.wav", signals, 22_050, layout), 22_050)
    expected = signals.astype(float) @ (np.array(gains) / sum(gains))
    assert np.abs(sound.samples - expected).max() < 3


@pytest.mark.parametrize(("suffix", "codecs"), [(".mp4", ("libx264", "aac")), (".webm", ("libvpx", "libopus"))])
def test_priming_samples_are_not_heard(suffix: str, codecs: tuple[str, str], tmp_path: Path, make_film) -> None:
    """Encoders put hundreds of samples before the first one; a click stays where it was."""
    samples = np.zeros(48_000, np.int16)
    samples[12_345] = 30_000
    path = make_film(tmp_path / f"a{suffix}", BLACK, samples, rate=48_000, codecs=codecs)
    sound = read_sound(path, 48_000)
    click = np.abs(sound.samples.astype(int)).argmax() + round(sound.start * 48_000)
    assert abs(click - 12_345) <= 48


def test_a_track_that_begins_late_stays_late(tmp_path: Path, make_film) -> None:
    samples = np.full(11_025, 5000, np.int16)
    path = make_film(tmp_path / "a.mkv", BLACK, samples, first_sample=11_025)
    sound = read_sound(path, 22_050)
    assert sound.start == pytest.approx(0.5, abs=1e-3)
    whole = read_sound(path, 22_050, start=0.0, seconds=2.0).samples
    assert len(whole) == 44_100 and not whole[:11_000].any() and not whole[22_080:].any()
    assert (whole[11_050:22_000] == 5000).all()


def test_gaps_are_silence_and_overlaps_are_heard_once(tmp_path: Path) -> None:
    """Blocks of 0.1 s, one left out, one whose timestamp claims it begins 50 ms before the block before it ends."""
    rate, count = 22_050, 2205
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        track = container.add_stream("pcm_s16le", rate=rate, layout="mono")
        for value, at in ((100, 0.0), (200, 0.1), (400, 0.3), (500, 0.35), (600, 0.45)):
            frame = av.AudioFrame.from_ndarray(np.full((1, count), value, np.int16), format="s16", layout="mono")
            frame.rate, frame.pts, frame.time_base = rate, round(at * rate), Fraction(1, rate)
            container.mux(track.encode(frame))
    samples = read_sound(tmp_path / "a.mkv", rate).samples
    for value, begin, end in ((100, 0, 0.1), (200, 0.1, 0.2), (0, 0.2, 0.3), (400, 0.3, 0.4), (500, 0.4, 0.45)):
        middle = samples[round(begin * rate) + 30 : round(end * rate) - 30]
        assert (middle == value).all(), (value, set(middle.tolist()))
    assert samples[-1] == 600 and len(samples) == pytest.approx(0.55 * rate, abs=30)


def test_windows_of_a_track_are_its_samples(tmp_path: Path) -> None:
    samples = np.random.default_rng(1).integers(-9000, 9000, 50_000).astype(np.int16)
    path = wav(tmp_path / "a.wav", samples, 22_050)
    with SoundTrack(path, 22_050) as track:
        for first, count in ((-10, 30), (100, 735), (400, 735), (20_000, 10), (49_900, 300), (60_000, 5)):
            expected = np.zeros(count, np.int16)
            inside = range(max(first, 0), min(first + count, 50_000))
            expected[[i - first for i in inside]] = samples[inside.start : max(inside.start, inside.stop)]
            np.testing.assert_array_equal(track.window(first, count), expected)
        assert (track.start, track.end) == (0, 50_000)
        with pytest.raises(ValueError, match="expected none earlier"):
            track.window(100, 5)


def test_what_cannot_be_heard_is_one_line(tmp_path: Path, make_film) -> None:
    mute = make_film(tmp_path / "mute.mkv", BLACK, None)
    (tmp_path / "text.mp4").write_text("no film\n" * 100)
    (tmp_path / "empty.mp4").touch()
    whole = make_film(tmp_path / "a.mp4", BLACK, tone(22_050), codecs=("libx264", "aac"))
    (tmp_path / "half.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for path, reason in (
        (mute, "no sound track in it"),
        (tmp_path / "text.mp4", "Invalid data"),
        (tmp_path / "empty.mp4", "Invalid data"),
        (tmp_path / "half.mp4", "Invalid data"),
        (tmp_path / "gone.wav", "No such file"),
    ):
        with pytest.raises(InputError, match=reason) as error:
            read_sound(path, 22_050)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
