"""Multimodal MovingMNIST, regenerated: digits bounce about a black canvas, tones tell the digit, its place and its
bounces.

The set is Sound2Sight's M3SO (Chatterjee and Cherian, ECCV 2020), from its published description, with named
variants. Ten frames a second, 440 samples of sound each:

- A digit starts uniformly on the canvas with a uniform direction and a speed of 2, 3, 4, 5 or 6 px a frame. A
  coordinate of its top-left corner that would leave [-2, canvas - 28 + 2] flips that velocity component (`mirror`),
  or draws the direction anew among those that lead back inside (`random`). It is drawn at its position truncated to
  integers.
- The sound of frame t belongs to the position of frame t + 1: it leads the picture by one frame. Two sines name the
  digit's class; in a step where any digit meets a wall, every digit sounds symbol 11 instead, and symbol 12 where any
  meets the block (both at once: the digits' own).
- `wrapped` is the sound as published: the amplitude grows with the distance from the canvas's top-left corner, about an
  offset of 32767, and overflows int16. `clean` is what the papers say: it falls with the distance, with no offset.
- With `block` (canvas 64) a white square of side 32 appears at the first frame after frame 10 (counted from 0) that has
  room for it. It keeps out the digits' top-left corners, so a digit can pass behind it; where it can, it appears
  clear of all four corners of every digit. Its corner is at least 12 px from the canvas's: room to bounce.

The same seed gives the same bytes on any machine: random bits are raw Philox words, sines come from integer tables, and
floating point is confined to IEEE-exact operations."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from avfast.data.base import SPLITS, DataSettings, FramePredictor, Split
from avfast.data.digits import DIGIT_SIDE, draw_digits, load_digits, philox_words, uniform
from avfast.data.film_clips import ClipSettings
from avfast.data.mmnist_motion import SPEEDS, direction, mirrored, walls_ahead
from avfast.data.mmnist_physics import Physics
from avfast.data.mmnist_rendering import BLOCK_SIDE, FRAME_SIDE, SAMPLES_PER_FRAME, render_frames, render_sound
from avfast.data.store import ClipStore, generated_folder, write_store
from avfast.errors import InputError
from avfast.files.settings import Count, Range, Seed, check_values
from avfast.media.spectrogram import SpectrogramConfig, spectrogram
from avfast.opticalflow.tvl1 import tvl1_flow
from avfast.ui.progress import Progress

GENERATOR_VERSION = 1
"""Raised whenever the same settings would give other bytes."""

# above the loudest bin of 8000 training clips, so that nothing is clamped: 14.7 and 18.4 (wrapped, one and two digits),
# 9.7 and 9.2 (clean); canvas 48 and 64 differ by less than 0.2
_SPECTROGRAM_SCALE = {"wrapped": 19.0, "clean": 10.0}

_START, _TURN, _BLOCK, _DRAWING = range(4)
_START_WORDS = 8
_FIRST_BLOCK_FRAME = 11
_BLOCK_CORNERS = np.arange(12, 64 - BLOCK_SIDE + 1)
_CHUNK = 64
_BUILD_CHUNK = 32


@dataclass(frozen=True)
class MMNISTConfig(DataSettings):
    """Multimodal MovingMNIST as generated here: every parameter that changes the data."""

    name: ClassVar[str] = "mmnist"
    regenerated: ClassVar[bool] = True
    title: ClassVar[str] = "Multimodal MovingMNIST"

    canvas: Literal[48, 64] = 48
    """Side of the canvas the digits move on, in pixels; 64 is shrunk to 48 (Lanczos)."""
    num_digits: Literal[1, 2] = 1
    """Digits per clip."""
    bounce: Literal["mirror", "random"] = "mirror"
    """At a wall the velocity component is mirrored, or the whole direction is drawn anew."""
    tone: Literal["wrapped", "clean"] = "wrapped"
    """`wrapped`: int16 overflow as published; `clean`: amplitude falls with the distance, as the paper's prose says."""
    block: bool = False
    """A white block appears after frame 10 and reflects the digit (wants canvas 64)."""
    clip_frames: Annotated[int, Range(2)] = 30
    """Frames per clip (10 per second)."""
    digits: str | None = None
    """Folder with the four MNIST idx files (.gz or not); without it, drawn handwriting-like strokes."""
    data_seed: Seed = 0
    """Seed of the data set; the splits of one seed never share a digit image."""
    train_clips: Count = 8000
    """Clips in the training split."""
    val_clips: Count = 200
    """Clips in the validation split."""
    test_clips: Count = 1000
    """Clips in the test split."""

    @property
    def seed(self) -> int:
        return self.data_seed

    @property
    def one_object(self) -> bool:
        return self.num_digits == 1 and not self.block

    def reference_frames(self) -> Mapping[str, FramePredictor]:
        """What follows from the given frames, and from them and the sound: for one digit that bounces like a mirror, on
        a canvas that is shown as it is."""
        if not self.one_object or self.bounce != "mirror" or self.canvas != FRAME_SIDE:
            return {}
        # MNIST has every digit's centre of mass in pixel 14; of the drawings one coordinate in 18 is a pixel away
        centre, doubt = (13.5, 0.2) if self.digits is None else (14.0, 0.0)
        physics = Physics(mmnist_spectrogram(self.tone), wrapped=self.tone == "wrapped", centre=centre, doubt=doubt)
        return {"physics, seen": physics.seen, "physics, seen and heard": physics.heard}

    def check_variant(self) -> None:
        """Raise InputError for settings that no data set has."""
        check_values(self)
        if self.block and self.canvas != 64:
            raise InputError(f"canvas is {self.canvas} with block, expected 64: the block's side is 32")

    def check(self, frames: int, batch_size: int) -> None:
        self.check_variant()
        if frames > self.clip_frames:
            raise InputError(
                f"context-frames with pred-frames or eval-frames is {frames} frames, more than the clip's "
                f"{self.clip_frames} frames (clip-frames)"
            )
        if batch_size > self.train_clips:
            raise InputError(f"batch-size is {batch_size}, more than the {self.train_clips} training clips")

    def load(self, split: Split, *, cache: str, flow_preset: str, quiet: bool = False) -> ClipStore:
        """One split with spectrograms and backward TV-L1 flow, from the cache or built into it. Raises InputError for
        bad settings or digit files, a damaged folder in the cache, a full disk or an unwritable cache."""
        source = MovingMNIST(self, split)
        folder, parameters = generated_folder(cache, source.parameters(), flow_preset)
        if folder.exists():
            return ClipStore.open(folder)
        with Progress(f"data set, {split}", quiet=quiet) as progress:
            return write_store(folder, len(source), _built_chunks(source, flow_preset, progress), parameters)

    def built(self, split: Split, *, cache: str, flow_preset: str) -> ClipStore | None:
        folder, _ = generated_folder(cache, MovingMNIST(self, split).parameters(), flow_preset)
        return ClipStore.open(folder) if folder.exists() else None

    def clip_settings(self, read_parameters: Callable[[], Mapping[str, Any]], image_channels: int) -> ClipSettings:
        sound = mmnist_spectrogram(self.tone)
        return ClipSettings(
            fps=sound.sample_rate / sound.samples_per_frame,
            size=(FRAME_SIDE, FRAME_SIDE),
            channels=1 if image_channels == 1 else 3,
            sample_rate=sound.sample_rate,
            n_fft=sound.n_fft,
            hop=sound.hop,
            spectrogram_scale=sound.scale,
        )


