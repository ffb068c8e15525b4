"""What a model is given to hear, its clip's own sound or another: whether it uses the sound at all shows in the scores.

A model that scores as well with another clip's sound, or with none, predicts from the frames alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from avfast.errors import InputError

Hearing = Literal["own", "shuffled", "silent", "shifted"]


def heard(audio: Tensor, hearing: Hearing, shift: int) -> Tensor:
    """What of a sound (...,T,1,F,S) is heard: `silent` is zeros, which is the spectrogram of silence; `shifted` comes
    `shift` frames later (earlier, below 0), what falls off one end coming in at the other; else it is unchanged."""
    if hearing == "silent":
        return torch.zeros_like(audio)
    return audio.roll(shift, dims=-4) if hearing == "shifted" else audio


def other_clip(index: int, count: int) -> int:
    """Whose sound `shuffled` gives to a clip: that of the clip half the set further on, and so from another source
    where neighbours come from the same one. Never its own for count >= 2."""
    return (index + count // 2) % count


def check_hearing(hearings: tuple[Hearing, ...], shift: int, frames: int) -> None:
    """Raise InputError for a shift that changes nothing in clips of so many frames."""
    if "shifted" in hearings and shift % frames == 0:
        raise InputError(f"shift is {shift}, which leaves the sound of {frames} frames as it is")


def describe(hearing: Hearing, shift: int) -> str:
    """In words, for the footer of a table."""
    return {
        "own": "the clip's own",
        "shuffled": "that of the clip half the set further on",
        "silent": "silence",
        "shifted": f"the clip's own {abs(shift)} frames {'later' if shift > 0 else 'earlier'} and wrapped around",
    }[hearing]
