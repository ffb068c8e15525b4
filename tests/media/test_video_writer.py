"""Films that are written and decoded again."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from avfast.errors import InputError
from avfast.media.video import probe_video, read_video
from avfast.media.video_writer import video_writer

H, W = 32, 48


def picture(i: int, h: int = H, w: int = W) -> np.ndarray:
    """Frame i, (h,w,3): no two rows, columns, channels or frames are alike."""
    y, x = np.mgrid[:h, :w]
    return np.stack([y * 5 + i, x * 3 + i, y + 2 * x + 7 * i], -1).astype(np.uint8)


@pytest.mark.parametrize(("h", "w"), [(32, 48), (31, 47), (1, 1)])
def test_writing_a_film(h: int, w: int, tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.08, 0.2, 0.24]
    # smooth, so that neither coarse chroma nor compression changes much
    y, x = np.mgrid[:h, :w][..., None]
    images = [(np.array([200, 40 * i, 90]) * 0.4 + 4 * y + x).astype(np.uint8) for i in range(5)]
    with video_writer(tmp_path / "a.mp4", 25) as write:
        for image, time in zip(images, times, strict=True):
            write(image, time)
        assert not (tmp_path / "a.mp4").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    frames = list(read_video(tmp_path / "a.mp4"))
    assert [f.time for f in frames] == pytest.approx(times)
    for frame, image in zip(frames, images, strict=True):
        assert frame.image.shape == (h + h % 2, w + w % 2, 3)
        assert np.abs(frame.image[:h, :w].astype(int) - image).mean() < 2
    assert probe_video(tmp_path / "a.mp4").seconds == pytest.approx(0.28)


def decoded_sound(path: Path) -> tuple[np.ndarray, int, float]:
    """The samples of the first track in [-1,1], their rate, and the time of the first one."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
        samples = np.concatenate([f.to_ndarray().mean(0) for f in frames])
        return samples, frames[0].sample_rate, frames[0].time


@pytest.mark.parametrize(
    ("rate", "coded", "fps"),
    [(22_050, 22_050, 30), (44_100, 44_100, 25), (4400, 8000, 10), (96_000, 96_000, 24), (192_000, 96_000, 30)],
)
def test_a_film_with_sound(rate: int, coded: int, fps: int, tmp_path: Path) -> None:
    """A tone and a light begin with frame 12; the tone is found there to the sample."""
    at, count = 12, 30
    seconds = np.arange(count * rate // fps) / rate
    tone = np.sin(2 * np.pi * 300 * (seconds - at / fps)) * (seconds >= at / fps)
    with video_writer(tmp_path / "a.mp4", fps, ((20_000 * tone).astype(np.int16), rate)) as write:
        for i in range(count):
            write(np.full((H, W, 3), 200 if i >= at else 30, np.uint8), i / fps)
    frames = list(read_video(tmp_path / "a.mp4"))
    assert [f.image.mean() > 100 for f in frames] == [i >= at for i in range(count)]
    assert [f.time for f in frames] == pytest.approx([i / fps for i in range(count)], abs=1e-4)
    samples, found, first = decoded_sound(tmp_path / "a.mp4")
    assert found == coded and first == 0
    # AAC fills its last block of 1024 samples with silence
    assert 0 <= len(samples) - count / fps * coded <= 1024
    want = np.interp(np.arange(len(samples)) / coded, seconds, tone * 20_000 / 32_768, right=0)
    lags = range(-30, 31)
    fit = [np.dot(np.roll(samples, lag)[40:-40], want[40:-40]) for lag in lags]
    assert lags[int(np.argmax(fit))] == 0
    # the coder is lossy, and a tone that begins at once is the hardest for it
    assert np.abs(samples - want).mean() < 0.02 * np.abs(want).mean() + 2e-3
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        assert container.duration / av.time_base == pytest.approx(count / fps, abs=0.01)


def test_sound_and_frames_lie_side_by_side(tmp_path: Path) -> None:
    """A player need not search: no packet lies more than half a second before one that is shown earlier."""
    with video_writer(tmp_path / "a.mp4", 30, (np.zeros(5 * 22_050, np.int16), 22_050)) as write:
        for i in range(150):
            write(picture(i), i / 30)
    with av.open(str(tmp_path / "a.mp4")) as container:
        times = [(p.pos, float(p.pts * p.time_base)) for p in container.demux() if p.pts is not None]
    times.sort()
    latest = np.maximum.accumulate([time for _, time in times])
    assert len(times) > 200 and (latest - [time for _, time in times]).max() < 0.5


def test_a_film_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), video_writer(tmp_path / "a.mp4") as write:
        write(picture(0), 0.0)
        raise RuntimeError("stop")
    with pytest.raises(InputError, match="a.mp4: no frame was written"), video_writer(tmp_path / "a.mp4"):
        pass
    with pytest.raises(OSError), video_writer(tmp_path / "nowhere" / "a.mp4") as write:
        write(picture(0), 0.0)
    assert list(tmp_path.iterdir()) == []
