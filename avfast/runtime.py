"""Run an exported model with onnxruntime and numpy alone: no PyTorch is imported here.

    from avfast.runtime import Predictor

    predictor = Predictor("model/")
    rollout = predictor.predict(frames, sound)  # frames (B,K,C,H,W), sound of T frames -> frames K+1..T

`Predictor.stream()` does the same piece by piece: push frames and sound as they arrive, get the next frame at any time.
The folder is what `python -m avfast.export RUN --out model/` writes. Shape legend: avfast.deploy.graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from avfast.deploy import numpy_inputs
from avfast.deploy.onnx_session import Session, choose_providers, to_numpy
from avfast.errors import InputError
from avfast.media.spectrogram import SpectrogramConfig

if TYPE_CHECKING:
    from avfast.data.film_clips import InputSpec

FORMAT = 1
"""Version of an exported folder. Raised whenever one written before could no longer be run."""
GRAPHS = ("audio", "context", "observe", "step")
"""The graphs that the runner uses, where a model has them; `rollout` is for other hosts."""
_KNOWN_INPUTS = {"frames", "image", "flow", "hidden", "cell", "condensed", "key", "value", "vector"}
_KNOWN_INPUTS |= {"previous", "source", "path", "age", "z1", "z2", "z3", "z4"}
"""Of `observe` and `step`."""
FEATURES = 128
"""As in avfast.models.networks, which needs PyTorch."""

Array = NDArray[Any]
Run = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A graph: inputs by name -> outputs by name. What stays on a device passes through as it is."""


class Rollout(NamedTuple):
    """Frames (B,P,C,H,W) in [0,1] and backward flow (B,P,2,H,W) in pixels."""

    frames: NDArray[np.float32]
    flow: NDArray[np.float32]


class Film(NamedTuple):
    """What a model sees and hears of a film: frames (1,T,C,H,W) in [0,1]; sound (1, T * samples per frame); fps, the
    model's frames per second, or the film's own where they are fewer; start, the time of the first frame on the file's
    clock, in seconds."""

    frames: NDArray[np.float32]
    sound: NDArray[np.int16]
    fps: float
    start: float


