"""What is heard instead of a clip's own sound."""

from __future__ import annotations

import pytest
import torch

from avfast.errors import InputError
from avfast.scoring.counterfactuals import check_conditions, conditioned, describe_condition, other_clip


def test_what_is_heard() -> None:
    audio = torch.arange(2 * 5 * 6, dtype=torch.float32).view(2, 5, 1, 2, 3)
    assert conditioned(audio, "own", 2) is audio and conditioned(audio, "shuffled", 2) is audio
    assert not conditioned(audio, "silent", 2).any() and conditioned(audio, "silent", 2).shape == audio.shape
    later, earlier = conditioned(audio, "shifted", 2), conditioned(audio, "shifted", -1)
    for t in range(5):
        assert torch.equal(later[:, (t + 2) % 5], audio[:, t]) and torch.equal(earlier[:, t], audio[:, (t + 1) % 5])


@pytest.mark.parametrize("count", [2, 3, 4, 7, 100])
def test_shuffled_gives_every_sound_once_and_never_the_own(count: int) -> None:
    others = [other_clip(i, count) for i in range(count)]
    assert sorted(others) == list(range(count)) and all(i != other for i, other in enumerate(others))


def test_a_shift_that_changes_nothing_is_refused() -> None:
    check_conditions(("own", "silent"), 0, 5)
    check_conditions(("shifted",), 6, 5)
    for shift in (0, 5, -10):
        with pytest.raises(InputError, match=f"shift is {shift}, which leaves the sound of 5 frames as it is"):
            check_conditions(("own", "shifted"), shift, 5)


def test_words() -> None:
    assert describe_condition("shifted", 3) == "the clip's own 3 frames later and wrapped around"
    assert describe_condition("shifted", -3) == "the clip's own 3 frames earlier and wrapped around"
    assert len({describe_condition(kind, 1) for kind in ("own", "shuffled", "silent", "shifted")}) == 4
