"""Multimodal motion estimation (paper section 3.1): backward flow from frames and sound.

Step t = 1..T-1 reads (F_t, V_t) and the memory of A_1..A_{t+1} and predicts F_{t+1}. Frame t is the given one for
t <= K, else the warp of frame t-1 by the predicted flow, unrefined; the flow likewise.

The three classes are the rows of Table 4. They differ in what a step recalls from the sound. Exact shortcuts (the
literal step-by-step equations are the tests' oracle): all audio vectors and all memories are computed before the
recurrence, because the whole sound track is given; E_m takes the K given frames in one call; D_m runs only where its
flow is used.

Shape legend: B batch, K given frames of T in all, P = T - K, C channels, H W image, h w = H/16 W/16, D = 128 feature
channels, M memory tokens, N frames.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from avfast.kernels import backward_warp, shared_weights
from avfast.models.networks import FEATURES, AudioEncoder, MotionDecoder, MotionEncoder
from avfast.modules import Condense, ConvLSTM, Recall, State

Memory = tuple[Tensor, ...]
"""What a step, or several, recall from; empty without sound."""


class Motion(NamedTuple):
    """What the motion stage predicts: flow (B,P,2,H,W), the unrefined warped frames (B,P,C,H,W), and E_a's vectors
    (B,T,D) before Condense, None without sound."""

    flow: Tensor
    frames: Tensor
    audio: Tensor | None


class VisualMotion(nn.Module):
    """Motion from the frames alone, without sound (Table 4, `V`)."""

    memory_names: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors of a step's memory."""
    hears: ClassVar[bool] = False
    """Whether there is an audio encoder."""

    def __init__(self, image_channels: int, audio_shape: tuple[int, int], layers: int) -> None:
        super().__init__()
        self.encoder = MotionEncoder(image_channels)
        self.lstm = ConvLSTM(FEATURES, [FEATURES] * layers)
        self.decoder = MotionDecoder()

    def forward(self, frames: Tensor, flow: Tensor, audio: Tensor) -> Motion:
        """frames (B,K,C,H,W) in [0,1], flow (B,K,2,H,W) with flow[:,0] = 0, audio (B,T,1,F,S), T > K >= 1."""
        given, total = frames.shape[1], audio.shape[1]
        vectors, memory = self.listen(audio)
        states = None
        with shared_weights():
            for feature in self.features(frames, flow, *self.frames_memory(memory, given)).unbind(1):
                hidden, states = self.lstm(feature, states)
            image, motion = self.move(frames[:, -1], hidden)
            images, flows = [image], [motion]
            for t in range(given + 1, total):
                image, motion, states = self.step(image, motion, states, *self.step_memory(memory, t))
                images.append(image)
                flows.append(motion)
        return Motion(torch.stack(flows, dim=1), torch.stack(images, dim=1), vectors)

    def listen(self, audio: Tensor) -> tuple[Tensor | None, Memory]:
        """Sound (B,T,1,F,S) -> E_a's vectors (B,T,D), or None, and the memory of all steps."""
        return None, ()

    def step_memory(self, memory: Memory, t: int) -> Memory:
        """What step t recalls from."""
        return ()

    def frames_memory(self, memory: Memory, count: int) -> Memory:
        """What steps 1..count recall from together, for `features`."""
        return ()

    def recall_step(self, feature: Tensor, *memory: Tensor) -> Tensor:
        """Add to a step's feature (B,D,h,w) what it recalls."""
        return feature

    def recall_frames(self, features: Tensor, *memory: Tensor) -> Tensor:
        """The same for N frames (B,N,D,h,w); the memory ends with that of the last frame."""
        return features

    def features(self, frames: Tensor, flow: Tensor, *memory: Tensor) -> Tensor:
        """What the ConvLSTMs take of N frames (B,N,C,H,W) and their flow (B,N,2,H,W): (B,N,D,h,w)."""
        return self.recall_frames(self.encoder(flow, frames), *memory)

    def move(self, image: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """V_t (B,C,H,W) and the top hidden state of step t -> V_t warped by the predicted flow, and this flow F_{t+1}
        (B,2,H,W)."""
        flow = self.decoder(hidden)
        return backward_warp(image, flow), flow

    def step(
        self, image: Tensor, flow: Tensor, states: list[State] | None, *memory: Tensor
    ) -> tuple[Tensor, Tensor, list[State]]:
        """Step t: V_t, F_t, the states before it and its memory -> V_t warped, F_{t+1}, the states after it."""
        feature = self.recall_step(self.encoder(flow[:, None], image[:, None])[:, 0], *memory)
        hidden, states = self.lstm(feature, states)
        return *self.move(image, hidden), states


class RecallMotion(VisualMotion):
    """Every position recalls from all audio vectors so far, by attention (Table 4, `V+Recall`)."""

    memory_names = ("key", "value")
    hears = True

    def __init__(self, image_channels: int, audio_shape: tuple[int, int], layers: int) -> None:
        super().__init__(image_channels, audio_shape, layers)
        self.audio_encoder = AudioEncoder(audio_shape)
        self.recall = Recall(FEATURES, single=False)

    def listen(self, audio: Tensor) -> tuple[Tensor, Memory]:
        vectors = self.audio_encoder(audio)
        return vectors, self.recall.project(vectors)

    def step_memory(self, memory: Memory, t: int) -> Memory:
        key, value = memory
        return key[:, : t + 1], value[:, : t + 1]

    def frames_memory(self, memory: Memory, count: int) -> Memory:
        return self.step_memory(memory, count)

    def recall_step(self, feature: Tensor, *memory: Tensor) -> Tensor:
        return self.recall(feature, *memory)

    def recall_frames(self, features: Tensor, *memory: Tensor) -> Tensor:
        key, value = memory
        n, m = features.shape[1], key.shape[1]
        tokens = torch.arange(m, device=key.device)
        # the last frame's memory ends with the last token
        visible = tokens <= (torch.arange(n, device=key.device) + (m - n))[:, None]
        return self.recall_visible(features, key, value, visible)

    def recall_visible(self, features: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        """Features (B,N,D,h,w) recall from those of the tokens (B,M,D) that `visible` (N,M) names."""
        b, n, _, h, w = features.shape
        query = self.recall.query(features.flatten(0, 1).to(value.dtype)).unflatten(0, (b, n)).flatten(3).mT
        recalled = masked_attention(query, key[:, None], value[:, None], visible[:, None])
        return features + recalled.mT.unflatten(3, (h, w)).to(features.dtype)


class MME(VisualMotion):
    """Every position recalls the one vector into which Condense turns the sound so far (Table 4, `MME`). The softmax
    over one token is 1, so what is recalled is a projection of that vector, added everywhere."""

    memory_names = ("condensed",)
    hears = True

    def __init__(self, image_channels: int, audio_shape: tuple[int, int], layers: int) -> None:
        super().__init__(image_channels, audio_shape, layers)
        self.audio_encoder = AudioEncoder(audio_shape)
        self.recall = Recall(FEATURES, single=True)
        self.condense = Condense(FEATURES)

    def listen(self, audio: Tensor) -> tuple[Tensor, Memory]:
        vectors = self.audio_encoder(audio)
        _, value = self.recall.project(self.condense(vectors))
        return vectors, (value,)

    def step_memory(self, memory: Memory, t: int) -> Memory:
        (rows,) = memory
        return (rows[:, t],)

    def frames_memory(self, memory: Memory, count: int) -> Memory:
        (rows,) = memory
        return (rows[:, 1 : count + 1],)

    def recall_step(self, feature: Tensor, *memory: Tensor) -> Tensor:
        (row,) = memory
        return self.recall(feature, None, row[:, None]).to(feature.dtype)

    def recall_frames(self, features: Tensor, *memory: Tensor) -> Tensor:
        (rows,) = memory
        return self.recall_step(features.flatten(0, 1), rows.flatten(0, 1)).unflatten(0, features.shape[:2])


def masked_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """softmax(query key^T) value without 1/sqrt(D); a key has no weight where `visible` is False."""
    scores = (query @ key.mT).masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1) @ value
