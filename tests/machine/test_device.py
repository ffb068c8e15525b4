"""The device that a user's word means."""

from __future__ import annotations

import pytest

from avfast.errors import InputError
from avfast.machine.device import choose_device


@pytest.mark.parametrize("present, automatic", [(True, "cuda"), (False, "cpu")])
def test_the_device_is_one_that_is_there(present: bool, automatic: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: present)
    assert choose_device("auto") == automatic and choose_device("cpu") == "cpu"
    with pytest.raises(InputError, match="device is 'gpu', expected auto, cpu or cuda"):
        choose_device("gpu")
    if present:
        assert choose_device("cuda") == "cuda"
    else:
        with pytest.raises(InputError, match="device is 'cuda', but PyTorch sees no CUDA device here"):
            choose_device("cuda")
