"""The order of the training data: a function of (seed, epoch, rank) alone. So a resumed run continues in the middle
of an epoch, bit for bit the same as an uninterrupted one on a CPU."""

from __future__ import annotations

import numpy as np

from avfast.errors import InputError


class DataOrder:
    """Which clips and windows make which step's batch: a function of (seed, epoch), cut into slices by rank."""

    def __init__(self, clips: int, starts: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.clips, self.starts, self.seed = clips, starts, seed
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.steps_per_epoch = clips // (batch_size * world)
        self._drawn: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))
        if self.steps_per_epoch == 0:
            raise InputError(f"batch-size is {batch_size} on {world} processes, more than the {clips} training clips")

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Clip indices and window starts of this rank's part of a step's batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        # the thread that prefetches asks too, so what is drawn is replaced as a whole
        drawn = self._drawn
        if epoch != drawn[0]:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            order = generator.permutation(self.clips)
            self._drawn = drawn = (epoch, order, generator.integers(self.starts, size=self.clips))
        _, order, starts = drawn
        first = (position * self.world + self.rank) * self.batch_size
        clips = order[first : first + self.batch_size]
        return clips, starts[clips]