class Predictor:
    """An exported model. device: "cpu", "cuda", or "auto", which is CUDA where onnxruntime can use it. threads: CPU
    threads within an operator, default all cores. Raises InputError for a folder that holds no whole model, and for
    "cuda" where it cannot be used, with the reason.

    Attributes: `metadata`, what the export says of itself (config, precision, hash of the weights, spectrogram, flow);
    `graphs` by name, and `inputs`, what each takes; `device`, "cpu" or "cuda"; `note`, why "auto" did not choose CUDA,
    if it did not."""

    def __init__(
        self, folder: str | Path, *, device: Literal["auto", "cpu", "cuda"] = "auto", threads: int | None = None
    ) -> None:
        providers, self.note = choose_providers(device)
        sessions = {
            name: Session(Path(folder) / f"{name}.onnx", providers, threads)
            for name in GRAPHS
            if name == "step" or (Path(folder) / f"{name}.onnx").exists()
        }
        self.device = sessions["step"].device
        if len(providers) > 1 and self.device == "cpu":
            self.note = "onnxruntime could not load its CUDA provider: the CUDA or cuDNN libraries for it are missing"
            if device == "cuda":
                raise InputError(f"device is 'cuda', but {self.note}")
        self._set({name: (session, session.metadata) for name, session in sessions.items()}, str(folder))

    def _set(self, opened: Mapping[str, tuple[Run, dict[str, Any]]], source: str) -> None:
        """Take graphs that belong together, each with what it says of itself. Raises InputError where one is missing or
        of another export."""
        self.graphs: Mapping[str, Run] = {name: run for name, (run, _) in opened.items()}
        self.metadata, self.source = opened["step"][1], source
        if self.metadata.get("format") != FORMAT:
            raise InputError(f"{source} is of format {self.metadata.get('format')}, this avfast runs format {FORMAT}")
        for name in self.metadata["graphs"]:
            if name in GRAPHS and name not in opened:
                raise InputError(f"{source} lacks {name}.onnx, which its step.onnx needs")
        for name, (_, found) in opened.items():
            if found.get("hash") != self.metadata["hash"] or found.get("precision") != self.metadata["precision"]:
                raise InputError(f"{source}: {name}.onnx and step.onnx are of different exports")
        self.config = self.metadata["config"]
        self.inputs: dict[str, list[dict[str, Any]]] = {name: found["inputs"] for name, (_, found) in opened.items()}
        for name in ("observe", "step"):
            unknown = {spec["name"] for spec in self.inputs.get(name, [])} - _KNOWN_INPUTS
            if unknown:
                raise InputError(f"{source}: its {name} takes {', '.join(unknown)}, which this avfast does not know")
        sound = self.metadata["spectrogram"]
        self.spectrogram = None if sound is None else SpectrogramConfig(**sound)

    @property
    def input_spec(self) -> InputSpec:
        """How films are read for it and how many frames it is given. Raises InputError where the export does not say,
        being that of a checkpoint without its run folder."""
        # here: it needs av, which the runner itself does not
        from avfast.data.film_clips import InputSpec

        if self.metadata["usage"] is None:
            raise InputError(f"{self.source} does not say how films are read for it: export it from its run folder")
        return InputSpec.from_dict(self.metadata["usage"])

    def read(self, path: str | Path, *, max_frames: int | None = None) -> Film:
        """A film as the model was trained to see and hear it, as far as its sound covers it. Needs av. Raises
        InputError for a film that cannot be read, has no sound, or has more than `max_frames` frames."""
        from avfast.data.film_clips import read_film

        clip = read_film(path, self.input_spec.clips, max_frames=max_frames)
        frames = clip.frames[None].astype(np.float32) / np.float32(255)
        return Film(frames, clip.waveform[None], clip.fps, float(clip.times[0]))

    @property
    def fps(self) -> float | None:
        """Frames per second that the model was trained on, None where that is not known."""
        sound = self.spectrogram
        return None if sound is None else sound.sample_rate / sound.samples_per_frame

    def predict(self, frames: Array, sound: Array, *, flow: Array | None = None) -> Rollout:
        """Predict frames K+1..T from K given frames and the sound of all T. frames (B,K,C,H,W): float in [0,1] or
        uint8, H and W multiples of 16. sound: spectrograms (B,T,1,F,S), or the waveform (B, T * samples per frame),
        int16 or floating in [-1,1]. flow (B,K,2,H,W): backward, in pixels; without it TV-L1 flow as in training. Raises
        ValueError naming the argument, its value and what was expected."""
        stream = self.stream()
        frames = self._images("frames", frames, 5)
        stream.push_sound(sound)
        given, total = frames.shape[1], stream.sound_frames
        if stream.batch != len(frames):
            raise ValueError(f"sound has {stream.batch} clips, frames has {len(frames)}: expected as many")
        if total <= given:
            raise ValueError(f"sound covers T = {total} frames, expected more than the K = {given} given frames")
        stream.push(frames, flow)
        steps = [stream.next() for _ in range(total - given)]
        return Rollout(*(np.stack(column, axis=1) for column in zip(*steps, strict=True)))

    def rollout(self, frames: Array, flow: Array, audio: Array) -> Rollout:
        """`AVModel.predict` with its order of arguments, on arrays."""
        return self.predict(frames, audio, flow=flow)

    def stream(self) -> Stream:
        """A clip, or a batch of clips, that grows."""
        return Stream(self)

    def flow(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """The flow that the model was trained on, of frames (B,T,C,H,W) in [0,1]."""
        return numpy_inputs.backward_flow(frames, self.metadata["flow"])

    def _images(self, name: str, images: Array, ndim: int) -> NDArray[np.float32]:
        """Images as float32 in [0,1]. Raises ValueError for what does not fit the model."""
        channels = self.config["image_channels"]
        shape = _shape(name, images)
        if len(shape) != ndim or shape[-3] != channels or 0 in shape or shape[-2] % 16 or shape[-1] % 16:
            axes = "(B, K, C, H, W)" if ndim == 5 else "(B, C, H, W)"
            sizes = f"C = {channels}, H and W multiples of 16"
            raise ValueError(f"{name} has shape {shape}, expected {axes} with {sizes}")
        if images.dtype == np.uint8:
            return images.astype(np.float32) / np.float32(255)
        values = _finite(name, images)
        if values.min() < 0 or values.max() > 1:
            raise ValueError(f"{name} holds values from {values.min():g} to {values.max():g}, expected [0, 1]")
        return values

    def _windows(self, sound: Array) -> NDArray[np.float32]:
        """Spectrograms (B,N,1,F,S) of a sound given either way."""
        shape = _shape("sound", sound)
        expected = tuple(self.config["audio_shape"])
        if len(shape) == 2 and self.spectrogram is not None:
            waveform = sound if sound.dtype == np.int16 else _finite("sound", sound)
            return numpy_inputs.spectrogram(waveform, self.spectrogram)
        if len(shape) != 5 or shape[2:] != (1, *expected) or 0 in shape:
            other = f", or a waveform (B, T * {self.spectrogram.samples_per_frame})" if self.spectrogram else ""
            axes = f"(B, T, 1, {expected[0]}, {expected[1]})"
            raise ValueError(f"sound has shape {shape}, expected spectrograms {axes}{other}")
        return _finite("sound", sound)


class Stream:
    """A batch of clips that grows by given frames and by sound, and predicts the frame that comes next. Frames are
    numbered from 1. The state is that after the given frames: predicted ones are forgotten as soon as a given one
    arrives. To predict frame t + 1, or to take in a frame after t, the sound of frame t + 1 must have been pushed (a
    model without sound needs none)."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self._run = predictor, predictor.graphs
        self.batch = 0
        """Clips, known from the first frame or sound on."""
        self.sound_frames = 0
        """Frames whose sound was pushed."""
        self.given = 0
        """Frames that were pushed."""
        self.newest = 0
        """Frames that were pushed or predicted since."""
        self._sound: dict[str, Array] = {}
        self._state: dict[str, Any] = {}
        self._image: Any = None
        self._flow: Any = None
        self._previous: Any = None
        self._path: Any = None
        self._contexts: dict[str, Any] = {}
        self._after_given: dict[str, Any] | None = None
        self._last: NDArray[np.float32] | None = None

    def push_sound(self, sound: Array) -> None:
        """The sound of the next N frames: spectrograms (B,N,1,F,S), or a waveform (B, N * samples per frame)."""
        windows = self._predictor._windows(sound)
        self._one_batch("sound", len(windows))
        self.sound_frames += windows.shape[1]
        if "audio" not in self._run:
            return
        empty = np.zeros((self.batch, 0, FEATURES), np.float32)
        past = {f"past_{name}": self._sound.get(name, empty) for name in ("key", "value")}
        # a few hundred numbers per frame, cut differently at every step: they stay with the host
        new = {name: to_numpy(x) for name, x in self._run["audio"]({"windows": windows, **past}).items()}
        for name in ("vectors", "condensed"):
            if name in new:
                new[name] = np.concatenate((self._sound.get(name, empty), new[name]), axis=1)
        self._sound = new

    def push(self, frames: Array, flow: Array | None = None) -> None:
        """Given frames that follow those before: (B,N,C,H,W) or one, (B,C,H,W). flow: theirs, (B,N,2,H,W) or (B,2,H,W),
        to the given frame before; without it TV-L1 flow. Raises ValueError as `Predictor.predict` does."""
        one = len(_shape("frames", frames)) == 4
        frames = self._predictor._images("frames", frames, 4 if one else 5)
        frames = frames[:, None] if one else frames
        self._one_batch("frames", len(frames))
        b, n, _, h, w = frames.shape
        if self._last is not None and (last := self._last.shape[-2:]) != (h, w):
            raise ValueError(f"frames are {h}x{w}, those before {last[0]}x{last[1]}: expected one size")
        # every frame but the last one is taken in here
        self._need_sound(self.given + n - (0 if self.given or n > 1 else 1), "to take frames in")
        if flow is None:
            before = [] if self._last is None else [self._last[:, None]]
            flow = self._predictor.flow(np.concatenate((*before, frames), axis=1))[:, len(before) :]
        else:
            expected = (b, 2, h, w) if one else (b, n, 2, h, w)
            if _shape("flow", flow) != expected:
                raise ValueError(f"flow has shape {flow.shape}, expected {expected}")
            flow = _finite("flow", flow)
            flow = flow[:, None] if one else flow

        if not self._state:
            shape = (b, self._predictor.config["convlstm_layers"], FEATURES, h // 16, w // 16)
            hidden_type = np.float16 if self._predictor.metadata["precision"] == "fp16" else np.float32
            self._state = {"hidden": np.zeros(shape, hidden_type), "cell": np.zeros(shape, np.float32)}
        earlier, moved = frames[:, :-1], flow[:, :-1]
        if self._after_given is not None:
            self._state = self._after_given
        elif self.given:
            # the given frame before has not been taken in yet
            earlier, moved = (
                np.concatenate((x[:, None], y), 1) for x, y in ((self._image, earlier), (self._flow, moved))
            )
        count = earlier.shape[1]
        if count:
            # all but the newest one, which the next step reads
            memory = self._memory("observe", self.given + n - count, self.given + n - 1)
            arrays = {"frames": earlier, "flow": moved, **memory}
            self._advance("observe", self._state | {name: np.ascontiguousarray(x) for name, x in arrays.items()})
        self.given += n
        self.newest = self.given
        self._image = self._previous = self._last = np.ascontiguousarray(frames[:, -1])
        self._flow = np.ascontiguousarray(flow[:, -1])
        self._path = np.zeros_like(self._flow)
        self._after_given, self._contexts = None, {}

    def next(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Predict the frame after the newest one: frame (B,C,H,W) in [0,1] and its flow (B,2,H,W). Raises ValueError
        where no frame was given, or the sound of that frame was not pushed."""
        t = self.newest
        if not t:
            raise ValueError("0 frames were pushed, expected at least one to predict from")
        self._need_sound(t + 1, "to predict it")
        if "context" in self._run and not self._contexts:
            self._contexts = self._run["context"]({"frame": self._last})
        available = {"image": self._image, "flow": self._flow, "previous": self._previous, **self._state}
        available |= {"source": self._last, "path": self._path, "age": np.full(self.batch, t - self.given, np.float32)}
        available |= self._contexts | self._memory("step", t, t)
        if "vectors" in self._sound:
            available["vector"] = self._sound["vectors"][:, t - 1]
        out = self._advance("step", {spec["name"]: available[spec["name"]] for spec in self._predictor.inputs["step"]})
        if t == self.given:
            self._after_given = self._state
        self._image, self._flow, self._previous = out["next_image"], out["next_flow"], out["prediction"]
        self._path = out.get("next_path")
        self.newest += 1
        return to_numpy(self._previous), to_numpy(self._flow)

    def _advance(self, graph: str, feed: dict[str, Any]) -> dict[str, Any]:
        """Run a graph that moves the state on; its outputs."""
        out = self._run[graph](feed)
        self._state = {name: out[f"next_{name}"] for name in ("hidden", "cell")}
        return out

    def _memory(self, graph: str, first: int, last: int) -> dict[str, Array]:
        """What a graph's frames first..last recall from. With a dimension M an input is all tokens up to the last
        frame's, else row t + 1 of every frame t, the only one in `step`."""
        memory = {}
        for spec in self._predictor.inputs[graph]:
            if spec["name"] in self._sound:
                tokens = self._sound[spec["name"]][:, : last + 1]
                rows = tokens[:, first:] if len(spec["shape"]) == 3 else tokens[:, last]
                memory[spec["name"]] = tokens if "M" in spec["shape"] else rows
        return memory

    def _one_batch(self, name: str, batch: int) -> None:
        if self.batch and batch != self.batch:
            raise ValueError(f"{name} has {batch} clips, what came before {self.batch}: expected as many")
        self.batch = batch

    def _need_sound(self, frames: int, purpose: str) -> None:
        if "audio" in self._run and self.sound_frames < frames:
            raise ValueError(f"sound covers {self.sound_frames} frames, expected {frames} or more {purpose}")


def _shape(name: str, array: Any) -> tuple[int, ...]:
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} is a {type(array).__name__}, expected a numpy array")
    return array.shape


def _finite(name: str, array: Array) -> NDArray[np.float32]:
    """The array as float32. Raises ValueError for another kind of number, and for values that are not finite."""
    if array.dtype.kind != "f":
        raise ValueError(f"{name} has dtype {array.dtype}, expected a floating type")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    return array.astype(np.float32)
