"""What the harness asks of a data set: training, scoring and export know data sets through this class. A data set is
one file in this folder, with a subclass of `DataSettings`, and one line in `registry`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from avfast.data.film_clips import ClipSettings
from avfast.data.store import Batch, ClipStore
from avfast.errors import InputError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

FramePredictor = Callable[[Batch, int], Tensor]
"""(batch of T frames, K) -> frames K+1..T in [0,1], (B,P,C,H,W)."""


@dataclass(frozen=True)
class DataSettings(ABC):
    """Settings of a data set, and the way to its clips."""

    name: ClassVar[str]
    """What `--dataset` calls it."""
    regenerated: ClassVar[bool] = False
    """It is a regeneration of a published set: scores on it are not comparable with published ones."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What tables call it."""

    @property
    def seed(self) -> int | None:
        """The seed it was generated from; None where it was not."""
        return None

    @property
    def one_object(self) -> bool:
        """Every frame shows one object on black: its centre of mass tells where the object is."""
        return False

    def reference_frames(self) -> Mapping[str, FramePredictor]:
        """Predictors of its own that tables show below the models, by the name of their row: what is known of the set,
        and of no other, bounds the scores. They may use the whole sound."""
        return {}

    @abstractmethod
    def check(self, frames: int, batch_size: int) -> None:
        """Raise InputError for settings that cannot work, or that have no windows of so many frames or fewer training
        clips than a batch, as far as they tell without the data."""

    @abstractmethod
    def load(self, split: Split, *, cache: str, flow_preset: str, quiet: bool = False) -> ClipStore:
        """One split, opened, or made and kept in the folder `cache`; progress is shown unless `quiet`. Raises
        InputError, one line, where it cannot be had."""

    def built(self, split: Split, *, cache: str, flow_preset: str) -> ClipStore | None:
        """The same where nothing has to be made for it, else None."""
        return self.load(split, cache=cache, flow_preset=flow_preset, quiet=True)

    def in_folder(self, folder: str) -> DataSettings:
        """The same kind of set in another folder. Raises InputError for a set that lies in none."""
        raise InputError(f"data is {folder}, but the data set {self.name} is generated and lies in no folder")

    @abstractmethod
    def clip_settings(self, read_parameters: Callable[[], Mapping[str, Any]], image_channels: int) -> ClipSettings:
        """How a film is read for a model that was trained on this set; `read_parameters` gives the parameters of the
        data that the run recorded. Raises InputError where films cannot be read so."""