def _built_chunks(source: MovingMNIST, flow_preset: str, progress: Progress) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of a clip store, some clips after another."""
    config_audio = mmnist_spectrogram(source.config.tone)
    for first in range(0, len(source), _BUILD_CHUNK):
        clips = source.clips(first, min(_BUILD_CHUNK, len(source) - first))
        flow = tvl1_flow(torch.from_numpy(clips.frames), preset=flow_preset)
        yield {
            "frames": clips.frames,
            "audio": spectrogram(torch.from_numpy(clips.waveform), config_audio).numpy(),
            "flow": flow.numpy().astype(np.float16),
            "waveform": clips.waveform,
        }
        progress.update(first + len(clips.frames), len(source))


def mmnist_spectrogram(tone: str) -> SpectrogramConfig:
    """23 x 21 per frame: n_fft 44, hop 22, 440 samples at 4400 Hz, with the tone variant's own scale."""
    return SpectrogramConfig(10 * SAMPLES_PER_FRAME, SAMPLES_PER_FRAME, 44, 22, _SPECTROGRAM_SCALE[tone])


class Clips(NamedTuple):
    """N clips of T frames with D digits. Positions are of top-left corners, x then y, in pixels of the canvas.

    frames (N, T, 1, 48, 48) uint8, each divided by its own maximum; waveform (N, T * 440) int16; labels (N, D) uint8;
    positions (N, T, D, 2) float64, drawn truncated towards zero; wall_bounces and block_bounces (N, T, D) bool: the
    velocity changes between frames t and t + 1, and sounds in frame t; block (N, 3) int64: the block's x, y and first
    frame, T where it never appears."""

    frames: np.ndarray
    waveform: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    wall_bounces: np.ndarray
    block_bounces: np.ndarray
    block: np.ndarray


