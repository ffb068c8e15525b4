"""What a trained model expects where it is used: how films are read for it, and how many frames it is given.

Works without PyTorch where it comes out of an export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avfast.data.clips import ClipSettings
from avfast.errors import InputError

if TYPE_CHECKING:
    from avfast.training.config import TrainConfig


@dataclass(frozen=True)
class Usage:
    """How a model is used as it was in its training."""

    context_frames: int
    """K, the given frames."""
    eval_frames: int
    """Frames predicted where nobody asks for another number."""
    flow_preset: str
    """TV-L1 preset of the given frames' flow."""
    clips: ClipSettings
    """Rate, size, channels and spectrogram of what it sees and hears."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Usage:
        """Back from `to_dict`, through JSON or not."""
        clips = dict(values["clips"])
        return cls(**{**values, "clips": ClipSettings(**{**clips, "size": tuple(clips["size"])})})


def usage_of(checkpoint: Path, run: TrainConfig) -> Usage:
    """The usage of a checkpoint of a run: as the run's training data was read.

    Raises InputError where the run does not tell, and for one that was trained on spectrograms of other makers.
    """
    from avfast.data.mmnist import FRAME_SIDE, mmnist_spectrogram
    from avfast.training.runs import read_data_parameters

    if run.dataset == "clips":
        said = read_data_parameters(checkpoint)
        if said["layout"] != "videos":
            raise InputError(f"{checkpoint} was trained on the ready-made spectrograms of layout {said['layout']}")
        settings = {field.name: said[field.name] for field in dataclasses.fields(ClipSettings)}
        clips = ClipSettings(**{**settings, "size": tuple(settings["size"])})
    else:
        sound = mmnist_spectrogram(run.data.tone)
        clips = ClipSettings(
            fps=sound.sample_rate / sound.samples_per_frame,
            size=(FRAME_SIDE, FRAME_SIDE),
            channels=run.model.image_channels,
            sample_rate=sound.sample_rate,
            n_fft=sound.n_fft,
            hop=sound.hop,
            spectrogram_scale=sound.scale,
        )
    return Usage(run.context_frames, run.eval_frames, run.flow_preset, clips)
