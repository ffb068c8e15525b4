"""How a trained model is fed: how films are read for it, and how many frames it is given.

Works without PyTorch where it comes out of an export.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from avfast.data.clips import ClipSettings


@dataclass(frozen=True)
class InputSpec:
    """How a model's inputs are made, as they were in its training."""

    context_frames: int
    """K, the given frames."""
    eval_frames: int
    """Frames predicted where nobody asks for another number."""
    flow_preset: str
    """TV-L1 preset of the given frames' flow."""
    clips: ClipSettings
    """Rate, size, channels and spectrogram."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputSpec:
        """Back from `to_dict`, through JSON or not."""
        clips = dict(values["clips"])
        return cls(**{**values, "clips": ClipSettings(**{**clips, "size": tuple(clips["size"])})})