class MovingMNIST:
    """One split of Multimodal MovingMNIST; clip i is a function of the settings, the split and i alone. Raises
    InputError for settings that contradict each other and for missing or damaged digit files."""

    def __init__(self, config: MMNISTConfig, split: Split) -> None:
        if split not in SPLITS:
            raise InputError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        config.check_variant()
        self.config, self.split = config, split
        self._digits = load_digits(config.digits, split) if config.digits is not None else None
        self._length = {"train": config.train_clips, "val": config.val_clips, "test": config.test_clips}[split]

    def __len__(self) -> int:
        return self._length

    def parameters(self) -> dict[str, Any]:
        """Everything that decides this split's bytes, as JSON values; digit files by the SHA-256 of their content."""
        names = ("canvas", "num_digits", "bounce", "tone", "block", "clip_frames", "data_seed")
        digits = "drawn"
        if self._digits is not None:
            digits = hashlib.sha256(b"".join(array.tobytes() for array in self._digits)).hexdigest()
        return {
            "dataset": "mmnist",
            "generator_version": GENERATOR_VERSION,
            "split": self.split,
            "clips": len(self),
            "digits": digits,
            **{name: getattr(self.config, name) for name in names},
            "spectrogram": dataclasses.asdict(mmnist_spectrogram(self.config.tone)),
        }

    def clips(self, first: int, count: int) -> Clips:
        """Clips `first` .. `first + count`. Raises ValueError for an empty range or one outside the split."""
        if first < 0 or count < 1 or first + count > len(self):
            raise ValueError(f"first={first}, count={count}: expected a range inside the split's {len(self)} clips")
        chunks = [self._chunk(i, min(_CHUNK, first + count - i)) for i in range(first, first + count, _CHUNK)]
        return Clips(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))

    def _chunk(self, first: int, count: int) -> Clips:
        config, digits = self.config, self.config.num_digits
        start = self._words(_START, first, count, _START_WORDS * digits).reshape(count, digits, _START_WORDS)
        if self._digits is None:
            drawn = draw_digits(config.data_seed, self._stream(_DRAWING), first * digits, count * digits)
            images, labels = (array.reshape(count, digits, *array.shape[1:]) for array in drawn)
        else:
            chosen = (uniform(start[..., 0]) * len(self._digits.labels)).astype(np.intp)
            images, labels = self._digits.images[chosen], self._digits.labels[chosen]
        positions, walls, blocks, block = self._move(start, first)
        # sound t belongs to the position of frame t + 1, so one position more is simulated than drawn
        wrapped = config.tone == "wrapped"
        waveform = render_sound(positions[:, 1:], labels, walls, blocks, config.canvas, wrapped=wrapped)
        frames = render_frames(positions[:, :-1], images, block, config.canvas)
        return Clips(frames, waveform, labels, positions[:, :-1], walls, blocks, block)

    def _stream(self, purpose: int) -> int:
        return 4 * SPLITS.index(self.split) + purpose

    def _words(self, purpose: int, first: int, count: int, width: int) -> np.ndarray:
        return philox_words(self.config.data_seed, self._stream(purpose), first, count, width)

    def _move(self, start: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Positions (N, T + 1, D, 2), bounces off walls and off the block (N, T, D), the block (N, 3)."""
        config, (count, digits, _) = self.config, start.shape
        frames, limit = config.clip_frames, config.canvas - DIGIT_SIDE
        position = uniform(start[..., 1:3]) * limit
        speed = np.floor(uniform(start[..., 3]) * len(SPEEDS)) + SPEEDS[0]
        velocity = speed[..., None] * _drawn_direction(start[..., 4])
        if config.bounce == "random":
            turns = self._words(_TURN, first, count, 4 * frames).reshape(count, frames, 4)
        block = np.full((count, 3), frames)
        choice = uniform(self._words(_BLOCK, first, count, 4)[:, 0]) if config.block else None

        positions = np.empty((count, frames + 1, digits, 2))
        walls, blocks = np.zeros((2, count, frames, digits), bool)
        positions[:, 0] = position
        for t in range(frames):
            if choice is not None and t >= _FIRST_BLOCK_FRAME:
                _place_block(block, position, choice, t)
            low, high = walls_ahead(position, velocity, limit)
            walls[:, t] = hit = (low | high).any(-1)
            if config.bounce == "random":
                turned = speed[..., None] * _drawn_direction(turns[:, t, :digits])
                # of all directions those that lead away from the wall that was hit
                turned = np.where(low, abs(turned), np.where(high, -abs(turned), turned))
                velocity = np.where(hit[..., None], turned, velocity)
            velocity = mirrored(position, velocity, limit)
            if choice is not None:
                corner = block[:, None, :2]
                present = (block[:, 2] <= t)[:, None]
                next_position = position + velocity
                covered = (next_position >= corner) & (next_position < corner + BLOCK_SIDE)
                blocks[:, t] = inside = present & covered.all(-1)
                entered = (position < corner) | (position >= corner + BLOCK_SIDE)
                velocity = np.where(inside[..., None] & entered, -velocity, velocity)
            position = position + velocity
            positions[:, t + 1] = position
        return positions, walls, blocks, block


def _place_block(block: np.ndarray, position: np.ndarray, choice: np.ndarray, t: int) -> None:
    """Give every clip without a block one that covers no digit's top-left corner, where there is room; in place."""
    waiting = np.flatnonzero(block[:, 2] > t)
    if not len(waiting):
        return

    def covered(corners: np.ndarray) -> np.ndarray:
        """(N, D, 2) points -> (N, y, x) bool: a block there covers at least one."""
        inside = (corners[..., None] >= _BLOCK_CORNERS) & (corners[..., None] < _BLOCK_CORNERS + BLOCK_SIDE)
        return np.any(inside[:, :, 1, :, None] & inside[:, :, 0, None, :], axis=1)

    corner = position[waiting]
    room = ~covered(corner)
    clear = room.copy()
    for offset in ((DIGIT_SIDE, 0), (0, DIGIT_SIDE), (DIGIT_SIDE, DIGIT_SIDE)):
        clear &= ~covered(corner + np.array(offset))
    places = np.where(clear.any((1, 2), keepdims=True), clear, room).reshape(len(waiting), -1)
    number = places.sum(1)
    # the index of the k-th free place, k uniform in 0 .. number - 1
    wanted = (choice[waiting] * number).astype(np.int64) + 1
    place = (places.cumsum(1) >= wanted[:, None]).argmax(1)
    y, x = np.divmod(place, len(_BLOCK_CORNERS))
    found = np.stack([_BLOCK_CORNERS[x], _BLOCK_CORNERS[y], np.full_like(x, t)], 1)
    block[waiting[number > 0]] = found[number > 0]


def _drawn_direction(words: np.ndarray) -> np.ndarray:
    """(...,) words -> (..., 2) float64 unit vectors, uniform over all directions."""
    return direction((words >> np.uint64(50)).astype(np.int64))
