"""Multimodal motion estimation (paper section 3.1): backward flow from frames and sound.

Step t = 1..T-1 reads (F_t, V_t) and the memory of A_1..A_{t+1} and predicts F_{t+1}. Frame t is the given one for
t <= K, else the warp of frame t-1 by the predicted flow, unrefined; the flow likewise.

The three classes are the rows of Table 4. They differ in what a step recalls from the sound. Exact shortcuts (the
literal step-by-step equations are the tests' oracle): all audio vectors and all memories are computed before the
recurrence, because the whole sound track is given; E_m takes the K given frames in one call; D_m runs only where its
flow is used.

Shape legend: B batch, K given frames of T in all, P = T - K, C channels, H W image, h w = H/16 W/16, D = 128 feature
channels, M memory tokens, N frames."""

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
    uses_sound: ClassVar[bool] = False
    """Whether there is an audio encoder."""

    def __init__(self, image_channels: int, audio_shape: tuple[int, int], layers: int) -> None:
        super().__init__()
        self.encoder = MotionEncoder(image_channels)
        self.lstm = ConvLSTM(FEATURES, [FEATURES] * layers)
        self.decoder = MotionDecoder()

    def forward(self, frames: Tensor, flow: Tensor, audio: Tensor, *, every_step: bool = False) -> Motion:
        """frames (B,K,C,H,W) in [0,1], flow (B,K,2,H,W) with flow[:,0] = 0, audio (B,T,1,F,S), T > K >= 1.

        every_step: predict from every given frame, F_2..F_{K+1}, and no further. With the true frames of all steps,
        K = T-1, this is teacher forcing."""
        given, total = frames.shape[1], audio.shape[1]
        vectors, memory = self.encode_sound(audio)
        states: list[State] | None = None
        with shared_weights():
            features = self.encoder(flow, frames)
            hiddens = []
            for t in range(1, given + 1):
                hidden, states = self.advance(features[:, t - 1], states, *self.step_memory(memory, t))
                hiddens.append(hidden)
            if every_step:
                predicted = self.decoder(torch.stack(hiddens, dim=1).flatten(0, 1), given).unflatten(0, (-1, given))
                moved = backward_warp(frames.flatten(0, 1), predicted.flatten(0, 1)).view_as(frames)
                return Motion(predicted, moved, vectors)
            image, motion = self.move(frames[:, -1], hidden)
            images, flows = [image], [motion]
            for t in range(given + 1, total):
                image, motion, states = self.step(image, motion, states, *self.step_memory(memory, t))
                images.append(image)
                flows.append(motion)
        return Motion(torch.stack(flows, dim=1), torch.stack(images, dim=1), vectors)

    def encode_sound(self, audio: Tensor) -> tuple[Tensor | None, Memory]:
        """Sound (B,T,1,F,S) -> E_a's vectors (B,T,D), or None, and the memory of all steps."""
        return None, ()

    def step_memory(self, memory: Memory, t: int) -> Memory:
        """What step t recalls from."""
        return ()

    def recall_step(self, feature: Tensor, *memory: Tensor) -> Tensor:
        """Add to a step's feature (B,D,h,w) what it recalls."""
        return feature

    def advance(self, feature: Tensor, states: list[State] | None, *memory: Tensor) -> tuple[Tensor, list[State]]:
        """E_m's feature of frame t (B,D,h,w) and the states before it -> the top hidden state, and the states after."""
        return self.lstm(self.recall_step(feature, *memory), states)

    def move(self, image: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """V_t (B,C,H,W) and the top hidden state of step t -> V_t warped by the predicted flow, and this flow F_{t+1}
        (B,2,H,W)."""
        flow = self.decoder(hidden)
        return backward_warp(image, flow), flow

    def step(
        self, image: Tensor, flow: Tensor, states: list[State] | None, *memory: Tensor
    ) -> tuple[Tensor, Tensor, list[State]]:
        """Step t: V_t, F_t, the states before it and its memory -> V_t warped, F_{t+1}, the states after it."""
        feature = self.encoder(flow[:, None], image[:, None])[:, 0]
        hidden, states = self.advance(feature, states, *memory)
        return *self.move(image, hidden), states

    # exported graphs grow a memory by new windows, and their loops cannot slice it by the number of a round: what
    # differs from round to round comes as items, tensors with the rounds first

    def extend(self, windows: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, ...]:
        """New sound windows (B,N,1,F,S), keys and values of the P before (B,P,D) -> E_a's vectors of the new ones, what
        of the memory is new, and all keys and values (B,P+N,D)."""
        raise NotImplementedError("a model without sound has no memory")

    def memory_until(self, memory: Memory, t: int) -> Memory:
        """The part of a memory that steps 1..t recall from."""
        return ()

    def loop_items(self, memory: Memory, count: int) -> list[Tensor]:
        """The items of the last `count` steps that a memory serves."""
        return []

    def loop_memory(self, memory: Memory, *items: Tensor) -> Memory:
        """What one round recalls from, for `recall_step`."""
        return ()


class RecallMotion(VisualMotion):
    """Every position recalls from all audio vectors so far, by attention (Table 4, `V+Recall`)."""

    memory_names = ("key", "value")
    uses_sound = True

    def __init__(self, image_channels: int, audio_shape: tuple[int, int], layers: int) -> None:
        super().__init__(image_channels, audio_shape, layers)
        self.audio_encoder = AudioEncoder(audio_shape)
        self.recall = Recall(FEATURES, single=False)

    def encode_sound(self, audio: Tensor) -> tuple[Tensor, Memory]:
        vectors = self.audio_encoder(audio)
        key, value = self.recall.project(vectors)
        assert key is not None
        return vectors, (key, value)

    def step_memory(self, memory: Memory, t: int) -> Memory:
        return self.memory_until(memory, t)

    def recall_step(self, feature: Tensor, *memory: Tensor) -> Tensor:
        if len(memory) == 2:
            return self.recall(feature, *memory)
        # in a loop all tokens are there, and `visible` (M) says which of them count
        key, value, visible = memory
        assert self.recall.query is not None
        query = self.recall.query(feature.to(value.dtype)).flatten(2).mT
        scores = (query @ key.transpose(1, 2)).masked_fill(~visible, float("-inf"))
        return feature + (scores.softmax(dim=-1) @ value).mT.view_as(feature).to(feature.dtype)

    def extend(self, windows: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, ...]:
        vectors, (key, value) = self.encode_sound(windows)
        return vectors, torch.cat((past_key, key), 1), torch.cat((past_value, value), 1)

    def memory_until(self, memory: Memory, t: int) -> Memory:
        key, value = memory
        return key[:, : t + 1], value[:, : t + 1]

    def loop_items(self, memory: Memory, count: int) -> list[Tensor]:
        # the number of the last token that a step sees
        tokens = memory[0].shape[1]
        return [torch.arange(tokens - count, tokens, device=memory[0].device)]

    def loop_memory(self, memory: Memory, *items: Tensor) -> Memory:
        (last,) = items
        return *memory, torch.arange(memory[0].shape[1], device=last.device) <= last


class MME(VisualMotion):
    """Every position recalls the one vector into which Condense turns the sound so far (Table 4, `MME`). The softmax
    over one token is 1, so what is recalled is a projection of that vector, added everywhere."""

    memory_names = ("condensed",)
    uses_sound = True

    def __init__(self, image_channels: int, audio_shape: tuple[int, int], layers: int) -> None:
        super().__init__(image_channels, audio_shape, layers)
        self.audio_encoder = AudioEncoder(audio_shape)
        self.recall = Recall(FEATURES, single=True)
        self.condense = Condense(FEATURES)

    def encode_sound(self, audio: Tensor) -> tuple[Tensor, Memory]:
        vectors = self.audio_encoder(audio)
        _, value = self.recall.project(self.condense(vectors))
        return vectors, (value,)

    def step_memory(self, memory: Memory, t: int) -> Memory:
        (rows,) = memory
        return (rows[:, t],)

    def recall_step(self, feature: Tensor, *memory: Tensor) -> Tensor:
        (row,) = memory
        return self.recall(feature, None, row[:, None]).to(feature.dtype)

    def extend(self, windows: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, ...]:
        vectors = self.audio_encoder(windows)
        # Condense over the new rows alone: those before them are keys and values
        query, key, value = self.condense.qkv(vectors).chunk(3, dim=-1)
        key, value = torch.cat((past_key, key), 1), torch.cat((past_value, value), 1)
        tokens = torch.arange(key.shape[1], device=key.device)
        future = tokens > tokens[past_key.shape[1] :, None]
        weights = (query @ key.mT).masked_fill(future, float("-inf")).softmax(dim=-1)
        _, rows = self.recall.project(vectors + weights @ value)
        return vectors, rows, key, value

    def memory_until(self, memory: Memory, t: int) -> Memory:
        (rows,) = memory
        return (rows[:, : t + 1],)

    def loop_items(self, memory: Memory, count: int) -> list[Tensor]:
        (rows,) = memory
        return [rows[:, rows.shape[1] - count :].transpose(0, 1)]

    def loop_memory(self, memory: Memory, *items: Tensor) -> Memory:
        return items
