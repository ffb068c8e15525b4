"""Two bounds for Multimodal MovingMNIST: what the given frames tell of the future, and what the sound tells beyond.

A digit's motion follows from its start (`mmnist_motion`), of which the frames show whole pixels only, and a bounce that
comes one frame later throws it up to 12 px away. So these predictors keep particles, starts that agree with all that is
given, and show the digit of the first frame where the error to be expected over the particles is least:

- `seen` agrees with the given frames: starts are drawn as the generator draws them, and those that would have been seen
  elsewhere are dropped.
- `heard` agrees with the loudness of every frame's sound too. It tells the distance from the canvas's top-left corner
  to 1/64 px, which hardly a drawn start hits; so the particles move, while the tolerance narrows and the time that is
  listened to grows (Del Moral et al. 2012, "An adaptive sequential Monte Carlo method for approximate Bayesian
  computation").

For one digit, canvas 48, `mirror`, no block, and windows from the clip's first frame, where the digit is whole: it
starts inside. Random bits are raw Philox words of a fixed seed, and a clip's particles do not depend on its batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from avfast.data.digits import DIGIT_SIDE, philox_words, uniform
from avfast.data.mmnist_motion import DIRECTIONS, MARGIN, SPEEDS, direction, mirrored
from avfast.data.mmnist_rendering import FRAME_SIDE, render_frames, render_sound
from avfast.data.store import Batch
from avfast.media.spectrogram import SpectrogramConfig, spectrogram

_LIMIT = FRAME_SIDE - DIGIT_SIDE
_SEED, _POOL, _MOVE = 1, 0, 1
_DRAWN, _PARTICLES = 1 << 19, 1024
# of _DRAWN starts 5 to 2000 (half of the clips: 150) agree with five frames; more frames are left to the moves
_DRAWN_FRAMES = 5
# frames by which the horizon grows from round to round, rounds with all frames, moves of every particle in a round
_GROWTH, _LAST_ROUNDS, _MOVES = 2, 3, 2
# px; the table of sounds has a distance every so much, the nearest one is half as far off at most
_TOLERANCE = 1 / 32
# of ten digits and of a wall
_TONES = 11


class Particles(NamedTuple):
    """N starts for each of B clips: the pixel of the digit's top-left corner in the first frame, (2, B, N), x then y;
    what its position has beyond it, in [0, 1), the same shape; the speed in px per frame and the angle as an index of
    `direction`, (B, N)."""

    corner: np.ndarray
    offset: np.ndarray
    speed: np.ndarray
    angle: np.ndarray

    def positions(self, count: int) -> Iterator[np.ndarray]:
        """Positions (2, B, N) in each of the first `count` frames."""
        position = self.corner + self.offset
        velocity = self.speed * np.moveaxis(direction(self.angle), -1, 0)
        for _ in range(count):
            yield position
            velocity = mirrored(position, velocity, _LIMIT)
            position = position + velocity


class Given(NamedTuple):
    """What is known of B clips: by how many whole pixels the digit is seen away from its place in the first frame, (2,
    B, K); how far from the canvas's top-left corner it is in frame t + 1 as the sound of frame t tells, (B, T) px, or
    None; and from which distance on all sounds are alike."""

    shift: np.ndarray
    distance: np.ndarray | None
    reach: float

    def error(self, particles: Particles, frames: int) -> np.ndarray:
        """(B, N) px: by how much each particle misses what is known of the first `frames` frames, at most."""
        outside = (particles.offset < 0) | (particles.offset >= 1)
        error = np.where(outside.any(0), np.inf, 0.0)
        for t, position in enumerate(particles.positions(frames)):
            if t < self.shift.shape[2]:
                # what is truncated to a pixel lies from it to the next one away from 0, to 0 from both sides
                pixel = particles.corner + self.shift[:, :, t, None]
                missed = np.maximum(pixel - (pixel <= 0) - position, position - pixel - (pixel >= 0)).max(0)
                # beyond the last tolerance: no particle stays that would have been seen elsewhere
                np.maximum(error, np.where(missed > 0, missed + 2 * _TOLERANCE, 0), out=error)
            if t and self.distance is not None:
                x, y = position
                distance = np.minimum(np.sqrt(x * x + y * y), self.reach)
                np.maximum(error, abs(distance - self.distance[:, t - 1, None]), out=error)
        return error


class Physics:
    """The predictors for one kind of sound and of digits. `sound` is how spectrograms were made, `wrapped` as in
    `render_sound`. The corner lies `centre` pixels before the digit's centre of mass, rounded; within `doubt` of half a
    pixel it may be rounded either way."""

    def __init__(self, sound: SpectrogramConfig, *, wrapped: bool, centre: float, doubt: float) -> None:
        self._sound, self._wrapped, self._centre, self._doubt = sound, wrapped, centre, doubt
        # with `clean` the amplitude reaches 0 in the corner opposite
        self._reach = _LIMIT * 2**0.5 + (2 * MARGIN if wrapped else 0)
        self._table: Tensor | None = None

    def seen(self, batch: Batch, k: int) -> Tensor:
        """Frames K+1..T from the K given ones: (B, P, 1, 48, 48)."""
        return self._predicted(batch, k, None)

    def heard(self, batch: Batch, k: int) -> Tensor:
        """The same from the K given frames and the whole sound."""
        return self._predicted(batch, k, self._distances(batch.audio))

    def _predicted(self, batch: Batch, k: int, distance: np.ndarray | None) -> Tensor:
        total = batch.frames.shape[1]
        pixels = np.rint(255 * batch.frames[:, :k, 0].cpu().numpy()).astype(np.uint8)
        centroids = _centroids(pixels)
        # whole pixels: what the canvas's edge hides of a digit is faint and moves the centre by much less than one
        given = Given(np.rint(centroids - centroids[:, :, :1]), distance, self._reach)
        place = centroids[:, :, 0] - self._centre
        particles = self._posterior(place, given, total)
        # the digit as it is cut out and pasted, wherever a particle has its corner
        corner = np.clip(np.rint(place), 0, _LIMIT).astype(np.int64)
        digits = [p[y : y + DIGIT_SIDE, x : x + DIGIT_SIDE] for p, x, y in zip(pixels[:, 0], *corner, strict=True)]
        moved = corner[..., None] - particles.corner
        positions = [np.trunc(position).astype(np.int64) + moved for position in particles.positions(total)]
        places = np.stack([_least_expected_error(p) for p in positions[k:]], 1)
        no_block = np.full((len(digits), 3), total)
        frames = render_frames(places[:, :, None], np.stack(digits)[:, None], no_block, FRAME_SIDE)
        return torch.from_numpy(frames).to(batch.frames) / 255

    def _posterior(self, place: np.ndarray, given: Given, total: int) -> Particles:
        """Particles that agree with what is given of clips of `total` frames; place (2, B) of the corner in the first
        frame, before it is rounded."""
        seen = given.shift.shape[2]
        clips = [_drawn(place[:, i], given.shift[:, i], self._doubt) for i in range(place.shape[1])]
        particles = Particles(*(np.stack(parts, -2) for parts in zip(*clips, strict=True)))
        # the last frame's sound belongs to one frame more
        end = seen if given.distance is None else total + 1
        horizons = [*range(min(_DRAWN_FRAMES, seen), end, _GROWTH), *[end] * _LAST_ROUNDS]
        for number, frames in enumerate(horizons):
            error = given.error(particles, frames)
            best = np.partition(error, _PARTICLES // 4, -1)[:, _PARTICLES // 4, None]
            tolerance = np.maximum(best, _TOLERANCE)
            # those within it take the places of the others, in turn
            order, count = np.argsort(error > tolerance, -1, kind="stable"), (error <= tolerance).sum(-1, keepdims=True)
            chosen = np.take_along_axis(order, np.arange(_PARTICLES) % count, -1)
            particles = Particles(*(values[..., np.arange(len(chosen))[:, None], chosen] for values in particles))
            for move in range(_MOVES):
                child = _moved(particles, number * _MOVES + move)
                fits = given.error(child, frames) <= tolerance
                particles = Particles(*(np.where(fits, a, b) for a, b in zip(child, particles, strict=True)))
        return particles

    def _distances(self, audio: Tensor) -> np.ndarray:
        """(B, T) px from spectrograms (B, T, 1, F, S): the distance of the most similar sound that the generator makes
        of any digit or bounce at any distance."""
        if self._table is None:
            self._table = self._sounds()
        count = len(self._table) // _TONES
        # in float64: neighbours in the table differ by less than the rounding of the products in float32
        norms = self._table.square().sum(1)
        clips = audio.cpu().double().flatten(2)
        nearest = torch.stack([(norms - 2 * clip @ self._table.T).argmin(1) for clip in clips])
        return (nearest % count).numpy() * _TOLERANCE

    def _sounds(self) -> Tensor:
        """Spectrograms of all tones at every distance, (_TONES * N, F * S) float64."""
        distance = np.arange(0, self._reach, _TOLERANCE)
        positions = np.zeros((_TONES, len(distance), 1, 2))
        positions[..., 0, 0] = distance
        walls = np.zeros((_TONES, len(distance), 1), bool)
        walls[-1] = True
        labels = np.arange(_TONES)[:, None] % 10
        waveform = render_sound(positions, labels, walls, np.zeros_like(walls), FRAME_SIDE, wrapped=self._wrapped)
        return spectrogram(torch.from_numpy(waveform), self._sound).double().flatten(2).flatten(0, 1)


def _centroids(pixels: np.ndarray) -> np.ndarray:
    """(B, K, 48, 48) uint8 -> (2, B, K) px: the centre of mass, x then y; 0 where there is none."""
    mass, side = pixels.astype(np.float64), np.arange(FRAME_SIDE)
    return np.stack([mass.sum(-2) @ side, mass.sum(-1) @ side]) / np.maximum(mass.sum((-2, -1)), 1)


@cache
def _pool() -> tuple[np.ndarray, ...]:
    """The starts that are tried for every clip, M of them: offset and doubt (2, M), the latter in [-1, 1); speed and
    angle (M,); pace (2, M), the speed along x and along y, which no mirror changes. In the order of the first pace."""
    words = uniform(philox_words(_SEED, _POOL, 0, _DRAWN, 8)).T
    speed = np.floor(words[4] * len(SPEEDS)) + SPEEDS[0]
    angle = np.floor(words[5] * DIRECTIONS).astype(np.int64)
    pace = abs(speed * np.moveaxis(direction(angle), -1, 0))
    order = np.argsort(pace[0], kind="stable")
    return tuple(values[..., order] for values in (words[:2], 2 * words[2:4] - 1, speed, angle, pace))


def _drawn(place: np.ndarray, shift: np.ndarray, doubt: float) -> Particles:
    """Particles of one clip, B absent, that agree with its first frames, or where none does with as many of them as
    any; place (2,), shift (2, K)."""
    offset, doubts, speed, angle, pace = _pool()
    # steps in whole pixels tell the pace to within -1 and +2 px (the pixel 0 is two wide): no other need be rolled
    steps = abs(np.diff(shift[:, :_DRAWN_FRAMES]))
    low, high = steps.max(1, initial=0) - 1, steps.min(1, initial=9) + 2
    first, last = np.searchsorted(pace[0], (low[0], high[0]))
    tried = first + np.flatnonzero((pace[1, first:last] > low[1]) & (pace[1, first:last] < high[1]))
    if not len(tried):
        tried = np.arange(_DRAWN)
    corner = np.clip(np.floor(place[:, None] + 0.5 + doubt * doubts[:, tried]), 0, _LIMIT - 1).astype(np.int64)
    particles = Particles(corner, offset[:, tried], speed[tried], angle[tried])
    fitting = np.arange(len(tried))
    for t, position in enumerate(particles.positions(min(shift.shape[1], _DRAWN_FRAMES))):
        agree_x, agree_y = np.trunc(position[:, fitting]) - corner[:, fitting] == shift[:, t, None]
        agreeing = fitting[agree_x & agree_y]
        if not len(agreeing):
            break
        fitting = agreeing
    # evenly from all, each several times where they are few
    chosen = fitting[np.arange(_PARTICLES) * len(fitting) // _PARTICLES]
    return Particles(*(values[..., chosen] for values in particles))


def _moved(particles: Particles, number: int) -> Particles:
    """Every particle displaced along the line between two others, and a little more (ter Braak 2006, "A Markov chain
    Monte Carlo version of the genetic algorithm differential evolution"): steps take the shape of the population."""
    words = uniform(philox_words(_SEED, _MOVE, number * _PARTICLES, _PARTICLES, 8)).T
    a, b = (words[:2] * _PARTICLES).astype(np.int64)
    along, x, y, turn = 2 * words[2:6] - 1
    between = particles.offset[..., a] - particles.offset[..., b]
    offset = particles.offset + along * between + 0.02 * np.stack([x, y])[:, None]
    half = DIRECTIONS // 2
    between = (particles.angle[:, a] - particles.angle[:, b] + half) % DIRECTIONS - half
    angle = particles.angle + np.rint(along * between + 8 * turn).astype(np.int64)
    return particles._replace(offset=offset, angle=angle % DIRECTIONS)


def _least_expected_error(pixels: np.ndarray) -> np.ndarray:
    """(2, B, N) whole pixels -> (B, 2): the one whose mean distance from all N is least."""
    side = _LIMIT + 2 * MARGIN + 1
    x, y = np.clip(pixels + MARGIN, 0, side - 1)
    share = np.stack([np.bincount(clip, minlength=side * side) for clip in y * side + x])
    # integers below 2**53: the products are exact, and so the choice is the same on every machine
    best = (share.astype(np.float64) @ _distances_of_pixels(side)).argmin(1)
    return np.stack([best % side, best // side], -1) - MARGIN


@cache
def _distances_of_pixels(side: int) -> np.ndarray:
    """(side**2, side**2) float64 integers: distances between the pixels of a square, in 2**-16 px."""
    y, x = np.divmod(np.arange(side * side), side)
    dx, dy = x[:, None] - x, y[:, None] - y
    return np.rint(np.sqrt(dx * dx + dy * dy) * 2.0**16)
