"""Settings of a run that cannot work are one clear line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from avfast.errors import InputError
from avfast.models.avmodel import PaperTraining
from avfast.train import train


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"pred_frames": 5}, r"context-frames with pred-frames or eval-frames is 7 frames, more than the clip's 6"),
        ({"context_frames": 6}, r"context-frames with pred-frames or eval-frames is 9 frames"),
        ({"context_frames": 0}, "expected at least 1"),
        ({"batch_size": 9}, "batch-size is 9, more than the 8 training clips"),
        ({"batch_size": 0}, "batch-size is 0"),
        ({"stage": "car"}, "--mme PATH names the motion model"),
        ({"training": PaperTraining(mme="x")}, "--mme PATH names the motion model"),
        ({"training": PaperTraining(car_steps=0)}, "car-steps is 0, expected at least 1"),
        ({"training": PaperTraining(teacher_forcing=1.2)}, "teacher-forcing is 1.2, expected at least 0 and at most 1"),
        ({"training": PaperTraining(teacher_forcing=0.5, forced_frames=1)}, "forced-frames is 1, expected at least 2"),
        ({"training": PaperTraining(forced_frames=8)}, "forced-frames is for teacher forcing"),
        ({"stage": "cars"}, "stage is 'cars', expected all or a stage of this model: mme, car"),
        ({"device": "tpu"}, "device is 'tpu', expected auto, cpu or cuda"),
        ({"resume": "nowhere"}, "resume is nowhere, which is not a run folder"),
        ({"output_dir": __file__}, "is not a folder"),
    ],
)
def test_bad_settings(config, changes, message):
    with pytest.raises(InputError, match=message):
        train(replace(config, **changes))
    assert not Path(config.output_dir).exists() or changes.keys() & {"device"}
