"""One ONNX graph in onnxruntime, without PyTorch, and the choice of its device."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avfast.errors import InputError

METADATA = "avfast"
"""Key under which a graph carries what it is, as JSON."""


class Session:
    """One ONNX file, called with inputs by name. On CUDA outputs stay on the device, and are bound where they come back
    as inputs (written for CUDA, not measured there yet; the same path runs on the CPU in the tests)."""

    def __init__(self, path: Path, providers: list[str], threads: int | None, *, bind: bool | None = None) -> None:
        import onnxruntime

        if not path.is_file():
            raise InputError(f"{path.parent} holds no exported model: {path.name} is missing")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            # onnxruntime's own classes share no other base
            raise InputError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from None
        self.device = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        self._bind = self.device == "cuda" if bind is None else bind
        self._outputs = [output.name for output in self._session.get_outputs()]
        try:
            self.metadata: dict[str, Any] = json.loads(self._session.get_modelmeta().custom_metadata_map[METADATA])
        except (KeyError, ValueError):
            raise InputError(f"{path} was not written by avfast.export: it says nothing of itself") from None

    def __call__(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        if not self._bind:
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(feed)), strict=True))
        binding = self._session.io_binding()
        # `feed` holds the arrays until the run is over: the binding is not known to keep them
        feed = {name: np.ascontiguousarray(x) if isinstance(x, np.ndarray) else x for name, x in feed.items()}
        for name, value in feed.items():
            bind = binding.bind_cpu_input if isinstance(value, np.ndarray) else binding.bind_ortvalue_input
            bind(name, value)
        for name in self._outputs:
            binding.bind_output(name, self.device)
        self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))


def to_numpy(value: Any) -> NDArray[Any]:
    """A graph's output as a numpy array."""
    return value if isinstance(value, np.ndarray) else value.numpy()


def choose_providers(device: str) -> tuple[list[str], str | None]:
    """onnxruntime's providers for a device, and why "auto" settled for the CPU. Raises InputError where "cuda" cannot
    be had, or onnxruntime is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {device!r}, expected auto, cpu or cuda")
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(f"onnxruntime is needed and does not load ({error}): pip install onnxruntime") from None
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    if device == "cpu":
        return [cpu], None
    reason = None
    if len(both := [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]) == 2:
        reason = f"{' and '.join(both)} are both installed and overwrite each other: uninstall both, then install one"
    elif cuda not in onnxruntime.get_available_providers():
        reason = "this onnxruntime is built without CUDA: install onnxruntime-gpu in its place"
    elif not os.path.exists("/dev/nvidiactl"):
        reason = "there is no NVIDIA driver"
    if reason is not None and device == "cuda":
        raise InputError(f"device is 'cuda', but {reason}")
    return [cuda, cpu] if reason is None else [cpu], reason


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
