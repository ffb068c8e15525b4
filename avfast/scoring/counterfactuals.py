"""Sound conditions: what a model gets in place of a clip's own sound, so that the scores show whether it uses it.

A model that scores as well with another clip's sound, or with none, predicts from the frames alone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from avfast.data.store import Batch
from avfast.errors import InputError

SoundCondition = Literal["own", "shuffled", "silent", "shifted"]


def other_clip(index: int, count: int) -> int:
    """Whose sound a clip gets with `shuffled`: that of the clip half the set further on, and so from another source
    where neighbours come from the same one. Never its own for count >= 2."""
    return (index + count // 2) % count


def with_sound_of(batch: Batch, other: Batch, condition: SoundCondition, shift: int) -> Batch:
    """A batch whose sound is that of a condition; `other` has the sound of the other clips, for `shuffled`."""
    source = other if condition == "shuffled" else batch
    audio, waveform = source.audio, source.waveform
    if waveform is not None:
        # (B, T * samples) as (B, T, 1, 1, samples), to be moved by frames as spectrograms are
        by_frame = waveform.view(*audio.shape[:2], 1, 1, -1)
        waveform = conditioned(by_frame, condition, shift).flatten(1)
    return batch._replace(audio=conditioned(audio, condition, shift), waveform=waveform)


def conditioned(audio: Tensor, condition: SoundCondition, shift: int) -> Tensor:
    """Sound (...,T,1,F,S) under a condition: `silent` is zeros, which is the spectrogram of silence; `shifted` comes
    `shift` frames later (earlier, below 0), and what falls off one end comes in at the other; else it is unchanged."""
    if condition == "silent":
        return torch.zeros_like(audio)
    return audio.roll(shift, dims=-4) if condition == "shifted" else audio


def check_conditions(conditions: tuple[SoundCondition, ...], shift: int, frames: int) -> None:
    """Raise InputError for a shift that changes nothing in clips of so many frames."""
    if "shifted" in conditions and shift % frames == 0:
        raise InputError(f"shift is {shift}, which leaves the sound of {frames} frames as it is")


def describe_condition(condition: SoundCondition, shift: int) -> str:
    """In words, for the footer of a table."""
    return {
        "own": "the clip's own",
        "shuffled": "that of the clip half the set further on",
        "silent": "silence",
        "shifted": f"the clip's own {abs(shift)} frames {'later' if shift > 0 else 'earlier'} and wrapped around",
    }[condition]
