"""The order in which clips are read."""

from __future__ import annotations

import numpy as np

from avfast.training.order import DataOrder


def test_order_is_a_permutation_per_epoch_cut_by_rank():
    whole = DataOrder(10, 4, 4, seed=3)
    halves = [DataOrder(10, 4, 2, seed=3, rank=r, world=2) for r in range(2)]
    assert whole.steps_per_epoch == 2
    seen = []
    for step in range(6):
        clips, starts = whole[step]
        parts = [h[step] for h in halves]
        assert np.array_equal(clips, np.concatenate([p[0] for p in parts]))
        assert np.array_equal(starts, np.concatenate([p[1] for p in parts]))
        assert len(set(clips)) == 4 and set(starts) <= set(range(4))
        seen.append(tuple(clips))
    assert not set(seen[0]) & set(seen[1]) and seen[:2] != seen[2:4]
    # any step can be asked for at any time
    assert tuple(DataOrder(10, 4, 4, seed=3)[5][0]) == seen[5]
    assert tuple(DataOrder(10, 4, 4, seed=4)[5][0]) != seen[5]
