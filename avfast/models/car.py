"""Context-aware refinement (paper section 3.2): frames from their warp, the last given frame, motion and sound.

Step t = K..T-1 warps V_t by F_{t+1}, reads A_t and renders V_{t+1}. V_t is the given frame for t = K and CAR's own last
output after it, clamped to [0,1]; the loss sees the unclamped one. That is the paper's `chained` rendering.

In `composed` rendering V_K is sampled once, by the flow from frame t+1 back to frame K, and this warp is what the U-Net
refines; V_t is the warp of the step before, unrefined. No step waits for another, so all of them are one batch. How far
the step is from K goes into the affine beside motion and sound: the U-Net cannot see it in a warp that never blurs.

Shape legend: B batch, P predicted frames, C channels, H W image, D = 128 feature channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avfast.kernels import backward_warp, shared_weights
from avfast.models.composition import warp_once
from avfast.models.networks import FEATURES, ContextEncoder, MotionEncoder, UNet
from avfast.modules import ContextModulation

HALF_AGE = 5.0
"""For the number of steps since K the affine of composed rendering reads age / (age + 5): it saturates, so frames
beyond those of training are not far from them."""


class CAR(nn.Module):
    """A U-Net over the warped frame; with context features where there is a context encoder (Table 5, `+ context`), and
    with the motion-conditioned affine of them where there is one (Table 5, `CAR`).

    E_m and E_a are the motion stage's, frozen. E_m and the vectors of E_a are passed in: neither is a submodule."""

    def __init__(
        self, channels: int, width: int, *, context: bool, affine: bool, uses_sound: bool, composed: bool
    ) -> None:
        super().__init__()
        self.unet = UNet(channels, width, with_context=context)
        if context:
            self.context_encoder = ContextEncoder(channels, width)
        if affine:
            size = FEATURES * (2 if uses_sound else 1) + composed
            self.affine = nn.ModuleList(ContextModulation(size, width << i) for i in range(4))
        self.has_context, self.has_affine, self.composed = context, affine, composed
        self.uses_sound = affine and uses_sound
        """Whether a step takes E_a's vector of its frame."""

    def forward(self, frame: Tensor, flow: Tensor, audio: Tensor | None, motion_encoder: MotionEncoder) -> Tensor:
        """frame V_K (B,C,H,W), flow F_{K+1}..F_T (B,P,2,H,W), audio vectors of A_K..A_{T-1} (B,P,D) or None -> frames
        K+1..T (B,P,C,H,W), not clamped."""
        if self.composed:
            return self._all_steps(frame, flow, audio, motion_encoder)
        contexts = self.contexts(frame)
        outputs = []
        with shared_weights():
            for t in range(flow.shape[1]):
                vector = None if audio is None else audio[:, t]
                outputs.append(self.step(frame, flow[:, t], vector, contexts, motion_encoder))
                frame = outputs[-1].clamp(0, 1)
        return torch.stack(outputs, dim=1)

    def _all_steps(self, frame: Tensor, flow: Tensor, audio: Tensor | None, motion_encoder: MotionEncoder) -> Tensor:
        batch, steps = flow.shape[:2]
        warped = warp_once(frame, flow)
        before = torch.cat((frame[:, None], warped[:, :-1]), dim=1)
        contexts = self.contexts(frame)
        if contexts is not None:
            contexts = [z.repeat_interleave(steps, dim=0) for z in contexts]
        age = torch.arange(1, steps + 1, device=flow.device, dtype=flow.dtype).repeat(batch)
        warped, before, flow = (x.flatten(0, 1) for x in (warped, before, flow))
        vectors = None if audio is None else audio.flatten(0, 1)
        frames = self.refine(warped, before, flow, vectors, contexts, motion_encoder, age)
        return frames.unflatten(0, (batch, steps))

    def contexts(self, frame: Tensor) -> list[Tensor] | None:
        """The context features of V_K (B,C,H,W), computed once per clip; None without a context encoder."""
        return self.context_encoder(frame) if self.has_context else None

    def step(
        self,
        frame: Tensor,
        flow: Tensor,
        audio: Tensor | None,
        contexts: list[Tensor] | None,
        motion_encoder: MotionEncoder,
    ) -> Tensor:
        """One step of chained rendering: V_t (B,C,H,W), F_{t+1} (B,2,H,W), vector of A_t (B,D) or None, context
        features or None -> V_{t+1} (B,C,H,W), not clamped."""
        return self.refine(backward_warp(frame, flow), frame, flow, audio, contexts, motion_encoder)

    def refine(
        self,
        warped: Tensor,
        frame: Tensor,
        flow: Tensor,
        audio: Tensor | None,
        contexts: list[Tensor] | None,
        motion_encoder: MotionEncoder,
        age: Tensor | None = None,
    ) -> Tensor:
        """The warp that shows frame t+1, then as in `step`; in composed rendering `age`, the steps t+1-K (B), too."""
        affine = motion = None
        if self.has_affine:
            affine = self.affine
            parts = [motion_encoder(flow[:, None], frame[:, None])[:, 0].mean(dim=(-2, -1))]
            if self.uses_sound:
                assert audio is not None
                parts.append(audio)
            if age is not None:
                parts.append((age / (age + HALF_AGE))[:, None])
            motion = torch.cat(parts, dim=1)
        return warped + self.unet(warped, contexts, affine, motion)
