"""MME and CAR: motion first, then appearance (paper section 3).

Indices are the paper's, from 1. Step t = 1..T-1 of MME reads (F_t, V_t) and the memory of A_1..A_{t+1} and predicts
F_{t+1}; step t = K..T-1 of CAR warps V_t by F_{t+1}, reads A_t and renders V_{t+1}. In MME frame t is the given one for
t <= K, else the warp of frame t-1 by the predicted flow, unrefined; the flow likewise. CAR feeds back its own output,
clamped to [0,1]; the loss sees the unclamped one.

What is computed ahead of the recurrence, exactly (the literal step-by-step equations are the tests' oracle): all audio
vectors and every prefix's condensed memory (the whole sound track is given), E_m on the K observed frames in one call,
the context features once per clip; D_m runs only where its flow is used.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from avfast.errors import InputError
from avfast.files.atomic import replacing
from avfast.kernels import backward_warp
from avfast.kernels.winograd.strided import Kept
from avfast.models.networks import (
    FEATURES,
    AudioEncoder,
    ContextEncoder,
    MotionDecoder,
    MotionEncoder,
    UNet,
    batch_norms,
)
from avfast.models.settings import ModelConfig
from avfast.modules import Condense, ContextModulation, ConvLSTM, Recall

FORMAT = 2
"""Version of config.json."""


class Rollout(NamedTuple):
    """Predictions for frames K+1..T: frames (B,P,C,H,W) and backward flow (B,P,2,H,W) in pixels, P = T-K."""

    frames: Tensor
    flow: Tensor


class Motion(NamedTuple):
    """What MME predicts: flow (B,P,2,H,W), the unrefined warped frames (B,P,C,H,W), and E_a's vectors (B,T,D) before
    Condense (None for the variant `v`)."""

    flow: Tensor
    frames: Tensor
    audio: Tensor | None


class MME(nn.Module):
    """Multimodal motion estimation (section 3.1).

    Variants (Table 4): `v` hears nothing; `v+recall` recalls from all audio vectors so far by attention; `mme` recalls
    from the one condensed vector, which adds a projection of it at every position.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.variant = config.motion
        self.encoder = MotionEncoder(config.image_channels)
        self.lstm = ConvLSTM(FEATURES, [FEATURES] * config.convlstm_layers)
        self.decoder = MotionDecoder()
        if self.variant != "v":
            self.audio_encoder = AudioEncoder(config.audio_shape)
            self.recall = Recall(FEATURES, single=self.variant == "mme")
        if self.variant == "mme":
            self.condense = Condense(FEATURES)

    def forward(self, frames: Tensor, flow: Tensor, audio: Tensor) -> Motion:
        """frames (B,K,C,H,W) in [0,1], flow (B,K,2,H,W) with flow[:,0] = 0, audio (B,T,1,F,S), T > K >= 1."""
        given, total = frames.shape[1], audio.shape[1]
        vectors = key = value = None
        if self.variant != "v":
            vectors = self.audio_encoder(audio)
            key, value = self.recall.project(self.condense(vectors) if self.variant == "mme" else vectors)

        kept: Kept = {}
        observed = self.encoder(flow, frames, kept)
        image, motion = frames[:, -1], flow[:, -1]
        step = self.lstm.recurrence(observed[:, 0])
        flows, images = [], []
        for t in range(1, total):
            feature = observed[:, t - 1] if t <= given else self.encoder(motion[:, None], image[:, None], kept)[:, 0]
            if value is not None:
                memory = slice(t if self.variant == "mme" else 0, t + 1)
                feature = self.recall(feature, None if key is None else key[:, memory], value[:, memory])
            hidden = step(feature)
            if t >= given:
                motion = self.decoder(hidden, kept)
                image = backward_warp(image, motion)
                flows.append(motion)
                images.append(image)
        return Motion(torch.stack(flows, dim=1), torch.stack(images, dim=1), vectors)


