"""Image files as frames, and resizing against closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avfast.errors import InputError
from avfast.media.images import read_images, resize, target_size

H, W = 32, 48


def picture(i: int, h: int = H, w: int = W) -> np.ndarray:
    """Frame i, (h,w,3): no two rows, columns, channels or frames are alike."""
    y, x = np.mgrid[:h, :w]
    return np.stack([y * 5 + i, x * 3 + i, y + 2 * x + 7 * i], -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("given", "wanted", "result"),
    [
        ((180, 320), {"short_side": 256}, (256, 455)),
        ((720, 1280), {"short_side": 256}, (256, 455)),
        ((1280, 720), {"short_side": 256}, (455, 256)),
        ((1000, 1), {"short_side": 2}, (2000, 2)),
        ((90, 70), {"size": (20, 10)}, (10, 20)),
        ((90, 70), {}, (90, 70)),
    ],
)
def test_target_size(given: tuple[int, int], wanted: dict, result: tuple[int, int]) -> None:
    assert target_size(*given, **wanted) == result


def test_resize_averages_areas_and_enlarges_linearly() -> None:
    image = np.random.default_rng(0).uniform(size=(12, 18, 2)).astype(np.float32)
    np.testing.assert_allclose(resize(image, 4, 6), image.reshape(4, 3, 6, 3, 2).mean((1, 3)), rtol=1e-5)
    # one axis shrinks and the other grows: area averages along the first, linear along the second
    rows = resize(np.repeat(image[:, :1], 5, 1), 4, 10)
    np.testing.assert_allclose(rows[:, 3], image[:, 0].reshape(4, 3, 2).mean(1), rtol=1e-5)
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32), (4, 8))
    inside = resize(np.ascontiguousarray(ramp), 4, 16)[:, 1:-1]
    np.testing.assert_allclose(inside, np.broadcast_to((np.arange(1, 15) + 0.5) / 2 - 0.5, (4, 14)), atol=1e-5)
    assert resize(image, 12, 18) is image


def test_image_files(tmp_path: Path) -> None:
    image = picture(3)
    Image.fromarray(image).save(tmp_path / "rgb.png")
    Image.fromarray(np.concatenate([image, image[..., :1]], -1)).save(tmp_path / "rgba.png")
    Image.fromarray(image[..., 0]).save(tmp_path / "grey.png")
    Image.fromarray(image[..., 0].astype(np.uint16) * 256 + 99).save(tmp_path / "deep.png")
    exif = Image.Exif()
    # 6: the camera was turned, the picture has to go 90 degrees clockwise
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(image))).save(tmp_path / "turned.png", exif=exif)
    names = ["rgb.png", "rgba.png", "grey.png", "deep.png", "turned.png"]
    frames = list(read_images([tmp_path / name for name in names]))
    assert [(f.number, f.time) for f in frames] == [(i, None) for i in range(5)]
    grey = np.repeat(image[..., :1], 3, 2)
    for frame, want in zip(frames, [image, image, grey, grey, image], strict=True):
        np.testing.assert_array_equal(frame.image, want)


def test_image_files_that_do_not_do(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    Image.fromarray(noise[1:]).save(tmp_path / "b.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("no")
    for name, reason in (
        ("b.jpg", "is 48x31 pixels, the first one 48x32: give a size for all"),
        ("cut.jpg", "cut.jpg: image file is truncated"),
        ("text.jpg", "text.jpg: cannot identify image file$"),
        ("none.jpg", "none.jpg: No such file or directory"),
    ):
        with pytest.raises(InputError, match=reason):
            list(read_images([tmp_path / "a.jpg", tmp_path / name]))
    assert len(list(read_images([tmp_path / "a.jpg", tmp_path / "b.jpg"], size=(20, 20)))) == 2
