"""Decoding against made films whose pixels, times and orientation are known."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from avfast.errors import InputError
from avfast.media.video import probe_video, read_video

H, W = 32, 48


def picture(i: int, h: int = H, w: int = W) -> np.ndarray:
    """Frame i, (h,w,3): no two rows, columns, channels or frames are alike."""
    y, x = np.mgrid[:h, :w]
    return np.stack([y * 5 + i, x * 3 + i, y + 2 * x + 7 * i], -1).astype(np.uint8)


def film(
    path: Path,
    images: Sequence[np.ndarray],
    *,
    times: Sequence[int] | None = None,
    codec: str = "ffv1",
    pix_fmt: str = "bgr0",
    format: str | None = None,
    display: tuple[int, bool, bool] | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
) -> Path:
    """A film of (H,W,3) RGB pictures at 25 fps, or at times in ms; pts: written over the packets', in frames."""
    with av.open(str(path), "w", format=format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if display is not None:
            stream.set_display_rotation(display[0], hflip=display[1], vflip=display[2])
        packets = []
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = (i, Fraction(1, 25)) if times is None else (times[i], Fraction(1, 1000))
            packets += stream.encode(frame)
        for i, packet in enumerate(packets + stream.encode()):
            if pts is not None:
                # later by ten frames: no packet may be shown before it is decoded
                packet.pts, packet.dts, packet.time_base = pts[i] + 10, i, Fraction(1, 25)
            container.mux(packet)
    return path


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def luma(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float64) @ [0.299, 0.587, 0.114]


def test_frames_numbers_and_times(tmp_path: Path) -> None:
    images = [picture(i) for i in range(7)]
    path = film(tmp_path / "a.mkv", images)
    frames = list(read_video(path))
    assert [f.number for f in frames] == list(range(7))
    assert [f.time for f in frames] == pytest.approx([i / 25 for i in range(7)])
    for frame, image in zip(frames, images, strict=True):
        assert frame.image.dtype == np.uint8
        np.testing.assert_array_equal(frame.image, image)
    for frame, image in zip(read_video(path, grey=True), images, strict=True):
        assert frame.image.shape == (H, W) and np.abs(frame.image - luma(image)).max() <= 0.51
    assert probe_video(path) == (25.0, pytest.approx(0.28))


def fill(plane: av.video.plane.VideoPlane, values: np.ndarray) -> None:
    """Write (h,w) samples into a plane, whose lines may be longer."""
    lines = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
    lines[:, : values.shape[1]] = values
    plane.update(lines.tobytes())


# first level, and levels between black and white: limited range for YUV
LEVELS = {
    "yuv420p": (16, 219, "u1"),
    "yuv420p10le": (64, 876, "<u2"),
    "gray": (0, 255, "u1"),
    "gray10le": (0, 1023, "<u2"),
}


@pytest.mark.parametrize(("h", "w"), [(47, 63), (1, 1), (33, 7)])
@pytest.mark.parametrize("pix_fmt", LEVELS)
def test_odd_sizes_and_pixel_formats(h: int, w: int, pix_fmt: str, tmp_path: Path) -> None:
    """Planes filled by hand: FFmpeg's own conversion to 10 bits is sometimes wrong at odd edges."""
    base, span, kind = LEVELS[pix_fmt]
    grey = [picture(i, h, w)[..., 0] for i in range(3)]
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = h, w, pix_fmt
        for i, levels in enumerate(grey):
            frame = av.VideoFrame(w, h, pix_fmt)
            fill(frame.planes[0], np.rint(base + span / 255 * levels).astype(kind))
            for plane in frame.planes[1:]:
                # no colour
                fill(plane, np.full((plane.height, plane.width), 128 if kind == "u1" else 512, kind))
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    colour = [f.image for f in read_video(tmp_path / "a.mkv")]
    luminance = [f.image for f in read_video(tmp_path / "a.mkv", grey=True)]
    for levels, rgb, y in zip(grey, colour, luminance, strict=True):
        assert rgb.shape == (h, w, 3) and y.shape == (h, w)
        # white in 10 bits becomes 253
        assert np.abs(rgb.astype(int) - levels[..., None]).max() <= 2
        assert np.abs(y.astype(int) - levels).max() <= 2


def test_alpha_is_dropped(tmp_path: Path) -> None:
    rgba = np.concatenate([picture(0), np.full((H, W, 1), 10, np.uint8)], -1)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = H, W, "bgra"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        container.mux(stream.encode())
    np.testing.assert_array_equal(next(read_video(tmp_path / "a.mkv")).image, picture(0))


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize(("hflip", "vflip"), [(False, False), (True, False), (False, True)])
def test_display_matrix(turn: int, hflip: bool, vflip: bool, tmp_path: Path) -> None:
    """FFmpeg's matrix turns the frame counter-clockwise, then mirrors it."""
    path = film(tmp_path / "a.mov", [picture(0)], codec="png", pix_fmt="rgb24", display=(turn, hflip, vflip))
    want = np.rot90(picture(0), turn // 90)
    want = want[:, ::-1] if hflip else want
    want = want[::-1] if vflip else want
    np.testing.assert_array_equal(next(read_video(path)).image, want)


UNEVEN = [0, 40, 80, 200, 240, 500, 505, 510, 700, 733, 767, 800]


@pytest.mark.parametrize("fps", [4, 10, 25, 30, 100])
def test_rate_picks_the_nearest_in_time(fps: int, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", [picture(i) for i in range(len(UNEVEN))], times=UNEVEN)
    frames = list(read_video(path, fps=fps))
    # the last frame stands for half the gap before it too
    grid = np.arange(0, 0.8 + 0.0165 + 1e-9, 1 / fps)
    assert [f.time for f in frames] == pytest.approx(grid.tolist())
    distance = np.abs(np.array(UNEVEN)[None] / 1000 - grid[:, None])
    for frame, row in zip(frames, distance, strict=True):
        assert row[frame.number] <= row.min() + 1e-3
        np.testing.assert_array_equal(frame.image, picture(frame.number))


@pytest.mark.parametrize("fps", [24, 25, 30])
def test_the_films_own_rate_keeps_every_frame(fps: int, tmp_path: Path) -> None:
    """Matroska rounds times to milliseconds."""
    times = [round(1000 * i / fps) for i in range(20)]
    path = film(tmp_path / "a.mkv", [picture(i) for i in range(20)], times=times)
    assert [f.number for f in read_video(path, fps=fps)] == list(range(20))
    assert [f.number for f in read_video(path, fps=2 * fps)] == [i for i in range(20) for _ in range(2)]
    assert [f.number for f in read_video(path, fps=fps / 2)] == list(range(0, 20, 2))


def test_one_frame(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", [picture(0)])
    assert [f.number for f in read_video(path, fps=25)] == [0]


@pytest.mark.parametrize(
    ("pts", "times"),
    [
        # the k-th frame shown has the k-th smallest time
        ([0, 1, 3, 2, 4, 6, 5, 7], [0, 1, 2, 3, 4, 5, 6, 7]),
        # a time that is there twice: the stated rate goes on, but the rest is not shifted
        ([0, 1, 1, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([0, 1, 1, 2, 3, 4, 5, 6], [0, 1, 1.5, 2, 3, 4, 5, 6]),
        # no jump back, the stated rate goes on
        ([5, 6, 7, 8, 9, 10, 0, 1], None),
    ],
)
def test_times_always_increase(pts: list[int], times: list[float] | None, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", [picture(i) for i in range(8)], pts=pts)
    frames = list(read_video(path))
    for i, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.image, picture(i))
    found = np.array([f.time for f in frames])
    assert (np.diff(found) > 0).all()
    if times is not None:
        np.testing.assert_allclose(found - 0.4, np.array(times) / 25, atol=1e-3)


def test_streams_without_timestamps(tmp_path: Path) -> None:
    """Raw H.264 states its rate in the pictures; raw MJPEG states none, and none is made up."""
    images = [picture(i) for i in range(6)]
    path = film(tmp_path / "a.h264", images, codec="libx264", pix_fmt="yuv420p", format="h264")
    assert [f.time for f in read_video(path)] == pytest.approx([i / 25 for i in range(6)])
    path = film(tmp_path / "a.mjpeg", images, codec="mjpeg", pix_fmt="yuvj420p", format="mjpeg")
    assert [(f.number, f.time) for f in read_video(path)] == [(i, None) for i in range(6)]
    assert probe_video(path) == (None, None)
    with pytest.raises(InputError, match="a.mjpeg: it has no timestamps and states no frame rate, so fps cannot"):
        list(read_video(path, fps=25))


def broken(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files that cannot be read, each with the reason."""
    (folder / "text.mp4").write_text("no film")
    yield folder / "text.mp4", "Invalid data found"
    (folder / "empty.mp4").touch()
    yield folder / "empty.mp4", "Invalid data found"
    yield folder / "none.mp4", "No such file"
    yield sound(folder / "sound.m4a"), "no video stream in it"
    images = [picture(i, 16, 16) for i in range(100)]
    for suffix, codec, options in (
        ("mp4", "libx264", {"movflags": "faststart"}),
        ("mkv", "libx264", {}),
        ("webm", "libvpx-vp9", {}),
    ):
        whole = film(folder / f"whole.{suffix}", images, codec=codec, pix_fmt="yuv420p", container_options=options)
        data = whole.read_bytes()
        (folder / f"cut.{suffix}").write_bytes(data[: len(data) * 6 // 10])
        yield folder / f"cut.{suffix}", r"truncated, it ends after \d\.\d s of 4\.0 s|Invalid data found.*after frame"
    whole = film(folder / "moov-last.mp4", images[:20], codec="libx264", pix_fmt="yuv420p")
    whole.write_bytes(whole.read_bytes()[:2000])
    yield whole, "Invalid data found"
    list_file = folder / "list.m3u8"
    list_file.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    yield list_file, "Invalid data found"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in broken(tmp_path):
        with pytest.raises(InputError, match=reason) as error:
            list(read_video(path))
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_damage_in_the_middle(tmp_path: Path) -> None:
    """A slice of the file is overwritten: the frames before it come, then the reason."""
    path = film(tmp_path / "a.mov", [picture(i) for i in range(20)], codec="png", pix_fmt="rgb24")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    path.write_bytes(data)
    seen = []
    with pytest.raises(InputError, match=f"{path}: .*"):
        for frame in read_video(path):
            seen.append(frame.number)
    assert 3 < len(seen) < 20 and seen == list(range(len(seen)))


def test_a_name_is_only_a_name(tmp_path: Path) -> None:
    path = film(tmp_path / "http:12%03d.mkv", [picture(0)])
    np.testing.assert_array_equal(next(read_video(path)).image, picture(0))


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "cover.png")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        container.add_attachment("cover.png", "image/png", (tmp_path / "cover.png").read_bytes())
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="no video stream in it"):
        list(read_video(tmp_path / "a.mkv"))


def test_reading_holds_a_handful_of_frames(tmp_path: Path) -> None:
    """100 frames of 640x640 are 61 MB within FFmpeg and 123 MB as RGB; nothing may wait for the garbage collector."""
    path = film(tmp_path / "a.mp4", [picture(0, 640, 640)] * 100, codec="libx264", pix_fmt="yuv420p")

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    gc.disable()
    try:
        sizes = [resident() for _ in read_video(path, fps=50)]
    finally:
        gc.enable()
    assert len(sizes) == 200 and sizes[-1] - sizes[40] < 20


def test_leaving_early_closes_the_file(tmp_path: Path) -> None:
    frames = read_video(film(tmp_path / "a.mkv", [picture(i) for i in range(30)]))
    assert [f.number for f in itertools.islice(frames, 3)] == [0, 1, 2]
    frames.close()  # type: ignore[attr-defined]
    assert list(frames) == []


def test_resized_frames(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", [picture(i) for i in range(3)])
    for i, frame in enumerate(read_video(path, short_side=16)):
        want = picture(i).reshape(16, 2, 24, 2, 3).astype(float).mean((1, 3))
        assert frame.image.shape == (16, 24, 3) and np.abs(frame.image - want).max() <= 1
    assert next(read_video(path, size=(20, 30), grey=True)).image.shape == (30, 20)
