"""Settings of a run that cannot work are one clear line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from avfast.data.mmnist import MMNISTConfig
from avfast.errors import InputError
from avfast.models.avmodel import ModelConfig, PaperTraining
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
        ({"training": PaperTraining(mme_lr=math.nan)}, "mme-lr is nan, expected above 0"),
        ({"training": PaperTraining(flow_cache_gb=math.inf)}, "flow-cache-gb is inf, expected at least 0"),
        ({"training": PaperTraining(smooth_weight=-1)}, "smooth-weight is -1.0, expected at least 0"),
        ({"model": ModelConfig(unet_width=0)}, "unet-width is 0, expected at least 1"),
        ({"data": MMNISTConfig(block=True)}, "canvas is 48 with block, expected 64"),
        ({"data": MMNISTConfig(clip_frames=6, train_clips=8, digits="nowhere")}, "digits is nowhere|nowhere"),
        ({"flow_preset": "fats"}, r"flow-preset is 'fats' \(did you mean 'fast'\?\)"),
        ({"clip_grad": 0}, "clip-grad is 0.0, expected above 0"),
        ({"seed": 1 << 70}, "seed is 1180591620717411303424, expected at least 0"),
        ({"batch_size": 2.5}, "batch-size is 2.5, expected a whole number"),
        ({"cache": "disk"}, "cache is 'disk', expected one of none, ram, device"),
        ({"name": "../elsewhere"}, "name is '../elsewhere', expected a name without slashes"),
        ({"mixed_precision": "fp16", "device": "cpu"}, "mixed-precision is fp16 on the CPU"),
        ({"stage": "cars"}, "stage is 'cars', expected all or a stage of this model: mme, car"),
        ({"device": "tpu"}, "device is 'tpu', expected auto, cpu or cuda"),
        ({"resume": "nowhere"}, "resume is nowhere, which is not a run folder"),
        ({"output_dir": __file__}, "is not a folder"),
    ],
)
def test_bad_settings(config, changes, message):
    with pytest.raises(InputError, match=message):
        train(replace(config, **changes))
    assert "output_dir" in changes or not Path(config.output_dir).exists()
