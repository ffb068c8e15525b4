"""Digits: real ones from idx files, drawn ones, and the random words that everything is drawn with."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from avfast.data.digits import draw_digits, load_digits, philox_words, read_idx
from avfast.data.mmnist import MMNISTConfig, MovingMNIST
from avfast.errors import InputError

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"
needs_mnist = pytest.mark.skipif(not MNIST.exists(), reason="no real MNIST files beside the checkout")


def variant(canvas=48, num_digits=1, bounce="mirror", block=False, **other):
    return MMNISTConfig(canvas=canvas, num_digits=num_digits, bounce=bounce, block=block, **other)


def test_philox_words_are_the_published_generator():
    # Random123's known answer for philox4x64-10 with key and counter 0; the counter is raised before the first block,
    # so that the item before item 0, in modular arithmetic, holds it
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert np.random.Philox(key=0, counter=2**256 - 1).random_raw(4).tolist() == expected
    whole = philox_words(5, 3, 0, 10, 8)
    assert (philox_words(5, 3, 7, 2, 8) == whole[7:9]).all()
    assert len(np.unique(np.stack([whole, philox_words(5, 4, 0, 10, 8), philox_words(6, 3, 0, 10, 8)]))) == 240


@needs_mnist
def test_real_splits_share_no_image():
    parts = {split: load_digits(MNIST, split) for split in ("train", "val", "test")}
    assert [len(part.labels) for part in parts.values()] == [55000, 5000, 10000]
    seen = [{image.tobytes() for image in part.images} for part in parts.values()]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    # independently of read_idx: 16 bytes of header, then the images
    raw = gzip.decompress((MNIST / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert raw[16:] == parts["test"].images.tobytes()
    assert set(MovingMNIST(variant(digits=str(MNIST)), "test").clips(0, 100).labels.ravel()) == set(range(10))


def test_drawn_digits_are_distinct_and_like_mnist():
    drawings = {split: draw_digits(0, 4 * k + 3, 0, 600) for k, split in enumerate(("train", "val", "test"))}
    images = np.concatenate([part.images for part in drawings.values()])
    assert len({image.tobytes() for image in images}) == 1800
    assert images.dtype == np.uint8 and (images.max((1, 2)) > 250).all()
    # MNIST: mean 0.1307, standard deviation 0.3081; the mean of 1800 drawings has a standard error of 0.001
    assert abs(images.mean() / 255 - 0.1307) < 0.005 and abs(images.std() / 255 - 0.3081) < 0.01
    inked = images > 127
    rows, columns = inked.any(2).sum(1), inked.any(1).sum(1)
    assert np.maximum(rows, columns).max() <= 21 and np.maximum(rows, columns).min() >= 17
    grid = np.arange(28)
    centre = [(images * axis).sum((1, 2)) / images.sum((1, 2), dtype=float) for axis in (grid[:, None], grid[None])]
    assert abs(np.array(centre) - 13.5).max() < 1


def test_drawn_classes_can_be_told_apart():
    train, test = draw_digits(0, 3, 0, 1000), draw_digits(0, 11, 0, 500)
    means = np.stack([train.images[train.labels == digit].mean(0) for digit in range(10)]).reshape(10, -1)
    distance = ((test.images.reshape(500, 1, -1) - means) ** 2).sum(-1)
    right = distance.argmin(1) == test.labels
    # 0.978 here, every class above 0.91; 0.78 on real MNIST; chance is 0.10
    assert right.mean() > 0.9
    assert all(right[test.labels == digit].mean() > 0.75 for digit in range(10))


def idx(array, magic=8):
    return bytes([0, 0, magic, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_read_idx(tmp_path, compress):
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "file").write_bytes(compress(idx(array)))
    assert (read_idx(tmp_path / "file") == array).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "magic number"),
        (idx(np.zeros((2, 3), np.uint8), magic=13), "magic number 0x00000d02"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "17 bytes, expected 18"),
        (idx(np.zeros((2, 3), np.uint8)) + b"x", "19 bytes, expected 18"),
        (idx(np.zeros((2, 3), np.uint8))[:7], "7 bytes, expected"),
        (gzip.compress(idx(np.zeros((2, 3), np.uint8)))[:-9], "cannot be read"),
        (b"\x1f\x8bnot gzip", "cannot be read"),
    ],
)
def test_read_idx_says_what_is_wrong(tmp_path, content, message):
    if content is not None:
        (tmp_path / "images").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_idx(tmp_path / "images")
    assert str(tmp_path / "images") in str(error.value) and "\n" not in str(error.value)


def write_digits(folder, count=36, labels=None):
    labels = np.arange(count, dtype=np.uint8) % 10 if labels is None else labels
    images = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28).reshape(count, 28, 28)
    for name in ("train", "t10k"):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{name}-labels.idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))


def test_load_digits_splits_the_training_file(tmp_path):
    write_digits(tmp_path)
    train, val, test = (load_digits(tmp_path, split) for split in ("train", "val", "test"))
    assert train.images[:, 0, 0].tolist() == list(range(33)) and val.images[:, 0, 0].tolist() == [33, 34, 35]
    assert test.labels.tolist() == [i % 10 for i in range(36)] and train.labels.tolist() == [i % 10 for i in range(33)]


def test_bad_digit_folders(tmp_path):
    with pytest.raises(InputError, match="no file t10k-images-idx3-ubyte"):
        MovingMNIST(variant(digits=str(tmp_path)), "test")
    write_digits(tmp_path, labels=np.zeros(35, np.uint8))
    with pytest.raises(InputError, match=r"labels of shape \(35,\)"):
        load_digits(tmp_path, "train")
    write_digits(tmp_path, labels=np.full(36, 11, np.uint8))
    with pytest.raises(InputError, match="labels reach 11"):
        load_digits(tmp_path, "train")