class CAR(nn.Module):
    """Context-aware refinement (section 3.2). Variants (Table 5): `unet`, `unet+context` (no affine), `car`.

    E_m and E_a are MME's, frozen: they are passed in and belong to no parameter list of this module.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.variant = config.refinement
        with_context = self.variant != "unet"
        self.unet = UNet(config.image_channels, config.unet_width, with_context=with_context)
        if with_context:
            self.context_encoder = ContextEncoder(config.image_channels, config.unet_width)
        if self.variant == "car":
            motion_size = FEATURES * (1 if config.motion == "v" else 2)
            self.affine = nn.ModuleList(ContextModulation(motion_size, config.unet_width << i) for i in range(4))

    def forward(self, frame: Tensor, flow: Tensor, audio: Tensor | None, motion_encoder: MotionEncoder) -> Tensor:
        """frame V_K (B,C,H,W), flow F_{K+1}..F_T (B,P,2,H,W), audio vectors of A_K..A_{T-1} (B,P,D) or None -> frames
        K+1..T (B,P,C,H,W), not clamped."""
        contexts = self.context_encoder(frame) if self.variant != "unet" else None
        kept: Kept = {}
        outputs = []
        for t in range(flow.shape[1]):
            vector = None if audio is None else audio[:, t]
            outputs.append(self.step(frame, flow[:, t], vector, contexts, motion_encoder, kept))
            frame = outputs[-1].clamp(0, 1)
        return torch.stack(outputs, dim=1)

    def step(
        self,
        frame: Tensor,
        flow: Tensor,
        audio: Tensor | None,
        contexts: list[Tensor] | None,
        motion_encoder: MotionEncoder,
        kept: Kept | None = None,
    ) -> Tensor:
        """One step: frame V_t (B,C,H,W), flow F_{t+1} (B,2,H,W), vector of A_t (B,D) or None, context features or None
        -> V_{t+1} (B,C,H,W), not clamped. kept: see `strided_conv`."""
        affine = motion = None
        if self.variant == "car":
            affine = self.affine
            motion = motion_encoder(flow[:, None], frame[:, None], kept)[:, 0].mean(dim=(-2, -1))
            if audio is not None:
                motion = torch.cat((motion, audio), dim=1)
        warped = backward_warp(frame, flow)
        return warped + self.unet(warped, contexts, affine, motion)


class AVModel(nn.Module):
    """MME followed by CAR (or by nothing, refinement `none`: the prediction is the warped frame)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.mme = MME(config)
        self.car = None if config.refinement == "none" else CAR(config)

    def check_inputs(self, frames: Tensor, flow: Tensor, audio: Tensor) -> None:
        """Raise ValueError, naming argument and value, unless the three fit each other and the model."""
        if frames.dim() != 5 or frames.shape[2] != self.config.image_channels:
            raise ValueError(
                f"frames has shape {tuple(frames.shape)}, expected (B, K, {self.config.image_channels}, H, W)"
            )
        b, k, _, h, w = frames.shape
        if h % 16 or w % 16 or 0 in (b, k, h, w):
            raise ValueError(
                f"frames has shape {tuple(frames.shape)}, expected H and W to be multiples of 16, none empty"
            )
        if flow.shape != (b, k, 2, h, w):
            raise ValueError(f"flow has shape {tuple(flow.shape)}, expected {(b, k, 2, h, w)}")
        if audio.dim() != 5 or audio.shape[0] != b or tuple(audio.shape[2:]) != (1, *self.config.audio_shape):
            raise ValueError(f"audio has shape {tuple(audio.shape)}, expected {(b, 'T', 1, *self.config.audio_shape)}")
        if audio.shape[1] <= k:
            raise ValueError(f"audio covers T = {audio.shape[1]} frames, expected more than the K = {k} given frames")

    def forward(self, frames: Tensor, flow: Tensor, audio: Tensor) -> Rollout:
        """frames (B,K,C,H,W) in [0,1], flow (B,K,2,H,W), audio (B,T,1,F,S) -> the T-K frames and flows that follow; H
        and W multiples of 16. The frames are not clamped. Raises ValueError on inputs that do not fit."""
        self.check_inputs(frames, flow, audio)
        motion = self.mme(frames, flow, audio)
        return self.refine(frames[:, -1], motion)

    def refine(self, frame: Tensor, motion: Motion) -> Rollout:
        """Render the frames of a predicted motion from the last given frame (B,C,H,W)."""
        if self.car is None:
            return Rollout(motion.frames, motion.flow)
        steps = motion.flow.shape[1]
        audio = None if motion.audio is None else motion.audio[:, -steps - 1 : -1]
        return Rollout(self.car(frame, motion.flow, audio, self.mme.encoder), motion.flow)

    @torch.no_grad()
    def predict(self, frames: Tensor, flow: Tensor, audio: Tensor) -> Rollout:
        """`forward` without gradients, frames clamped to [0,1]. Raises ValueError in training mode, where the clips of
        a batch would change each other's prediction."""
        if batch_norms(self):
            raise ValueError("predict needs evaluation mode: call eval() first")
        frames, flow = self(frames, flow, audio)
        return Rollout(frames.clamp(0, 1), flow)

    def motion_only(self) -> AVModel:
        """A model with refinement `none` that shares this one's MME."""
        with torch.device("meta"):
            model = AVModel(dataclasses.replace(self.config, refinement="none"))
        model.mme = self.mme
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder, each under a temporary name first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps({"format": FORMAT, **dataclasses.asdict(self.config)}, indent=2) + "\n"
        # serialised in memory: safetensors reports a full disk as an error of its own, without the file's name
        for name, content in (("model.safetensors", save(self.state_dict())), ("config.json", config.encode())):
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> AVModel:
        """Load a model in evaluation mode from a folder with config.json and model.safetensors.

        Raises InputError when a file is missing, damaged, or does not belong to the other.
        """
        config, weights = read_pretrained(folder)
        model = cls(config)
        load_weights(model, weights, str(folder))
        return model.to(device).eval()


def read_pretrained(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the weights of a saved model. Raises InputError when they cannot be read."""
    folder = Path(folder)
    try:
        fields = json.loads((folder / "config.json").read_text())
        known = {f.name for f in dataclasses.fields(ModelConfig)}
        if fields.pop("format") != FORMAT or fields.keys() != known:
            raise ValueError(f"unknown settings {sorted(fields.keys() ^ known)}")
        fields["audio_shape"] = tuple(fields["audio_shape"])
        return ModelConfig(**fields), load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} holds no model: {Path(error.filename or 'model.safetensors').name} is missing"
        ) from None
    except Exception as error:
        # json, key and safetensors errors all mean the same to the user: this is not a model of ours, or it is damaged
        raise InputError(f"the model in {folder} cannot be read: {error}") from None


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights strictly. Raises InputError that names what does not fit, and changes nothing then."""
    own = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    theirs = {name: tuple(t.shape) for name, t in weights.items()}
    missing, foreign = sorted(own.keys() - theirs.keys()), sorted(theirs.keys() - own.keys())
    if missing or foreign:
        what = f"lacks {missing[0]}" if missing else f"has {foreign[0]}, which this model does not"
        raise InputError(
            f"{source} is of another variant or stage: it {what} ({len(missing)} missing, {len(foreign)} foreign)"
        )
    for name, shape in own.items():
        if theirs[name] != shape:
            raise InputError(f"{source} is of another model: {name} has shape {theirs[name]}, expected {shape}")
    module.load_state_dict(weights)
